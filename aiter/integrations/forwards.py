"""What do a router and its experts compute in a block that uses aiter?

    router:   logits alone; (logits, logits, Choice) in the place of (logits, weights, ids), or in the
              order of the installed transformers (`returned_by`)
    hidden:   the router of a block whose launch makes the product: memory for the logits, and
              FromHidden in the place of Choice
    experts:  (hidden states, Choice, logits) to `fused_moe_from_logits`, FromHidden to
              `fused_moe_from_hidden`, which writes the logits; ready ids to `fused_moe`

The block's own forward calls one after the other and hands on what the router returned. So all that the
experts have to know of the router travels in `Choice`, and each forward takes weights, biases and
configuration from the module that it is called on, when it is called: a copy, a replica, a state dict
loaded later or a value changed later computes as it should.

Under autocast the products run in autocast's dtype, whatever the weights' is, and come out in that of
the hidden states, as in transformers' own forwards; routing is left as it is.

Zero experts (LongCat) return their input: what they add is its multiple by the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fused_moe import fused_moe, fused_moe_from_hidden, fused_moe_from_logits, last_path
from ..layer.arguments import DTYPES
from ..layer.parts import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation
from ..layer.types import ActivationType
from ..ops.rule import RoutingRule
from ..routing.autograd import checked, gradients_matter
from ..routing.graph import topk_routing
from .blocks import ARGUMENT, IN_F32, ROUTERS, Router


class Choice(NamedTuple):
    """How experts are to be chosen from a router's logits."""

    topk: int
    rule: RoutingRule
    correction_bias: Tensor | None


class FromHidden(NamedTuple):
    """What a router's product is made of, and how experts are to be chosen from it.

    Attributes:
        rows: [M, D'], what the router was called with.
        weight, bias: the router's own.
        logits: float32 [M, E], which the experts' call writes.
    """

    choice: Choice
    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor


class Weights(NamedTuple):
    """What `fused_moe` takes of an experts module: views of its parameters, and its activation."""

    w1: Tensor
    w2: Tensor
    bias1: Tensor | None
    bias2: Tensor | None
    activation: Activation
    gate_up_interleaved: bool


_rules = SimpleNamespace()  # rules by a name of their own
_numbers = count()


def rule_of(spec: Router, router: Any) -> RoutingRule:
    """The rule of a router as its attributes are now.

    Raises:
        ValueError: a value is none that a rule can have.
    """
    rule: RoutingRule = getattr(_rules, _name_of_rule(tuple(spec.fields(router).items())))
    return rule


# NOTE: a tracer cannot follow how a rule is made, and has to find it where it can guard it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of_rule(fields: tuple[tuple[str, Any], ...]) -> str:
    return _named_rule(fields)


@cache
def _named_rule(fields: tuple[tuple[str, Any], ...]) -> str:
    rule = RoutingRule(**dict(fields))
    _ = rule.packed  # NOTE: what is cached on first use would be a side effect in a trace.
    name = f"rule{next(_numbers)}"
    setattr(_rules, name, rule)
    return name


def weights_of(experts: Any) -> Weights:
    """The weights of an experts module, in the layout that `fused_moe` takes."""
    gated = getattr(experts, "has_gate", True)
    w1 = experts.gate_up_proj if gated else experts.up_proj
    w2 = experts.down_proj
    if getattr(experts, "is_transposed", False):
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    bias1 = bias2 = None
    if getattr(experts, "has_bias", False):
        bias1 = experts.gate_up_proj_bias if gated else experts.up_proj_bias
        bias2 = experts.down_proj_bias
    # NOTE: LongCat stores rows for zero experts as well, which nothing reads.
    activation, interleaved = _activation(experts, gated)
    return Weights(w1[: w2.shape[0]], w2, bias1, bias2, activation, interleaved)


def _activation(experts: Any, gated: bool) -> tuple[Activation, bool]:
    """The activation, and whether `fused_moe` has to take gate and up in turns."""
    if not gated:
        return experts.act_fn, False
    interleaved = not getattr(experts, "is_concatenated", True)
    limits = (getattr(experts, "alpha", None), getattr(experts, "limit", None))
    if limits == (SWIGLU_ALPHA, SWIGLU_LIMIT):
        return ActivationType.Swiglu, interleaved
    if _is_silu(experts):
        return ActivationType.Silu, False
    own = getattr(experts, "_apply_gate", None)
    if own is not None:
        return own, False

    def gate(hidden: Tensor) -> Tensor:
        halves = hidden.chunk(2, dim=-1)
        activated: Tensor = experts.act_fn(halves[0]) * halves[1]
        return activated

    return gate, False


