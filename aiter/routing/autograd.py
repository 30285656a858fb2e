"""What does a call owe to autograd? A refusal where a gradient would be lost, and counted writes.

Routing has no backward. A float input that requires grad while gradients are on would come out as a
result that needs none, and training would go on with zeros; so every entry refuses it, by name. The
same holds for forward-mode: a dual tensor's tangent would be lost. An output that requires grad is
refused while gradients are on, as PyTorch's in-place operations refuse a leaf, because what is written
to it would not be part of the graph.

A kernel writes behind PyTorch's back, so `wrote` bumps the version counters of what a call was given
to write to, as PyTorch's in-place operations do: a tensor that another operation saved for its backward
is then found to be modified. New outputs need none.

`refusing` is the same for ops that come through PyTorch's dispatcher (`torch.ops.aiter`, a compiled or
exported graph, torch.func): a kernel for the autograd keys, below which the op is called again.

What it costs in CPU time of a thread, on an AMD EPYC, Python 3.11, PyTorch 2.13, 2026-11-26, the call
of a function included: `gradients_matter` of six arguments 155 ns with gradients off, and with them on
1.0 us, 1.25 if five outputs are among them (`checked` of all, which makes dictionaries, took 2.7);
`wrote` of five 315 ns, `Writes` of five 550 ns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from .._pytorch import any_requires_grad, is_exporting
from .tracing import NAMESPACE, by_name, registered

_native: Any = torch._C
_bump: Callable[[Any], None] = _native._increment_version
_below_autograd: Any = _native._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_forward: Any = forward_ad


def _tangent(tensor: Tensor) -> Any:
    return _forward.unpack_dual(tensor).tangent


def gradients_matter(*arguments: object) -> bool:
    """Whether a gradient of a call with these arguments may be lost: else there is nothing to refuse.

    Told quickly, and with tensors in tuples among the arguments: gradients are on and a tensor requires
    grad, or a tangent may be about.
    """
    # NOTE: the level is -1 outside of torch.func.jvp and dual_level().
    if forward_ad._current_level >= 0:
        return True
    if not _grad_enabled() or is_dynamo_compiling():
        return _grad_enabled()
    # NOTE: it looks into lists, not into tuples.
    return any_requires_grad(*[list(a) if isinstance(a, tuple) else a for a in arguments])


def refuse_gradients(**tensors: object) -> None:
    """Raises for the first tensor, by its argument's name, whose gradient would be lost.

    What is no tensor is passed over: the ops say what they expected.

    Raises:
        ValueError: gradients are on and a tensor requires grad, or a tensor has a tangent.
    """
    if _grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                _refuse(name, "requires grad")
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)


def checked(tensor: Tensor, **tensors: object) -> Tensor:
    """`tensor`, an input of a call, if no gradient of `tensors` would be lost; else raises as above.

    Where torch.compile looks on, the graph that it makes raises: an exception of the traced code itself
    would end as one of torch.compile's own, which says little of ours.
    """
    if not is_dynamo_compiling() or is_exporting():
        refuse_gradients(**tensors)
        return tensor
    if torch.is_grad_enabled():
        for name, other in tensors.items():
            if isinstance(other, Tensor) and other.requires_grad:
                refused: Tensor = registered("refuse_gradient")(tensor, name)
                return refused
    return tensor


def wrote(tensors: Sequence[Tensor]) -> None:
    """Bumps the version counters of tensors that a call has written to."""
    _bump(tensors)


class Writes:
    """Bumps the version counters of what a call of an op has written to, by the op's schema."""

    def __init__(self, schema: Any) -> None:
        written = [
            (position, argument.name, "Optional" in str(argument.type))
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.all = tuple((position, name) for position, name, _ in written)
        required = [position for position, _, is_optional in written if not is_optional]
        self.optional = tuple((p, name) for p, name, is_optional in written if is_optional)
        # NOTE: of positional arguments, which is how calls that count every microsecond are made.
        self.pick = operator.itemgetter(*required) if len(required) > 1 else None
        self.most = max(required, default=0)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.pick is None or len(args) <= self.most:
            found = [args[p] if p < len(args) else kwargs.get(name) for p, name in self.all]
            _bump([tensor for tensor in found if tensor is not None])
            return
        _bump(self.pick(args))
        for position, name in self.optional:
            tensor = args[position] if position < len(args) else kwargs.get(name)
            if tensor is not None:
                _bump((tensor,))


def counting(run: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """`run`, the implementation of a registered op, with what it writes counted."""
    if not any(argument.alias_info is not None for argument in op._schema.arguments):
        return run
    count = Writes(op._schema)

    def call(*args: Any, **kwargs: Any) -> None:
        run(*args, **kwargs)
        count(args, kwargs)

    return call


def refusing(op: Any, unread: str = "") -> Callable[..., Any]:
    """The autograd kernel of a registered op: refuses, then calls the op below autograd.

    `unread` names an argument of which only the shape is looked at, so that no gradient is lost.
    """
    order = tuple(argument.name for argument in op._schema.arguments)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = by_name(order, args) | kwargs
        given.pop(unread, None)
        refuse_gradients(**given)
        with _below_autograd():
            return op(*args, **kwargs)

    return call


def _refuse_at_run_time(tensor: Tensor, name: str) -> Tensor:
    _refuse(name, "requires grad")


def _register() -> Any:
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    library.define("refuse_gradient(Tensor tensor, str name) -> Tensor")
    op = registered("refuse_gradient").default

    def below(tensor: Tensor, name: str) -> Any:
        with _below_autograd():
            return op(tensor, name)

    library.impl("refuse_gradient", _refuse_at_run_time, "CompositeExplicitAutograd")
    library.impl("refuse_gradient", lambda tensor, name: torch.empty_like(tensor), "Meta")
    library.impl("refuse_gradient", below, "Autograd")
    return library


def _refuse_tangents(tensors: dict[str, object]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and _tangent(tensor) is not None:
            _refuse(name, "has a tangent")


def _refuse(name: str, what: str) -> NoReturn:
    raise ValueError(
        f"{name}: expected a tensor that needs no gradient, as routing has no backward, got one that"
        f" {what}; call under torch.no_grad() or torch.inference_mode()"
    )


_library = _register()  # NOTE: the registration lives as long as this object does.
