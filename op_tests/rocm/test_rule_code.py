"""Does the machine code of kernels by rules have the bits of the CPU target?

As `test_machine_code.py`, at the same wave width and with rules of models, for every instance of
`topk_routing` and, on wave64, of the fused launch by rules. On wave32 the fused kernels keep
registers in scratch, which the interpreter does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from rule_cases import MODELS, check_routing, num_logits
from targets import Target

import aiter
from aiter import RoutingRule
from aiter.routing.buffers import Buffers

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

from archs import parameters  # noqa: E402
from launches import Device, kernels  # noqa: E402
from rule_launches import fused_topk_moe_sorting_fwd, rows_of, topk_routing  # noqa: E402

WAVE64 = ("gfx90a", "gfx942", "gfx950")
ARCHS = (*WAVE64, "gfx1100", "gfx1201", "gfx1250")
TOKENS, BLOCK_SIZE, MODEL_DIM = 3, 4, 5

# Of models, and what stays in memory: more places than registers, in groups and not.
RULES = {
    **{name: MODELS[name] for name in (
        "deepseek-v3", "kimi-k2", "kimi-k3", "glm-4.5", "nemotron-3", "ax-k1", "deepseek-v2",
        "deepseek-v4", "ernie-4.5", "longcat", "grok", "qwen2+shared", "glm+shared",
    )},
    "many experts": (RoutingRule("sigmoid"), 1030, 3, True),
    "softplus of many": (RoutingRule("sqrtsoftplus"), 500, 20, False),
    "softplus": (RoutingRule("sqrtsoftplus"), 400, 8, True),
    "plain, K above 16": (RoutingRule(), 40, 17, False),
    "sigmoid of many, f16": (RoutingRule("sigmoid"), 800, 8, True),
    "sigmoid of many": (RoutingRule("sigmoid"), 800, 8, True),
    "sigmoid of many, K above 16": (RoutingRule("sigmoid"), 800, 20, True),
    "softmax in memory": (RoutingRule(need_renorm=False), 100, 33, False),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs_of(name: str) -> tuple[RoutingRule, int, torch.Tensor, torch.Tensor | None]:
    """The rule, the slots of a row, logits with NaN and ties, and the bias."""
    rule, experts, topk, has_bias = RULES[name]
    place = list(RULES).index(name)
    generator = torch.Generator().manual_seed(place)
    width = num_logits(rule, experts)
    gating = torch.randn(TOKENS, width, generator=generator).mul(3).to(DTYPES[place % 3])
    gating[1, 3] = float("nan")
    gating[2] = gating[2].round()
    bias = None
    if has_bias:
        size = experts + rule.num_zero_experts
        bias = torch.randn(size, generator=generator).to(DTYPES[place // 3 % 3])
    return rule, topk + rule.num_shared_experts, gating, bias


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_rules(arch: str, name: str) -> None:
    rule, slots, gating, bias = inputs_of(name)
    place = list(RULES).index(name)
    device = Device(arch, seed=place, rcp_rounding=place % 3 - 1)
    results = []
    for run in ("machine code", "cpu"):
        weights = torch.full((TOKENS, slots + 1), -1.0)[:, :slots]
        ids = torch.full((TOKENS, slots), -7, dtype=torch.int32)
        if run == "cpu":
            with Target("cpu", device.wave_size).active():
                aiter.topk_routing(weights, ids, gating, rule=rule, correction_bias=bias)
        else:
            topk_routing(device, weights, ids, gating, rule, bias)
        results.append((weights, ids))
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0].view(torch.int32), results[1][0].view(torch.int32))
    check_routing(results[0], gating, rule, bias)


# Every class of rows, zero experts, shared ones with logits and without.
FUSED = (
    "deepseek-v3", "kimi-k2", "kimi-k3", "nemotron-3", "deepseek-v2", "deepseek-v4", "longcat",
    "qwen2+shared", "glm+shared", "softplus of many", "softplus", "many experts",
    "sigmoid of many", "sigmoid of many, K above 16",
)  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("arch", parameters(WAVE64))
def test_fused(arch: str, name: str) -> None:
    """With a mask, rows that do not count, both id formats, a hand-over, one token, by turns."""
    rule, slots, gating, bias = inputs_of(name)
    place = FUSED.index(name) + ARCHS.index(arch)
    gating = gating[: 1 if place % 7 == 2 else TOKENS]
    flat, zero = place % 2 == 0, rule.num_zero_experts
    num_experts = RULES[name][1] + rule.num_shared_experts
    mask = torch.arange(num_experts, dtype=torch.int32) % 3 % 2 if place % 3 == 0 else None
    num_local = torch.tensor([len(gating) - 1], dtype=torch.int32) if place % 4 == 1 else None
    has_slots = (num_experts + zero * flat) * BLOCK_SIZE >= slots
    device = Device(arch, seed=place, rcp_rounding=place % 3 - 1, preloads=place % 2 == 0)
    results = []
    for run in ("machine code", "cpu"):
        sizes = Buffers.of(
            len(gating), slots, num_experts + zero * flat, MODEL_DIM, torch.bfloat16, BLOCK_SIZE
        )
        outputs = (
            torch.full((sizes.slots,), -7, dtype=torch.int32), torch.full((sizes.slots,), -1.0),
            torch.full((sizes.blocks,), -7, dtype=torch.int32), torch.full((2,), -7, dtype=torch.int32),
            torch.full(sizes.moe_buf, -1.0, dtype=torch.bfloat16),
        )  # fmt: skip
        topk_out = (
            torch.full((len(gating), slots + 1), -1.0)[:, :slots],
            torch.full((len(gating), slots + 2), -7, dtype=torch.int32)[:, :slots],
        )
        arguments = (gating, *outputs, num_experts, RULES[name][2], BLOCK_SIZE, rule.need_renorm)
        options: dict[str, Any] = {
            "rule": rule, "correction_bias": bias, "topk_out": topk_out,
            "id_format": "flat" if flat else "slot", "local_expert_mask": mask,
            "num_local_tokens": num_local, "handover_size": 1 + (has_slots and place % 3 == 1),
        }  # fmt: skip
        if run == "cpu":
            with Target("cpu", device.wave_size).active():
                aiter.fused_topk_moe_sorting_fwd(*arguments, **options)
        else:
            fused_topk_moe_sorting_fwd(device, *arguments, **options)
        results.append((*outputs, *topk_out))
    assert device.statistics
    for got, expected in zip(*results, strict=True):
        same = got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
        assert torch.equal(*same)


def test_every_instance_is_run() -> None:
    def ran(names: Iterable[str]) -> set[str]:
        inputs = (
            (rule, gating, bias, slots) for rule, slots, gating, bias in map(inputs_of, names)
        )
        return {rows_of(*each) for each in inputs}

    def there(module: str, kernel: str) -> set[str]:
        names = (each.partition("<") for each in kernels(module, "gfx942"))
        return {rest.removesuffix(">") for name, _, rest in names if name == kernel}

    assert ran(RULES) == there("module_topk_routing", "topk_routing")
    fused = there("module_fused_topk_moe_sorting", "fused_topk_moe_sorting_rules")
    assert ran(FUSED) == fused
