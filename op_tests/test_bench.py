"""Do the benches compute, print, write and draw what they measured? No test looks at a time itself."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import _checkout  # noqa: F401
import bench_fused_topk_moe_sorting as bench
import bench_host
import bench_report
import bench_timing
import pytest
import torch
from bench_timing import Timing

from aiter import reference

NAMES = ("E", "K", "D")
FULL = Timing(2.0, 0.25, strict_us=3.0, cold_us=4.0, host_us=8.0)
RECORDS: list[bench_report.Entry] = [
    ((128, 4, 64), 1, {"fused": FULL, "oneshot": Timing(5.0, 0.1), "PyTorch": Timing(50.0, 0.0)}),
    ((128, 4, 64), 64, {"fused": None, "oneshot": Timing(6.0, 0.1), "PyTorch": Timing(3.0, 0.5)}),
]


def test_slopes_leave_out_what_every_run_costs() -> None:
    """Runs of 20 and 60 calls of 3 us each, with a start of 100 us and one late replay."""
    low = [100 + 20 * 3.0, 100 + 20 * 3.0, 170 + 20 * 3.0]
    high = [100 + 60 * 3.0, 100 + 60 * 3.0, 130 + 60 * 3.0]
    assert bench_timing.slopes(low, high, 40) == [3.0, 3.0, 2.0]
    assert bench_timing.summary(bench_timing.slopes(low, high, 40)).us == 3.0
    with pytest.raises(ValueError, match="zip"):
        bench_timing.slopes(low, high[:2], 40)


def test_summary() -> None:
    assert bench_timing.summary([1.0, 2.0, 3.0, 4.0, 100.0]).us == 3.0
    assert bench_timing.summary([2.0] * 8) == Timing(2.0, 0.0)
    assert bench_timing.summary([1.0, 2.0, 3.0]).spread == 1.0


@pytest.mark.parametrize(
    ("replays", "round_us", "expected"),
    [(60, 200.0, 60), (60, 2.5e4, 20), (60, 5e5, 10), (60, 5e6, 10), (5, 5e6, 5)],
)
def test_slow_calls_are_replayed_less(replays: int, round_us: float, expected: int) -> None:
    assert bench_timing.affordable(replays, round_us) == expected


def test_every_clock_of_the_cpu_counts_calls() -> None:
    calls: list[int] = []
    bench_timing.cpu_us(lambda: calls.append(1), seconds=0.0)
    assert len(calls) == 1 + 7
    calls.clear()
    bench_timing.host_us(lambda: calls.append(1), torch.device("cpu"), count=5)
    assert len(calls) % 5 == 1


def test_tables() -> None:
    text = bench_report.tables(NAMES, RECORDS)
    strict, device, cold, host = text.split("\n\n")
    assert device.startswith("overlapping clock")
    first, second = device.splitlines()[3:]
    assert first.split() == ["128", "4", "64", "1", "2.00", "5.00", "50.00", "25%", "0.40", "x"]
    assert second.split() == ["128", "4", "64", "64", "-", "6.00", "3.00", "50%", "-"]
    assert strict.startswith("strict clock") and " 3.00 " in strict
    assert cold.startswith("device time with a cold L2") and " 4.00 " in cold
    assert host.startswith("host time") and " 8.00 " in host
    plain = bench_report.tables(NAMES, RECORDS[1:])
    assert all(word not in plain for word in ("clock", "cold", "host"))


def test_csv_rows_match_their_header() -> None:
    header = bench_report.csv_header(NAMES, RECORDS[0][2])
    first, second = (dict(zip(header, bench_report.csv_row(r, 0.5), strict=True)) for r in RECORDS)
    assert first["M"] == 1 and first["fused strict_us"] == 3.0
    assert first["fused cold_us"] == 4.0 and first["fused host_us"] == 8.0
    assert first["oneshot us"] == 5.0 and first["oneshot cold_us"] == ""
    assert second["fused us"] == "" and second["PyTorch spread"] == 0.5


def test_csv_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(bench_report.csv_header(NAMES, RECORDS[0][2]))
        writer.writerows(bench_report.csv_row(record, 0.5) for record in RECORDS)
    assert bench_report.read_csv(NAMES, path) == (RECORDS, 0.5)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for floor in (None, 1.5):
        path = tmp_path / f"{floor}.png"
        bench_report.plot(path, NAMES, RECORDS, "a title", floor)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_bench_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.csv"
    arguments = ["--device", "cpu", "--tokens", "1,3", "--shape", "8,2", "--csv", str(path)]

    def measure(
        options: argparse.Namespace, shape: tuple[int, ...], tokens: int
    ) -> bench_report.Record:
        assert [len(x) for x in bench_report.logits(options, tokens, shape[0])] == [tokens] * 4
        return {"ours": Timing(float(tokens), 0.0), "theirs": None}

    options = bench_report.parser("A bench.").parse_args(arguments)
    bench_report.run(options, "planted", ("E", "K"), ("99,9",), measure)
    printed = capsys.readouterr().out
    assert "planted, bf16 logits" in printed and "not a GPU" in printed
    rows = list(csv.DictReader(path.open()))
    assert [(row["E"], row["M"], row["ours us"], row["theirs us"]) for row in rows] == [
        ("8", "1", "1.0", ""),
        ("8", "3", "3.0", ""),
    ]


def test_every_clock_of_a_gpu_comes_to_an_end() -> None:
    """Graphs are captured and replayed; what the clocks show is for people to judge."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = torch.zeros(1 << 16, device=device)
    timings = [
        bench_timing.floor_us(),
        bench_timing.graph_slope_us([lambda: buffer.add_(1)], 3),
        bench_timing.wall_us(lambda: buffer.add_(1), device),
        bench_timing.call_us([lambda: buffer.add_(1)] * 2, torch.device("cuda"), everything=True),
    ]
    assert all(math.isfinite(timing.us) for timing in timings)
    assert timings[-1].strict_us is not None and timings[-1].cold_us is not None
    assert (timings[-1].host_us or 0.0) > 0.0


