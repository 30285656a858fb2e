"""Does `out=` write to the caller's buffers and nothing else, and is what does not fit refused?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from cases import Case, make_inputs
from runners import SortedOutputs, expected_sorted, reporting
from targets import Target
from torch import Tensor

import aiter.fused_moe
from aiter import reference
from aiter.ops.fused_topk_moe_sorting import FusedCalls
from aiter.routing import known as remembered
from aiter.routing import plan as routing_plan

POLICIES = (0, 1, 2)
CASE = Case(6, 24, 3, block_size=8, model_dim=5)
BUFFERS = tuple[Tensor, ...]


def route(case: Case, target: Target, policy: int, out: Any, **changes: Any) -> Any:
    inputs = make_inputs(case, target.device)
    with target.active():
        result = aiter.fused_moe.topk_softmax_sorting(
            **{
                "gating_output": inputs.gating,
                "topk": case.topk,
                "num_experts": case.num_experts,
                "model_dim": case.model_dim,
                "moebuf_dtype": case.moebuf_dtype,
                "need_renorm": case.need_renorm,
                "block_size": case.block_size,
                "expert_mask": inputs.mask,
                "num_local_tokens": inputs.num_local_tokens,
                "dispatch_policy": policy,
                **changes,
            },
            out=out,
        )
    target.synchronize()
    return result


@pytest.mark.parametrize("policy", POLICIES)
def test_writes_to_what_it_is_given(target: Target, policy: int) -> None:
    """The buffers lie between guards and hold poison; the same ones serve the next call."""
    for shape in ((1, 128, 4), (0, 24, 3), (50, 33, 9)):
        for options in ({}, {"mask": "random", "num_local": shape[0] // 2}):
            case = Case(*shape, logits="ties", **options)
            inputs = make_inputs(case, target.device)
            outputs = SortedOutputs.allocate(case, target.device)
            for _ in range(2):
                with reporting(f"policy {policy}, {case}", target):
                    assert route(case, target, policy, outputs.tensors) is not None
                    outputs.check(case, inputs, expected_sorted(case, inputs))


@pytest.mark.parametrize("policy", POLICIES)
def test_sorts_into_what_it_is_given(target: Target, policy: int) -> None:
    inputs = make_inputs(CASE, target.device)
    outputs = SortedOutputs.allocate(CASE, target.device)
    weights, ids = reference.topk_softmax(inputs.gating.cpu(), CASE.topk, CASE.need_renorm)
    with target.active():
        result = aiter.fused_moe.moe_sorting(
            ids.to(target.device),
            weights.to(target.device),
            CASE.num_experts,
            CASE.model_dim,
            CASE.moebuf_dtype,
            CASE.block_size,
            dispatch_policy=policy,
            out=outputs.tensors,
        )
    target.synchronize()
    assert result is outputs.tensors or result == outputs.tensors
    outputs.check(CASE, inputs, expected_sorted(CASE, inputs))


def test_the_same_tensors_come_back(target: Target) -> None:
    first = route(CASE, target, 0, None)
    again = route(CASE, target, 1, first)
    assert again is first
    with target.active():
        made = aiter.fused_moe.empty_sorted_buffers(
            6, 3, 24, 5, CASE.moebuf_dtype, 8, device=target.device
        )
    for ours, returned in zip(made, first, strict=True):
        assert (ours.shape, ours.dtype, ours.stride(), ours.device) == (
            returned.shape, returned.dtype, returned.stride(), returned.device,
        )  # fmt: skip
    assert route(CASE, target, 0, list(made))[0] is made[0]


def replaced(index: int, make: Callable[[Tensor], object]) -> Callable[[BUFFERS], Sequence[object]]:
    return lambda out: (*out[:index], make(out[index]), *out[index + 1 :])


def spread(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


REFUSED: list[tuple[str, Callable[[BUFFERS], object], type[Exception], str]] = [
    ("four tensors", lambda out: out[:4], TypeError, "out: expected 5 tensors.*got 4"),
    ("a number", lambda out: 5, TypeError, "out: expected 5 tensors.*got int"),
    ("a list in it", replaced(1, lambda t: [1.0]), TypeError, "sorted_weights, got list"),
    ("None in it", replaced(3, lambda t: None), TypeError, "num_valid_ids: expected a tensor"),
    ("long ids", replaced(0, lambda t: t.new_empty(208)), ValueError, r"sorted_ids.*207.*208"),
    ("short weights", replaced(1, lambda t: t[:-1]), ValueError, r"sorted_weights.*207.*206"),
    ("long experts", replaced(2, lambda t: t.new_empty(27)), ValueError, r"sorted_expert.*26.*27"),
    ("flat moe_buf", replaced(4, lambda t: t.view(-1)), ValueError, r"moe_buf.*\[6, 5\].*\[30\]"),
    ("wide moe_buf", replaced(4, lambda t: t.new_empty(6, 6)), ValueError, r"moe_buf.*\[6, 6\]"),
    ("square ids", replaced(0, lambda t: t.view(9, 23)), ValueError, "sorted_(token_)?ids.*rank 1"),
    ("other moe_buf", replaced(4, lambda t: t.double()), ValueError, "moe_buf of dtype.*float64"),
    ("long counts", replaced(3, lambda t: t.new_empty(3)), ValueError, r"num_valid_ids.*\[2\]"),
    ("64-bit ids", replaced(0, lambda t: t.long()), ValueError, "sorted_(token_)?ids.*int32"),
    ("16-bit weights", replaced(1, lambda t: t.half()), ValueError, "sorted_weights.*float32"),
    ("strided weights", replaced(1, spread), ValueError, "sorted_weights.*contiguous"),
    ("strided moe_buf", replaced(4, spread), ValueError, "moe_buf.*contiguous"),
    ("meta ids", replaced(0, lambda t: t.to("meta")), ValueError, "sorted_(token_)?ids.*expected"),
    (
        "weights over ids",
        lambda out: (out[0], out[0].view(torch.float32), *out[2:]),
        ValueError,
        "overlaps",
    ),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "change", "kind", "words"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(
    target: Target,
    name: str,
    change: Callable[[BUFFERS], object],
    kind: type[Exception],
    words: str,
    policy: int,
) -> None:
    outputs = SortedOutputs.allocate(CASE, target.device)
    with pytest.raises(kind, match=words):
        route(CASE, target, policy, change(outputs.tensors))
    target.synchronize()
    for buffer in outputs.buffers:
        buffer.check_untouched()


@pytest.mark.usefixtures("nothing_known")
def test_routes_where_the_binding_leaves_the_outputs_to_python(
    monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    """As it does in a PyTorch whose tensors it cannot read by the exchange."""
    plan = routing_plan.plan_routing

    def declined_plan(*sizes: Any) -> routing_plan.Plan:
        made = plan(*sizes)
        return made._replace(fused=FusedCalls(lambda *_: False, lambda *_: None))

    monkeypatch.setattr(routing_plan, "plan_routing", declined_plan)
    remembered.forget()  # what an earlier test called is answered without a plan
    for options in ({}, {"mask": "random", "num_local": 3}):
        case = replace(CASE, **options)
        inputs = make_inputs(case, target.device)
        outputs = SortedOutputs.allocate(case, target.device)
        out = outputs.tensors
        assert route(case, target, 0, out) is out
        outputs.check(case, inputs, expected_sorted(case, inputs))
        assert aiter.fused_moe.last_path() == "fused"
        with pytest.raises(ValueError, match="moe_buf of dtype"):
            route(case, target, 0, out, moebuf_dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "good", "bad", "kind"),
    [
        ("topk", 1, True, TypeError),
        ("topk", 1, 1.0, TypeError),
        ("topk", 1, [1], TypeError),
        ("block_size", 1, True, TypeError),
        ("model_dim", 1, 1.0, TypeError),
        ("dispatch_policy", 1, True, TypeError),
        ("dispatch_policy", 1, 3, ValueError),
        ("num_experts", 24, 24.0, TypeError),
        ("moebuf_dtype", torch.float32, "torch.float32", TypeError),
    ],
)
def test_a_good_call_excuses_no_bad_one(
    target: Target, name: str, good: object, bad: object, kind: type[Exception]
) -> None:
    """What is remembered about shapes does not take an equal value of another type for it."""
    for _ in range(2):
        route(CASE, target, 0, None, **{name: good})
        with pytest.raises(kind, match=f"{name}.*expected.*got"):
            route(CASE, target, 0, None, **{name: bad})


@pytest.mark.parametrize(
    ("tokens", "kind"), [(-1, ValueError), (2.0, TypeError), (None, TypeError)]
)
def test_sizes_of_empty_buffers(tokens: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="tokens: expected"):
        aiter.fused_moe.empty_sorted_buffers(tokens, 3, 24, 5, torch.float32, device="cpu")
