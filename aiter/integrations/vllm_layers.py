"""Which MoE layers of vLLM can route in one launch, by which rule, and why not the others?

A layer of vLLM is asked when its weights have been loaded, because only then everything is there that
decides: the runner's router, which says how experts are chosen; the experts' activation, biases and
place among the ranks; and the backend that vLLM chose, which says how the weights lie. The answer is a
`Taken`, or a sentence with the reason for leaving the layer as it is.

vLLM's names come from `vllm_names`. Routers are known by the name of their class and read by their
attributes: vLLM's own routing would have computed what they say. Its classes and names are those of
0.32 and 0.33; whatever is not known is a reason to leave the layer alone, never a guess.

Rejected: going by `RoutingMethodType` alone, as vLLM's own fused routers do. It tells neither softmax
with groups from softmax without, nor the scale, nor a router with fused shared experts; and of a model's
own routing function it knows that there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._version import __version__
from ..layer import triton_configs, triton_plan
from ..layer.arguments import DTYPES
from ..layer.experts import triton_problem
from ..layer.parts import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation
from ..layer.types import ActivationType
from ..ops.rule import RoutingRule
from . import rocm_sort, vllm_names

Products = Literal["ours", "triton", "rocm"]
"""Who multiplies: `layer.experts`, vLLM's Triton kernels, or ROCm's aiter."""

LLAMA4 = ("vllm.model_executor.models.llama4", "Llama4MoE.custom_routing_function")


NO_DECOMPOSED = "vLLM wants experts whose steps it can see (require_decomposed_backend)"


class Routing(NamedTuple):
    """How a layer chooses its experts: the rule, K, and whether there is a correction bias."""

    rule: RoutingRule
    topk: int
    biased: bool


class Between(NamedTuple):
    """What lies between the products in our own layer, as `parts.Experts` has it."""

    activation: Activation
    interleaved: bool = False
    swiglu_limit: float = SWIGLU_LIMIT


class Taken(NamedTuple):
    """A layer that routes in one launch.

    Attributes:
        mask: int32 [E] of 0 and 1, the experts of this rank; None for all.
        between: None where the products are not ours.
        skips_padding: whether rows that vLLM has marked as padding are left out.
    """

    routing: Routing
    num_experts: int
    products: Products
    mask: Tensor | None
    between: Between | None
    skips_padding: bool = False


class Decision(NamedTuple):
    """A layer that is taken, and what of vLLM's its products need; the text says both."""

    taken: Taken
    products: Any

    def __str__(self) -> str:
        rule, (products, mask) = self.taken.routing.rule, (self.taken.products, self.taken.mask)
        words = [f"{rule.scoring_func}, top {self.taken.routing.topk} of {self.taken.num_experts}"]
        if rule.num_expert_group > 1:
            words.append(f"{rule.topk_group} of {rule.num_expert_group} groups")
        if self.taken.routing.biased:
            words.append("correction bias")
        if mask is not None:
            words.append("the experts of this rank")
        return f"{', '.join(words)}; products by {_PRODUCTS[products]}"


_PRODUCTS: dict[Products, str] = {
    "ours": "this package",
    "triton": "vLLM's Triton kernels",
    "rocm": "ROCm's aiter",
}


def decide(experts: Any, method: Any, layer: Any) -> Decision | str:
    """How a layer whose weights are loaded is computed, or why it stays as it is.

    Args:
        experts: our class of experts.
        method: vLLM's method of the layer, with `moe`, its FusedMoEConfig.
        layer: vLLM's RoutedExperts.
    """
    try:
        vllm_names.check_layer(method, layer)
        fits, reason = experts.is_supported_config(
            experts, method.moe, None, None, experts.activation_format()
        )
        if not fits:
            return str(reason)
        if getattr(method.moe, "require_decomposed_backend", False):
            return NO_DECOMPOSED
        changed = _changed(type(layer))
        if changed is not None:
            return f"its experts, {type(layer).__name__}, have a {changed} of their own"
        if getattr(layer.expert_map_manager, "num_fused_shared_experts", 0):
            return "shared experts are among its experts"
        runner = vllm_names.runner_of(layer.layer_name)
        if runner is None:
            return "vLLM does not say which router it has"
        routing = routing_of(runner.router, layer)
        if isinstance(routing, str):
            return routing
        return _decide(method, layer, routing)
    except vllm_names.Unknown as why:
        return f"this version of vLLM is not known here: {why}"


def _changed(kind: type) -> str | None:
    """What a model's class of experts computes otherwise than vLLM's; most only load otherwise."""
    for name in ("forward", "forward_modular", "forward_monolithic"):
        owner = next((each for each in kind.__mro__ if name in vars(each)), None)
        if owner is None or owner.__name__ != "RoutedExperts":
            return name
    return None


