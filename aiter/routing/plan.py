"""What do the shapes of a routing call decide, and how is it known without asking again?

A `Plan` is everything about a call that does not depend on the contents of its tensors: the path,
the sizes of the outputs, the workspace, the compiled function. It is made once per shape and device,
checks included, and found again by one lookup in a typed LRU memo (`True` and `1` are different keys,
so a bool for an int is refused every time). What a device is known to be fastest at is read once per
device and process; `forget` drops both, and with them the calls that compiled modules remember.

On the CPU of an AMD EPYC, Python 3.11, a lookup takes 0.3 us and making a plan 14 us (2026-11-23,
`python op_tests/bench_host.py --tokens 1`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ..jit import envs, module_for
from ..ops.fused_topk_moe_sorting import (
    FusedCalls,
    fused_calls,
    fused_topk_moe_sorting_forget,
    fused_topk_moe_sorting_max_tokens,
)
from ..ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size
from . import dispatch
from .buffers import Buffers, Layouts, chain_layouts, sorted_layouts
from .dispatch import Crossover
from .graph import sorted_sizes

LOGITS: dict[torch.dtype, dispatch.Logits] = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
}  # fmt: skip
MOST_PLANS = 4096  # a plan takes about 1 KiB; decode and prefill sizes of a few layers are hundreds


class Chain(NamedTuple):
    """The chain on a device.

    Attributes:
        topk, check, sort: the compiled functions behind the ops `topk_softmax`,
            `moe_sorting_opus_check` and `moe_sorting_opus_fwd`, which save 0.7 us each.
        layouts: how what it keeps between its launches is allocated.
    """

    topk: Callable[..., None]
    check: Callable[..., None]
    sort: Callable[..., None]
    layouts: Layouts


class Plan(NamedTuple):
    """What a call's shapes decide.

    Attributes:
        path: which launches run.
        workspace_bytes: of the sort of the chain; 0 for none.
        buffers: the sizes of the outputs.
        layouts: how they are allocated.
        fused: the fused launch, if that is the path of a routing.
        chain: the chain, if that is.
    """

    path: dispatch.Path
    workspace_bytes: int
    buffers: Buffers
    layouts: Layouts
    fused: FusedCalls | None = None
    chain: Chain | None = None


@dataclass(frozen=True)
class Basis:
    """What `dispatch` goes by on a device, and where that comes from, in words."""

    rows: tuple[Crossover, ...]
    override: int | None
    estimate: int | None
    origin: str
    modelled: Mapping[dispatch.Logits, tuple[Crossover, ...]] = field(default_factory=dict)


@cache
def basis_of(device: torch.device) -> Basis:
    """What is known about `device`: AITER_DISPATCH, else the tuned file, else the built-in table.

    Raises:
        aiter.jit.TargetError: there is no target for the device.
        aiter.jit.EnvError: AITER_DISPATCH is set to what it cannot be.
        aiter.jit.CacheError: others may write to the tuned file.
    """
    # NOTE: imported late, as `import aiter` should not pay for what a first call needs.
    from ..jit.target import device_arch, target_for
    from . import tuned

    target_for(device)
    override = envs.AITER_DISPATCH.get()
    if override is not None:
        return Basis((), override, None, f"AITER_DISPATCH={envs.AITER_DISPATCH.text()}")
    arch = "cpu" if device.type == "cpu" else device_arch(device)
    found = tuned.find(device)
    if found.rows:
        estimate, modelled = dispatch.estimate_of(arch), dispatch.modelled_of(arch)
        return Basis(found.rows, None, estimate, f"{found.path}", modelled)
    name, rows = dispatch.rows_of(arch)
    family = f"the built-in table, {name or arch}"
    tuned_reason = "" if found.reason == "not measured" else f" (tuned: {found.reason})"
    origin = family + ("" if rows else ": not measured") + tuned_reason
    return Basis(rows, None, dispatch.estimate_of(arch), origin, dispatch.modelled_of(arch))


def forget() -> None:
    """Drops plans, remembered calls and what is known of devices: the next call looks again."""
    fused_topk_moe_sorting_forget()
    basis_of.cache_clear()
    plan_routing.cache_clear()
    plan_sorting.cache_clear()


def choose(problem: dispatch.Problem, max_tokens: int, device: torch.device) -> dispatch.Choice:
    """The path of a problem on a device; arguments as of `dispatch.choose`."""
    if problem.dispatch_policy != dispatch.AUTOMATIC:
        return dispatch.choose(problem, max_tokens, ())
    basis = basis_of(device)
    modelled = basis.modelled.get(problem.logits, ())
    return dispatch.choose(
        problem, max_tokens, basis.rows, basis.override, basis.estimate, modelled
    )


@lru_cache(MOST_PLANS, typed=True)
def plan_routing(
    device: torch.device,
    cpu_wave: int | None,
    tokens: int,
    width: int,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int,
    dispatch_policy: int,
    logits: torch.dtype = torch.bfloat16,
) -> Plan:
    """The plan of `topk_softmax_sorting` for gating_output [tokens, width], of `logits`, on `device`.

    `cpu_wave` is the override of the cpu target's wave width, which compiled functions are bound to.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    dispatch.check_policy(dispatch_policy)
    if width != num_experts:
        raise ValueError(
            f"gating_output: expected shape [any, num_experts = {num_experts}], got"
            f" {[tokens, width]}"
        )
    buffers = sorted_buffers(tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
    # NOTE: the ops refuse other dtypes.
    kind = LOGITS.get(logits, "bf16")
    problem = dispatch.Problem(tokens, num_experts, topk, model_dim, dispatch_policy, kind)
    max_tokens = 0
    if dispatch_policy == dispatch.AUTOMATIC:
        # NOTE: asked only where it counts; a forced chain must not build the fused module.
        max_tokens = fused_topk_moe_sorting_max_tokens(num_experts, topk, device=device)
    plan = _plan(device, problem, choose(problem, max_tokens, device).path, buffers)
    if plan.path == "fused":
        return plan._replace(fused=fused_calls(device))
    select = module_for("module_topk_softmax", device)
    sort = module_for("module_moe_sorting_opus", device)
    return plan._replace(
        chain=Chain(
            select.topk_softmax,
            sort.moe_sorting_opus_check,
            sort.moe_sorting_opus_fwd,
            chain_layouts(tokens, topk, plan.workspace_bytes, device),
        )
    )


@lru_cache(MOST_PLANS, typed=True)
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
    buffers = sorted_buffers(tokens, topk, num_experts, model_dim, moebuf_dtype, block_size)
    problem = dispatch.Problem(tokens, num_experts, topk, model_dim, dispatch_policy)
    return _plan(device, problem, choose(problem, 0, device).path, buffers)


def sorted_buffers(
    tokens: int,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int,
) -> Buffers:
    """The outputs' sizes. Checks only what they are computed from; the ops check the rest."""
    check_size("topk", topk)
    check_size("num_experts", num_experts)
    check_size("block_size", block_size)
    check_size("model_dim", model_dim, low=0)
    if topk > num_experts:
        raise ValueError(f"topk: expected at most num_experts = {num_experts}, got {topk}")
    if not isinstance(moebuf_dtype, torch.dtype):
        raise TypeError(f"moebuf_dtype: expected a torch.dtype, got {type(moebuf_dtype).__name__}")
    slots, blocks = sorted_sizes(tokens, topk, num_experts, block_size)
    if slots >= 2**31:
        raise ValueError(
            f"block_size: expected M*topk + num_experts*block_size - topk below {2**31}, got {slots}"
        )
    return Buffers(slots, slots, blocks, (tokens, model_dim), moebuf_dtype)


def check_size(name: str, value: int, low: int = 1) -> None:
    """Raises TypeError for what is not an int, ValueError for an int that is no size."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value < 2**31:
        raise ValueError(f"{name}: expected a value from {low} to {2**31 - 1}, got {value}")


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
