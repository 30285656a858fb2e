"""Does `python -m aiter tune` measure, keep and use what it says, and nobody else's?

The clock is replaced where times matter, so that no test depends on how fast the machine is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import _checkout  # noqa: F401
import pytest
import torch
from targets import Target

from aiter import fused_moe
from aiter.cli import explain, tune, tune_router
from aiter.jit import CacheError, EnvError, envs
from aiter.ops.device import current_device
from aiter.routing import dispatch, tuned
from aiter.routing import known as remembered
from aiter.routing.basis import basis_of
from aiter.routing.dispatch import Crossover, RouterCrossover

CPU = torch.device("cpu")
SHAPE = (16, 2, 8)
ROW = Crossover(*SHAPE, 4, 6, "cpu wave64", "2026-11-23", "a command")
LOGITS = torch.zeros(5, SHAPE[0])
ROUTER_SHAPE = (24, 16, 2)
ROUTER_ROW = RouterCrossover(*ROUTER_SHAPE, 4, "cpu wave64", "2026-11-27", "a command")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own for the tuned file, the modules in use, and a fresh memory."""
    monkeypatch.setattr(tuned, "builds_of", lambda device, modules: dict.fromkeys(modules, "a/b"))
    monkeypatch.setattr(
        tuned, "path_of", lambda device, ending="": tmp_path / tuned.FOLDER / f"cpu{ending}.json"
    )
    monkeypatch.delenv("AITER_DISPATCH", raising=False)
    remembered.forget()
    yield tmp_path
    remembered.forget()


def path_of(tokens: int) -> str | None:
    """The path of an actual call."""
    logits = LOGITS[:1].expand(tokens, -1)
    fused_moe.topk_softmax_sorting(logits, SHAPE[1], SHAPE[0], SHAPE[2], torch.float32)
    return fused_moe.last_path()


def router_path_of(tokens: int, width: int = ROUTER_SHAPE[0]) -> str | None:
    """The path of an actual call from hidden states: "fused" where the product is made first."""
    hidden, weight = torch.zeros(tokens, width), torch.zeros(SHAPE[0], width)
    fused_moe.router_topk_sorting(hidden, weight, SHAPE[1], SHAPE[0], SHAPE[2], torch.float32)
    return fused_moe.last_path()


def planted_clock(fused_until: int, oneshot_until: int) -> tune.Clock:
    """Times that cross where the arguments say."""

    def clock(shape: tune.Shape, m: int, paths: Sequence[dispatch.Path]) -> dict[str, float]:
        times = {
            "fused": 1.0 if m <= fused_until else 5.0,
            "oneshot": 2.0 if m <= oneshot_until else 4.0,
            "multiphase": 3.0,
        }
        return {path: times[path] for path in paths}

    return clock


def test_nothing_kept(cache: Path) -> None:
    assert tuned.find(CPU, tuned.LOGITS) == tuned.Found(tuned.path_of(CPU))
    assert "not measured" in basis_of(CPU).origin
    assert path_of(5) == "fused"


def test_kept_rows_decide_at_once_and_later(cache: Path) -> None:
    assert path_of(5) == "fused"
    path = tuned.keep(CPU, [tuned.Measured(ROW, [[1, 1.0, 2.0, 3.0]])], tuned.LOGITS)
    assert path.stat().st_mode & 0o77 == 0 and path.is_relative_to(cache)
    assert path_of(5) == "fused", "a kept plan is not made again by itself"
    remembered.forget()
    assert [path_of(tokens) for tokens in (4, 5, 6, 7)] == [
        "fused", "oneshot", "oneshot", "multiphase",
    ]  # fmt: skip
    ids = torch.zeros(7, 2, dtype=torch.int32) + torch.arange(2, dtype=torch.int32)
    fused_moe.moe_sorting(ids, ids.float(), 16, 8, torch.float32)
    assert fused_moe.last_path() == "multiphase"


def test_the_file_is_not_read_per_call(cache: Path) -> None:
    path = tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    assert path_of(5) == "oneshot"
    path.write_text("no longer what it was")
    assert path_of(5) == "oneshot" and path_of(3) == "fused"