def _decide(method: Any, layer: Any, routing: Routing) -> Decision | str:
    moe, backend = method.moe, method.unquantized_backend.name
    between = between_of(moe.activation.value, settings_of(method, layer))
    why_triton = None
    names: Any = None
    if backend == "TRITON":
        try:
            names = vllm_names.find_triton()
        except vllm_names.Unknown as why:
            why_triton = f"this version of vLLM is not known here: {why}"
    weight_first = bool(layer.apply_router_weight_on_input)
    products = products_of(backend, layer.w13_weight, between, weight_first, why_triton)
    if products == "rocm":
        return _by_rocm(layer, routing, moe)
    if products not in ("ours", "triton"):
        return products
    chosen: Products = "ours" if products == "ours" else "triton"
    if not vllm_names.mark_compiled(f"one launch routes, {__version__}"):
        return "vLLM's additional_config is no dict, by which compiled models could be told apart"
    mask = mask_of(layer.expert_map)
    if isinstance(mask, str):
        return mask
    on_gpu = layer.w13_weight.device.type == "cuda"
    one_batch = moe.dp_size == 1 and moe.pcp_size == 1 and not moe.is_sequence_parallel
    taken = Taken(
        routing, moe.num_experts, chosen, mask, between if products == "ours" else None,
        on_gpu and one_batch and vllm_names.skips_padding(),
    )  # fmt: skip
    return Decision(taken, names if products == "triton" else None)


def _by_rocm(layer: Any, routing: Routing, moe: Any) -> Decision | str:
    from . import vllm_rocm

    reason = rocm_sort.available()
    if reason is not None:
        return reason
    experts = vllm_names.find_aiter_experts()
    vllm_rocm.wrap()
    return Decision(Taken(routing, moe.num_experts, "rocm", None, None), experts)


def settings_of(method: Any, layer: Any) -> Any:
    """`clamp_limit`, `alpha` and `beta` of a layer's activation, as vLLM's products get them."""
    return vllm_names.activation_settings(method.moe, method.get_fused_moe_quant_config(layer))


def routing_of(router: Any, layer: Any) -> Routing | str:
    """How a router of vLLM chooses, or why no rule says it.

    Args:
        router: the runner's.
        layer: vLLM's RoutedExperts, which has the bias that a call gets.
    """
    kind = type(router).__name__
    read = _ROUTERS.get(kind)
    if read is None:
        return f"its router is a {kind}, which no rule expresses"
    if getattr(router, "eplb_state", None) is not None:
        return "expert load balancing (EPLB) maps its experts after the choice"
    if getattr(router, "num_fused_shared_experts", 0):
        return "its router appends shared experts"
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not layer.e_score_correction_bias:
        return "its router has another correction bias than its experts"
    try:
        rule = read(router)
        return rule if isinstance(rule, str) else Routing(rule, router.top_k, bias is not None)
    except (AttributeError, TypeError, ValueError) as error:
        return f"its router has no rule: {error}"


def _by_score(router: Any) -> RoutingRule | str:
    """Top-k over all experts, without a bias: no scale either, in vLLM."""
    return RoutingRule(router.scoring_func, need_renorm=router.renormalize)


def _by_biased_score(router: Any) -> RoutingRule | str:
    if getattr(router, "_hash_indices_table", None) is not None:
        return "its experts are given by the token (hash routing)"
    if getattr(router, "bias_vl", None) is not None:
        return "image tokens have a correction bias of their own"
    return RoutingRule(
        router.scoring_func, need_renorm=router.renormalize,
        routed_scaling_factor=float(router.routed_scaling_factor),
    )  # fmt: skip


def _by_groups(router: Any) -> RoutingRule | str:
    groups, experts = router.num_expert_group, router.global_num_experts
    if groups is None or router.topk_group is None:
        return "its router asks for groups, and does not say how many"
    if experts <= groups or experts % groups:
        return f"its {experts} experts are not {groups} groups of several"
    return RoutingRule(
        router.scoring_func, groups, router.topk_group, need_renorm=router.renormalize,
        routed_scaling_factor=float(router.routed_scaling_factor),
    )  # fmt: skip


def _on_a_cpu(router: Any) -> RoutingRule | str:
    """vLLM's one router for CPUs, which is all of the others."""
    function = router.custom_routing_function
    if function is not None:
        return _by_function(router)
    if router.use_grouped_topk:
        return _by_groups(router)
    if router.scoring_func == "softmax":
        if router.e_score_correction_bias is not None:
            return (
                "vLLM's router for CPUs leaves the correction bias out of a softmax without groups"
            )
        return _by_score(router)
    return _by_biased_score(router)


