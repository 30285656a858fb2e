"""Is every wrong argument refused before a launch, in a sentence that helps?

Each item changes one argument of a valid call and expects the exact exception type, the argument's
name, "expected", "got" and the offending value in the message, and all outputs untouched.
TypeError is for a thing of the wrong Python type, ValueError for everything else.
"""

from __future__ import annotations

from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from bad_input import (
    Bad,
    bad_int,
    bad_tensor,
    check_refused,
    constant,
    replaced,
    sorted_buffer_mistakes,
)
from buffers import GuardedBuffer
from cases import Case, make_inputs
from runners import SortedOutputs, fused_arguments
from targets import Target

import aiter
import aiter.fused_moe

CASE = Case(6, 24, 3, block_size=8, model_dim=5)
HUGE = (2**31, 2**40, 2**70)


def _gating_width(change: int) -> Bad:
    words = ("gating_output", "num_experts", "24", str(24 + change))
    return Bad(
        f"gating_output has {24 + change} columns",
        replaced("gating_output", lambda t: t.new_zeros(t.shape[0], 24 + change)),
        words,
    )


GATING = [
    *bad_tensor("gating_output", torch.float64),
    *bad_tensor("gating_output", torch.int32)[2:3],
    Bad("gating_output is flat", replaced("gating_output", lambda t: t[0]), ("gating_output",)),
]
RENORM = [
    Bad(
        f"need_renorm is {value!r}",
        constant("need_renorm", value),
        ("need_renorm", "bool", type(value).__name__),
        TypeError,
    )
    for value in (1, None, "yes", 1.0)
]
FUSED = [
    *GATING,
    _gating_width(-1),
    _gating_width(1),
    *bad_tensor("sorted_ids", torch.int64),
    Bad(
        "sorted_ids is one short",
        replaced("sorted_ids", lambda t: t[:-1]),
        ("sorted_ids", "207", "206"),
    ),
    *sorted_buffer_mistakes("gating_output"),
    *bad_int("topk", (0, 25, 256, *HUGE)),
    *bad_int("num_experts", (0, *HUGE)),
    *bad_int("unit_size", (0, *HUGE)),
    *RENORM,
]


@pytest.mark.parametrize("bad", FUSED, ids=str)
def test_fused(target: Target, bad: Bad) -> None:
    outputs = SortedOutputs.allocate(CASE, target.device)
    arguments = fused_arguments(CASE, make_inputs(CASE, target.device), outputs)
    check_refused(bad, aiter.fused_topk_moe_sorting_fwd, arguments, outputs, target)


def test_fused_topk_beyond_255(target: Target) -> None:
    case = Case(2, 300, 255, block_size=2)
    outputs = SortedOutputs.allocate(case, target.device)
    arguments = fused_arguments(case, make_inputs(case, target.device), outputs)
    bad = Bad("topk = 256", constant("topk", 256), ("topk", "255", "256"))
    check_refused(bad, aiter.fused_topk_moe_sorting_fwd, arguments, outputs, target)


@pytest.mark.parametrize("argument", ["num_experts", "topk"])
@pytest.mark.parametrize("value", [0, -1, 2**40, 2.0, None])
def test_max_tokens(target: Target, argument: str, value: Any) -> None:
    """Sizes that no launch can have are refused, not answered with 0."""
    sizes = {"num_experts": 8, "topk": 2, argument: value}
    kind = ValueError if isinstance(value, int) else TypeError
    with target.active(), pytest.raises(kind, match=f"{argument}.*expected.*got"):
        aiter.fused_topk_moe_sorting_max_tokens(**sizes, device=torch.device(target.device))


SORTING = [
    *bad_tensor("topk_ids", torch.int64),
    *bad_tensor("topk_weights", torch.float16),
    *bad_tensor("sorted_token_ids", torch.int64),
    Bad("topk_weights is short", replaced("topk_weights", lambda t: t[:-1]), ("topk_weights",)),
    Bad("topk_weights is narrow", replaced("topk_weights", lambda t: t[:, :2]), ("topk_weights",)),
    Bad(
        "sorted_token_ids is one short",
        replaced("sorted_token_ids", lambda t: t[:-1]),
        ("sorted_token_ids", r"\d"),
    ),
    Bad("fewer experts than topk", constant("num_experts", 2), ("num_experts|topk", "2", "3")),
    *(
        bad
        for bad in sorted_buffer_mistakes("topk_weights")
        if bad.name != "sorted_ids|sorted_weights overlaps sorted_weights|sorted_ids"
    ),
    *bad_int("num_experts", (0, *HUGE)),
    *bad_int("unit_size", (0, *HUGE)),
    *bad_int("dispatch_policy", (3, *HUGE)),
    Bad("workspace is a list", constant("workspace", [0]), ("workspace", "list"), TypeError),
]


