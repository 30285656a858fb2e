"""What do the sizes of a routing call decide?

A `Plan` is everything about a call that does not depend on the contents of its tensors: the path,
the sizes of the outputs, the workspace, the compiled functions. `known` keeps one per kind of call.
On the CPU of an AMD EPYC, Python 3.11, making a plan takes 14 us (2026-11-23,
`python op_tests/bench_host.py --tokens 1`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..jit import module_for
from ..ops.fused_router_sorting import (
    RouterCalls,
    fused_router_sorting_max_tokens,
    router_calls,
)
from ..ops.fused_topk_moe_sorting import (
    FusedCalls,
    fused_calls,
    fused_topk_moe_sorting_max_tokens,
)
from ..ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size
from . import dispatch
from .arguments import check_bool
from .basis import choose, choose_router
from .buffers import (
    Buffers,
    Layouts,
    chain_layouts,
    checked_buffers,
    logits_layouts,
    sorted_layouts,
)
from .request import Request


class Chain(NamedTuple):
    """The chain on a device.

    Attributes:
        by_rule: whether `topk` is `topk_routing`, not `topk_softmax`.
        topk, check, sort: the compiled functions. `topk` is that of `topk_softmax` or `topk_routing`
            which leaves the entries per expert in the workspace, if there is one, for `sort`, that of
            `moe_sorting_opus_fwd` which finds them there.
        layouts: how what it keeps between its launches is allocated.
    """

    by_rule: bool
    topk: Callable[..., None]
    check: Callable[..., None]
    sort: Callable[..., None]
    layouts: Layouts


class Router(NamedTuple):
    """The router's product on a device.

    Attributes:
        calls: our launches, of everything or of the product alone; None where PyTorch makes it.
        layouts: how logits are allocated that the caller does not ask for.
    """

    calls: RouterCalls | None
    layouts: Layouts


class Plan(NamedTuple):
    """What a call's sizes decide.

    Attributes:
        path: which launches run.
        workspace_bytes: of the sort of the chain; 0 for none.
        buffers: the sizes of the outputs.
        layouts: how they are allocated.
        fused: the fused launch, if that is the path of a routing.
        chain: the chain, if that is.
        router: the product, of a routing of hidden states. With the path "router" it is part of the
            launch; with any other, the routing of its logits is planned for itself.
    """

    path: dispatch.Path
    workspace_bytes: int
    buffers: Buffers
    layouts: Layouts
    fused: FusedCalls | None = None
    chain: Chain | None = None
    router: Router | None = None


def plan_routing(
    device: torch.device,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    has_bias: bool,
    *fields: Any,
) -> Plan:
    """The plan of a routing of logits [tokens, width] of `dtype` on `device`; `fields`: a `Request`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    request = Request(*fields)
    dispatch.check_policy(request.dispatch_policy)
    request.check(tokens, width)
    slots, experts = request.num_slots, request.num_sorted_experts
    buffers = checked_buffers(
        tokens, slots, experts, request.model_dim, request.moebuf_dtype, request.block_size
    )
    problem = dispatch.Problem(
        tokens, experts, slots, request.model_dim, request.dispatch_policy, _logits_of(dtype)
    )
    max_tokens = 0
    if request.dispatch_policy == dispatch.AUTOMATIC:
        # NOTE: asked only where it counts; a forced chain must not build the fused module.
        # It has to do with zero experts whatever the format is.
        all_experts = request.num_experts + request.full_rule.num_zero_experts
        max_tokens = fused_topk_moe_sorting_max_tokens(all_experts, slots, device=device)
    plan = _plan(device, problem, choose(problem, max_tokens, device).path, buffers)
    if plan.path == "fused":
        return plan._replace(fused=fused_calls(device))
    by_rule = has_bias or not request.is_plain
    name = "topk_routing" if by_rule else "topk_softmax"
    select = getattr(module_for(f"module_{name}", device), f"{name}_counting")
    sort = module_for("module_moe_sorting_opus", device)
    return plan._replace(
        chain=Chain(
            by_rule,
            select,
            sort.moe_sorting_opus_check,
            sort.moe_sorting_opus_place,
            chain_layouts(tokens, slots, plan.workspace_bytes, device),
        )
    )


def plan_router(
    device: torch.device,
    tokens: int,
    width: int,
    experts: int,
    batch_invariant: bool,
    *fields: Any,
) -> Plan:
    """The plan of a routing of hidden states [tokens, width] by `experts` rows; raises as above."""
    request = Request(*fields)
    dispatch.check_policy(request.dispatch_policy)
    check_bool("batch_invariant", batch_invariant)
    request.check(tokens, experts, "router_weight")
    slots = request.num_slots
    buffers = checked_buffers(
        tokens, slots, request.num_sorted_experts, request.model_dim, request.moebuf_dtype,
        request.block_size,
    )  # fmt: skip
    max_tokens = 0
    if request.dispatch_policy == dispatch.AUTOMATIC and tokens <= dispatch.MOST_ROUTER_TOKENS:
        all_experts = request.num_experts + request.full_rule.num_zero_experts
        max_tokens = fused_router_sorting_max_tokens(all_experts, slots, device=device)
    problem = dispatch.Problem(
        tokens, request.num_sorted_experts, slots, width, request.dispatch_policy, "f32"
    )
    choice = choose_router(problem, max_tokens, device, batch_invariant)
    calls = None if choice.path == "linear" else router_calls(device)
    router = Router(calls, logits_layouts(tokens, experts, device))
    # NOTE: "fused" stands for whatever the routing of the logits takes.
    path: dispatch.Path = "router" if choice.path == "fused" else "fused"
    return Plan(path, 0, buffers, sorted_layouts(buffers, device), router=router)


def plan_sorting(
    device: torch.device,
    tokens: int,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int,
    dispatch_policy: int,
) -> Plan:
    """The plan of `moe_sorting` for topk_ids [tokens, topk] on `device`; raises as above."""
    dispatch.check_policy(dispatch_policy)
    buffers = checked_buffers(tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
    problem = dispatch.Problem(tokens, num_experts, topk, model_dim, dispatch_policy)
    return _plan(device, problem, choose(problem, 0, device).path, buffers)


def _logits_of(dtype: torch.dtype) -> dispatch.Logits:
    """The name of the logits' dtype; the ops refuse others than these."""
    if dtype == torch.float32:
        return "f32"
    return "f16" if dtype == torch.float16 else "bf16"


def _plan(
    device: torch.device, problem: dispatch.Problem, path: dispatch.Path, buffers: Buffers
) -> Plan:
    workspace_bytes = 0
    if path != "fused":
        workspace_bytes = moe_sorting_opus_get_workspace_size(
            problem.tokens, problem.num_experts, problem.topk, dispatch.POLICY_OF_CHAIN[path],
            device=device,
        )  # fmt: skip
    return Plan(path, workspace_bytes, buffers, sorted_layouts(buffers, device))
