"""How do the ops take part in torch.compile, torch.export and fake tensors?

Every op is registered under `torch.ops.aiter` with a schema that names exactly what it writes, and
with a fake (a Meta kernel) that says what comes back without running anything. `graph_op` makes the
Python function of an op choose: under a tracer it calls the registered op, which the tracer
records, else the compiled module, so that an eager call pays for three flag reads (0.4 us of a
`topk_softmax` call) and not for PyTorch's dispatcher (2.9 us).

The registration runs at import: `torch.ops.aiter` has to be there before a graph that names it is
loaded or traced. It costs 0.3 ms for all ops through `torch.library.Library` with Meta kernels.
Rejected: `torch.library.custom_op`, 0.9 ms for each op; `torch.library.register_fake`, 0.9 ms for
each op, most of it spent on finding the line of the source that calls it. (Medians on one core of
an AMD EPYC, Python 3.11, PyTorch 2.13, 2026-11-23.)

The ops that allocate their outputs are registered beside those that fill given ones, because what
they decide, the path and the workspace, is asked of the compiled module, which no tracer can see
into. No op has a backward: routing is for inference, and `autograd` says what is refused and counted.

Not only tracers go through the registered ops: torch.func's transforms (vmap runs an op once per slice,
`vmap` says how where it writes), torch.jit.trace, which would take a result for a constant otherwise,
and tensors on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..ops import fused_topk_moe_sorting, moe_sorting_opus
from ..ops import topk_routing as topk_routing_stub
from ..ops import topk_softmax as topk_softmax_stub
from ..ops.rule import RoutingRule, check_rule, rule_of
from . import calls, router
from .autograd import Writes, checked, counting, gradients_matter, refusing
from .buffers import BUFFER_NAMES, Buffers, SortedBuffers, empty, empty_topk, five, sorted_layouts
from .tracing import NAMESPACE, all_meta, by_name, refuse_some_meta, registered, traced
from .vmap import once_per_slice

F = TypeVar("F", bound=Callable[..., Any])

_SORT_OUTPUTS = (
    "Tensor(b!) sorted_weights, Tensor(c!) sorted_expert_ids, Tensor(d!) num_valid_ids,"
    " Tensor(e!) moe_buf, int num_experts"
)
_ROUTING = (
    "int num_experts, int model_dim, ScalarType moebuf_dtype, {}int block_size=32,"
    " Tensor? expert_mask=None, Tensor? num_local_tokens=None, int dispatch_policy=0"
)
_BY_RULE = (
    "int num_experts, int model_dim, ScalarType moebuf_dtype, float[] rule,"
    " Tensor? correction_bias=None, int block_size=32, Tensor? expert_mask=None,"
    " Tensor? num_local_tokens=None, int dispatch_policy=0, str id_format='slot'"
)
_FROM_HIDDEN = (
    "Tensor hidden_states, Tensor router_weight, int topk, int num_experts, int model_dim, ScalarType"
    " moebuf_dtype, float[] rule, Tensor? router_bias=None, Tensor? correction_bias=None,"
    " int block_size=32, Tensor? expert_mask=None, Tensor? num_local_tokens=None,"
    " int dispatch_policy=0, str id_format='slot', bool batch_invariant=False"
)
_SORTED = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_OUT = f"*, Tensor(a!) sorted_ids, {_SORT_OUTPUTS.removesuffix(', int num_experts')}"

SCHEMAS = {
    "topk_softmax": (
        "(Tensor(a!) topk_weights, Tensor(b!) topk_indices, Tensor(c!) token_expert_indices,"
        " Tensor gating_output, bool need_renorm) -> ()"
    ),
    "topk_routing": (
        "(Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor gating_output, *, float[]? rule=None,"
        " Tensor? correction_bias=None) -> ()"
    ),
    "moe_sorting_opus_fwd": (
        f"(Tensor topk_ids, Tensor topk_weights, Tensor(a!) sorted_token_ids, {_SORT_OUTPUTS},"
        " int unit_size, Tensor? local_expert_mask=None, Tensor? num_local_tokens=None,"
        " Tensor(f!)? workspace=None, int dispatch_policy=0, str id_format='slot',"
        " int num_zero_experts=0) -> ()"
    ),
    "fused_topk_moe_sorting_fwd": (
        f"(Tensor gating_output, Tensor(a!) sorted_ids, {_SORT_OUTPUTS}, int topk, int unit_size,"
        " bool need_renorm, *, Tensor? local_expert_mask=None, Tensor? num_local_tokens=None,"
        " int? cluster_size=None, int? handover_size=None, float[]? rule=None,"
        " Tensor? correction_bias=None, Tensor(f!)? topk_weights=None, Tensor(g!)? topk_ids=None,"
        " str id_format='slot') -> ()"
    ),
    "topk_softmax_sorting": (
        f"(Tensor gating_output, int topk, {_ROUTING.format('bool need_renorm=True, ')})"
        f" -> {_SORTED}"
    ),
    "topk_softmax_sorting_out": (
        f"(Tensor gating_output, int topk, {_ROUTING.format('bool need_renorm=True, ')}, {_OUT})"
        " -> ()"
    ),
    "topk_routing_sorting": f"(Tensor gating_output, int topk, {_BY_RULE}) -> {_SORTED}",
    "topk_routing_sorting_out": (
        f"(Tensor gating_output, int topk, {_BY_RULE}, {_OUT}, Tensor(f!)? topk_weights=None,"
        " Tensor(g!)? topk_ids=None) -> ()"
    ),
    "router_topk_sorting": f"({_FROM_HIDDEN}) -> {_SORTED}",
    "router_topk_sorting_out": (
        f"({_FROM_HIDDEN}, {_OUT}, Tensor(f!)? topk_weights=None, Tensor(g!)? topk_ids=None,"
        " Tensor(h!)? logits_out=None) -> ()"
    ),
    "moe_sorting": f"(Tensor topk_ids, Tensor topk_weights, {_ROUTING.format('')}) -> {_SORTED}",
    "moe_sorting_out": (
        f"(Tensor topk_ids, Tensor topk_weights, {_ROUTING.format('')}, {_OUT}) -> ()"
    ),
    "fused_topk": (
        "(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize)"
        " -> (Tensor, Tensor)"
    ),
}
"""The schema of every op; `(x!)` marks what it writes."""


def graph_op(stub: F, in_schema: Callable[..., dict[str, Any]] | None = None) -> F:
    """Makes an op's function call its registered namesake under a tracer, and `stub` otherwise.

    It refuses gradients and counts what `stub` writes (`autograd`). `in_schema` turns keyword arguments
    into those of the schema, where they differ.
    """
    op = registered(stub.__name__)
    schema = op.default._schema
    order = tuple(argument.name for argument in schema.arguments)
    read = next(a.name for a in schema.arguments if a.alias_info is None)
    count = Writes(schema)

    def pass_on(args: Any, kwargs: Any) -> Any:
        """The arguments, with the first that is read in place of itself once it is checked."""
        tensors = {**by_name(order, args), **kwargs}
        if read in tensors:  # else the call is refused for that
            written = tensors.get("topk_out") or ()
            for i, tensor in enumerate(written):
                tensors[f"topk_out[{i}]"] = tensor
            tensors[read] = checked(tensors[read], **tensors)
        return tuple(tensors[name] for name in order[: len(args)]), {
            name: tensors[name] for name in kwargs
        }

    @functools.wraps(stub)
    def call(*args: Any, **kwargs: Any) -> Any:
        if gradients_matter(*args, *kwargs.values()):
            args, kwargs = pass_on(args, kwargs)
        by_schema = in_schema(**kwargs) if in_schema else kwargs
        first = args[0] if args else (*kwargs.values(), None)[0]
        if traced(first):
            refuse_some_meta({**by_name(order, args), **by_schema}, first)
            return op(*args, **by_schema)
        stub(*args, **kwargs)
        return count(args, by_schema)

    return cast(F, call)


def _numbers_in_schema(rule: RoutingRule | None = None, **kwargs: Any) -> dict[str, Any]:
    check_rule(rule)
    return {**kwargs, "rule": None if rule is None else [float(n) for n in rule.packed]}


def _rule_in_schema(topk_out: tuple[Tensor, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
    if topk_out is not None and not (isinstance(topk_out, tuple) and len(topk_out) == 2):
        size = f" of {len(topk_out)}" if isinstance(topk_out, tuple) else ""
        raise TypeError(
            "topk_out: expected a tuple of two tensors or None, got a"
            f" {type(topk_out).__name__}{size}"
        )
    weights, ids = topk_out or (None, None)
    return {**_numbers_in_schema(**kwargs), "topk_weights": weights, "topk_ids": ids}


def _topk_routing(*tensors: Tensor, rule: Sequence[float] | None = None, **kwargs: Any) -> None:
    by_rule = None if rule is None else rule_of(rule)
    topk_routing_stub.topk_routing(*tensors, rule=by_rule, **kwargs)


def _empty_sorted(like: Tensor, *sizes: Any) -> tuple[Tensor, ...]:
    """The five outputs for the M rows of `like`; `sizes` are those of `Buffers.of` but for M."""
    return five(empty(sorted_layouts(Buffers.of(like.shape[0], *sizes), like.device), like.device))


def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that only writes to what it is given."""