def sorting_arguments(case: Case, outputs: SortedOutputs, device: str) -> dict[str, Any]:
    """Valid arguments of ``moe_sorting_opus_fwd`` but for the workspace."""
    ids = torch.arange(case.topk, dtype=torch.int32, device=device).repeat(case.num_tokens, 1)
    return {
        "topk_ids": ids,
        "topk_weights": torch.full(ids.shape, 1 / case.topk, device=device),
        "sorted_token_ids": outputs.buffers[0].tensor,
        **{buffer.name: buffer.tensor for buffer in outputs.buffers[1:]},
        "num_experts": case.num_experts,
        "unit_size": case.block_size,
        "local_expert_mask": None,
        "num_local_tokens": None,
        "workspace": None,
        "dispatch_policy": 1,
    }


@pytest.mark.parametrize("bad", SORTING, ids=str)
def test_sorting(target: Target, bad: Bad) -> None:
    outputs = SortedOutputs.allocate(CASE, target.device)
    arguments = sorting_arguments(CASE, outputs, target.device)
    check_refused(bad, aiter.moe_sorting_opus_fwd, arguments, outputs, target)


def test_workspace(target: Target) -> None:
    """A multi-phase sort needs its whole workspace, on its device, apart from the outputs."""
    case = Case(4096, 128, 4, model_dim=1)
    outputs = SortedOutputs.allocate(case, target.device)
    with target.active():
        size = aiter.moe_sorting_opus_get_workspace_size(4096, 128, 4, 2)
    assert size > 0, "expected the multi-phase sort of 4096 tokens to need a workspace"
    arguments: dict[str, Any] = {
        **sorting_arguments(case, outputs, target.device),
        "dispatch_policy": 2,
        "workspace": torch.zeros(size, dtype=torch.uint8, device=target.device),
    }
    for bad in (
        Bad("no workspace", constant("workspace", None), ("workspace", str(size))),
        Bad(
            "workspace is one byte short",
            replaced("workspace", lambda t: t[:-1]),
            ("workspace", str(size), str(size - 1)),
        ),
        Bad("empty workspace", replaced("workspace", lambda t: t[:0]), ("workspace", str(size))),
        Bad("workspace on meta", replaced("workspace", lambda t: t.to("meta")), ("workspace",)),
    ):
        check_refused(bad, aiter.moe_sorting_opus_fwd, arguments, outputs, target)


def test_too_many_tokens_for_an_entry(target: Target) -> None:
    """2**24 tokens do not fit 24 bits."""
    case = Case(1 << 24, 24, 1, block_size=8, model_dim=1)
    vector = torch.empty(case.capacity, dtype=torch.int32, device=target.device)
    arguments: dict[str, Any] = {
        "topk_ids": vector[: case.num_tokens, None],
        "topk_weights": torch.empty(case.num_tokens, 1, device=target.device),
        "sorted_token_ids": torch.empty_like(vector),
        "sorted_weights": torch.empty(case.capacity, device=target.device),
        "sorted_expert_ids": torch.empty_like(vector)[: case.max_blocks],
        "num_valid_ids": torch.empty_like(vector)[:2],
        "moe_buf": torch.empty(case.num_tokens, 1, dtype=torch.bfloat16, device=target.device),
        "num_experts": case.num_experts,
        "unit_size": case.block_size,
        "dispatch_policy": 1,
    }
    with target.active(), pytest.raises(ValueError, match=r"topk_ids.*expected.*got.*16777216"):
        aiter.moe_sorting_opus_fwd(**arguments)


