"""Does top-k by any rule choose and weigh experts as the contract says?

Against its table, against the plain PyTorch reference (exactly where scores are exact, allowing for
close calls elsewhere), against float64 for the arithmetic, and bit for bit between wave widths, numbers
of rows and layouts. As a script: the largest error of every score on a device.
"""

from __future__ import annotations

import sys

import _checkout  # noqa: F401
import pytest
import torch
from buffers import FrozenInputs, GuardedBuffer
from hypothesis import given, settings
from rule_cases import (
    ANSWERS,
    BIASES,
    DTYPES,
    INF,
    LOGITS,
    MODELS,
    Answer,
    Problem,
    check_exact,
    check_routing,
    exact_bias,
    exact_logits,
    num_logits,
    problems,
    random_bias,
)
from targets import CPU_WAVES, Target, default_device, select_targets
from torch import Tensor

import aiter
from aiter.cli.table import format_table
from aiter.ops.rule import RoutingRule
from aiter.ops.topk_routing import topk_routing

# Largest relative errors against float64: csrc/include/rule_scores.h states them.
MOST_ERROR = {"sigmoid": 2.0e-7, "sqrtsoftplus": 1.5e-7, "softcap": 2.5e-7}


def route(
    target: Target, gating: Tensor, topk: int, rule: RoutingRule | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(weights, ids) on the CPU, of a call into rows that are apart, between guards."""
    device = target.device
    slots = topk + (0 if rule is None else rule.num_shared_experts)
    inputs = {"gating_output": gating.to(device)}
    if bias is not None:
        inputs["correction_bias"] = bias.to(device)
    frozen = FrozenInputs(inputs)
    guarded = [
        GuardedBuffer("topk_weights", (len(gating), slots + 3), torch.float32, device),
        GuardedBuffer("topk_ids", (len(gating), slots + 1), torch.int32, device),
    ]
    weights, ids = (buffer.tensor[:, 1 : slots + 1] for buffer in guarded)
    beside = [torch.cat((b.tensor[:, :1], b.tensor[:, slots + 1 :]), 1) for b in guarded]
    with target.active():
        topk_routing(
            weights, ids, inputs["gating_output"], rule=rule,
            correction_bias=inputs.get("correction_bias"),
        )  # fmt: skip
    target.synchronize()
    frozen.check()
    for buffer, before in zip(guarded, beside, strict=True):
        buffer.check_guards()
        after = torch.cat((buffer.tensor[:, :1], buffer.tensor[:, slots + 1 :]), 1)
        assert torch.equal(after.view(torch.int32), before.view(torch.int32))
    return weights.cpu().contiguous(), ids.cpu().contiguous()


def same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0].view(torch.int32), b[0].view(torch.int32)) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_table_of_the_contract(target: Target, answer: Answer) -> None:
    logits, bias, rule, ids, weights = answer
    for dtype in (torch.float32, torch.bfloat16) if 1.2 not in logits else (torch.float32,):
        got = route(
            target,
            torch.tensor([logits], dtype=dtype),
            len(ids),
            rule,
            None if bias is None else torch.tensor(bias, dtype=torch.float32),
        )
        assert got[1].tolist() == [ids]
        expected = torch.tensor([weights], dtype=torch.float32)
        torch.testing.assert_close(got[0], expected, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_models(target: Target, model: str, dtype: torch.dtype) -> None:
    """Random logits, and exact ones with ties and an exact bias."""
    rule, num_experts, topk, has_bias = MODELS[model]
    width = num_logits(rule, num_experts)
    num_routed = num_experts + rule.num_zero_experts
    generator = torch.Generator().manual_seed(len(model))
    logits = torch.randn(9, width, generator=generator).to(dtype) * 2
    bias = random_bias(num_routed, generator).to(dtype) if has_bias else None
    check_routing(route(target, logits, topk, rule, bias), logits, rule, bias)
    if rule.scoring_func == "sigmoid":
        logits = exact_logits((9, width), generator).to(dtype)
        bias = exact_bias(num_routed, generator) if has_bias else None
        check_exact(route(target, logits, topk, rule, bias), logits, rule, bias)


@pytest.mark.slow  # builds for both
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_random_rules(problem: Problem) -> None:
    """Any rule on any input; both wave widths agree to the bit on the CPU."""
    rule, num_experts, topk, kind, bias_kind, dtype, seed = problem
    generator = torch.Generator().manual_seed(seed)
    logits = LOGITS[kind]((5, num_logits(rule, num_experts)), generator).to(dtype)
    bias = None
    if bias_kind != "none":
        bias = BIASES[bias_kind](num_experts + rule.num_zero_experts, generator)
    results = [route(t, logits, topk, rule, bias) for t in select_targets(None)]
    check_routing(results[0], logits, rule, bias)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_rules_are_topk_softmax(target: Target, dtype: torch.dtype, renorm: bool) -> None:
    """The same bits, whichever way each selects."""
    generator = torch.Generator().manual_seed(3)
    for num_experts, topk in (
        (3, 2),
        (40, 8),
        (128, 4),
        (256, 8),
        (513, 11),
        (896, 16),
        (1100, 40),
    ):
        for kind in ("normal", "special"):
            logits = LOGITS[kind]((7, num_experts), generator).to(dtype)
            got = route(target, logits, topk, RoutingRule(need_renorm=renorm), None)
            weights = torch.empty(7, topk, device=target.device)
            ids, source = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
            with target.active():
                aiter.topk_softmax(weights, ids, source, logits.to(target.device), renorm)
            assert same_bits(got, (weights.cpu(), ids.cpu())), (num_experts, topk, kind)


@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v2", "longcat", "kimi-k3"])
def test_bits_do_not_depend_on_rows_or_layout(target: Target, model: str) -> None:
    rule, num_experts, topk, has_bias = MODELS[model]
    generator = torch.Generator().manual_seed(1)
    width = num_logits(rule, num_experts)
    logits = torch.randn(35, width, generator=generator)
    bias = random_bias(num_experts + rule.num_zero_experts, generator) if has_bias else None
    expected = route(target, logits, topk, rule, bias)
    apart = torch.full((35, width + 3), INF)
    apart[:, 1 : width + 1] = logits
    odd = None if bias is None else torch.cat((torch.zeros(1), bias))[1:]
    assert same_bits(route(target, apart[:, 1 : width + 1], topk, rule, odd), expected)
    for row in (0, 17, 34):
        one = route(target, logits[row : row + 1], topk, rule, bias)
        assert same_bits(one, (expected[0][row : row + 1], expected[1][row : row + 1]))
    broadcast = route(target, logits[:1].expand(3, width), topk, rule, bias)
    assert same_bits(broadcast, tuple(t[:1].expand(3, -1).contiguous() for t in expected[:2]))  # type: ignore[arg-type]


def test_a_bias_is_read_in_its_own_dtype(target: Target) -> None:
    """Biases of 11.1 to 11.3 over scores of 1e-8, as GLM-5 has them."""
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(16, 256, generator=generator) - 18).bfloat16()
    bias = torch.rand(256, generator=generator) * 0.2 + 11.1
    rule = RoutingRule("sigmoid", routed_scaling_factor=2.5)
    for dtype in DTYPES:
        check_exact(route(target, logits, 8, rule, bias.to(dtype)), logits, rule, bias.to(dtype))


def test_no_rows(target: Target) -> None:
    assert route(target, torch.empty(0, 16), 4, RoutingRule("sigmoid"), None)[1].shape == (0, 4)


def largest_error(target: Target, name: str, count: int = 300_000) -> float:
    """Relative to float64, over `count` random x of each of four scales and the powers of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.randn(count, generator=generator) * scale for scale in (0.01, 1.0, 8.0, 40.0)]
        + [torch.tensor([2.0**e * s for e in range(-126, 128) for s in (-1, 1)] * 2)[:1000]]
    )
    rule = RoutingRule("sigmoid" if name == "sigmoid" else "sqrtsoftplus", need_renorm=False)
    if name == "softcap":
        # NOTE: where x is above 25, sqrtsoftplus is its square root.
        rule = RoutingRule("sqrtsoftplus", need_renorm=False, softcap=1e4)
        x = x.abs() * 300 + 30
    x = x[: len(x) // 32 * 32].view(-1, 32)
    weights, ids = route(target, x, 32, rule, None)
    wide = x.gather(1, ids.long()).double()
    if name == "sigmoid":
        true = 1 / (1 + torch.exp(-wide))
    else:
        capped = 1e4 * torch.tanh(wide / 1e4) if name == "softcap" else wide
        true = (capped.clamp(min=0) + torch.log1p(torch.exp(-capped.abs()))).sqrt()
    normal = wide > -87  # where exp(x) is no subnormal number
    return float(((weights.double() - true).abs() / true)[normal].max())


@pytest.mark.slow
@pytest.mark.parametrize("count", [40_000, pytest.param(300_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", MOST_ERROR)
def test_errors_of_the_arithmetic(target: Target, name: str, count: int) -> None:
    assert largest_error(target, name, count) <= MOST_ERROR[name]


def test_exact_scores(target: Target) -> None:
    """Sigmoid at 0, from 17.4 up and from -89 down; sqrtsoftplus at squares from 25 up, and infinity."""
    rule = RoutingRule("sigmoid", need_renorm=False)
    x = torch.tensor([[0.0, -0.0, 17.4, 50.0, INF, -89.0, -1e4, -INF]])
    weights, ids = route(target, x, 8, rule, None)
    by_expert = weights[0][ids[0].long().argsort()]
    assert by_expert.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    roots = torch.arange(5, 4096, dtype=torch.float32)
    rule = RoutingRule("sqrtsoftplus", need_renorm=False)
    weights, _ = route(target, (roots * roots)[:, None], 1, rule, None)
    assert torch.equal(weights[:, 0], roots)
    weights, _ = route(target, torch.tensor([[INF]]), 1, rule, None)
    assert weights.item() == torch.tensor(torch.finfo(torch.float32).max).sqrt().item()


def bad_calls() -> list[tuple[str, dict[str, object], type[Exception], str]]:
    """(what is wrong, changed arguments, error, its text)."""
    grouped = RoutingRule("sigmoid", num_expert_group=3)
    by_logit = RoutingRule("sigmoid", select_on="logit")
    bias = torch.zeros(16)
    return [
        ("groups do not divide E", {"rule": grouped}, ValueError,
         r"gating_output: expected experts in 3 groups of equal size, got 16 experts"),
        ("bias is short", {"correction_bias": bias[1:]}, ValueError,
         r"correction_bias: expected shape \[16\].* got \[15\]"),
        ("bias is double", {"correction_bias": bias.double()}, ValueError,
         "correction_bias: expected dtype float32 or float16 or bfloat16, got torch.float64"),
        ("bias is a matrix", {"correction_bias": bias[None]}, ValueError, "correction_bias: .*rank 1"),
        ("bias has a stride", {"correction_bias": torch.zeros(32)[::2]}, ValueError,
         "correction_bias: expected a contiguous tensor"),
        ("bias is elsewhere", {"correction_bias": bias.to("meta")}, ValueError, "meta"),
        ("bias is a list", {"correction_bias": [0.0]}, TypeError, "correction_bias: expected a tensor"),
        ("bias with logits", {"rule": by_logit, "correction_bias": bias}, ValueError,
         "correction_bias: expected None with a rule of select_on 'logit'"),
        ("rule is a name", {"rule": "sigmoid"}, TypeError, "rule: expected a RoutingRule, got str"),
        ("K above E", {"topk_weights": torch.empty(2, 17), "topk_ids": torch.empty(2, 17).int()},
         ValueError, "topk: expected a value from 1 to 16, got 17"),
        ("no slot is routed", {"rule": RoutingRule(num_shared_experts=4)}, ValueError,
         "topk: expected a value from 1 to 16, got 0"),
        ("no column is routed", {"rule": RoutingRule(num_zero_experts=16)}, ValueError,
         "gating_output: expected more than 16 columns"),
        ("ids are long", {"topk_ids": torch.empty(2, 4).long()}, ValueError, "topk_ids: .*int32"),
        ("ids are narrow", {"topk_ids": torch.empty(2, 3).int()}, ValueError,
         r"topk_ids: expected shape \[2, 4\], got \[2, 3\]"),
        ("rows overlap", {"topk_ids": torch.empty(4).int().expand(2, 4)}, ValueError,
         "topk_ids: expected rows that do not overlap"),
        ("inner stride", {"topk_weights": torch.empty(2, 8)[:, ::2]}, ValueError,
         "topk_weights: expected inner stride 1, got 2"),
        ("gating is double", {"gating_output": torch.zeros(2, 16).double()}, ValueError,
         "gating_output"),
    ]  # fmt: skip


@pytest.mark.parametrize("bad", bad_calls(), ids=lambda bad: bad[0])
def test_bad_input(
    target: Target, bad: tuple[str, dict[str, object], type[Exception], str]
) -> None:
    _, changes, error, text = bad
    arguments: dict[str, object] = {
        "topk_weights": torch.full((2, 4), 7.0),
        "topk_ids": torch.full((2, 4), 7, dtype=torch.int32),
        "gating_output": torch.zeros(2, 16),
        "rule": RoutingRule("sigmoid"),
        "correction_bias": None,
        **changes,
    }
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type != "meta":
            # NOTE: the whole storage moves, as moving a view would make it dense.
            storage = value.as_strided(
                (value.untyped_storage().nbytes() // value.itemsize,), (1,), 0
            )
            moved = storage.to(target.device)
            arguments[name] = moved.as_strided(value.shape, value.stride(), value.storage_offset())
    outputs = [arguments["topk_weights"], arguments["topk_ids"]]
    before = [o.clone() for o in outputs if isinstance(o, Tensor)]
    with target.active(), pytest.raises(error, match=text):
        topk_routing(**arguments)  # type: ignore[arg-type]
    assert all(
        torch.equal(o.nan_to_num() if o.is_floating_point() else o,
                    b.nan_to_num() if b.is_floating_point() else b)
        for o, b in zip(outputs, before, strict=True)
        if isinstance(o, Tensor)
    )  # fmt: skip


def main() -> int:
    """Print the largest error of every score."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--wave", type=int, choices=CPU_WAVES, default=None)
    options = parser.parse_args()
    rows = [
        [str(target), name, f"{largest_error(target, name):.2e}", f"{most:.1e}"]
        for target in select_targets(options.device, options.wave)
        for name, most in MOST_ERROR.items()
    ]
    print(format_table(["target", "score", "largest error", "limit"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
