"""How are the launches of a plan made?

A failure in a path is raised, never answered by another path.
"""

from __future__ import annotations

from typing import cast

from ..ops.fused_topk_moe_sorting import FusedCalls, fused_topk_moe_sorting_fwd
from . import dispatch
from .buffers import BUFFER_NAMES, SortedBuffers, allocate, check_topk_memory, given, given_topk
from .plan import Chain, Plan
from .request import Request, Tensors


def launch_fused(request: Request, plan: Plan, tensors: Tensors, buffers: SortedBuffers) -> None:
    """The fused launch into `buffers`, which are `tensors.out` or were allocated by the plan."""
    into = cast(FusedCalls, plan.fused).into
    *inputs, topk_out, out = tensors
    # NOTE: checks the outputs' sizes, too, in 0.05 us; in Python that takes 0.5 us.
    allocated = plan.layouts if out is None else None
    if into(request, *inputs, topk_out, buffers, plan.buffers, allocated):
        return
    rule = request.full_rule
    fused_topk_moe_sorting_fwd(
        tensors.gating_output, *given(buffers, plan.buffers), request.num_experts, request.topk,
        request.block_size, rule.need_renorm, local_expert_mask=tensors.expert_mask,
        num_local_tokens=tensors.num_local_tokens, rule=None if rule.is_plain else rule,
        correction_bias=tensors.correction_bias, topk_out=topk_out, id_format=request.id_format,
    )  # fmt: skip


def launch_chain(request: Request, plan: Plan, tensors: Tensors, buffers: SortedBuffers) -> None:
    """Top-k, then the sort, into `buffers`."""
    chain = cast(Chain, plan.chain)  # a plan has the fused launch or the chain
    gating_output, expert_mask, num_local_tokens, correction_bias, topk_out, _ = tensors
    given(buffers, plan.buffers)
    weights, ids, *given_workspace = allocate(chain.layouts, gating_output.device)
    workspace = given_workspace[0] if given_workspace else None
    copied = False
    if topk_out is not None:
        given_topk(topk_out, weights)
        copied = not all(tensor.is_contiguous() for tensor in topk_out)
        weights, ids = (weights, ids) if copied else topk_out
    sorting = (
        ids, weights, *buffers, request.num_sorted_experts, request.block_size, expert_mask,
        num_local_tokens, workspace, dispatch.POLICY_OF_CHAIN[plan.path],
        request.id_format, request.num_sorted_experts - request.num_experts,
    )  # fmt: skip
    # NOTE: nothing may be launched before every argument is known to be good.
    chain.check(*sorting)
    if topk_out is not None:
        read = {
            "gating_output": gating_output, "correction_bias": correction_bias,
            "local_expert_mask": expert_mask, "num_local_tokens": num_local_tokens,
        }  # fmt: skip
        check_topk_memory(topk_out, dict(zip(BUFFER_NAMES, buffers, strict=True)) | read)
    counting = workspace, buffers[4], request.num_sorted_experts, num_local_tokens
    if chain.by_rule:
        chain.topk(weights, ids, gating_output, request.full_rule, correction_bias, *counting)
    else:
        chain.topk(weights, ids, gating_output, request.rule, *counting)
    chain.sort(*sorting)
    if topk_out is not None and copied:
        for given_tensor, tensor in zip(topk_out, (weights, ids), strict=True):
            given_tensor.copy_(tensor)
