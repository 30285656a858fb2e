"""Are the public signatures the documented ones? Callers rely on names, order and defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import _checkout  # noqa: F401
import pytest
import torch

import aiter
import aiter.fused_moe
from aiter import dtypes, reference

SORT_OUTPUTS = "sorted_weights sorted_expert_ids num_valid_ids moe_buf num_experts"

SIGNATURES: list[tuple[Callable[..., object], str]] = [
    (
        aiter.topk_softmax,
        "topk_weights topk_indices token_expert_indices gating_output need_renorm num_shared_experts=0"
        " shared_expert_scoring_func=",
    ),
    (
        aiter.moe_sorting_opus_get_workspace_size,
        "tokens num_experts topk dispatch_policy=0",
    ),
    (
        aiter.moe_sorting_opus_fwd,
        f"topk_ids topk_weights sorted_token_ids {SORT_OUTPUTS} unit_size local_expert_mask=None "
        "num_local_tokens=None workspace=None dispatch_policy=0 local_topk_ids=None "
        "m_indices=None reverse_sorted=None",
    ),
    (
        aiter.moe_sorting_fwd,
        f"topk_ids topk_weights sorted_token_ids {SORT_OUTPUTS} unit_size local_expert_mask=None "
        "num_local_tokens=None dispatch_policy=0",
    ),
    (
        aiter.fused_topk_moe_sorting_fwd,
        f"gating_output sorted_ids {SORT_OUTPUTS} topk unit_size need_renorm",
    ),
    (aiter.fused_topk_moe_sorting_max_tokens, "num_experts topk"),
    (
        aiter.fused_moe.topk_softmax_sorting,
        "gating_output topk num_experts model_dim moebuf_dtype need_renorm=True block_size=32 "
        "expert_mask=None num_local_tokens=None dispatch_policy=0",
    ),
    (
        aiter.fused_moe.moe_sorting,
        "topk_ids topk_weights num_experts model_dim moebuf_dtype block_size=32 "
        "expert_mask=None num_local_tokens=None dispatch_policy=0 return_local_topk_ids=False "
        "accumulate=True flat=False output_aux=False",
    ),
    (
        aiter.fused_moe.fused_topk,
        "hidden_states gating_output topk renormalize topk_ids=None topk_weights=None",
    ),
]


@pytest.mark.parametrize(
    ("function", "documented"), SIGNATURES, ids=lambda value: getattr(value, "__name__", "")
)
def test_signature(function: Callable[..., object], documented: str) -> None:
    positional, extras = [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            extras.append(parameter)
            continue
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        positional.append(parameter.name + default)
    assert " ".join(positional) == documented
    assert all(extra.default is not extra.empty for extra in extras), extras


@pytest.mark.parametrize("name", ["moe_sorting", "topk_softmax_sorting"])
def test_reference_takes_the_same_arguments(name: str) -> None:
    """The reference has the op's parameters but for the dispatch policy."""
    op = list(inspect.signature(getattr(aiter.fused_moe, name)).parameters.values())
    model = list(inspect.signature(getattr(reference, name)).parameters.values())
    pairs = [(parameter.name, parameter.default) for parameter in model]
    assert pairs == [(parameter.name, parameter.default) for parameter in op[: len(pairs)]]


def test_dtypes() -> None:
    assert dtypes.fp32 is torch.float32
    assert dtypes.fp16 is torch.float16
    assert dtypes.bf16 is torch.bfloat16
    assert dtypes.i32 is torch.int32


def test_documented_functions() -> None:
    """Every public function has a docstring that states its errors."""
    for function, _ in SIGNATURES:
        assert re.search("Raises|errors", function.__doc__ or ""), function.__name__
