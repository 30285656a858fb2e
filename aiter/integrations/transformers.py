"""How do Hugging Face transformers' MoE blocks get the fused routing and the fused experts?

    with use_aiter(model) as patched:
        model.generate(...)
    print(patched.paths)

A block of transformers is a router (logits, scores, top-k) and experts, called one after the other by
the block's own forward, which also adds shared experts, scales and reshapes. `use_aiter` takes the
forwards of these two and leaves the block's alone: the router's then computes the logits only and
hands them on in the place of the weights, the experts' takes them into `fused_moe_from_logits`. So
what records the router's logits (`output_router_logits`), shared experts and hooks keep working, and
no weight is copied. With `router=True` the router hands on what its product is made of, and the launch
that routes makes the product as well. `forwards` says what is computed, `patching` how a forward is
taken and given back, `blocks` which blocks are known.

Rejected: replacing the block's forward, which would have to repeat what each family does around the
experts.

`experts_implementation="aiter"` is the other way in, through transformers' own registry, for every model
whose experts are in it: the router stays transformers', and `fused_moe` gets its ids. It is there when
this module has been imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..jit.paths import PACKAGE
from ..layer.arguments import DTYPES
from ..layer.experts import Backend, expert_backend
from ..routing.arguments import check_bool
from ..routing.dispatch import Path
from .blocks import BLOCKS, REFUSED, Block
from .forwards import apply_experts, returned_by, rule_of, weight_of, weights_of
from .patching import Mark, mark_of, put_mark, replaceable, take_mark


@dataclass
class Patched:
    """The blocks of a model that use aiter, until `remove()` or the end of a `with`.

    Attributes:
        layers: the names of the blocks in the model.
        routers: those of them whose router's product is made by the routing launch.
    """

    layers: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    _experts: dict[str, tuple[Any, Mark]] = field(default_factory=dict)
    _marks: list[tuple[nn.Module, Mark]] = field(default_factory=list)

    @property
    def paths(self) -> dict[str, Path | None]:
        """The routing path that each block's last eager call took; None before the first."""
        return {name: mark.path for name, (_, mark) in self._experts.items()}

    @property
    def backends(self) -> dict[str, Backend]:
        """The backend of each block's expert products, on the device where its weights are now."""
        parts = {name: weights_of(experts) for name, (experts, _) in self._experts.items()}
        return {
            name: expert_backend(each.w1, each.w2, each.activation) for name, each in parts.items()
        }

    def remove(self) -> None:
        """Gives every block that still uses aiter by this handle its own forwards back."""
        for module, mark in self._marks:
            take_mark(module, mark)
        self._marks.clear()

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def use_aiter(model: nn.Module, *, router: bool = False) -> Patched:
    """Makes every MoE block of a transformers model route and multiply through aiter.

    Args:
        model: a transformers model in float32, float16 or bfloat16 whose MoE blocks are in
            `blocks.BLOCKS`; docs/models.md lists them by model. Calls need no gradients: run it under
            `torch.no_grad()` or `torch.inference_mode()`; `model.generate` does so by itself.
        router: whether the routing launch makes the router's product, too, in every block whose router
            is a plain linear layer (`Patched.routers`; the others keep theirs, as with False). Logits
            are float32 then, not rounded to another dtype, also under autocast; up to 64 tokens the
            bits of a row's are its own (docs/contract.md). They are written when the experts run, so
            a hook on the router must not read them.

    Returns:
        A handle; `remove()`, or leaving it as a context manager, undoes everything. Copies of the
        model that are made meanwhile use aiter as well; `remove_aiter` takes it from them.

    Raises:
        ValueError: a block with experts is of another kind, quantised, sharded or customised, or the
            model has no MoE block, or none whose router is one with `router`; nothing was changed.
        TypeError: `router` is no bool.
    """
    check_bool("router", router)
    found: list[tuple[str, nn.Module, Block, tuple[int, int] | None]] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in BLOCKS:
            returned = _check_block(name, module, BLOCKS[kind])
            found.append((name, module, BLOCKS[kind], returned))
        elif kind in REFUSED and (kind not in _MAY_HAVE_EXPERTS or _has_experts(module)):
            raise ValueError(
                f"{name or 'model'}: expected a MoE block whose router a RoutingRule can express, got"
                f" {kind}: {REFUSED[kind]}"
            )
        elif _has_experts(module):
            raise ValueError(
                f"{name or 'model'}: expected a MoE block with a router that is known, one of"
                f" {', '.join(BLOCKS)}, got {kind}"
            )
    if not found:
        raise ValueError(
            f"model: expected MoE blocks, {', '.join(BLOCKS)}, got none in {type(model).__name__}"
        )
    by_launch = [router and _has_linear_router(block, known) for _, block, known, _ in found]
    if router and not any(by_launch):
        raise ValueError(
            "router: expected a block whose router is a plain linear layer, got none in"
            f" {type(model).__name__}"
        )
    patched = Patched()
    for (name, block, known, returned), in_launch in zip(found, by_launch, strict=True):
        _patch(name, block, known, patched, returned, in_launch)
    return patched


