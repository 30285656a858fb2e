"""Is a repeated `topk_softmax_sorting` recognised, and nothing else taken for one?

The compiled module remembers the calls with `out=` that passed its checks; what it takes for one of
them is launched without any. So every change of an argument is compared with what a fresh call, with
nothing remembered, makes of it: the same bytes in the outputs, or the same error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from buffers import POISON
from repeated import (
    EXPERTS,
    TOKENS,
    WIDTH,
    Arguments,
    arguments,
    check_against_reference,
    drawn,
    outcome,
    remembered,
    watched,
)
from targets import Target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import aiter.fused_moe
from aiter import moe_routing, routing_plan
from aiter.jit import cpu_wave
from aiter.ops.fused_topk_moe_sorting import fused_topk_moe_sorting_forget

Change = Callable[[Arguments], object]  # changes them in place


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    routing_plan.forget()
    yield
    routing_plan.forget()


def test_new_logits_in_the_same_memory(target: Target) -> None:
    call = remembered(target)
    for seed in range(1, 4):
        call["gating_output"].copy_(drawn(TOKENS, seed))
        assert outcome(target, call).known
        check_against_reference(call)


def test_mask_and_local_tokens_are_read_anew(target: Target) -> None:
    mask = torch.ones(EXPERTS, dtype=torch.int32, device=target.device)
    count = torch.tensor([TOKENS], dtype=torch.int32, device=target.device)
    call = remembered(target, expert_mask=mask, num_local_tokens=count)
    mask[::2] = 0
    count.fill_(4)
    assert outcome(target, call).known
    check_against_reference(call)


def replace(name: str, make: Callable[[Any], object]) -> Change:
    return lambda call: call.update({name: make(call[name])})


def to(name: str, value: object) -> Change:
    return replace(name, lambda _: value)


def in_place(index: int, change: Callable[[Tensor], object]) -> Change:
    """Changes a tensor of `out` and leaves the tuple as it is."""
    return lambda call: change(call["out"][index])


def other(index: int, make: Callable[[Tensor], object]) -> Change:
    return replace("out", lambda out: (*out[:index], make(out[index]), *out[index + 1 :]))


def on_device(name: str, value: list[int]) -> Change:
    def change(call: Arguments) -> None:
        call[name] = torch.tensor(value, dtype=torch.int32, device=call["gating_output"].device)

    return change


class Three(int):
    """An int that may be anything but 3 when it is asked."""


class Subclass(Tensor):
    """A tensor of another type, as a tracer's."""