def test_the_fused_bench_measures() -> None:
    """One shape of the fused bench, on the GPU where there is one."""
    options = bench.make_parser().parse_args(["--no-compile"])
    options.device = bench_report.current_device()
    record = bench.measure(options, (8, 2, 4), 3)
    assert list(record) == ["fused", "oneshot", "multiphase", "PyTorch"]
    assert all(timing is not None and math.isfinite(timing.us) for timing in record.values())


def test_the_fused_bench_measures_clusters() -> None:
    """On the CPU, whose execution layer has clusters."""
    options = bench.make_parser().parse_args(["--device", "cpu", "--clusters", "1,4"])
    options.device = torch.device("cpu")
    record = bench.measure(options, (8, 2, 4), 3)
    assert list(record) == ["fused, 1", "fused, 4"]
    assert all(timing is not None and math.isfinite(timing.us) for timing in record.values())


def test_the_pieces_of_host_time() -> None:
    """Every piece is timed, and the call is whole again afterwards."""
    logits = torch.randn(1, 8, dtype=torch.bfloat16)
    rows = bench_host.measure(logits, (8, 2, 4), rounds=2)
    assert len({row.piece for row in rows}) == len(rows)
    assert all(len(row.rounds_us) == 2 and min(row.rounds_us) > 0 for row in rows)
    assert {row.includes for row in rows} == {"host", "host and the kernel on the CPU"}
    bench_host.check(logits, (8, 2, 4))


def test_contestants_do_the_same_work() -> None:
    """Every contestant passes the check, and the check notices each wrong output of ours."""
    shape = (16, 2, 8)
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = reference.topk_softmax_sorting(logits, 2, 16, 8, torch.bfloat16)
    found = bench.contestants(shape, 5, torch.device("cpu"), compiled=False)
    assert list(found) == ["fused", "oneshot", "multiphase", "PyTorch"]
    for name, run in found.items():
        assert run is not None
        bench.check(name, run(logits), expected)
    for index in range(5):
        wrong = [buffer.clone() for buffer in expected]
        wrong[index].view(-1)[0] += 1
        with pytest.raises((RuntimeError, AssertionError)):
            bench.check("fused", tuple(wrong), expected)
    too_many = bench.contestants(shape, 10**6, torch.device("cpu"), compiled=False)
    assert too_many["fused"] is None and too_many["oneshot"] is not None
