"""Is a `topk_softmax_sorting` like an earlier one known, and nothing else taken for one?

The compiled module remembers the calls that passed its checks; what it takes for one of them is
launched without any. So every change of an argument is compared with what a fresh call, with nothing
remembered, makes of it: the same bytes in given outputs, or the same error. Whatever returns is
compared with the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from known import (
    EXPERTS,
    GIVEN,
    TOKENS,
    WIDTH,
    Arguments,
    arguments,
    drawn,
    known,
    needs_exchange,
    outcome,
    watched,
)
from targets import Target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import aiter.fused_moe
from aiter.routing import known as remembered
from aiter.routing.request import Request

Change = Callable[[Arguments], object]  # changes them in place


pytestmark = [pytest.mark.usefixtures("nothing_known"), needs_exchange]


@GIVEN
def test_new_logits_in_the_same_memory(target: Target, given: bool) -> None:
    call = known(target, given)
    for seed in range(1, 4):
        call["gating_output"].copy_(drawn(TOKENS, seed))
        assert outcome(target, call).known


@GIVEN
def test_mask_and_local_tokens_are_read_anew(target: Target, given: bool) -> None:
    mask = torch.ones(EXPERTS, dtype=torch.int32, device=target.device)
    count = torch.tensor([TOKENS], dtype=torch.int32, device=target.device)
    call = known(target, given, expert_mask=mask, num_local_tokens=count)
    mask[::2] = 0
    count.fill_(4)
    assert outcome(target, call).known
    call.update(expert_mask=1 - mask, num_local_tokens=count + 1)
    assert outcome(target, call).known


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


def moved(tensor: Tensor) -> Tensor:
    """A copy elsewhere, with the same strides."""
    room = torch.zeros(TOKENS + 3, 32, dtype=tensor.dtype, device=tensor.device)
    copy = room.as_strided(tensor.shape, tensor.stride(), 32)
    return copy.copy_(tensor)


def shifted(tensor: Tensor) -> Tensor:
    """A copy that begins an item behind a boundary of 16 bytes."""
    room = tensor.new_zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + 1)
    copy = room.as_strided(tensor.shape, tensor.stride(), 1)
    return copy.copy_(tensor)


SAME: dict[str, Change] = {
    "nothing": lambda call: None,
    "an equal int": to("model_dim", int("300")),
    "other logits in the same memory": replace("gating_output", lambda t: t[:]),
    "logits in other memory": replace("gating_output", moved),
    "logits moved in place": lambda call: call["gating_output"].set_(moved(call["gating_output"])),
}
SAME_OUT: dict[str, Change] = {
    "another tuple": replace("out", lambda out: (*out,)),
    "other tensors in the same memory": replace("out", lambda out: tuple(t[:] for t in out)),
    "all outputs elsewhere": replace("out", lambda out: tuple(t.clone() for t in out)),
    "other experts": other(2, torch.empty_like),
    "experts moved in place": in_place(2, lambda t: t.set_(torch.empty_like(t))),
    "weights where the ids were": replace(
        "out", lambda out: (out[1].view(torch.int32), out[0].view(torch.float32), *out[2:])
    ),
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
    "logits in dense rows": replace("gating_output", Tensor.contiguous),
    "logits off the boundary": replace("gating_output", shifted),
    "logits without memory": lambda call: call["gating_output"].untyped_storage().resize_(0),
}
DIFFERENT_OUT: dict[str, Change] = {
    "no outputs": to("out", None),
    "a list of outputs": replace("out", list),
    "four outputs": replace("out", lambda out: out[:4]),
    "no tensor among them": other(3, lambda _: None),
    "longer ids": in_place(0, lambda t: t.resize_(t.numel() + 1)),
    "shorter weights": in_place(1, lambda t: t.resize_(t.numel() - 1)),
    "ids off the boundary": other(0, shifted),
    "longer counts": in_place(3, lambda t: t.resize_(3)),
    "counts in strides": other(3, lambda t: torch.stack([t, t], dim=-1)[:, 0]),
    "moe_buf turned in place": in_place(4, Tensor.t_),
    "moe_buf of another dtype": other(4, lambda t: t.view(torch.float16)),
    "ids without memory": in_place(0, lambda t: t.untyped_storage().resize_(0)),
    "weights of another dtype": other(1, lambda t: t.view(torch.int32)),
    "weights over ids": lambda call: call["out"][1].set_(call["out"][0].view(torch.float32)),
    "counts among the ids": replace("out", lambda out: (*out[:3], out[0][204:206], out[4])),
    "logits over moe_buf": lambda call: call.update(
        gating_output=call["out"][4].as_strided((TOKENS, EXPERTS), (32, 1))
    ),
    "moe_buf on no device": other(4, lambda t: t.to("meta")),
}


@pytest.mark.parametrize("name", [*SAME, *SAME_OUT])
def test_the_same_is_known(target: Target, name: str) -> None:
    call = known(target)
    {**SAME, **SAME_OUT}[name](call)
    assert outcome(target, call).known


@pytest.mark.parametrize("name", SAME)
def test_the_same_without_out_is_known(target: Target, name: str) -> None:
    call = known(target, given=False)
    SAME[name](call)
    assert outcome(target, call).known


@pytest.mark.parametrize("name", [*DIFFERENT, *DIFFERENT_OUT])
def test_a_change_is_as_in_a_fresh_call(target: Target, name: str) -> None:
    call = known(target)
    {**DIFFERENT, **DIFFERENT_OUT}[name](call)
    check_change(target, call)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_change_without_out_is_as_in_a_fresh_call(target: Target, name: str) -> None:
    call = known(target, given=False)
    DIFFERENT[name](call)
    check_change(target, call)


def check_change(target: Target, call: Arguments) -> None:
    """The call is not known, and does what it does where nothing is."""
    after = outcome(target, call)
    remembered.forget()
    fresh = outcome(target, call)
    assert not after.known and after.same(fresh)


def test_outputs_for_a_call_that_had_none(target: Target) -> None:
    call = known(target, given=False)
    call["out"] = arguments(target)["out"]
    check_change(target, call)


@GIVEN
@pytest.mark.parametrize("name", ["expert_mask", "num_local_tokens"])
def test_what_is_taken_away_is_missed(target: Target, name: str, given: bool) -> None:
    mask = torch.tensor(HALF_MASK, dtype=torch.int32, device=target.device)
    count = torch.tensor([4], dtype=torch.int32, device=target.device)
    call = known(target, given, expert_mask=mask, num_local_tokens=count)
    call[name] = None
    assert not outcome(target, call).known


@pytest.mark.parametrize("name", ["expert_mask", "num_local_tokens"])
def test_an_input_in_the_memory_of_an_output_is_refused(target: Target, name: str) -> None:
    mask = torch.tensor(HALF_MASK, dtype=torch.int32, device=target.device)
    count = torch.tensor([4], dtype=torch.int32, device=target.device)
    call = known(target, expert_mask=mask, num_local_tokens=count)
    call[name] = call["out"][0][: call[name].numel()]
    after = outcome(target, call)
    assert not after.known and "overlaps" in after.error


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
    call = known(target)
    remembered.forget()
    assert not outcome(target, call).known and outcome(target, call).known
    monkeypatch.setenv("AITER_DISPATCH", "1")
    assert outcome(target, call).path == "fused"
    remembered.forget()
    for _ in range(2):
        again = outcome(target, call)
        assert not again.known and again.path != "fused" and again.error == ""


def test_the_path_of_a_known_call_is_told(target: Target) -> None:
    call = known(target)
    assert outcome(target, {**call, "dispatch_policy": 2}).path == "multiphase"
    assert outcome(target, call)[:3] == (True, "", "fused")


@pytest.mark.slow  # builds for both
def test_a_wave_width_knows_only_its_own() -> None:
    targets = [Target("cpu", 64), Target("cpu", 32)]
    call = arguments(targets[0])
    for _ in range(2):
        for target in targets:
            assert not outcome(target, call).known  # the other's module was the last
            assert outcome(target, call).known
    assert not outcome(Target("cpu"), call).known


def test_a_tensor_of_another_type_is_not_known(target: Target) -> None:
    """In the same memory, as what a tracer wraps may be."""
    call = known(target)
    call["gating_output"] = call["gating_output"].as_subclass(Subclass)
    request = Request(*(call[name] for name in PLAIN), call["dispatch_policy"], "slot", target.wave)
    others = (None, None, None, None, call["out"])
    assert remembered.again(request, call["gating_output"], *others) is None
    call["gating_output"] = call["gating_output"].as_subclass(Tensor)
    assert remembered.again(request, call["gating_output"], *others) is call["out"]


def test_a_tracer_sees_a_known_call(target: Target) -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> None:
            seen.append(func.name())

    seen: list[str] = []
    call = known(target)
    with target.active(), watched() as answers, Recorder():
        aiter.fused_moe.topk_softmax_sorting(**call)
    assert (answers, seen) == ([], ["aiter::topk_softmax_sorting_out"])
