"""Does the self-test see what is wrong, and say what it could not see?"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch

from aiter import fused_moe
from aiter.cli import selftest, selftest_checks
from aiter.cli.selftest_checks import CHECKS, Skipped, difference, expected_route, logits_of
from aiter.jit import BuildError

CPU = torch.device("cpu")
GPU_CHECKS = [name for name in CHECKS if name.startswith(("graph", "side", "two", "a device"))]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape, and no report of the environment."""
    monkeypatch.setattr(selftest, "QUICK_SHAPES", ((3, 16, 2),))
    monkeypatch.setattr(selftest.env_command, "run", lambda options: 0)


@pytest.mark.slow
def test_report(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", "cpu", "--quick"]) == 0
    report = capsys.readouterr().out
    assert [line for line in report.splitlines() if line.startswith("wave ")] == [
        "wave    64", "wave    32",
    ]  # fmt: skip
    for name in CHECKS:
        result = "skipped: needs a GPU" if name in GPU_CHECKS else "right"
        assert report.count(f"\n{name:<29}  {result}\n") == 2, name
    assert report.endswith("selftest: all right on cpu\n")


def test_a_wrong_routing_fails(
    few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fused_moe.topk_softmax_sorting

    def wrong(*arguments: object, **options: object) -> fused_moe.SortedBuffers:
        buffers = right(*arguments, **options)  # type: ignore[arg-type]
        buffers[0][0] ^= 1
        return buffers

    monkeypatch.setattr(fused_moe, "topk_softmax_sorting", wrong)
    assert selftest.main(["--device", "cpu", "--wave", "64", "--quick"]) == 1
    output = capsys.readouterr()
    assert "selftest: NOT all right on cpu" in output.out
    assert "policy 1, M=3 E=16 K=2 normal torch.float32: sorted_ids[0]: expected" in output.err


def test_what_ends_the_test_is_its_last_line(
    few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that cannot be built, say: no report without a line that says all right or not."""

    def broken(*arguments: object) -> None:
        raise BuildError("module_x", "cpu-wave64", "the compiler exited with status 1")

    monkeypatch.setattr(selftest, "_report", broken)
    assert selftest.main(["--device", "cpu"]) == 1
    output = capsys.readouterr()
    last = output.out.splitlines()[-1]
    assert last == "selftest: NOT all right on cpu: 1 wrong, the first of them above"
    assert "raised BuildError: building module_x for cpu-wave64 failed" in output.err


def test_a_wrong_op_fails(
    few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ids: torch.Tensor, load: torch.Tensor) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(selftest_checks, "expert_load", broken)
    assert selftest.main(["--device", "cpu", "--wave", "64", "--quick"]) == 1
    output = capsys.readouterr()
    assert "expert_load: raised RuntimeError: planted" in output.err
    monkeypatch.setattr(selftest_checks, "expert_load", lambda ids, load: load.fill_(-1))
    assert CHECKS["expert_load"](CPU) == "load: expected the counts of the ids, got others"


@pytest.mark.parametrize("error", [ValueError("planted"), KeyError("planted")])
def test_a_check_that_raises_anything_is_one_that_fails(
    few: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """The report goes on behind it, to its last line."""

    def broken(ids: torch.Tensor, load: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(selftest_checks, "expert_load", broken)
    assert selftest.main(["--device", "cpu", "--wave", "64", "--quick"]) == 1
    output = capsys.readouterr()
    assert f"expert_load: raised {type(error).__name__}: {error}" in output.err
    assert f"{'error, then a right call':<29}  right" in output.out
    assert output.out.splitlines()[-1].startswith("selftest: NOT all right on cpu: 1 wrong")


@pytest.mark.parametrize("way", ["automatic", "one launch", "two launches"])
def test_wrong_logits_are_seen(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    right = selftest_checks.reference.router_logits

    def wrong(*arguments: torch.Tensor) -> torch.Tensor:
        return right(*arguments).nextafter(torch.tensor(9.0))

    monkeypatch.setattr(selftest_checks.reference, "router_logits", wrong)
    assert "logits: expected the bits" in CHECKS[f"hidden states, {way}"](CPU)


@pytest.mark.parametrize(
    ("way", "name"),
    [("one launch", "fused_router_sorting_fwd"), ("two launches", "router_product")],
)
def test_a_wrong_launch_from_hidden_states_is_seen(
    monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    """Each way makes the launch that it is named after."""
    monkeypatch.setattr(selftest_checks, name, lambda *arguments, **options: None)
    assert "M=1 D'=2880 E=128 K=4" in CHECKS[f"hidden states, {way}"](CPU)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, 7, r"sorted_ids\[0\]: expected \d+, got 7"),
        (1, 9.0, r"sorted_weights: expected within 1e-06, got"),
        (2, 99, r"sorted_expert_ids\[0\]: expected \d+, got 99"),
        (3, 1, r"num_valid_ids: expected \["),
        (4, 1.0, r"moe_buf: expected 5 rows of zeros, got others"),
    ],
)
def test_every_difference_is_seen(index: int, value: float, message: str) -> None:
    logits = logits_of(CPU, 5, 16)
    expected = expected_route(logits)
    got = tuple(tensor.clone() for tensor in expected)
    assert difference(got, expected) == ""
    got[index].reshape(-1)[0] = value
    with pytest.raises(AssertionError, match=message):
        assert difference(got, expected) == "", difference(got, expected)


@pytest.mark.parametrize("name", CHECKS)
def test_checks(name: str) -> None:
    """On the GPU, where there is one; else what needs one says so."""
    if torch.cuda.is_available():
        try:
            assert CHECKS[name](torch.device("cuda", 0)) == ""
        except Skipped as reason:
            assert str(reason) == "needs two GPUs"
    elif name in GPU_CHECKS:
        with pytest.raises(Skipped, match="needs a GPU"):
            CHECKS[name](CPU)
    else:
        assert CHECKS[name](CPU) == ""


def test_weights_that_a_device_flushes_are_right() -> None:
    tiny = torch.tensor([1e-39, 0.5])
    assert selftest_checks.weight_difference("weights", torch.tensor([0.0, 0.5]), tiny) == ""
    assert "weights: expected within" in selftest_checks.weight_difference(
        "weights", torch.tensor([0.0, 0.50001]), tiny
    )
