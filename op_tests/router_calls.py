"""How is the launch from hidden states called and judged? By the reference's logits, to the bit.

A `Case` names the problem: its dtype is that of hidden states and weight, its logits are what hidden
states are drawn as, its layout is theirs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from buffers import FrozenInputs, GuardedBuffer, require
from cases import LAYOUTS, LOGITS, Case, Inputs, make_inputs
from checks import check_equal
from runners import SortedOutputs, expected_sorted, reporting
from targets import Target
from torch import Tensor

from aiter import reference
from aiter.ops.fused_router_sorting import fused_router_sorting_fwd

Launch = Callable[..., None]


@dataclass(frozen=True)
class Router:
    """The tensors that logits are made of, on one device, and the other inputs of a case."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    inputs: Inputs
    """With the reference's logits, on the CPU."""


def make_router(case: Case, device: str, width: int = 136, with_bias: bool = True) -> Router:
    """Draws `case`, with D' = `width`; rows that do not count hold anything."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((case, width)).encode()))
    hidden = LOGITS[case.logits]((case.num_tokens, width), generator).to(case.dtype)
    inputs = make_inputs(replace(case, logits="normal"), device)
    hidden[case.local_tokens :] = float("nan")
    weight = (torch.randn(case.num_experts, width, generator=generator) / width**0.5).to(case.dtype)
    bias = torch.randn(case.num_experts, generator=generator) if with_bias else None
    # NOTE: laid out on each device from what was drawn: a layout may say what the rows are, and copies
    # of rows that overlap get strides of their own.
    layout = LAYOUTS[case.layout]
    logits = reference.router_logits(layout(hidden, "cpu"), weight, bias)
    return Router(
        layout(hidden, device),
        weight.to(device),
        None if bias is None else bias.to(device),
        replace(inputs, gating=logits),
    )


def drawn(
    tokens: int, experts: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Hidden states [tokens, width] of several magnitudes, and a weight [experts, width]."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(tokens, width, generator=generator))
    hidden = torch.randn(tokens, width, generator=generator) * scale
    weight = torch.randn(experts, width, generator=generator) / width**0.5
    return hidden.to(dtype), weight.to(dtype)


def check_logits(what: str, got: Tensor, expected: Tensor) -> None:
    """The same bits, but for those of a NaN."""
    got, expected = got.cpu(), expected.cpu()
    nan = expected.isnan()
    require(torch.equal(got.isnan(), nan), f"{what}: expected NaN where the reference has it")
    bits = [logits.masked_fill(nan, 0.0).view(torch.int32) for logits in (got, expected)]
    check_equal(f"bits of {what}", *bits)


def run_router(
    case: Case,
    target: Target,
    num_workgroups: int | None = None,
    width: int = 136,
    launch: Launch = fused_router_sorting_fwd,
) -> tuple[Tensor, ...]:
    """Calls `launch` as `fused_router_sorting_fwd` and checks everything.

    Returns:
        The five outputs and the logits.
    """
    with reporting(f"width {width}, {num_workgroups} workgroups, {case}", target):
        router = make_router(case, target.device, width)
        inputs = router.inputs
        named = {"hidden_states": router.hidden_states, "router_weight": router.weight}
        frozen = FrozenInputs(named)
        outputs = SortedOutputs.allocate(case, target.device)
        shape = (case.num_tokens, case.num_experts)
        logits = GuardedBuffer("logits_out", shape, torch.float32, target.device, 4)
        with target.active():
            launch(
                router.hidden_states, router.weight, logits.tensor, *outputs.tensors,
                case.num_experts, case.topk, case.block_size, router_bias=router.bias,
                rule=case.need_renorm, local_expert_mask=inputs.mask,
                num_local_tokens=inputs.num_local_tokens, num_workgroups=num_workgroups,
            )  # fmt: skip
        target.synchronize()
        frozen.check()
        logits.check_guards()
        logits.check_untouched_from(case.local_tokens * case.num_experts)
        local = case.local_tokens
        check_logits("logits_out", logits.tensor[:local], inputs.gating[:local])
        outputs.check(case, inputs, expected_sorted(case, inputs))
        return (*outputs.tensors, logits.tensor)
