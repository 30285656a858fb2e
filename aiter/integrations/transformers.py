"""How do Hugging Face transformers' MoE blocks get the fused routing and the fused experts?

    with use_aiter(model) as patched:
        model.generate(...)
    print(patched.paths)

A block of transformers is a router (logits, softmax, top-k) and experts, called one after the other
by the block's own forward, which also adds shared experts and reshapes. `use_aiter` replaces the
two forwards on the instances and leaves the block's alone: the router's then computes the logits
only and hands them on in the place of the weights, the experts' takes them into
`fused_moe_from_logits`. So what records the router's logits (`output_router_logits`), shared experts
and hooks keep working, no weight is copied, and removing it is deleting two attributes.

Rejected: replacing the block's forward, which would have to repeat what each family does around the
experts; and registering an experts implementation with transformers (`set_experts_implementation`),
which gets ready top-k ids, when the routing launch has already been paid for.

Only blocks whose router is known to be a plain softmax are taken, by class name; every other block
with experts is refused, because a router that differs in one detail (sigmoid, groups, a correction
bias) would give plausible and wrong tokens. Weights keep their layout: gpt-oss stores both products
transposed, with gate and up interleaved, and is read through views. The classes are those of
transformers 5; it was run with 5.17 and 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..fused_moe import fused_moe_from_logits, last_path
from ..layer.arguments import DTYPES
from ..layer.experts import SWIGLU_ALPHA, SWIGLU_LIMIT, Backend, expert_backend
from ..layer.types import ActivationType
from ..routing.dispatch import Path


@dataclass(frozen=True)
class Family:
    """What has to be known of a block's class: its parts, and how the experts' weights lie."""

    router: str  # attribute and class of the router
    router_class: str
    experts_class: str
    renormalize: bool | None  # None: the router's norm_topk_prob says
    gpt_oss: bool = False  # transposed and interleaved weights, biases, clamped swiglu


FAMILIES = {
    "GptOssMLP": Family("router", "GptOssTopKRouter", "GptOssExperts", True, gpt_oss=True),
    "MixtralSparseMoeBlock": Family("gate", "MixtralTopKRouter", "MixtralExperts", True),
    "Qwen3MoeSparseMoeBlock": Family("gate", "Qwen3MoeTopKRouter", "Qwen3MoeExperts", None),
    "Qwen3NextSparseMoeBlock": Family("gate", "Qwen3NextTopKRouter", "Qwen3NextExperts", None),
}
"""The blocks that `use_aiter` takes, by the name of their class in transformers."""

_ACTIVATIONS = {
    "SiLUActivation": ActivationType.Silu,
    "SiLU": ActivationType.Silu,
    "GELUActivation": ActivationType.Gelu,
    "GELU": ActivationType.Gelu,
}


@dataclass
class Patched:
    """The blocks of a model that use aiter, until `remove()` or the end of a `with`.

    Attributes:
        layers: the names of the blocks in the model.
        paths: the routing path that each block's last eager call took; None before the first.
    """

    layers: list[str] = field(default_factory=list)
    paths: dict[str, Path | None] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list)
    _weights: dict[str, Callable[[], tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def backends(self) -> dict[str, Backend]:
        """The backend of each block's expert products, on the device where its weights are now."""
        return {name: expert_backend(*weights()) for name, weights in self._weights.items()}

    def remove(self) -> None:
        """Gives every block its own forwards back; a second call does nothing."""
        for module in self._modules:
            del module.forward
        self._modules.clear()

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def use_aiter(model: nn.Module) -> Patched:
    """Makes every MoE block of a transformers model route and multiply through aiter.

    Args:
        model: a gpt-oss, Qwen3-MoE, Qwen3-Next or Mixtral model in float32, float16 or bfloat16.
            Calls need no gradients: run it under `torch.no_grad()` or `torch.inference_mode()`;
            `model.generate` does so by itself.

    Returns:
        A handle; `remove()`, or leaving it as a context manager, undoes everything.

    Raises:
        ValueError: a block with experts is of another kind, quantised, sharded, hooked, or has an
            activation that is not supported, or the model has no MoE block; nothing was changed.
    """
    found: list[tuple[str, nn.Module, Family]] = []
    for name, module in model.named_modules():
        family = FAMILIES.get(type(module).__name__)
        if family is not None:
            _check_block(name, module, family)
            found.append((name, module, family))
        elif _has_experts(module):
            raise ValueError(
                f"{name or 'model'}: expected a MoE block with plain softmax routing, one of"
                f" {', '.join(FAMILIES)}, got {type(module).__name__}"
            )
    if not found:
        raise ValueError(
            f"model: expected MoE blocks, {', '.join(FAMILIES)}, got none in {type(model).__name__}"
        )
    patched = Patched()
    for name, block, family in found:
        _patch(name, block, family, patched)
    return patched