def test_other_shapes_stay(cache: Path) -> None:
    other = Crossover(128, 4, 2880, 9, 9, *("cpu wave64", "2026-11-23", "a command"))
    again = Crossover(*SHAPE, 1, 2, "cpu wave64", "2026-11-24", "a later command")
    for row in (ROW, other, again):
        tuned.keep(CPU, [tuned.Measured(row)], tuned.LOGITS)
    assert set(tuned.find(CPU, tuned.LOGITS).rows) == {again, other}


@pytest.mark.parametrize("build", ["a/c", ""])
def test_another_build_counts_for_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, build: str
) -> None:
    tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    rebuilt = {**dict.fromkeys(tuned.MODULES, "a/b"), tuned.MODULES[1]: build}
    monkeypatch.setattr(tuned, "builds_of", lambda device, modules: rebuilt)
    found = tuned.find(CPU, tuned.LOGITS)
    assert found.rows == () and tuned.MODULES[1] in found.reason
    assert path_of(5) == "fused"
    assert "tune" in basis_of(CPU).origin
    tuned.keep(CPU, [], tuned.LOGITS)
    rows = tuned.find(CPU, tuned.LOGITS).rows
    assert rows == (), "a stale row must not be kept under the new builds"


def test_another_device_counts_for_nothing(cache: Path) -> None:
    path = tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    path.write_text(path.read_text().replace(f'"{tuned.device_name(CPU)}"', '"another"'))
    found = tuned.find(CPU, tuned.LOGITS)
    assert found.rows == () and "another" in found.reason


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"num_experts": 16', '"num_experts": 0'),
        lambda text: text.replace('"fused_tokens": 4', '"fused_tokens": "4"'),
        lambda text: text.replace('"oneshot_tokens"', '"two_shots"'),
    ],
)
def test_a_damaged_file_is_reported(
    cache: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="aiter")
    path = tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    found = tuned.find(CPU, tuned.LOGITS)
    assert found.rows == () and "expected what `python -m aiter tune` writes" in found.reason
    assert "left aside" in caplog.text


@pytest.mark.parametrize("part", ["file", "folder"])
def test_what_others_can_write_is_refused(cache: Path, part: str) -> None:
    path = tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    (path if part == "file" else path.parent).chmod(0o777)
    remembered.forget()
    with pytest.raises(CacheError, match="writable by everyone"):
        path_of(5)


def test_the_environment_comes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    for text, tokens, expected in (
        ("capacity", 5, "fused"),
        ("measured", 5, "oneshot"),
        ("3", 4, "oneshot"),
        ("3", 3, "fused"),
        ("0", 1, "oneshot"),
    ):
        monkeypatch.setenv("AITER_DISPATCH", text)
        remembered.forget()
        assert path_of(tokens) == expected, text
    monkeypatch.setenv("AITER_DISPATCH", "sometimes")
    remembered.forget()
    with pytest.raises(EnvError, match="AITER_DISPATCH: expected measured, capacity or"):
        path_of(1)


@pytest.mark.parametrize(
    ("fused_until", "oneshot_until", "expected"),
    [(8, 16, (8, 16)), (99, 99, (50, 64)), (0, 0, (0, 0))],
)
def test_crossovers(fused_until: int, oneshot_until: int, expected: tuple[int, int]) -> None:
    """A fused launch that is never beaten is taken up to its capacity."""
    grid = tune.token_grid(50, 100)
    assert grid == [1, 2, 4, 8, 16, 32, 50, 64, 128]
    times = tune.measure(SHAPE, grid, 50, planted_clock(fused_until, oneshot_until))
    assert all(("fused" in by_path) == (m <= 50) for m, by_path in times.items())
    row = tune.crossover(SHAPE, times, 50, ("here", "2026-11-23", "a command"))
    assert (row.fused_tokens, row.oneshot_tokens) == (expected if oneshot_until != 99 else (50, 64))
    assert tune.times_as_rows(times)[-1] == [128, None, *list(times[128].values())]


