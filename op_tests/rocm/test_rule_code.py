"""Does the machine code of top-k by rules have the bits of the CPU target?

As `test_machine_code.py`, for every instance of `topk_routing`: rules of models, at the same wave width.
"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch
from rule_cases import MODELS, check_routing, num_logits
from targets import Target

import aiter
from aiter import RoutingRule

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

from launches import Device, kernels  # noqa: E402
from rule_launches import kernel_of, topk_routing  # noqa: E402

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx1250")
TOKENS = 3

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
@pytest.mark.parametrize("arch", ARCHS)
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


def test_every_instance_is_run() -> None:
    ran = set()
    for name in RULES:
        rule, slots, gating, bias = inputs_of(name)
        ran.add(kernel_of(rule, gating, bias, slots))
    assert ran == set(kernels("module_topk_routing", "gfx942"))
