"""Does policy 0 take the path that the timing model finds the fastest, from times that are today's?"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import _checkout  # noqa: F401
import pytest

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

import crossovers  # noqa: E402
from crossovers import (  # noqa: E402
    ARCHS,
    FAIR,
    MODELLED_SHAPES,
    MOST_TOKENS,
    PATHS,
    SURE,
    Cells,
    Columns,
    Crossing,
    Table,
    crossover,
    last_crossover,
    looked_at,
)
from model import DTYPES, Routed, capacity, launches, total_us  # noqa: E402

from aiter.routing import dispatch  # noqa: E402

STALE = 1.05
CELLS = [(arch, shape) for arch in ARCHS for shape in MODELLED_SHAPES]
IDS = [f"{arch}-{shape[0]}-{shape[1]}" for arch, shape in CELLS]


@cache
def table() -> Table:
    return Table.read()


def kept_cells(arch: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Cells:
    """Those of the table; asking for a time that is not kept fails."""

    def refuse(self: Cells, column: str, tokens: int) -> float:
        raise AssertionError(f"{arch} {shape}, {column}, M = {tokens}: expected a kept time")

    monkeypatch.setattr(Cells, "_modelled", refuse)
    return table().cells(arch, *shape)


def losses(cells: Cells, dtype: str, row: dispatch.Crossover) -> list[str]:
    """Where the path that dispatch takes by `row` may be slower than another, as sentences."""
    found = []
    for tokens in looked_at(Crossing(row.fused_tokens, row.oneshot_tokens)):
        problem = dispatch.Problem(tokens, *cells.shape, 4096, logits=dtype)
        choice = dispatch.choose(problem, cells.capacity, (), modelled=(row,))
        assert (choice.rule, choice.row) == ("modelled", row)
        slowest = cells.known(choice.path, dtype, tokens).high
        for path in PATHS:
            low = cells.known(path, dtype, tokens).low
            if path != choice.path and slowest > FAIR * low:
                found.append(f"{dtype}, M = {tokens}: {choice.path} {slowest} us, {path} {low} us")
    return found


@pytest.mark.parametrize(("arch", "shape"), CELLS, ids=IDS)
def test_policy_0_takes_the_faster_path(
    arch: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At powers of two up to 4096 and on both sides of each crossover, for every dtype."""
    cells = kept_cells(arch, shape, monkeypatch)
    for dtype in DTYPES:
        rows = dispatch.modelled_of(arch)[dtype]
        row = dispatch.nearest(rows, dispatch.Problem(1, *shape, 0), 0.0)
        assert row is not None
        assert losses(cells, dtype, row) == []


