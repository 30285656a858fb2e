"""Is the choice of a path the documented function of shapes, capacity and measurements?"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch

from aiter.cli import explain
from aiter.routing import basis as basis_module
from aiter.routing import dispatch, plan
from aiter.routing.dispatch import CAPACITY, Crossover, Problem

DATE = ("somewhere", "2026-11-23", "a command")
ROW = Crossover(128, 4, 2880, 64, 500, *DATE)


def path(problem: Problem, max_tokens: int, *rows: Crossover, override: int | None = None) -> str:
    return dispatch.choose(problem, max_tokens, rows, override).path


@pytest.mark.parametrize(("policy", "expected"), [(1, "oneshot"), (2, "multiphase")])
def test_a_policy_forces_the_chain(policy: int, expected: str) -> None:
    for tokens in (0, 1, 10**6):
        problem = Problem(tokens, 128, 4, 2880, policy)
        choice = dispatch.choose(problem, 1600, [ROW], 10**6)
        assert (choice.path, choice.rule, choice.row) == (expected, "policy", None)
        assert str(policy) in dispatch.explain(problem, choice, 1600)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, "fused"), (1600, "fused"), (1601, "oneshot"), (2048, "oneshot"), (2049, "multiphase")],
)
def test_capacity_decides_where_nothing_is_measured(tokens: int, expected: str) -> None:
    problem = Problem(tokens, 128, 4, 2880)
    choice = dispatch.choose(problem, 1600, ())
    assert (choice.path, choice.rule) == (expected, "capacity")
    assert "1600" in dispatch.explain(problem, choice, 1600)


@pytest.mark.parametrize(("tokens", "expected"), [(128, "fused"), (129, "oneshot")])
def test_an_estimate_decides_where_nothing_is_measured(tokens: int, expected: str) -> None:
    far = Crossover(1024, 16, 2880, 1, 1, *DATE)
    problem = Problem(tokens, 128, 4, 2880)
    choice = dispatch.choose(problem, 1600, [far], estimate=128)
    assert (choice.path, choice.rule, choice.row) == (expected, "estimated", None)
    assert "nothing is measured" in dispatch.explain(problem, choice, 1600)


def test_an_estimate_gives_way() -> None:
    problem = Problem(1000, 128, 4, 2880)
    assert dispatch.choose(problem, 1600, [ROW], estimate=10**6).rule == "measured"
    assert dispatch.choose(problem, 1600, (), CAPACITY, estimate=1).path == "fused"
    assert dispatch.choose(problem, 1600, (), 999, estimate=10**6).path == "oneshot"
    assert dispatch.choose(problem, 900, (), estimate=10**6).path == "oneshot"


MODELLED = (Crossover(128, 4, 0, 30, 600, *DATE), Crossover(896, 16, 0, 10, 300, *DATE))


def test_the_model_speaks_where_nothing_is_measured() -> None:
    def rule(tokens: int, num_experts: int, topk: int) -> tuple[str, str, Crossover | None]:
        problem = Problem(tokens, num_experts, topk, 2880)
        choice = dispatch.choose(problem, 1600, [ROW], None, 10**6, MODELLED)
        return choice.path, choice.rule, choice.row

    assert rule(64, 128, 4) == ("fused", "measured", ROW)
    assert rule(10, 1024, 16) == ("fused", "modelled", MODELLED[1])
    assert rule(11, 1024, 16) == ("oneshot", "modelled", MODELLED[1])
    assert rule(301, 1024, 16) == ("multiphase", "modelled", MODELLED[1])
    assert rule(1, 4, 1) == ("fused", "modelled", MODELLED[0]), "however far"


def test_the_model_gives_way() -> None:
    problem = Problem(31, 128, 4, 2880, logits="f32")
    choice = dispatch.choose(problem, 1600, (), modelled=MODELLED)
    assert choice.path == "oneshot"
    words = dispatch.explain(problem, choice, 1600)
    assert "modelled for E=128 K=4 and f32 logits: fused up to M = 30" in words
    assert dispatch.choose(problem, 1600, (), CAPACITY, modelled=MODELLED).path == "fused"
    assert dispatch.choose(problem, 30, (), 99, modelled=MODELLED).rule == "override"
    generous = (Crossover(128, 4, 0, 10**6, 10**6, *DATE),)
    assert dispatch.choose(problem, 30, (), modelled=generous).path == "oneshot"


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"),
     ("gfx1030", "gfx1201"), ("gfx1151", "gfx1201"), ("gfx1201", "gfx1201"), ("gfx1250", "gfx1201"),
     ("sm_90", None), ("cpu", None)],
)  # fmt: skip
def test_whose_model_speaks(arch: str, expected: str | None) -> None:
    found = dispatch.modelled_of(arch)
    assert (set(found) == {"f32", "f16", "bf16"}) == (expected is not None)
    for rows in found.values():
        assert {row.source for row in rows} == {f"the timing model, {expected}"}


def test_a_plan_goes_by_the_dtype_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"bf16": MODELLED, "f32": (Crossover(128, 4, 0, 0, 600, *DATE),)}
    basis = basis_module.Basis((), None, None, "planted", rows)
    monkeypatch.setattr(basis_module, "basis_of", lambda device: basis)
    request = (4, 128, 16, torch.bfloat16, True, 32, 0, "slot", None)

    def path(logits: torch.dtype) -> str:
        return plan.plan_routing(torch.device("cpu"), 8, 128, logits, False, *request).path

    assert path(torch.bfloat16) == "fused"
    assert path(torch.float32) == "oneshot"


def test_rows_of_f32_logits_speak_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = basis_module.Basis(
        (ROW,),
        None,
        None,
        "planted",
        rows_by_dtype={"f32": (Crossover(128, 4, 2880, 8, 500, *DATE),)},
    )
    monkeypatch.setattr(basis_module, "basis_of", lambda device: basis)

    def path(logits: dispatch.Logits, tokens: int) -> str:
        problem = Problem(tokens, 128, 4, 2880, logits=logits)
        return basis_module.choose(problem, 1000, torch.device("cpu")).path

    assert [path("bf16", tokens) for tokens in (8, 64, 65)] == ["fused", "fused", "oneshot"]
    assert [path("f32", tokens) for tokens in (8, 9, 64)] == ["fused", "oneshot", "oneshot"]


def test_an_h100_takes_the_chain_for_many_f32_rows() -> None:
    """Of 1,536 rows with 256 experts there, 13.7 us fused and 11.6 by the chain; bf16 10.8 and 11.0."""
    rows = {**dispatch.rows_by_dtype_of("sm_90a"), "bf16": dispatch.rows_of("sm_90a")[1]}
    for logits, path in (("f32", "multiphase"), ("bf16", "fused")):
        problem = Problem(1536, 256, 8, 7168, logits=logits)
        assert dispatch.choose(problem, 89088, rows[logits]).path == path
        problem = Problem(16384, 256, 8, 7168, logits=logits)
        assert dispatch.choose(problem, 89088, rows[logits]).path == "multiphase"
    assert dispatch.rows_by_dtype_of("gfx942") == dispatch.rows_by_dtype_of("cpu") == {}


def test_explain_tells_what_is_modelled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    basis = basis_module.Basis((), None, None, "planted", {"f32": MODELLED})
    for module in (basis_module, explain):
        monkeypatch.setattr(module, "basis_of", lambda device: basis)
    shape = ["--tokens", "31", "--experts", "128", "--topk", "4", "--device", "cpu"]
    assert explain.main([*shape, "--dtype", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "oneshot" in printed and "modelled for E=128 K=4 and f32 logits" in printed
    assert "planted: somewhere, 2026-11-23, `a command`" in printed
    assert explain.main(shape) == 0
    assert "capacity" in capsys.readouterr().out
    assert explain.main(["--table", "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "cpu, f32 logits" in line]
    assert len(lines) == len(MODELLED)


@pytest.mark.parametrize(
    ("arch", "expected"), [("gfx942", None), ("sm_80", 256), ("sm_90", 512), ("cpu", None)]
)
def test_estimates(arch: str, expected: int | None) -> None:
    assert dispatch.estimate_of(arch) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"), [(64, "fused"), (65, "oneshot"), (500, "oneshot"), (501, "multiphase")]
)
def test_a_row_decides(tokens: int, expected: str) -> None:
    problem = Problem(tokens, 128, 4, 2880)
    choice = dispatch.choose(problem, 1600, [ROW])
    assert (choice.path, choice.rule, choice.row) == (expected, "measured", ROW)
    words = dispatch.explain(problem, choice, 1600)
    assert "measured" in words and "64" in words and "500" in words


def test_a_row_does_not_lift_capacity() -> None:
    generous = Crossover(128, 4, 2880, 10**6, 10**6, *DATE)
    assert path(Problem(1600, 128, 4, 2880), 1600, generous) == "fused"
    assert path(Problem(1601, 128, 4, 2880), 1600, generous) == "oneshot"
    assert path(Problem(1, 128, 4, 2880), 0, generous) == "oneshot"


def test_oneshot_goes_by_entries() -> None:
    """A row for K = 4 that speaks for K = 8 means half as many tokens."""
    problem = [Problem(tokens, 128, 8, 2880) for tokens in (250, 251)]
    assert [path(each, 10, ROW) for each in problem] == ["oneshot", "multiphase"]


def test_the_nearest_row_speaks() -> None:
    wide, other_d = Crossover(256, 4, 2880, 1, 1, *DATE), Crossover(128, 4, 7168, 2, 2, *DATE)
    rows = (wide, ROW, other_d)
    assert dispatch.nearest(rows, Problem(1, 128, 4, 2880)) is ROW
    assert dispatch.nearest(rows, Problem(1, 128, 4, 8192)) is other_d
    assert dispatch.nearest(rows, Problem(1, 257, 4, 2880)) is wide
    assert dispatch.nearest(rows, Problem(1, 128, 8, 2880)) is ROW
    assert dispatch.nearest(rows, Problem(1, 128, 16, 2880)) is None
    assert dispatch.nearest(rows, Problem(1, 8, 2, 4096)) is None
    assert dispatch.nearest((), Problem(1, 128, 4, 2880)) is None


@pytest.mark.parametrize(
    ("override", "tokens", "expected"),
    [
        (CAPACITY, 1600, "fused"),
        (CAPACITY, 1601, "oneshot"),
        (8, 8, "fused"),
        (8, 9, "oneshot"),
        (0, 1, "oneshot"),
        (10**6, 1601, "oneshot"),
    ],
)
def test_an_override_comes_before_rows(override: int, tokens: int, expected: str) -> None:
    problem = Problem(tokens, 128, 4, 2880)
    choice = dispatch.choose(problem, 1600, [ROW], override)
    assert (choice.path, choice.rule, choice.row) == (expected, "override", None)


def test_threshold() -> None:
    def limit(*pairs: tuple[float, float]) -> int:
        return dispatch.threshold({2**i: pair for i, pair in enumerate(pairs)})

    assert limit((1, 2), (1, 2), (1, 2)) == 4
    assert limit((1, 2), (1, 2), (2, 1)) == 2
    assert limit((2, 1), (3, 1)) == 0
    assert limit((1, 1)) == 1, "equal times go to the first way"
    assert limit((1, 2), (1.1, 1), (1, 2), (3, 1)) == 4, "one outlier moves nothing"
    assert limit((1.1, 1), (1, 4), (9, 1)) == 2
    assert dispatch.threshold({}) == 0


def test_every_architecture_has_an_entry() -> None:
    for arch in ("cpu", "gfx90a", "gfx942:sramecc+:xnack-", "gfx950", "gfx1201", "sm_90", "sm_100"):
        name, rows = dispatch.rows_of(arch)
        assert name and arch.startswith(name) and isinstance(rows, tuple)
    assert dispatch.rows_of("gfx803") == ("", ())


def test_rows_of_the_table_are_complete() -> None:
    """What is entered names its source, its date and its command, and is a possible shape."""
    for rows in dispatch.MEASURED.values():
        for row in (*rows, ROW):
            assert row.source and row.command and len(row.date) == len("2026-11-23")
            assert 1 <= row.topk <= row.num_experts and row.model_dim > 0
            assert row.fused_tokens >= 0 and row.oneshot_tokens >= 0
