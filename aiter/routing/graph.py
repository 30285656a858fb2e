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

Not only tracers go through the registered ops: torch.func's transforms (vmap runs an op once per slice),
torch.jit.trace, which would take a result for a constant otherwise, and tensors on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

from ..ops import fused_topk_moe_sorting, moe_sorting_opus
from ..ops import topk_softmax as topk_softmax_stub
from .autograd import Writes, checked, counting, gradients_matter
from .autograd import registered as refusing

F = TypeVar("F", bound=Callable[..., Any])

_native: Any = torch._C
transforms_active: Callable[[], bool] = _native._are_functorch_transforms_active
tracing_state: Callable[[], object] = _native._get_tracing_state
_is_excluded: Callable[[Any], bool] = _native._dispatch_tls_is_dispatch_key_excluded
_TRACER = _native._dispatch_key_parse("Tracer")

NAMESPACE = "aiter"

_SORT_OUTPUTS = (
    "Tensor(b!) sorted_weights, Tensor(c!) sorted_expert_ids, Tensor(d!) num_valid_ids,"
    " Tensor(e!) moe_buf, int num_experts"
)
_ROUTING = (
    "int num_experts, int model_dim, ScalarType moebuf_dtype, {}int block_size=32,"
    " Tensor? expert_mask=None, Tensor? num_local_tokens=None, int dispatch_policy=0"
)
_SORTED = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_OUT = f"*, Tensor(a!) sorted_ids, {_SORT_OUTPUTS.removesuffix(', int num_experts')}"