@pytest.mark.parametrize("changed", [{"fused_tokens": 128}, {"oneshot_tokens": 1024}])
def test_a_wrong_row_is_noticed(changed: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cells = kept_cells("gfx942", (896, 16), monkeypatch)
    row = dispatch.nearest(
        dispatch.modelled_of("gfx942")["bf16"], dispatch.Problem(1, 896, 16, 0), 0.0
    )
    assert row is not None and losses(cells, "bf16", row) == []
    assert losses(cells, "bf16", replace(row, **changed)) != []


@pytest.mark.parametrize(("arch", "shape"), CELLS, ids=IDS)
def test_columns_grow_with_tokens(arch: str, shape: tuple[int, int]) -> None:
    """As bounds of what is not modelled assume."""
    for column, times in table().cells(arch, *shape).columns.items():
        largest = 0.0
        for tokens, time in sorted(times.items()):
            assert time * SURE[column.partition(" ")[0]] >= largest, (column, tokens)
            largest = max(largest, time)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
@pytest.mark.parametrize(("shape", "dtype"), [((128, 4), "bf16"), ((896, 16), "f32")])
def test_kept_times_are_todays(arch: str, shape: tuple[int, int], dtype: str) -> None:
    """Whoever changes a kernel runs `python op_tests/rocm/write_model.py`."""
    cells = table().cells(arch, *shape)
    columns = (f"fused {dtype}", f"topk {dtype}", f"counting {dtype}", "oneshot", "multiphase")
    for column in columns:
        tokens = next(m for m in sorted(cells.columns[column], reverse=True) if m <= 64)
        kept, now = cells.columns[column][tokens], cells._modelled(column, tokens)
        assert 1 / STALE < now / kept < STALE, (column, tokens, kept, now)


def test_dispatch_knows_every_shape() -> None:
    for arch in ARCHS:
        found = dispatch.modelled_of(arch)
        assert set(found) == set(DTYPES)
        for rows in found.values():
            assert [(row.num_experts, row.topk) for row in rows] == list(MODELLED_SHAPES)
            assert all(arch in row.source and row.date and row.command for row in rows)


@pytest.mark.parametrize("edge", [0, 1, 2, 3, 7, 100, 127, 128, 129, 999, 1000])
@pytest.mark.parametrize("hint", [1, 2, 99, 100, 128, 1000])
def test_a_crossover_is_found_from_any_hint(edge: int, hint: int) -> None:
    asked: list[int] = []

    def lead(tokens: int) -> float:
        asked.append(tokens)
        return 1.0 if tokens <= edge else -1.0

    assert crossover(lead, 1000, hint) == edge
    assert all(1 <= tokens <= 1000 for tokens in asked)
    assert len(asked) <= 2 + 2 * math.ceil(math.log2(1000)), asked


def test_a_crossover_among_equals_is_close_enough() -> None:
    found = crossover(lambda tokens: (700 - tokens) / 7000, 4096, 1)
    assert abs(700 - found) <= 105


def test_a_lead_that_comes_back_is_found() -> None:
    """Ahead up to 32, even up to 39, ahead again up to 200."""

    def lead(tokens: int) -> float:
        if tokens > 200:
            return -1.0
        return 0.0 if 32 < tokens < 40 else 1.0

    assert crossover(lead, 1000, 32) == 33
    assert last_crossover(lead, 1000, 32) == 200
    assert last_crossover(lambda tokens: 1.0, 1000, 32) == 1000


class Planted(Cells):
    """Cells with made-up times: fused M/10, top-k 1, oneshot M/50 + 1, multi-phase M/500 + 4."""

    def __init__(self) -> None:
        super().__init__("gfx942", 128, 4, {}, [])
        self.asked: list[tuple[str, int]] = []

    def _modelled(self, column: str, tokens: int) -> float:
        self.asked.append((column, tokens))
        slope = {"fused": 0.1, "oneshot": 0.02, "multiphase": 0.002, "topk": 0.0, "counting": 0.0}
        name = column.partition(" ")[0]
        return slope[name] * tokens + (name != "fused") + 3 * (name == "multiphase")


def test_planted_crossovers() -> None:
    """Fused and chain: M/10 = 3.5 + M/50; the sorts: 3.5 + M/50 = 6.5 + M/500."""
    cells = Planted()
    found = cells.crossing("bf16", Crossing())
    assert abs(found.fused_tokens - 43.75) < 1
    assert abs(found.oneshot_tokens - 166) < 10
    assert not any(column.startswith("fused") and m > 512 for column, m in cells.asked)
    before = len(cells.asked)
    assert cells.crossing("bf16", found) == found
    assert len(cells.asked) == before, "what is known is not modelled again"


def test_bounds_come_from_what_is_kept() -> None:
    columns: Columns = {"fused bf16": {4: 2.0, 64: 8.0}}
    cells = Cells("gfx942", 128, 4, columns, [])
    middle = cells.known("fused", "bf16", 16)
    assert (middle.low, middle.high) == (2.0 / SURE["fused"], 8.0 * SURE["fused"])
    exact = cells.known("fused", "bf16", 64)
    assert exact.low == exact.high == 8.0
    assert cells.known("fused", "bf16", 65).high == math.inf
    beyond = cells.known("fused", "bf16", cells.capacity + 1)
    assert beyond.low == math.inf


def test_a_table_reads_what_it_writes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossovers, "KEPT", tmp_path / "times.json")  # type: ignore[operator]
    assert Table.read().times == {}
    times = {"gfx942": {"128/4": {"oneshot": {1: 3.5, 16: 4.0}}, "8/2": {"fused f32": {2: 1.5}}}}
    Table(times, {"gfx942": {"oneshot": "ab"}}).write()
    again = Table.read()
    assert again.times == times and again.digests == {"gfx942": {"oneshot": "ab"}}


def test_the_same_machine_code_is_modelled_once() -> None:
    times: dict[str, dict[str, Columns]] = {"gfx942": {"128/4": {"oneshot": {1: 3.5}}}}
    digests = {"gfx942": {"oneshot": "ab"}, "gfx950": {"oneshot": "ab"}, "gfx90a": {"oneshot": "c"}}
    twin = Table(times, digests).cells("gfx950", 128, 4)
    assert twin.time("oneshot", 1) == 3.5
    other = Table(times, digests).cells("gfx90a", 128, 4)
    assert not any(other.twins)


def test_what_is_modelled_is_the_sum_of_the_launches() -> None:
    cells = Cells("gfx942", 128, 4, {}, [])
    for path in PATHS:
        cells.model(path, "bf16", 2)
        known = cells.known(path, "bf16", 2)
        assert (
            known.low
            == known.high
            == pytest.approx(total_us(launches("gfx942", Routed(2, 128, 4), path)), abs=0.01)
        )


def test_capacity() -> None:
    assert capacity("gfx942", 128, 4) == 1600
    assert capacity("gfx950", 128, 4) > 2 * 1600
    assert MOST_TOKENS == 4096