def test_tune_prints_keeps_and_explain_tells(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "device_clock", lambda *_: planted_clock(2, 8))
    arguments = ["--device", "cpu", "--shape", "16,2,8", "--tokens", "1,2,4,8,16"]
    assert tune.main([*arguments, "--dry-run"]) == 0
    assert not tuned.path_of(CPU).exists() and path_of(5) == "fused"
    assert tune.main([*arguments, "--rows", "--dry-run"]) == 0
    assert (
        "Crossover(num_experts=16, topk=2, model_dim=8, fused_tokens=2" in capsys.readouterr().out
    )
    assert tune.main(arguments) == 0
    printed = capsys.readouterr().out
    assert str(tuned.path_of(CPU)) in printed and "multiphase" in printed
    assert path_of(2) == "fused" and path_of(3) == "oneshot" and path_of(9) == "multiphase"
    kept = json.loads(tuned.path_of(CPU).read_text())["measured"][0]
    assert kept["command"] == f"python -m aiter tune {' '.join(arguments)}"
    assert kept["times"][0] == [1, 1.0, 2.0, 3.0] and len(kept["times"]) == 5
    shape = ["--tokens", "5", "--experts", "16", "--topk", "2", "--model-dim", "8"]
    assert explain.main([*shape, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert str(tuned.path_of(CPU)) in printed and "aiter tune" in printed and "oneshot" in printed
    assert explain.main(["--table", "--device", "cpu"]) == 0
    assert str(tuned.path_of(CPU)) in capsys.readouterr().out


def test_the_clock_of_a_device_times_every_path(target: Target) -> None:
    clock = tune.device_clock(current_device(target.device), torch.bfloat16, 2)
    for paths in (tune.PATHS, tune.PATHS[1:]):
        with target.active():
            times = clock(SHAPE, 3, paths)
        assert list(times) == list(paths) and all(us > 0 for us in times.values())


def test_builds_name_what_is_in_use() -> None:
    path_of(5)
    builds = tuned.builds_of(CPU, tuned.MODULES)
    assert set(builds) == set(tuned.MODULES)
    assert builds[tuned.MODULES[0]].count("/") == 1
    assert tuned.path_of(CPU).parent == envs.cache_dir() / ".tuned"


def test_a_shape_that_no_chain_sorts(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", "5000,2,8", "--tokens", "1"]
    assert tune.main(arguments) == 1
    assert "error: 5000,2,8: num_experts: expected" in capsys.readouterr().err
    assert not tuned.path_of(CPU).exists()


@pytest.mark.parametrize("text", ["1,2", "0,0,1", "2,3,4", "a,b,c"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--shape", text])


def test_rows_from_hidden_states_decide(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearer row speaks, measured here or built in; the one from here of two as near."""
    built_in = (RouterCrossover(24, 16, 2, 9, *("a table",) * 3),
                RouterCrossover(96, 16, 2, 2, *("a table",) * 3))  # fmt: skip
    assert router_path_of(5) == "router", "nothing is known"
    monkeypatch.setattr(dispatch, "router_rows_of", lambda arch: built_in)
    tuned.keep(CPU, [tuned.Measured(ROUTER_ROW, [[1, 1.0, 2.0]])], tuned.ROUTER)
    remembered.forget()
    assert [router_path_of(tokens) for tokens in (4, 5)] == ["router", "fused"]
    assert [router_path_of(tokens, 90) for tokens in (2, 3)] == ["router", "fused"]
    basis = basis_of(CPU)
    assert basis.router_origin(ROUTER_ROW) == str(tuned.path_of(CPU, "-router"))
    assert basis.router_origin(built_in[1]) == "the built-in table"
    assert basis.router_origin(None) == "the built-in table: not measured"
    monkeypatch.setenv("AITER_DISPATCH", "capacity")
    remembered.forget()
    assert router_path_of(5) == "router"
    assert basis_of(CPU).router_origin(None) == "AITER_DISPATCH=capacity"


def test_each_kind_keeps_to_its_own_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    before = logits.read_bytes()
    wider = RouterCrossover(48, 16, 2, 64, "cpu wave64", "2026-11-27", "a command")
    again = RouterCrossover(*ROUTER_SHAPE, 0, "cpu wave64", "2026-11-28", "a later command")
    for row in (ROUTER_ROW, wider, again):
        router = tuned.keep(CPU, [tuned.Measured(row)], tuned.ROUTER)
    assert router != logits and logits.read_bytes() == before
    assert tuned.find(CPU, tuned.ROUTER).rows == (again, wider)
    kept = router.read_bytes()
    tuned.keep(CPU, [tuned.Measured(ROW)], tuned.LOGITS)
    assert router.read_bytes() == kept
    module = "module_fused_router_sorting"
    monkeypatch.setattr(
        tuned, "builds_of",
        lambda device, modules: {name: "a/c" if name == module else "a/b" for name in modules},
    )  # fmt: skip
    remembered.forget()
    assert tuned.find(CPU, tuned.LOGITS).rows == (ROW,) and path_of(5) == "oneshot"
    assert router_path_of(5) == "router"
    origin = basis_of(CPU).router_origin(None)
    assert (
        f"(tuned: {module} is not the build that was measured; run `python -m aiter tune" in origin
    )


@pytest.mark.parametrize(
    ("old", "new"), [('"width": 24', '"width": 0'), ('"fused_tokens": 4', '"fused_tokens": true')]
)
def test_a_damaged_router_file_is_reported(
    cache: Path, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="aiter")
    path = tuned.keep(CPU, [tuned.Measured(ROUTER_ROW)], tuned.ROUTER)
    path.write_text(path.read_text().replace(old, new))
    found = tuned.find(CPU, tuned.ROUTER)
    assert found.rows == () and "expected what `python -m aiter tune --router" in found.reason
    assert "left aside" in caplog.text and router_path_of(5) == "router"


def test_tune_router_prints_keeps_and_explain_tells(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        tune_router, "device_clock", lambda *_: lambda shape, m: (1.0 if m <= 2 else 5.0, 3.0)
    )
    arguments = ["--device", "cpu", "--router", "24,16,2,48,16,2", "--router=96,16,2"]
    few = [*arguments, "--tokens", "8,4,2,1"]
    assert tune.main([*few, "--dry-run"]) == 0
    path = tuned.path_of(CPU, "-router")
    assert not path.exists() and router_path_of(5) == "router"
    capsys.readouterr()
    assert tune.main(few) == 0
    printed = capsys.readouterr().out
    assert f"kept in {path}; dispatch_policy 0 goes by {path}" in printed
    assert printed.count("one launch\n") == 6 and printed.count("two launches\n") == 6
    assert router_path_of(2) == "router" and router_path_of(3) == "fused"
    kept = json.loads(path.read_text())["measured"]
    assert [(each["width"], each["fused_tokens"]) for each in kept] == [(24, 2), (48, 2), (96, 2)]
    assert kept[0]["command"] == f"python -m aiter tune {' '.join(few)}"
    assert kept[0]["times"] == [[1, 1.0, 3.0], [2, 1.0, 3.0], [4, 5.0, 3.0], [8, 5.0, 3.0]]
    shape = ["--tokens", "3", "--experts", "16", "--topk", "2", "--hidden", "24"]
    assert explain.main([*shape, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"{path}: cpu wave64, " in printed and "tune --device cpu --router" in printed
    assert explain.main(["--table", "--device", "cpu"]) == 0
    assert f"from hidden states: decided by {path}" in capsys.readouterr().out
    assert tune.main(arguments) == 0
    assert [row[0] for row in json.loads(path.read_text())["measured"][0]["times"]] == [
        1, 2, 4, 8, 16, 32, 64,
    ]  # fmt: skip


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_routers_clock_times_both_ways(target: Target, with_bias: bool) -> None:
    clock = tune_router.device_clock(current_device(target.device), torch.bfloat16, with_bias, 2)
    with target.active():
        # NOTE: while other processes use the GPU, a difference of two slopes can come out as nothing.
        assert any(all(us > 0 for us in clock(ROUTER_SHAPE, 3)) for _ in range(3))


def test_ways_that_differ_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tune_router.router_product

    def wrong(*arguments: torch.Tensor, **options: torch.Tensor | None) -> None:
        right(*arguments, **options)
        arguments[2][0, 0] += 1

    monkeypatch.setattr(tune_router, "router_product", wrong)
    clock = tune_router.device_clock(CPU, torch.float32, False, 2)
    with pytest.raises(RuntimeError, match="M=3 D'=24 E=16 K=2: one launch gives other logits"):
        clock(ROUTER_SHAPE, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--router", "8,20000,2"], "error: 8,20000,2: --tokens: expected one of at most 0"),
        (["--router", "8,70000,2"], "error: 8,70000,2: num_experts: expected"),
    ],
)
def test_a_router_that_no_launch_takes(
    cache: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(["--device", "cpu", "--tokens", "1", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not tuned.path_of(CPU, "-router").exists()