def _by_function(router: Any) -> RoutingRule | str:
    function = router.custom_routing_function
    name = (getattr(function, "__module__", ""), getattr(function, "__qualname__", ""))
    if name == LLAMA4:
        return RoutingRule("sigmoid", select_on="logit", need_renorm=False)
    return f"the model routes by a function of its own, {'.'.join(name)}"


_ROUTERS: dict[str, Callable[[Any], RoutingRule | str]] = {
    "FusedTopKRouter": _by_score,
    "FusedTopKBiasRouter": _by_biased_score,
    "GroupedTopKRouter": _by_groups,
    "CPURouter": _on_a_cpu,
    "CustomRoutingRouter": _by_function,
}


def between_of(activation: str, settings: Any) -> Between | None:
    """An activation of vLLM in our own layer, None where it has none.

    Args:
        activation: the value of its MoEActivation.
        settings: `clamp_limit`, `alpha` and `beta` of its ApplyMoEActivationConfig.
    """
    limit, alpha, beta = settings.clamp_limit, settings.alpha, settings.beta
    if activation == "swigluoai":
        return Between(ActivationType.Swiglu, interleaved=True)
    if activation == "swigluoai_uninterleave":
        if limit is None:
            return None
        if alpha == SWIGLU_ALPHA and beta == 1.0:
            return Between(ActivationType.Swiglu, swiglu_limit=float(limit))
        return Between(_Clamped(float(limit), float(alpha), float(beta)))
    if activation == "silu" and limit is not None:
        return Between(_Clamped(float(limit), 1.0, 0.0))
    kind = _ACTIVATIONS.get(activation)
    return None if kind is None else Between(kind)


class _Clamped:
    """g * sigmoid(alpha * g) * (u + beta), g at most `limit`, u from -`limit` to `limit`."""

    def __init__(self, limit: float, alpha: float, beta: float) -> None:
        self.limit, self.alpha, self.beta = limit, alpha, beta

    def __call__(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def _gelu_tanh_and_mul(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _gelu_tanh(rows: Tensor) -> Tensor:
    return F.gelu(rows, approximate="tanh")


def _relu_squared(rows: Tensor) -> Tensor:
    return F.relu(rows).square()


# NOTE: without "_no_mul" w1 has 2 * inter rows, and with it inter, by which our layer tells them apart.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": ActivationType.Silu,
    "gelu": ActivationType.Gelu,
    "gelu_tanh": _gelu_tanh_and_mul,
    "silu_no_mul": ActivationType.Silu,
    "gelu_no_mul": ActivationType.Gelu,
    "gelu_tanh_no_mul": _gelu_tanh,
    "relu2_no_mul": _relu_squared,
}


def mask_of(expert_map: Tensor | None) -> Tensor | None | str:
    """int32 [E] of 0 and 1 for vLLM's map from global to local experts, or why there is none.

    The map is read on the host: once for each layer, when weights are loaded.
    """
    if expert_map is None:
        return None
    local = expert_map[expert_map >= 0].cpu()
    if not torch.equal(local, torch.arange(local.numel(), dtype=local.dtype)):
        return "its local experts are not in the order of their global numbers"
    return (expert_map >= 0).to(torch.int32)


_WEIGHT_FIRST = "its routing weight multiplies the expert's input"


def products_of(
    backend: str, weight: Tensor, between: Between | None, weight_first: bool, triton: str | None
) -> Products | str:
    """Who multiplies, or why the layer cannot be taken.

    On a CPU we do. Where vLLM chose its Triton kernels, ours multiply if their tiles were measured on
    such a GPU (on an H100 they are as fast as vLLM's or faster for every number of tokens:
    docs/moe_layer.md), and vLLM's everywhere else. Where it chose ROCm's aiter, that does.

    Args:
        backend: the name of vLLM's UnquantizedMoeBackend.
        weight: w1 [E', N1, D], where it will be multiplied.
        weight_first: whether the routing weight multiplies an expert's input.
        triton: why vLLM's Triton kernels cannot be fed, None if they can.
    """
    if weight.dtype not in DTYPES:
        return f"its weights are {weight.dtype}"
    if backend == "CPU":
        return "ours" if between is not None else "its activation is not computed here"
    if backend == "AITER":
        return "rocm" if not weight_first else _WEIGHT_FIRST
    if backend != "TRITON":
        return (
            f"vLLM multiplies with {backend}, whose kernels route by themselves or read ids alone"
        )
    if (
        between is not None
        and triton_problem(weight.device, between.activation) is None
        and triton_plan.family_for(weight.device, tuple(weight.shape), weight.stride()).source
        != triton_configs.NOT_MEASURED
    ):
        return "ours"
    if weight_first:
        return _WEIGHT_FIRST
    return triton if triton is not None else "triton"
