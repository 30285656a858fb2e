"""Do known calls keep to what a call of `topk_softmax_sorting` owes its caller?

New outputs are new memory of PyTorch's own, launches go to the current stream, threads may make calls
and forget them at any time.
"""

from __future__ import annotations

import threading

import _checkout  # noqa: F401
import pytest
import torch
from buffers import POISON
from known import (
    GIVEN,
    TOKENS,
    arguments,
    check_against_reference,
    drawn,
    known,
    needs_exchange,
    outcome,
    watched,
)
from targets import Target
from torch import Tensor

import aiter.fused_moe
from aiter.ops.fused_topk_moe_sorting import fused_topk_moe_sorting_forget
from aiter.routing import buffers as moe_buffers

pytestmark = [pytest.mark.usefixtures("nothing_known"), needs_exchange]


def test_new_outputs_are_new(target: Target) -> None:
    """No two calls write to the same memory while their outputs live, and all are PyTorch's own."""
    call = known(target, given=False)
    kept = [outcome(target, call) for _ in range(4)]
    assert all(each.known for each in kept)
    tensors = [tensor for each in kept for tensor in each.outputs]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    fresh = arguments(target)["out"]
    for each in kept:
        for ours, other in zip(each.outputs, fresh, strict=True):
            assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
                other.shape, other.stride(), other.dtype, other.device,
            )  # fmt: skip
            assert ours._base is None and ours.untyped_storage().nbytes() == ours.nbytes


def test_new_outputs_are_filled_where_pytorch_fills_memory(target: Target) -> None:
    call = known(target, given=False)
    torch.use_deterministic_algorithms(True)
    try:
        with target.active(), watched() as answers:
            out = aiter.fused_moe.topk_softmax_sorting(**call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert answers == [False] and int(out[0][-1]) == torch.iinfo(torch.int32).max
    check_against_reference(call, out)
    assert outcome(target, call).known


def test_new_outputs_are_where_the_logits_are(target: Target) -> None:
    """Not on the GPU that is the current one."""
    if torch.cuda.device_count() < 2 or target.device == "cpu":
        pytest.skip("needs two GPUs")
    call = known(target, given=False)
    with torch.cuda.device(1):
        after = outcome(target, call)
    assert not after.known and {t.device for t in after.outputs} == {call["gating_output"].device}


def test_memory_that_cannot_be_had_is_an_error(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "_quick_cpu" if target.device == "cpu" else "_quick_gpu"
    quick = getattr(moe_buffers, name)
    if quick is None:
        pytest.skip("this PyTorch has no quick allocator")
    left = [8]

    def scarce(*layout: object) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory left")
        return quick(*layout)

    monkeypatch.setattr(moe_buffers, name, scarce)
    call = arguments(target, given=False)
    assert not outcome(target, call).known
    with watched() as answers, pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        outcome(target, call)
    assert (answers, left) == ([], [-1])
    left[0] = 5
    assert outcome(target, call).known


@pytest.mark.slow
@pytest.mark.slow
def test_more_calls_than_are_remembered(target: Target) -> None:
    """Of 300 calls some take the places of others; all are answered right, whoever is known."""
    calls = [arguments(target, 1, width, width) for width in range(1, 301)]
    for call in calls:
        outcome(target, call)
        assert outcome(target, call).known
    times_known = 0
    for call in calls:
        call["gating_output"].neg_()
        times_known += outcome(target, call).known
    assert 0 < times_known < len(calls)


def test_calls_that_take_turns_are_both_known(target: Target) -> None:
    """As those of two models, or of two GPUs, in one process; places are few, so not every pair."""
    times_known = 0
    for width in range(1, 21):
        call = arguments(target, 1, width=width)
        other = {**call, "gating_output": call["gating_output"].half()}
        for each in (call, other):
            outcome(target, each)
        times_known += all(outcome(target, each).known for each in (call, other))
    assert times_known > 10


def test_threads(target: Target) -> None:
    """Each makes calls of its own, while one forgets them all, also under a running launch."""
    failures: list[BaseException] = []
    done = threading.Event()

    def work(seed: int) -> None:
        try:
            call = arguments(target, 2, seed, given=seed % 2 == 0)
            for step in range(30):
                call["gating_output"].copy_(drawn(2, 100 * seed + step))
                for tensor in call["out"] or ():
                    tensor.untyped_storage().fill_(POISON)
                target.synchronize()
                with target.active():
                    out = aiter.fused_moe.topk_softmax_sorting(**call)
                target.synchronize()
                check_against_reference(call, out)
        except BaseException as failure:
            failures.append(failure)

    def forget() -> None:
        while not done.wait(0.0005):
            fused_topk_moe_sorting_forget()

    with target.active():
        aiter.fused_moe.topk_softmax_sorting(
            **arguments(target, 2)
        )  # built before the threads start
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    forgetter = threading.Thread(target=forget)
    for thread in (forgetter, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    forgetter.join()
    assert failures == []


@GIVEN
def test_a_known_call_runs_on_the_current_stream(target: Target, given: bool) -> None:
    """Behind what the stream has to do before, here a change of the logits."""
    if target.device == "cpu":
        pytest.skip("the cpu target has no streams")
    call = known(target, given)
    later = drawn(TOKENS, 7).to(target.device)
    target.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), watched() as answers:
        torch.cuda._sleep(20_000_000)
        call["gating_output"].copy_(later)
        out = aiter.fused_moe.topk_softmax_sorting(**call)
    target.synchronize()
    assert answers == [True]
    check_against_reference(call, out)
