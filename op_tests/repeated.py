"""What does a `topk_softmax_sorting` call with `out=` do, and was it taken for a remembered one?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import _checkout  # noqa: F401
import torch
from buffers import POISON
from targets import Target
from torch import Tensor

import aiter.fused_moe
from aiter import moe_routing, reference

TOKENS, EXPERTS, TOPK, WIDTH, BLOCK = 6, 24, 3, 300, 8

Arguments = dict[str, Any]


def drawn(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator).to(dtype)


def arguments(target: Target, tokens: int = TOKENS, seed: int = 0) -> Arguments:
    """Those of a good call; the logits have room between their rows and behind them."""
    room = torch.zeros(tokens + 2, 32, dtype=torch.bfloat16, device=target.device)
    logits = room[:tokens, :EXPERTS]
    logits.copy_(drawn(tokens, seed))
    return {
        "gating_output": logits,
        "topk": TOPK,
        "num_experts": EXPERTS,
        "model_dim": WIDTH,
        "moebuf_dtype": torch.bfloat16,
        "need_renorm": True,
        "block_size": BLOCK,
        "expert_mask": None,
        "num_local_tokens": None,
        "dispatch_policy": 0,
        "out": aiter.fused_moe.empty_sorted_buffers(
            tokens, TOPK, EXPERTS, WIDTH, torch.bfloat16, BLOCK, device=target.device
        ),
    }


class Outcome(NamedTuple):
    """What a call did.

    Attributes:
        known: whether it was taken for a remembered one.
        error: its type and text; empty for none.
        path: `last_path()` after a call without an error.
        memory: the bytes of the outputs' memory.
    """

    known: bool
    error: str
    path: str | None
    memory: list[bytes]


@contextlib.contextmanager
def watched() -> Iterator[list[bool]]:
    """What `_again` answers inside."""
    answers: list[bool] = []
    again = moe_routing._again

    def watching(*arguments: object) -> bool:
        answers.append(again(*arguments))
        return answers[-1]

    moe_routing._again = watching
    try:
        yield answers
    finally:
        if moe_routing._again is watching:
            moe_routing._again = again


def outcome(target: Target, call: Arguments) -> Outcome:
    """Poisons the outputs and makes the call."""
    outputs = [t for t in call["out"] if isinstance(t, Tensor) and not t.is_meta]
    for tensor in outputs:
        tensor.untyped_storage().fill_(POISON)
    error, path = "", None
    with target.active(), watched() as answers:
        try:
            assert aiter.fused_moe.topk_softmax_sorting(**call) is call["out"]
            path = aiter.fused_moe.last_path()
        except (ValueError, TypeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    target.synchronize()
    memory = [bytes(tensor.untyped_storage().cpu().tolist()) for tensor in outputs]
    return Outcome(answers == [True], error, path, memory)


def check_against_reference(call: Arguments) -> None:
    """The outputs hold what the reference makes of the call's contents."""
    plain = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in call.items()}
    outputs = [tensor.cpu() for tensor in plain.pop("out")]
    plain.pop("dispatch_policy")
    expected = reference.topk_softmax_sorting(**plain)
    slots = int(expected[3][0])
    assert torch.equal(outputs[3], expected[3])
    assert torch.equal(outputs[0][:slots], expected[0][:slots])
    torch.testing.assert_close(outputs[1][:slots], expected[1][:slots], rtol=1e-6, atol=0)
    blocks = slots // call["block_size"]
    assert torch.equal(outputs[2][:blocks], expected[2][:blocks])
    rows = int(expected[3][1])
    assert torch.count_nonzero(outputs[4][:rows]) == 0


def remembered(target: Target, **changes: Any) -> Arguments:
    """The arguments of a call that was made twice."""
    call = {**arguments(target), **changes}
    first, second = outcome(target, call), outcome(target, call)
    assert (first.known, second.known) == (False, True)
    assert first[1:] == second[1:] and (first.error, first.path) == ("", "fused")
    check_against_reference(call)
    return call