def _has_experts(module: nn.Module) -> bool:
    return isinstance(module._modules.get("experts"), nn.Module)


def _check_block(name: str, block: nn.Module, family: Family) -> None:
    """Raises unless the block is built as the family's float weights and softmax router."""
    router, experts = _parts(block, family)
    for part, expected in ((router, family.router_class), (experts, family.experts_class)):
        if type(part).__name__ != expected:
            raise ValueError(
                f"{name}: expected {expected} (quantised and customised blocks are not supported),"
                f" got {type(part).__name__}"
            )
    for part in (block, router, experts):
        if "forward" in vars(part):
            raise ValueError(
                f"{name}: expected a block with its class's forward, got one whose forward is"
                " replaced already (by use_aiter, by hooks of accelerate's device_map, or by a"
                " kernel of the hub)"
            )
    for weight in ("gate_up_proj", "down_proj"):
        _check_weight(f"{name}.experts.{weight}", getattr(experts, weight))
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"{name}.experts: expected all experts on this rank, got a shard of transformers' own"
            " expert parallelism"
        )
    _activation(name, experts, family)


def _check_weight(name: str, weight: Tensor) -> None:
    """Raises for weights that are no plain float tensor."""
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected float32, float16 or bfloat16 (quantised experts are not supported),"
            f" got {weight.dtype}"
        )
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"{name}: expected a plain parameter (sharded and quantised ones are not supported),"
            f" got {type(weight).__name__}"
        )


def _parts(block: Any, family: Family) -> tuple[Any, Any]:
    return getattr(block, family.router), block.experts


def _activation(name: str, experts: Any, family: Family) -> ActivationType:
    if family.gpt_oss:
        got = (experts.alpha, experts.limit)
        if got != (SWIGLU_ALPHA, SWIGLU_LIMIT):
            raise ValueError(
                f"{name}.experts: expected swiglu with alpha {SWIGLU_ALPHA} and limit"
                f" {SWIGLU_LIMIT}, got {got[0]} and {got[1]}"
            )
        return ActivationType.Swiglu
    kind = type(experts.act_fn).__name__
    if kind not in _ACTIVATIONS:
        raise ValueError(
            f"{name}.experts.act_fn: expected one of {', '.join(_ACTIVATIONS)}, got {kind}"
        )
    return _ACTIVATIONS[kind]


def _weights(experts: Any, family: Family) -> tuple[Tensor, Tensor]:
    """w1 [E, 2*inter, D] and w2 [E, D, inter], as views where they are stored transposed."""
    if family.gpt_oss:
        return experts.gate_up_proj.transpose(1, 2), experts.down_proj.transpose(1, 2)
    return experts.gate_up_proj, experts.down_proj


def _patch(name: str, block: nn.Module, family: Family, patched: Patched) -> None:
    router, experts = _parts(block, family)
    patched.layers.append(name)
    patched.paths[name] = None
    patched._weights[name] = lambda: _weights(experts, family)
    router.forward = _router_forward(router)
    experts.forward = _experts_forward(name, router, experts, family, patched.paths)
    patched._modules += [router, experts]


def _router_forward(router: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, None]]:
    """(logits, scores, indices) with the logits for scores: the experts' forward chooses."""

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = F.linear(rows, router.weight, getattr(router, "bias", None))
        return logits, logits, None

    return forward


def _experts_forward(
    name: str, router: Any, experts: Any, family: Family, paths: dict[str, Path | None]
) -> Callable[[Tensor, None, Tensor], Tensor]:
    """(hidden_states, indices, scores), as the router's forward above returns the last two."""
    activation = _activation(name, experts, family)
    renormalize = router.norm_topk_prob if family.renormalize is None else family.renormalize

    def forward(hidden_states: Tensor, indices: None, logits: Tensor) -> Tensor:
        w1, w2 = _weights(experts, family)
        out = fused_moe_from_logits(
            hidden_states,
            w1,
            w2,
            logits,
            router.top_k,
            renormalize,
            activation=activation,
            bias1=experts.gate_up_proj_bias if family.gpt_oss else None,
            bias2=experts.down_proj_bias if family.gpt_oss else None,
            gate_up_interleaved=family.gpt_oss,
        )
        if not torch.compiler.is_compiling():
            paths[name] = last_path()
        return out

    return forward
