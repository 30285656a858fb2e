"""Does the contract hold for inputs that nobody thought of?

Hypothesis draws shapes, logits, layouts, masks and local token counts, and shrinks a failure to
its smallest case. Draws are fixed by default; ``--hypothesis-profile=explore`` draws new ones.
"""

from __future__ import annotations

import _checkout  # noqa: F401
import pytest
import torch
from cases import GATING_DTYPES, LAYOUTS, LOGITS, MASKS, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from route_calls import max_tokens, run_routing
from runners import run_fused, run_moe_sorting, run_topk_softmax
from targets import Target

import aiter

pytestmark = pytest.mark.slow

MAX_SELECTION_TOPK = 64
MOEBUF_DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.float16)


@st.composite
def routing_cases(draw: st.DrawFn, most_tokens: int = 40) -> Case:
    """Any case: sizes lean small, where the edges are."""
    num_experts = draw(st.integers(1, 40) | st.integers(1, 600))
    topk = draw(st.integers(1, min(num_experts, MAX_SELECTION_TOPK)))
    num_tokens = draw(st.integers(0, most_tokens))
    dtype = draw(st.sampled_from(MOEBUF_DTYPES))
    return Case(
        num_tokens,
        num_experts,
        topk,
        dtype=draw(st.sampled_from(GATING_DTYPES)),
        need_renorm=draw(st.booleans()),
        block_size=draw(st.sampled_from((1, 2, 16, 32, 33, 64, 128)) | st.integers(1, 70)),
        model_dim=draw(st.integers(1, 70)),
        moebuf_dtype=dtype,
        logits=draw(st.sampled_from(sorted(LOGITS))),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        mask=draw(st.sampled_from(sorted(MASKS))),
        num_local=draw(st.none() | st.integers(0, num_tokens)),
        moe_buf_offset=draw(st.integers(0, 15)) * dtype.itemsize,
        seed=draw(st.integers(0, 9)),
    )


sampled = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@sampled
@given(case=routing_cases())
def test_fused(target: Target, case: Case) -> None:
    limit = max_tokens(case.num_experts, case.topk, target)
    if case.num_tokens <= limit:
        run_fused(case, target, aiter.fused_topk_moe_sorting_fwd)
    else:
        assert run_routing(case, target, 0)[1] != "fused"


@sampled
@given(case=routing_cases())
def test_topk_softmax(target: Target, case: Case) -> None:
    run_topk_softmax(case, target, aiter.topk_softmax)


@sampled
@given(case=routing_cases(most_tokens=150), policy=st.sampled_from((0, 1, 2)))
def test_moe_sorting(target: Target, case: Case, policy: int) -> None:
    run_moe_sorting(
        case,
        target,
        aiter.moe_sorting_opus_fwd,
        policy,
        aiter.moe_sorting_opus_get_workspace_size,
    )


@sampled
@given(case=routing_cases(), policy=st.sampled_from((0, 1, 2)))
def test_routing(target: Target, case: Case, policy: int) -> None:
    run_routing(case, target, policy)