SOFTMAX = [
    *GATING,
    *bad_tensor("topk_weights", torch.float16),
    *bad_tensor("topk_indices", torch.int64),
    *bad_tensor("token_expert_indices", torch.int64),
    *(
        Bad(f"{name} is one short", replaced(name, lambda t: t[:-1]), (name,))
        for name in ("topk_weights", "topk_indices", "token_expert_indices")
    ),
    Bad("topk_indices is narrow", replaced("topk_indices", lambda t: t[:, :2]), ("topk_indices",)),
    Bad(
        "fewer experts than topk",
        replaced("gating_output", lambda t: t[:, :2].contiguous()),
        ("topk|gating_output", "2", "3"),
    ),
    Bad(
        "topk_indices overlaps token_expert_indices",
        lambda a: {"topk_indices": a["token_expert_indices"]},
        ("topk_indices", "token_expert_indices", "overlap|share"),
    ),
    *RENORM,
]


@pytest.mark.parametrize("bad", SOFTMAX, ids=str)
def test_topk_softmax(target: Target, bad: Bad) -> None:
    shape = (CASE.num_tokens, CASE.topk)
    outputs = SortedOutputs(
        (
            GuardedBuffer("topk_weights", shape, torch.float32, target.device),
            GuardedBuffer("topk_indices", shape, torch.int32, target.device),
            GuardedBuffer("token_expert_indices", shape, torch.int32, target.device),
        )
    )
    arguments: dict[str, Any] = {
        **{buffer.name: buffer.tensor for buffer in outputs.buffers},
        "gating_output": make_inputs(CASE, target.device).gating,
        "need_renorm": True,
    }
    check_refused(bad, aiter.topk_softmax, arguments, outputs, target)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"gating_output": None}, TypeError, "gating_output.*expected.*got"),
        ({"topk": 25}, ValueError, "topk.*expected.*got"),
        ({"topk": 2.0}, TypeError, "topk.*expected.*got"),
        ({"num_experts": 23}, ValueError, "gating_output.*expected.*got"),
        ({"model_dim": -1}, ValueError, "model_dim.*expected.*got"),
        ({"model_dim": "5"}, TypeError, "model_dim.*expected.*got"),
        ({"moebuf_dtype": "bf16"}, TypeError, "moebuf_dtype.*expected.*got"),
        ({"need_renorm": 1}, TypeError, "need_renorm.*expected.*got"),
        ({"block_size": 0}, ValueError, "block_size|unit_size"),
        ({"block_size": 2**40}, ValueError, "block_size|unit_size"),
        ({"expert_mask": [1]}, TypeError, "expert_mask.*expected.*got"),
        ({"num_local_tokens": 3}, TypeError, "num_local_tokens.*expected.*got"),
        ({"dispatch_policy": "1"}, TypeError, "dispatch_policy.*expected.*got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("policy", [0, 1, 2])
def test_routing_function(
    target: Target, changes: dict[str, Any], kind: type[Exception], words: str, policy: int
) -> None:
    arguments: dict[str, Any] = {
        "gating_output": make_inputs(CASE, target.device).gating,
        "topk": 3,
        "num_experts": 24,
        "model_dim": 5,
        "moebuf_dtype": torch.bfloat16,
        "dispatch_policy": policy,
        **changes,
    }
    with target.active(), pytest.raises(kind, match=words):
        aiter.fused_moe.topk_softmax_sorting(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"hidden_states": None}, TypeError, "hidden_states.*expected.*got"),
        ({"hidden_states": torch.zeros(5, 4)}, ValueError, "hidden_states.*expected.*6.*got.*5"),
        ({"gating_output": [[1.0]]}, TypeError, "gating_output.*expected.*got"),
        ({"topk": 25}, ValueError, "topk.*expected.*got"),
        ({"topk": 0}, ValueError, "topk.*expected.*got"),
        ({"topk": None}, TypeError, "topk.*expected.*got"),
        ({"renormalize": 1}, TypeError, "renorm.*expected.*got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_selection_function(
    target: Target, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    arguments: dict[str, Any] = {
        "hidden_states": torch.zeros(6, 4, device=target.device),
        "gating_output": make_inputs(CASE, target.device).gating,
        "topk": 3,
        "renormalize": True,
        **changes,
    }
    with target.active(), pytest.raises(kind, match=words):
        aiter.fused_moe.fused_topk(**arguments)