def _fake_topk_softmax_sorting(
    gating_output: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    need_renorm: bool = True,
    block_size: int = 32,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:
    return _empty_sorted(gating_output, topk, num_experts, model_dim, moebuf_dtype, block_size)


def _fake_topk_routing_sorting(
    gating_output: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    rule: Sequence[float],
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    id_format: str = "slot",
) -> tuple[Tensor, ...]:
    full = rule_of(rule)
    slots = topk + full.num_shared_experts
    experts = num_experts + (full.num_zero_experts if id_format == "flat" else 0)
    return _empty_sorted(gating_output, slots, experts, model_dim, moebuf_dtype, block_size)


def _fake_router_topk_sorting(
    hidden_states: Tensor,
    router_weight: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    rule: Sequence[float],
    router_bias: Tensor | None = None,
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    id_format: str = "slot",
    batch_invariant: bool = False,
) -> tuple[Tensor, ...]:
    return _fake_topk_routing_sorting(
        hidden_states, topk, num_experts, model_dim, moebuf_dtype, rule, block_size=block_size,
        id_format=id_format,
    )  # fmt: skip


def _fake_moe_sorting(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, ...]:
    topk = topk_ids.shape[1]
    return _empty_sorted(topk_ids, topk, num_experts, model_dim, moebuf_dtype, block_size)


def _fake_fused_topk(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    return empty_topk(gating_output.shape[0], topk, gating_output.device)


def _topk_routing_sorting(
    gating_output: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    rule: Sequence[float],
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    id_format: str = "slot",
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    out: SortedBuffers | None = None,
) -> SortedBuffers:
    """`calls.topk_routing_sorting` with a rule as numbers."""
    return calls.topk_routing_sorting(
        gating_output, topk, num_experts, model_dim, moebuf_dtype,
        rule=rule_of(rule), correction_bias=correction_bias, block_size=block_size,
        expert_mask=expert_mask, num_local_tokens=num_local_tokens,
        dispatch_policy=dispatch_policy, topk_out=_pair(topk_weights, topk_ids),
        id_format=id_format, out=out,
    )  # fmt: skip


def _router_topk_sorting(
    hidden_states: Tensor,
    router_weight: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    rule: Sequence[float],
    router_bias: Tensor | None = None,
    correction_bias: Tensor | None = None,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    id_format: str = "slot",
    batch_invariant: bool = False,
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    logits_out: Tensor | None = None,
    out: SortedBuffers | None = None,
) -> SortedBuffers:
    """`router.router_topk_sorting` with a rule as numbers."""
    return router.router_topk_sorting(
        hidden_states, router_weight, topk, num_experts, model_dim, moebuf_dtype,
        router_bias=router_bias, rule=rule_of(rule), correction_bias=correction_bias,
        logits_out=logits_out, block_size=block_size, expert_mask=expert_mask,
        num_local_tokens=num_local_tokens, dispatch_policy=dispatch_policy,
        topk_out=_pair(topk_weights, topk_ids), id_format=id_format,
        batch_invariant=batch_invariant, out=out,
    )  # fmt: skip


def _fused_topk_moe_sorting_fwd(
    *args: Any,
    rule: Sequence[float] | None = None,
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    **kwargs: Any,
) -> None:
    fused_topk_moe_sorting.fused_topk_moe_sorting_fwd(
        *args,
        rule=None if rule is None else rule_of(rule),
        topk_out=_pair(topk_weights, topk_ids),
        **kwargs,
    )


def _pair(weights: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if weights is None or ids is None:
        if weights is not ids:
            raise ValueError("topk_weights, topk_ids: expected both or none, got one of them")
        return None
    return weights, ids


def _out(run: Callable[..., Any]) -> Callable[..., None]:
    """As `run`, writing to the outputs that come by name."""

    def call(*args: Any, **kwargs: Any) -> None:
        run(*args, out=five([kwargs.pop(name) for name in BUFFER_NAMES]), **kwargs)

    return call


def _register() -> Any:
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "topk_softmax": (topk_softmax_stub.topk_softmax, _fake_nothing),
        "topk_routing": (_topk_routing, _fake_nothing),
        "moe_sorting_opus_fwd": (moe_sorting_opus.moe_sorting_opus_fwd, _fake_nothing),
        "fused_topk_moe_sorting_fwd": (_fused_topk_moe_sorting_fwd, _fake_nothing),
        "topk_softmax_sorting": (calls.topk_softmax_sorting, _fake_topk_softmax_sorting),
        "topk_softmax_sorting_out": (_out(calls.topk_softmax_sorting), _fake_nothing),
        "topk_routing_sorting": (_topk_routing_sorting, _fake_topk_routing_sorting),
        "topk_routing_sorting_out": (_out(_topk_routing_sorting), _fake_nothing),
        "router_topk_sorting": (_router_topk_sorting, _fake_router_topk_sorting),
        "router_topk_sorting_out": (_out(_router_topk_sorting), _fake_nothing),
        "moe_sorting": (calls.moe_sorting, _fake_moe_sorting),
        "moe_sorting_out": (_out(calls.moe_sorting), _fake_nothing),
        "fused_topk": (calls.fused_topk, _fake_fused_topk),
    }
    for name, schema in SCHEMAS.items():
        run, fake = kernels[name]
        library.define(name + schema)
        op = registered(name).default
        library.impl(name, counting(run, op), "CompositeExplicitAutograd")
        library.impl(name, all_meta(fake, op), "Meta")
        library.impl(
            name, refusing(op, "hidden_states" if name == "fused_topk" else ""), "Autograd"
        )
        if not op._schema.returns:
            library.impl(name, once_per_slice(op), "FuncTorchBatched")
    return library


_library = _register()  # NOTE: the registrations live as long as this object does.

topk_softmax = graph_op(topk_softmax_stub.topk_softmax)
topk_routing = graph_op(topk_routing_stub.topk_routing, _numbers_in_schema)
moe_sorting_opus_fwd = graph_op(moe_sorting_opus.moe_sorting_opus_fwd)
fused_topk_moe_sorting_fwd = graph_op(
    fused_topk_moe_sorting.fused_topk_moe_sorting_fwd, _rule_in_schema
)
