"""How does our launch come in front of the expert products of ROCm's aiter?

ROCm's `aiter.fused_moe.fused_moe` takes ready top-k ids. It chooses kernels and a block size, calls
its module's own `moe_sorting(topk_ids, topk_weights, ..., block_size, ...)` once, then multiplies,
reading the sorted buffers and, on some paths, the ids and weights as well. So `fused_moe_from_logits`
hands it ids and weights that nobody has filled, and one launch of ours takes the place of that sort: it
gets the block size, fills the sorted buffers and, by `topk_out`, the ids and weights.

- The module's attribute `moe_sorting` is replaced once, by a dispatcher (`rocm_sort`) that looks at a
  ContextVar: without a call of ours in this context it is the module's own function and one lookup, so
  other callers, threads and coroutines are not touched. `restore` puts the attribute back.
- A sort policy of ROCm's is for its sort alone: engines always hand one on (SGLang's default is 2), and
  read as ours it would ask for two launches where the point is one.
- What we lack (`flat=True`, `output_aux=True`, `return_local_topk_ids=True`) is the module's own sort,
  after our top-k: two launches in place of one. The same holds where upstream reads the ids before it
  sorts: grouped products of gfx1250, shared experts in a launch of their own, products that scatter to
  peers, and any keyword that is newer than this file.
- Signatures are checked once, when ROCm's aiter is imported, which is at the first call or question;
  an unknown one is refused. A call in which upstream never sorted is an error, as it has read what
  nobody wrote.
- Under a tracer the call is one registered op, since neither a ContextVar nor the kernels' choice can
  be traced. Launches go to the current stream; tensors are new for every call, so that two streams, or a
  graph and what runs beside it, share none.

Rejected: a patch around each call, which other threads see; a sort found by the ids' address, which
the allocator gives out again; a copy of upstream's `fused_moe` with another sort, which ages.

Seen in its sources of 2025-11 (the wheel amd-aiter 0.1.7.post2.dev18) to 2026-08; run on the CPU only,
with the wheel's own `fused_moe` and plain loops in place of its kernels (`.ci/side_by_side`).
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..ops.rule import RoutingRule, plain_rule, rule_of
from ..routing.autograd import checked, refusing
from ..routing.buffers import TopkOut, given_topk
from ..routing.dispatch import check_policy
from ..routing.request import Request, rule_key
from ..routing.tracing import NAMESPACE, registered, traced
from . import rocm_sort
from .rocm_sort import Pending, available, restore

__all__ = ["available", "fused_moe_from_logits", "restore"]


def fused_moe_from_logits(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool = True,
    *,
    rule: RoutingRule | None = None,
    correction_bias: Tensor | None = None,
    topk_out: TopkOut | None = None,
    dispatch_policy: int = 0,
    **keywords: Any,
) -> Tensor:
    """The output of a MoE layer for router logits: our routing, the products of ROCm's aiter.

    Equal to ROCm's `aiter.fused_moe.fused_moe(hidden_states, w1, w2, topk_weight, topk_ids, **keywords)`
    with the weights and ids of `topk_routing`.

    Args:
        hidden_states, w1, w2: as ROCm's aiter takes them, shuffled and quantised as its products want;
            w1 holds this rank's experts, the shared ones of the rule last.
        gating_output: [M, E] logits; wider with shared experts that are weighed by their sigmoid.
        topk: K, the routed experts of a row.
        renormalize: weights sum to 1 over the chosen experts (True) or over all (False). Only for
            rule None; a rule says it itself.
        rule, correction_bias: as in `topk_routing_sorting`. Zero experts are refused, since products
            that read ids would look for them in w1.
        topk_out: (weights float32 [M, K+S], ids int32 [M, K+S]) to be written as well; rows from
            `num_local_tokens` on are left undefined. None for none.
        dispatch_policy: of our launch: 0 automatic, 1 and 2 the separate chain, to debug it.
        keywords: any other keyword of ROCm's `fused_moe`: expert_mask, activation, quant_type,
            doweight_stage1, the scales, block_size_M, num_local_tokens, dtype, pads, biases, limits.
            `expert_mask` may be longer than the experts, as engines make it for ids of no expert.
            `moe_sorting_dispatch_policy` is read where ROCm's own sort runs, and by nothing of ours.

    Returns:
        [M, D], as ROCm's `fused_moe`; under a tracer `output` is copied to, not written in place.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing was launched.
        ImportError: `available()` says why.
        RuntimeError: ROCm's aiter never called its sort.
        JitError of the package's `jit`: a module could not be built or loaded.
    """
    _check_tensors(
        hidden_states=hidden_states, w1=w1, w2=w2, gating_output=gating_output,
    )  # fmt: skip
    full_rule = plain_rule(renormalize, "renormalize") if rule is None else rule
    check_policy(dispatch_policy)
    _check_routing(gating_output, hidden_states, topk, full_rule, w1, keywords)
    named = {name: tensor for name, tensor in keywords.items() if isinstance(tensor, Tensor)}
    hidden_states = checked(
        hidden_states, hidden_states=hidden_states, w1=w1, w2=w2, gating_output=gating_output,
        correction_bias=correction_bias, **named,
    )  # fmt: skip
    if any(map(traced, (hidden_states, w1, w2, gating_output))):
        output = keywords.pop("output", None)
        named.pop("output", None)
        weights, ids = (None, None) if topk_out is None else topk_out
        result: Tensor = registered("rocm_aiter_fused_moe")(
            hidden_states, w1, w2, gating_output, topk,
            [float(number) for number in full_rule.packed], correction_bias, list(named),
            list(named.values()), _plain_text({**keywords, "dispatch_policy": dispatch_policy}),
            weights, ids,
        )  # fmt: skip
        return result if output is None else output.copy_(result)
    upstream = rocm_sort.upstream()
    upstream.check_keywords(keywords)
    weights, ids = _topk_tensors(gating_output, topk, full_rule, topk_out, keywords)
    pending = Pending(
        gating_output, topk, full_rule, correction_bias, (weights, ids), dispatch_policy
    )
    if upstream.reads_ids_first(keywords):
        pending.fill()
    out = upstream.run(pending, hidden_states, w1, w2, weights, ids, **keywords)
    if topk_out is not None and topk_out[0] is not weights:
        for given, tensor in zip(topk_out, (weights, ids), strict=True):
            given.copy_(tensor)
    return out


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_routing(
    gating_output: Tensor,
    hidden_states: Tensor,
    topk: int,
    rule: RoutingRule,
    w1: Tensor,
    keywords: dict[str, Any],
) -> None:
    """Raises for what the launch would refuse only after upstream has begun."""
    packed = rule_key(rule)
    if rule.num_zero_experts:
        raise ValueError(
            "rule: expected one without zero experts, as the products read ids of experts that have"
            f" weights, got num_zero_experts={rule.num_zero_experts}"
        )
    if gating_output.dim() != 2 or gating_output.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"gating_output: expected a tensor of rank 2 with {hidden_states.shape[0]} rows, as"
            f" hidden_states, got shape {list(gating_output.shape)}"
        )
    num_experts = rule.num_experts(gating_output.shape[1])
    Request(topk, num_experts, 0, torch.float32, packed, 1, 0, "slot").check(*gating_output.shape)
    mask = keywords.get("expert_mask")
    if mask is None:
        if w1.shape[0] != num_experts:
            raise ValueError(
                f"w1: expected {num_experts} experts without expert_mask, by the width of"
                f" gating_output, got {w1.shape[0]}"
            )
    elif not isinstance(mask, Tensor):
        raise TypeError(f"expert_mask: expected a tensor or None, got {type(mask).__name__}")
    elif mask.dim() != 1 or mask.shape[0] < num_experts:
        raise ValueError(
            f"expert_mask: expected shape [at least {num_experts}], by the width of gating_output,"
            f" got {list(mask.shape)}"
        )


def _topk_tensors(
    gating_output: Tensor,
    topk: int,
    rule: RoutingRule,
    topk_out: TopkOut | None,
    keywords: dict[str, Any],
) -> TopkOut:
    """What upstream gets as weights and ids: the caller's where its kernels can read them."""
    shape = (gating_output.shape[0], topk + rule.num_shared_experts)
    # NOTE: rows that do not count are not written, and upstream may look up a mask by their ids.
    make = torch.empty if keywords.get("num_local_tokens") is None else torch.zeros
    if topk_out is not None:
        like = gating_output.new_empty((1, 1)).expand(shape)
        given_topk(topk_out, like)
        if all(tensor.is_contiguous() for tensor in topk_out):
            if make is torch.zeros:
                topk_out[1].zero_()
            return topk_out
    device = gating_output.device
    weights = make(shape, dtype=torch.float32, device=device)
    return weights, make(shape, dtype=torch.int32, device=device)