SCHEMAS = {
    "topk_softmax": (
        "(Tensor(a!) topk_weights, Tensor(b!) topk_indices, Tensor(c!) token_expert_indices,"
        " Tensor gating_output, bool need_renorm) -> ()"
    ),
    "moe_sorting_opus_fwd": (
        f"(Tensor topk_ids, Tensor topk_weights, Tensor(a!) sorted_token_ids, {_SORT_OUTPUTS},"
        " int unit_size, Tensor? local_expert_mask=None, Tensor? num_local_tokens=None,"
        " Tensor(f!)? workspace=None, int dispatch_policy=0) -> ()"
    ),
    "fused_topk_moe_sorting_fwd": (
        f"(Tensor gating_output, Tensor(a!) sorted_ids, {_SORT_OUTPUTS}, int topk, int unit_size,"
        " bool need_renorm, *, Tensor? local_expert_mask=None, Tensor? num_local_tokens=None,"
        " int? cluster_size=None) -> ()"
    ),
    "topk_softmax_sorting": (
        f"(Tensor gating_output, int topk, {_ROUTING.format('bool need_renorm=True, ')})"
        f" -> {_SORTED}"
    ),
    "topk_softmax_sorting_out": (
        f"(Tensor gating_output, int topk, {_ROUTING.format('bool need_renorm=True, ')}, {_OUT})"
        " -> ()"
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


def traced(tensor: object) -> bool:
    """Whether a call with this argument is being recorded, transformed or simulated, not run.

    True under torch.compile and torch.export, inside any dispatch mode (fake tensors, make_fx), in
    torch.jit.trace and torch.func's transforms, for a tensor subclass that dispatches by itself, such as
    a fake tensor outside its mode, and for a tensor on the meta device.
    """
    if is_dynamo_compiling() or _len_torch_dispatch_stack() or transforms_active():
        return True
    if tracing_state() is not None and not _is_excluded(_TRACER):
        return True  # NOTE: the tracer excludes itself while it runs what it has recorded.
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter:
        return cast(Tensor, tensor).is_meta
    if not isinstance(tensor, Tensor):
        return False
    return tensor.is_meta or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def transformed() -> bool:
    """Whether torch.func transforms the call: what is written in place may be of too few dimensions."""
    return not is_dynamo_compiling() and transforms_active()


def graph_op(stub: F) -> F:
    """Makes an op's function call `torch.ops.aiter` under a tracer, and `stub` otherwise.

    It refuses gradients and counts what `stub` writes (`aiter.routing.autograd`).
    """
    registered = getattr(torch.ops.aiter, stub.__name__)
    schema = registered.default._schema
    order = tuple(argument.name for argument in schema.arguments)
    read = next(a.name for a in schema.arguments if a.alias_info is None)
    count = Writes(schema)

    def pass_on(args: Any, kwargs: Any) -> Any:
        named = dict(zip(order, args, strict=False)) | kwargs
        if read in named:  # else the call is refused for that
            named[read] = checked(named[read], **named)
        return tuple(named[name] for name in order[: len(args)]), {
            name: named[name] for name in kwargs
        }

    @functools.wraps(stub)
    def call(*args: Any, **kwargs: Any) -> Any:
        if gradients_matter():
            args, kwargs = pass_on(args, kwargs)
        if traced(args[0] if args else next(iter(kwargs.values()), None)):
            return registered(*args, **kwargs)
        stub(*args, **kwargs)
        return count(args, kwargs)

    return cast(F, call)


def sorted_sizes(tokens: int, topk: int, num_experts: int, block_size: int) -> tuple[int, int]:
    """S = M*K + E*B - K slots of the sorted buffers, and ceil(S / B) blocks."""
    slots = tokens * topk + num_experts * block_size - topk
    return slots, (slots + block_size - 1) // block_size


def empty_sorted(
    like: Tensor,
    topk: int,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five sorted buffers for the M rows of `like`, on its device, uninitialised.

    Returns:
        sorted_ids int32 [S], sorted_weights float32 [S], sorted_expert_ids int32 [ceil(S / B)],
        num_valid_ids int32 [2], moe_buf [M, D], with S = M*K + E*B - K.
    """
    tokens, device = like.shape[0], like.device
    slots, blocks = sorted_sizes(tokens, topk, num_experts, block_size)
    return (
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(blocks, dtype=torch.int32, device=device),
        torch.empty(2, dtype=torch.int32, device=device),
        torch.empty((tokens, model_dim), dtype=moebuf_dtype, device=device),
    )


def empty_topk(like: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Weights float32 [M, K] and ids int32 [M, K] for the M rows of `like`, uninitialised."""
    shape = (like.shape[0], topk)
    return (
        torch.empty(shape, dtype=torch.float32, device=like.device),
        torch.empty(shape, dtype=torch.int32, device=like.device),
    )


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
    return empty_sorted(gating_output, topk, num_experts, model_dim, moebuf_dtype, block_size)


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
    return empty_sorted(topk_ids, topk, num_experts, model_dim, moebuf_dtype, block_size)


def _fake_fused_topk(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    return empty_topk(gating_output, topk)


def _routing(name: str) -> Callable[..., Any]:
    """The eager function `name` of `aiter.routing.calls`, which is imported at its first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from . import calls as moe_routing

        return getattr(moe_routing, name)(*args, **kwargs)

    return call


def _routing_out(name: str) -> Callable[..., None]:
    """As `_routing`, writing to the outputs that come by name."""

    def call(
        *args: Any,
        sorted_ids: Tensor,
        sorted_weights: Tensor,
        sorted_expert_ids: Tensor,
        num_valid_ids: Tensor,
        moe_buf: Tensor,
        **kwargs: Any,
    ) -> None:
        out = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
        _routing(name)(*args, out=out, **kwargs)

    return call


def _register() -> Any:
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "topk_softmax": (topk_softmax_stub.topk_softmax, _fake_nothing),
        "moe_sorting_opus_fwd": (moe_sorting_opus.moe_sorting_opus_fwd, _fake_nothing),
        "fused_topk_moe_sorting_fwd": (
            fused_topk_moe_sorting.fused_topk_moe_sorting_fwd,
            _fake_nothing,
        ),
        "topk_softmax_sorting": (_routing("topk_softmax_sorting"), _fake_topk_softmax_sorting),
        "topk_softmax_sorting_out": (_routing_out("topk_softmax_sorting"), _fake_nothing),
        "moe_sorting": (_routing("moe_sorting"), _fake_moe_sorting),
        "moe_sorting_out": (_routing_out("moe_sorting"), _fake_nothing),
        "fused_topk": (_routing("fused_topk"), _fake_fused_topk),
    }
    for name, schema in SCHEMAS.items():
        run, fake = kernels[name]
        library.define(name + schema)
        op = getattr(torch.ops.aiter, name).default
        library.impl(name, counting(run, op), "CompositeExplicitAutograd")
        library.impl(name, fake, "Meta")
        unread = "hidden_states" if name == "fused_topk" else ""
        library.impl(name, refusing(op, unread), "Autograd")
    return library


_library = _register()  # NOTE: the registrations live as long as this object does.

topk_softmax = graph_op(topk_softmax_stub.topk_softmax)
moe_sorting_opus_fwd = graph_op(moe_sorting_opus.moe_sorting_opus_fwd)
fused_topk_moe_sorting_fwd = graph_op(fused_topk_moe_sorting.fused_topk_moe_sorting_fwd)