def _is_silu(experts: Any) -> bool:
    """Whether halves of a product become silu(gate) * up, by transformers' own functions.

    What is known by name may run on every backend, a function not.
    """
    gate = getattr(type(experts), "_apply_gate", None)
    if getattr(gate, "__name__", "") != "_default_apply_gate" or "_apply_gate" in vars(experts):
        return False
    function = experts.act_fn
    plain = type(function).__name__ in ("SiLU", "SiLUActivation") and "forward" not in vars(
        function
    )
    return plain and not function._forward_hooks and not function._forward_pre_hooks


def router_forward(
    router: Any, mark: Any, hidden_states: Tensor, *arguments: Tensor | None
) -> tuple[Tensor | Choice, ...]:
    """The choice where the router's own forward returns ids, and logits where it returns others."""
    spec = ROUTERS[mark.kind]
    choice = _choice(spec, router, arguments)
    logits = _logits(spec, router, hidden_states)
    if gradients_matter(logits, choice.correction_bias):
        logits = checked(logits, router_logits=logits, correction_bias=choice.correction_bias)
    return _in_order(mark, choice, logits)


def hidden_forward(
    router: Any, mark: Any, hidden_states: Tensor, *arguments: Tensor | None
) -> tuple[Tensor | FromHidden, ...]:
    """As `router_forward`, with logits that nobody has written yet."""
    spec = ROUTERS[mark.kind]
    choice = _choice(spec, router, arguments)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    weight = weight_of(spec, router)
    if spec.inputs == "dtype of the weight":
        rows = rows.to(weight.dtype)
    bias = getattr(router, spec.bias) if spec.bias else None
    logits = torch.empty(
        (rows.shape[0], weight.shape[0]), dtype=torch.float32, device=hidden_states.device
    )
    if gradients_matter(rows, weight, bias):
        rows = checked(rows, hidden_states=rows, router_weight=weight, router_bias=bias)
    return _in_order(mark, FromHidden(choice, rows.contiguous(), weight, bias, logits), logits)


def _choice(spec: Router, router: Any, arguments: tuple[Tensor | None, ...]) -> Choice:
    """What follows from a router's attributes and the arguments behind the hidden states."""
    bias = arguments[0] if spec.correction_bias == ARGUMENT else None
    if spec.correction_bias not in (None, ARGUMENT):
        bias = _named(router, str(spec.correction_bias)).reshape(-1)
    return Choice(router.top_k, rule_of(spec, router), bias)


def _in_order(mark: Any, choice: Choice | FromHidden, logits: Tensor) -> tuple[Any, ...]:
    """The choice where the router's own forward returns ids, and logits where it returns others."""
    length, place = mark.returned
    return tuple(choice if i == place else logits for i in range(length))


def weight_of(spec: Router, router: Any) -> Tensor:
    """The weight of a router that has its own."""
    return _named(router, spec.weight)


def returned_by(router: Any) -> tuple[int, int]:
    """How many tensors a router's own forward returns, and which one the ids are.

    (logits, weights, ids) in transformers 5.23; (ids, weights, logits) and (weights, ids) occur before.
    Found by a call on the meta device, which computes nothing and moves no weight.

    Raises:
        ValueError: there is not one tensor of ids among what it returns.
    """
    spec = ROUTERS[type(router).__name__]
    twin = _on_meta(router)
    weight = _named(twin, f"{spec.linear}.weight" if spec.linear else spec.weight)
    rows: list[Tensor] = [weight.new_empty(1, 1, weight.shape[1])]
    if spec.correction_bias == ARGUMENT:
        rows.append(weight.new_empty(weight.shape[0], dtype=torch.float32))
    with torch.no_grad():
        found = twin(*rows)
    parts = found if isinstance(found, tuple) else (found,)
    ids = [i for i, part in enumerate(parts) if not part.is_floating_point()]
    if len(ids) != 1:
        raise ValueError(
            "router: expected one that returns logits, weights and ids, got one that returns"
            f" {', '.join(str(part.dtype) for part in parts)}"
        )
    return len(parts), ids[0]


def _on_meta(module: Any) -> Any:
    """The module with tensors on the meta device, and no forward but its class's."""
    twin = module._replicate_for_data_parallel()
    vars(twin).pop("forward", None)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        setattr(twin, name, None if tensor is None else torch.empty_like(tensor, device="meta"))
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _on_meta(child)
    return twin


