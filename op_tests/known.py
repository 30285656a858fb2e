"""What does a `topk_softmax_sorting` call do, and was it taken for a known one?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import _checkout  # noqa: F401
import pytest
import torch
from buffers import POISON, storage_bytes
from checks import check_sorted
from targets import Target
from torch import Tensor

import aiter.fused_moe
from aiter import reference
from aiter.routing import known as remembered
from aiter.routing.buffers import SortedBuffers

TOKENS, EXPERTS, TOPK, WIDTH, BLOCK = 6, 24, 3, 300, 8

Arguments = dict[str, Any]

GIVEN = pytest.mark.parametrize("given", [True, False], ids=["out", "no out"])


def drawn(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=generator).to(dtype)


def arguments(
    target: Target, tokens: int = TOKENS, seed: int = 0, width: int = WIDTH, given: bool = True
) -> Arguments:
    """Those of a good call, with outputs or without; the logits have room around their rows."""
    room = torch.zeros(tokens + 2, 32, dtype=torch.bfloat16, device=target.device)
    logits = room[:tokens, :EXPERTS]
    logits.copy_(drawn(tokens, seed))
    return {
        "gating_output": logits,
        "topk": TOPK,
        "num_experts": EXPERTS,
        "model_dim": width,
        "moebuf_dtype": torch.bfloat16,
        "need_renorm": True,
        "block_size": BLOCK,
        "expert_mask": None,
        "num_local_tokens": None,
        "dispatch_policy": 0,
        "out": aiter.fused_moe.empty_sorted_buffers(
            tokens, TOPK, EXPERTS, width, torch.bfloat16, BLOCK, device=target.device
        )
        if given
        else None,
    }


class Outcome(NamedTuple):
    """What a call did.

    Attributes:
        known: whether it was taken for a known one.
        error: its type and text; empty for none.
        path: `last_path()` after a call without an error.
        memory: the bytes of the given outputs' memory.
        outputs: what it returned, checked and, where it is new, poisoned again, so that a later call
            in this memory cannot find it done; empty after an error.
    """

    known: bool
    error: str
    path: str | None
    memory: list[bytes]
    outputs: tuple[Tensor, ...]

    def same(self, other: Outcome) -> bool:
        """Whether both did the same, known or not."""
        return self[1:4] == other[1:4]


@contextlib.contextmanager
def watched() -> Iterator[list[bool]]:
    """Whether `_again` knows the calls inside."""
    answers: list[bool] = []
    again = remembered.again

    def watching(*arguments: object) -> SortedBuffers | None:
        buffers = again(*arguments)
        answers.append(buffers is not None)
        return buffers

    remembered.again = watching
    try:
        yield answers
    finally:
        if remembered.again is watching:
            remembered.again = again


def outcome(target: Target, call: Arguments) -> Outcome:
    """Poisons the given outputs, makes the call and checks what it returns."""
    out = call["out"]
    given = [t for t in out or () if isinstance(t, Tensor) and not t.is_meta]
    for tensor in given:
        tensor.untyped_storage().fill_(POISON)
    error, path, outputs = "", None, ()
    with target.active(), watched() as answers:
        try:
            outputs = aiter.fused_moe.topk_softmax_sorting(**call)
            path = aiter.fused_moe.last_path()
        except (ValueError, TypeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    target.synchronize()
    if not error:
        assert out is None or outputs is out
        check_against_reference(call, outputs)
    # NOTE: of a copy, since memory that numpy has seen cannot be resized.
    memory = [storage_bytes(tensor).clone().cpu().numpy().tobytes() for tensor in given]
    for tensor in outputs if out is None else ():
        tensor.untyped_storage().fill_(POISON)
    return Outcome(answers == [True], error, path, memory, tuple(outputs))


def check_against_reference(call: Arguments, out: Sequence[Tensor]) -> None:
    """`out` holds what the reference makes of the call's contents."""
    plain = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in call.items()}
    outputs = [tensor.cpu() for tensor in out]
    del plain["dispatch_policy"], plain["out"]
    expected = reference.topk_softmax_sorting(**plain)
    check_sorted(outputs, expected, call["block_size"])
    slots, rows = expected[3].tolist()
    torch.testing.assert_close(outputs[1][:slots], expected[1][:slots], rtol=1e-6, atol=0)
    assert torch.count_nonzero(outputs[4][:rows].view(torch.uint8)) == 0


needs_exchange = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="no call is known to a PyTorch whose tensors have no C functions",
)


def known(target: Target, given: bool = True, **changes: Any) -> Arguments:
    """The arguments of a call that was made twice."""
    call = {**arguments(target, given=given), **changes}
    first, second = outcome(target, call), outcome(target, call)
    assert (first.known, second.known) == (False, True)
    assert first.same(second) and (first.error, first.path) == ("", "fused")
    return call