# NOTE: a schema has no room for keywords that upstream may add, so those that are no tensors are text.
_PLAIN = (bool, int, float, str, type(None))


def _plain_text(keywords: dict[str, Any]) -> str:
    """The keywords that are no tensors, as text; enums by their numbers, dtypes by their names."""
    parts = []
    for name, value in keywords.items():
        if isinstance(value, Tensor):
            continue
        if isinstance(value, torch.dtype):
            parts.append(f"{name!r}: ('dtype', {str(value)!r})")
        elif isinstance(getattr(value, "value", None), int):
            parts.append(f"{name!r}: ('enum', {int(value.value)!r})")
        elif isinstance(value, _PLAIN):
            parts.append(f"{name!r}: {value!r}")
        else:
            raise ValueError(
                f"{name}: expected a number, text, enum, dtype or tensor under a tracer, got"
                f" {type(value).__name__}"
            )
    return "{" + ", ".join(parts) + "}"


def _keywords(text: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    """The keywords again; a number of an enum becomes the enum that is upstream's default."""
    keywords: dict[str, Any] = dict(zip(names, tensors, strict=True))
    for name, value in ast.literal_eval(text).items():
        if isinstance(value, tuple):
            kind, what = value
            if kind == "dtype":
                value = getattr(torch, what.removeprefix("torch."))
            else:
                value = rocm_sort.upstream().enum_of(name, what)
        keywords[name] = value
    return keywords


def _op(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    gating_output: Tensor,
    topk: int,
    rule: Sequence[float],
    correction_bias: Tensor | None,
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    plain: str,
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
) -> Tensor:
    out = fused_moe_from_logits(
        hidden_states, w1, w2, gating_output, topk, rule=rule_of(rule),
        correction_bias=correction_bias,
        topk_out=None if topk_weights is None or topk_ids is None else (topk_weights, topk_ids),
        **_keywords(plain, names, tensors),
    )  # fmt: skip
    # NOTE: what an op returns may be none of its inputs.
    return out.clone() if any(out is tensor for tensor in (hidden_states, *tensors)) else out


def _fake(hidden_states: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> Tensor:
    plain = ast.literal_eval(rest[6])
    kind, what = plain.get("dtype") or ("dtype", "")
    dtype = getattr(torch, what.removeprefix("torch.")) if what else hidden_states.dtype
    return hidden_states.new_empty((hidden_states.shape[0], w2.shape[1]), dtype=dtype)


def _register() -> Any:
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    library.define(
        "rocm_aiter_fused_moe(Tensor hidden_states, Tensor w1, Tensor w2, Tensor gating_output,"
        " int topk, float[] rule, Tensor? correction_bias, str[] names, Tensor?[] tensors, str plain,"
        " Tensor(a!)? topk_weights=None, Tensor(b!)? topk_ids=None) -> Tensor"
    )
    library.impl("rocm_aiter_fused_moe", _op, "CompositeExplicitAutograd")
    library.impl("rocm_aiter_fused_moe", _fake, "Meta")
    library.impl(
        "rocm_aiter_fused_moe", refusing(registered("rocm_aiter_fused_moe").default), "Autograd"
    )
    return library


_library = _register()  # NOTE: the registration lives as long as this object does.