def remove_aiter(model: nn.Module) -> None:
    """Gives all modules of a model their own forwards back: of a copy that no handle knows, as well."""
    for module in model.modules():
        take_mark(module)


_MAY_HAVE_EXPERTS = (
    "DiffusionGemmaDecoderTextLayer",
    "DiffusionGemmaEncoderTextLayer",
    "Gemma4TextDecoderLayer",
)


def _has_experts(module: nn.Module) -> bool:
    return isinstance(module._modules.get("experts"), nn.Module)


def _check_block(name: str, block: Any, known: Block) -> tuple[int, int] | None:
    """Raises unless the block is built of the parts that its row names, with plain float weights.

    Returns:
        What `returned_by` says of the router; None for one that keeps its own forward.
    """
    router, experts = getattr(block, known.router), block.experts
    routers = (
        f"{known.router_class} or {known.ids_class}" if known.ids_class else known.router_class
    )
    for part, expected in ((router, routers), (experts, known.experts_class)):
        if type(part).__name__ not in expected.split(" or "):
            raise ValueError(
                f"{name}: expected {expected} (quantised and customised blocks are not supported),"
                f" got {type(part).__name__}"
            )
    for part in (block, router, experts):
        if mark_of(part) is not None or not (
            replaceable(part) or (part is block and "_hf_hook" in vars(part))
        ):
            raise ValueError(
                f"{name}: expected a block with its class's forward, got one whose forward is"
                " replaced already (by use_aiter, or by a kernel of the hub)"
            )
    for weight_name, parameter in experts.named_parameters():
        _check_weight(f"{name}.experts.{weight_name}", parameter)
    # NOTE: what is no parameter any more is looked at as well.
    parts = weights_of(experts)
    for part_name in ("w1", "w2", "bias1", "bias2"):
        weight = getattr(parts, part_name)
        if weight is not None:
            _check_weight(f"{name}.experts ({part_name})", weight)
    if getattr(experts, "_is_expert_parallel", False):
        raise ValueError(
            f"{name}.experts: expected all experts on this rank, got a shard of transformers' own"
            " expert parallelism"
        )
    if type(router).__name__ != known.router_class:
        return None
    try:
        rule_of(known.spec, router)
        return returned_by(router)
    except ValueError as error:
        raise ValueError(f"{name}.{known.router}: {error}") from error


def _check_weight(name: str, weight: Tensor) -> None:
    """Raises for weights that are no plain float tensor."""
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected float32, float16 or bfloat16 (quantised experts are not supported),"
            f" got {weight.dtype}"
        )
    if not _is_plain(weight):
        raise ValueError(
            f"{name}: expected a plain parameter (sharded and quantised ones are not supported),"
            f" got {type(weight).__name__}"
        )


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _has_linear_router(block: Any, known: Block) -> bool:
    """Whether the block's launch can make its router's product."""
    router = getattr(block, known.router)
    if type(router).__name__ != known.router_class or not known.spec.is_linear:
        return False
    if rule_of(known.spec, router).num_zero_experts:
        return False  # what they add goes by ids
    weight = weight_of(known.spec, router)
    return weight.dtype in DTYPES and _is_plain(weight)


def _patch(
    name: str,
    block: Any,
    known: Block,
    patched: Patched,
    returned: tuple[int, int] | None,
    in_launch: bool,
) -> None:
    router, experts = getattr(block, known.router), block.experts
    if returned is not None:
        role = "hidden" if in_launch else "router"
        patched._marks.append((router, put_mark(router, role, returned)))
    if in_launch:
        patched.routers.append(name)
    mark = put_mark(experts, "experts")
    patched._marks.append((experts, mark))
    patched._experts[name] = (experts, mark)
    patched.layers.append(name)


def register_experts() -> bool:
    """Makes `experts_implementation="aiter"`, the package's name, known to transformers that have it."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return False
    ALL_EXPERTS_FUNCTIONS.register(PACKAGE, apply_experts)
    return True


register_experts()