PLAIN = ("topk", "num_experts", "model_dim", "moebuf_dtype", "need_renorm", "block_size")
HALF_MASK = [0, 1] * (EXPERTS // 2)

SAME: dict[str, Change] = {
    "nothing": lambda call: None,
    "an equal int": to("model_dim", int("300")),
    "another tuple": replace("out", lambda out: (*out,)),
    "other tensors in the same memory": replace("out", lambda out: tuple(t[:] for t in out)),
    "other logits in the same memory": replace("gating_output", lambda t: t[:]),
}

DIFFERENT: dict[str, Change] = {
    "topk": to("topk", 2),
    "topk, a float": to("topk", 3.0),
    "topk, another kind of int": to("topk", Three(3)),
    "num_experts": to("num_experts", 23),
    "model_dim": to("model_dim", 301),
    "moebuf_dtype": to("moebuf_dtype", torch.float16),
    "need_renorm": to("need_renorm", False),
    "need_renorm, an int": to("need_renorm", 1),
    "block_size": to("block_size", 4),
    "policy 1": to("dispatch_policy", 1),
    "policy 2": to("dispatch_policy", 2),
    "policy 3": to("dispatch_policy", 3),
    "policy, a bool": to("dispatch_policy", False),
    "a mask": on_device("expert_mask", HALF_MASK),
    "a short mask": on_device("expert_mask", HALF_MASK[1:]),
    "a mask, a list": to("expert_mask", HALF_MASK),
    "num_local_tokens": on_device("num_local_tokens", [4]),
    "num_local_tokens, an int": to("num_local_tokens", 4),
    "negated logits": replace("gating_output", torch._neg_view),
    "a parameter": replace("gating_output", lambda t: torch.nn.Parameter(t, requires_grad=False)),
    "a list": replace("gating_output", Tensor.tolist),
    "logits of another dtype": replace("gating_output", lambda t: t.view(torch.float16)),
    "integer logits": replace("gating_output", lambda t: t.view(torch.int16)),
    "logits of another stride": replace("gating_output", lambda t: t.as_strided(t.shape, (24, 1))),
    "logits in columns": replace("gating_output", lambda t: t.as_strided(t.shape, (1, 6))),
    "fewer logits": replace("gating_output", lambda t: t[:5]),
    "narrower logits": replace("gating_output", lambda t: t[:, :23]),
    "flat logits": replace("gating_output", lambda t: t[0]),
    "logits in other memory": replace("gating_output", Tensor.clone),
    "logits moved in place": lambda call: call["gating_output"].set_(call["gating_output"].clone()),
    "a list of outputs": replace("out", list),
    "four outputs": replace("out", lambda out: out[:4]),
    "no tensor among them": other(3, lambda _: None),
    "longer ids": in_place(0, lambda t: t.resize_(t.numel() + 1)),
    "shorter weights": in_place(1, lambda t: t.resize_(t.numel() - 1)),
    "other experts": other(2, torch.empty_like),
    "experts moved in place": in_place(2, lambda t: t.set_(torch.empty_like(t))),
    "longer counts": in_place(3, lambda t: t.resize_(3)),
    "counts in strides": other(3, lambda t: torch.stack([t, t], dim=-1)[:, 0]),
    "moe_buf turned in place": in_place(4, Tensor.t_),
    "moe_buf of another dtype": other(4, lambda t: t.view(torch.float16)),
    "ids without memory": in_place(0, lambda t: t.untyped_storage().resize_(0)),
    "weights of another dtype": other(1, lambda t: t.view(torch.int32)),
    "weights over ids": lambda call: call["out"][1].set_(call["out"][0].view(torch.float32)),
    "moe_buf on no device": other(4, lambda t: t.to("meta")),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_is_known(target: Target, name: str) -> None:
    call = remembered(target)
    SAME[name](call)
    assert outcome(target, call).known
    check_against_reference(call)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_change_is_as_in_a_fresh_call(target: Target, name: str) -> None:
    call = remembered(target)
    DIFFERENT[name](call)
    after = outcome(target, call)
    routing_plan.forget()
    fresh = outcome(target, call)
    assert not after.known and after == fresh


@pytest.mark.parametrize("name", ["expert_mask", "num_local_tokens"])
def test_what_is_taken_away_is_missed(target: Target, name: str) -> None:
    mask = torch.tensor(HALF_MASK, dtype=torch.int32, device=target.device)
    count = torch.tensor([4], dtype=torch.int32, device=target.device)
    call = remembered(target, expert_mask=mask, num_local_tokens=count)
    call[name] = None
    assert not outcome(target, call).known
    check_against_reference(call)


DTYPES = [
    ("uint8", "int8", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    ("bfloat16", "float16", "int16", "uint16"),
    ("float32", "int32", "uint32", "complex32"),
    ("float64", "int64", "uint64", "complex64"),
]


@pytest.mark.parametrize("names", DTYPES)
def test_every_dtype_of_moe_buf_is_told_from_every_other(
    target: Target, names: tuple[str, ...]
) -> None:
    dtypes = [getattr(torch, name) for name in names]
    call = arguments(target)
    first, raw = call["out"][:4], torch.empty(TOKENS, WIDTH, dtype=dtypes[0], device=target.device)
    for dtype in dtypes:
        for asked in dtypes:
            call.update(moebuf_dtype=asked, out=(*first, raw.view(asked)))
            assert outcome(target, call).path == "fused"
            call["out"] = (*first, raw.view(dtype))
            assert bool(outcome(target, call).error) == (dtype != asked), (dtype, asked)


def test_nothing_is_known_after_forget(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides between the paths may have changed."""
    call = remembered(target)
    routing_plan.forget()
    assert not outcome(target, call).known and outcome(target, call).known
    monkeypatch.setenv("AITER_DISPATCH", "1")
    assert outcome(target, call).path == "fused"
    routing_plan.forget()
    for _ in range(2):
        again = outcome(target, call)
        assert not again.known and again.path != "fused" and again.error == ""


def test_the_path_of_a_known_call_is_told(target: Target) -> None:
    call = remembered(target)
    assert outcome(target, {**call, "dispatch_policy": 2}).path == "multiphase"
    assert outcome(target, call)[:3] == (True, "", "fused")


def test_a_call_without_out_is_not_remembered(target: Target) -> None:
    call = arguments(target)
    with target.active(), watched() as answers:
        out = aiter.fused_moe.topk_softmax_sorting(**{**call, "out": None})
    assert answers == []
    assert not outcome(target, {**call, "out": out}).known


def test_a_wave_width_knows_only_its_own() -> None:
    targets = [Target("cpu", 64), Target("cpu", 32)]
    call = arguments(targets[0])
    for _ in range(2):
        for target in targets:
            assert not outcome(target, call).known  # the other's module was the last
            assert outcome(target, call).known
            check_against_reference(call)
    assert not outcome(Target("cpu"), call).known
    with cpu_wave(64):
        assert not outcome(Target("cpu"), call).known


def test_a_tensor_of_another_type_is_not_known(target: Target) -> None:
    """In the same memory, as what a tracer wraps may be."""
    call = remembered(target)
    call["gating_output"] = call["gating_output"].as_subclass(Subclass)
    names = ("gating_output", *PLAIN, "expert_mask", "num_local_tokens", "dispatch_policy", "out")
    assert not moe_routing._again(*(call[name] for name in names), target.wave)
    call["gating_output"] = call["gating_output"].as_subclass(Tensor)
    assert moe_routing._again(*(call[name] for name in names), target.wave)


def test_a_tracer_sees_a_known_call(target: Target) -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> None:
            seen.append(func.name())

    seen: list[str] = []
    call = remembered(target)
    with target.active(), watched() as answers, Recorder():
        aiter.fused_moe.topk_softmax_sorting(**call)
    assert (answers, seen) == ([], ["aiter::topk_softmax_sorting_out"])


def test_more_calls_than_are_remembered(target: Target) -> None:
    """Of 300 calls some take the places of others; all are answered right, whoever is known."""
    calls = [arguments(target, 1, seed) for seed in range(300)]
    for call in calls:
        outcome(target, call)
        assert outcome(target, call).known
    known = 0
    for call in calls:
        call["gating_output"].neg_()
        known += outcome(target, call).known
        check_against_reference(call)
    assert 0 < known < len(calls)


def test_threads(target: Target) -> None:
    """Each has calls of its own, while one forgets them all, also under a running launch."""
    failures: list[BaseException] = []
    done = threading.Event()

    def work(seed: int) -> None:
        try:
            call = arguments(target, 2, seed)
            for step in range(30):
                call["gating_output"].copy_(drawn(2, 100 * seed + step))
                for tensor in call["out"]:
                    tensor.untyped_storage().fill_(POISON)
                target.synchronize()
                with target.active():
                    aiter.fused_moe.topk_softmax_sorting(**call)
                target.synchronize()
                check_against_reference(call)
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


def test_a_known_call_runs_on_the_current_stream(target: Target) -> None:
    """Behind what the stream has to do before, here a change of the logits."""
    if target.device == "cpu":
        pytest.skip("the cpu target has no streams")
    call = remembered(target)
    later = drawn(TOKENS, 7).to(target.device)
    target.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), watched() as answers:
        torch.cuda._sleep(20_000_000)
        call["gating_output"].copy_(later)
        aiter.fused_moe.topk_softmax_sorting(**call)
    target.synchronize()
    assert answers == [True]
    check_against_reference(call)