def _logits(spec: Router, router: Any, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    linear = getattr(router, spec.linear) if spec.linear else None
    weight = linear.weight if linear is not None else weight_of(spec, router)
    bias = getattr(router, spec.bias) if spec.bias else None
    if spec.inputs in ("f32", "f32 rows"):
        rows = rows.float()
    elif spec.inputs == "dtype of the weight":
        rows = rows.to(weight.dtype)
    if spec.inputs == "f32":
        weight, bias = weight.float(), None if bias is None else bias.float()
    if linear is not None:
        logits: Tensor = linear(rows)
    elif spec.autocast:
        logits = F.linear(rows, weight, bias)
    else:
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows, weight, bias)
    return logits if spec.then is None else spec.then(router, logits)


def experts_forward(
    experts: Any,
    mark: Any,
    hidden_states: Tensor,
    choice: Choice | FromHidden | Tensor,
    weights: Tensor,
) -> Tensor:
    """The sum of the experts' outputs [M, D] for a router's choice, or for ready ids and weights."""
    out = apply_experts(experts, hidden_states, choice, weights)
    if not torch.compiler.is_compiling():
        mark.path = last_path()
    return out


def apply_experts(
    experts: Any, hidden_states: Tensor, choice: Choice | FromHidden | Tensor, weights: Tensor
) -> Tensor:
    """`experts_forward` without a mark: what transformers' registry of experts functions calls.

    Args:
        experts: a module with `gate_up_proj` or `up_proj` and `down_proj`, and the flags that
            transformers sets on it.
        hidden_states: [M, D].
        choice: a router's choice, or ids [M, K] of any int dtype; ids outside [0, E) count for nothing.
        weights: the logits that belong to a `Choice`, or the weights of the ids; `FromHidden` has all.
    """
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError("experts: expected none that normalise what every expert returns")
    parts = weights_of(experts)
    device = hidden_states.device.type
    dtype = parts.w1.dtype
    if type(experts).__name__ in IN_F32:
        dtype = torch.float32
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    out_dtype = hidden_states.dtype if hidden_states.dtype in DTYPES else None
    options: dict[str, Any] = {
        **parts._asdict(),
        "w1": parts.w1.to(dtype),
        "w2": parts.w2.to(dtype),
        "dtype": out_dtype,
    }
    with torch.autocast(device, enabled=False):
        rows = hidden_states.to(dtype)
        if isinstance(choice, Choice):
            return _by_logits(rows, weights, choice, options)
        if isinstance(choice, FromHidden):
            return _by_hidden(rows, choice, options)
        if gradients_matter(weights):
            weights = checked(weights, top_k_weights=weights)
        if choice.is_floating_point():
            raise ValueError(f"top_k_index: expected ids of an int dtype, got {choice.dtype}")
        return _by_ids(rows, weights, choice, options)


def _by_logits(rows: Tensor, logits: Tensor, choice: Choice, options: Mapping[str, Any]) -> Tensor:
    topk, rule, bias = choice
    if rule.num_zero_experts == 0:
        return fused_moe_from_logits(
            rows, gating_output=logits, topk=topk, rule=rule, correction_bias=bias, **options
        )
    # NOTE: of the logits, so that torch.func.vmap has outputs per slice.
    weights = logits.new_empty((logits.shape[0], topk), dtype=torch.float32)
    ids = logits.new_empty((logits.shape[0], topk), dtype=torch.int32)
    topk_routing(weights, ids, logits, rule=rule, correction_bias=bias)
    out = _by_ids(rows, weights, ids, options)
    zero = torch.where(ids >= options["w1"].shape[0], weights, 0.0).sum(dim=1, keepdim=True)
    return out + (zero * rows).to(out.dtype)


def _by_hidden(rows: Tensor, made_of: FromHidden, options: Mapping[str, Any]) -> Tensor:
    topk, rule, bias = made_of.choice
    return fused_moe_from_hidden(
        rows, router_weight=made_of.weight, topk=topk, rule=rule, correction_bias=bias,
        router_input=made_of.rows, router_bias=made_of.bias, logits_out=made_of.logits, **options,
    )  # fmt: skip


def _by_ids(rows: Tensor, weights: Tensor, ids: Tensor, options: Mapping[str, Any]) -> Tensor:
    return fused_moe(
        rows,
        topk_weight=weights.float().contiguous(),
        topk_ids=ids.to(torch.int32).contiguous(),
        **options,
    )


def _named(module: Any, path: str) -> Tensor:
    """The tensor of a dotted name, as it is now."""
    for name in path.split("."):
        module = getattr(module, name)
    tensor: Tensor = module
    return tensor


FORWARDS: dict[str, Callable[..., Any]] = {
    "router": router_forward,
    "hidden": hidden_forward,
    "experts": experts_forward,
}
"""By the role of a marked module."""
