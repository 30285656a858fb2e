"""Is ROCm's aiter here, does it sort as we know it, and who takes its sort's place?

`upstream` imports `aiter.fused_moe` when it is first asked, never before: that import needs a GPU and
may build. It compares two signatures, those of `moe_sorting` and `fused_moe`, with what is known here,
and puts the dispatcher in the place of `moe_sorting`; `rocm_aiter` says how that is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import Tensor

from ..jit.paths import PACKAGE
from ..ops.rule import RoutingRule
from ..routing.buffers import SortedBuffers, TopkOut
from ..routing.calls import empty_sorted_buffers, topk_routing_sorting
from ..routing.graph import topk_routing

NAME = "aiter"  # the import name of ROCm's package
DISTRIBUTION = "amd-aiter"

SORT_FIRST = (
    "topk_ids", "topk_weights", "num_experts", "model_dim", "moebuf_dtype", "block_size",
    "expert_mask", "num_local_tokens", "dispatch_policy",
)  # fmt: skip
SORT_LATER = ("return_local_topk_ids", "accumulate", "flat", "output_aux", "output")
LAYER_FIRST = ("hidden_states", "w1", "w2", "topk_weight", "topk_ids")
LAYER_KNOWN = (
    "expert_mask", "activation", "quant_type", "doweight_stage1", "w1_scale", "w2_scale", "a1_scale",
    "a2_scale", "block_size_M", "num_local_tokens", "moe_sorting_dispatch_policy", "dtype",
)  # fmt: skip
LAYER_LATER = (
    "hidden_pad", "intermediate_pad", "bias1", "bias2", "splitk", "swiglu_limit", "beta",
    "linear_beta", "gate_mode", "output",
)  # fmt: skip
"""Keywords that reach the sort without a look at the ids; others have the ids filled first."""

_GROUPED = "gfx1250"  # where products of interleaved weights read the ids, and never sort
_pending: ContextVar[Pending | None] = ContextVar(f"{PACKAGE}_rocm_aiter", default=None)
_lock = threading.Lock()
_found: Upstream | None = None


class Pending:
    """A routing that waits for upstream's sort.

    Attributes:
        gating_output, topk, rule, correction_bias: of the call.
        topk_out: weights and ids, which upstream was handed unfilled.
        policy: 0, 1 or 2, our `dispatch_policy`.
        done: whether `topk_out` is filled.
    """

    def __init__(
        self,
        gating_output: Tensor,
        topk: int,
        rule: RoutingRule,
        correction_bias: Tensor | None,
        topk_out: TopkOut,
        policy: int,
    ) -> None:
        self.gating_output = gating_output
        self.topk = topk
        self.rule = rule
        self.correction_bias = correction_bias
        self.topk_out = topk_out
        self.policy = policy
        self.done = False

    def fill(self) -> None:
        """Fills ids and weights by a launch of their own."""
        topk_routing(
            *self.topk_out, self.gating_output, rule=self.rule, correction_bias=self.correction_bias
        )
        self.done = True

    def is_for(self, topk_ids: object) -> bool:
        """Whether a sort of these ids is the one that is waited for."""
        ids = self.topk_out[1]
        return isinstance(topk_ids, Tensor) and topk_ids.data_ptr() == ids.data_ptr()

    def sort(
        self,
        block_size: int,
        model_dim: int,
        moebuf_dtype: Any,
        expert_mask: Tensor | None,
        num_local_tokens: Tensor | None,
        accumulate: bool,
        output: Tensor | None,
    ) -> SortedBuffers:
        """The one launch, with what upstream's sort was asked for."""
        logits = self.gating_output
        num_experts = self.rule.num_experts(logits.shape[1])
        mask = expert_mask
        if mask is not None and mask.shape[0] != num_experts:
            mask = mask[:num_experts]  # NOTE: what is behind the experts is chosen by no row.
        placeholder = not accumulate and mask is None
        out = None
        if output is not None and not placeholder:
            slots = self.topk + self.rule.num_shared_experts
            rows = logits.shape[0]
            *sorted_buffers, _ = empty_sorted_buffers(
                rows, slots, num_experts, 0, moebuf_dtype, block_size, device=logits.device
            )
            first, second, third, fourth = sorted_buffers
            out = (first, second, third, fourth, output)
        buffers = topk_routing_sorting(
            logits, self.topk, num_experts, 0 if placeholder else model_dim, moebuf_dtype,
            rule=self.rule, correction_bias=self.correction_bias, block_size=block_size,
            expert_mask=mask, num_local_tokens=num_local_tokens, dispatch_policy=self.policy,
            topk_out=self.topk_out, out=out,
        )  # fmt: skip
        self.done = True
        if placeholder:
            return (*buffers[:4], buffers[4].new_empty((0, 0)))
        return buffers


class Upstream:
    """ROCm's `aiter.fused_moe`, with signatures that are known, and the dispatcher in it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.original: Callable[..., Any] = module.moe_sorting
        self.parameters = inspect.signature(module.fused_moe).parameters
        self.dispatcher = _dispatcher(self.original)
        module.moe_sorting = self.dispatcher  # type: ignore[attr-defined]

    def check_keywords(self, keywords: dict[str, Any]) -> None:
        """Raises TypeError for a keyword that this version of `fused_moe` has not."""
        for name in keywords:
            if name not in self.parameters or name in LAYER_FIRST:
                known = ", ".join(each for each in self.parameters if each not in LAYER_FIRST)
                raise TypeError(
                    f"{name}: expected a keyword of the fused_moe of {_version()}, which are {known},"
                    " got one that it has not"
                )

    def reads_ids_first(self, keywords: dict[str, Any]) -> bool:
        """Whether this call may read the ids before it sorts, or without sorting."""
        for name, value in keywords.items():
            if name not in LAYER_KNOWN and name not in LAYER_LATER:
                default = self.parameters[name].default
                if value is not default and (isinstance(value, Tensor) or value != default):
                    return True
        if str(keywords.get("gate_mode", "separated")) == "separated":
            return False
        get_gfx = getattr(self.module, "get_gfx", None)
        return get_gfx is None or get_gfx() == _GROUPED

    def enum_of(self, name: str, number: int) -> Any:
        """The member of the enum that is the default of a keyword."""
        return type(self.parameters[name].default)(number)

    def run(self, pending: Pending, *args: Any, **keywords: Any) -> Tensor:
        """Upstream's `fused_moe`, with `pending` in the place of its sort."""
        token = _pending.set(pending)
        try:
            out: Tensor = self.module.fused_moe(*args, **keywords)
        finally:
            _pending.reset(token)
        if not pending.done:
            raise RuntimeError(
                f"moe_sorting: expected the fused_moe of {_version()} to call it for the ids that it"
                " was given, got a call that went past it; its result is of ids that nobody wrote"
            )
        return out


def available() -> str | None:
    """None if ROCm's aiter is here, with signatures that are known; else a sentence that says why not.

    The first question imports ROCm's aiter.
    """
    try:
        upstream()
    except ImportError as error:
        return str(error)
    return None


def upstream() -> Upstream:
    """ROCm's `fused_moe` module with the dispatcher in its place.

    Raises:
        ImportError: it is not here, cannot be imported, or its signatures are not known.
    """
    global _found
    found = _found
    if found is not None and found.module.moe_sorting is found.dispatcher:
        return found
    with _lock:
        # NOTE: also where somebody else has replaced the attribute since: then on top of theirs.
        module = _import()
        reason = unknown_signature(module)
        if reason:
            raise ImportError(reason)
        _found = Upstream(module)
        return _found


def restore() -> bool:
    """Puts ROCm's own `moe_sorting` back; whether it did.

    Where somebody replaced the attribute since, theirs stays, and the dispatcher below it does nothing
    but call the original. The next call of ours puts a dispatcher in its place again.
    """
    global _found
    with _lock:
        found, _found = _found, None
        if found is None or found.module.moe_sorting is not found.dispatcher:
            return False
        found.module.moe_sorting = found.original  # type: ignore[attr-defined]
        return True


def unknown_signature(module: ModuleType) -> str | None:
    """What about a `fused_moe` module is not as known here, in a sentence; None if nothing is."""
    for name, first, later, strict in (
        ("moe_sorting", SORT_FIRST, SORT_LATER, True),
        ("fused_moe", LAYER_FIRST, (), False),
    ):
        function = getattr(module, name, None)
        got = list(inspect.signature(function).parameters) if callable(function) else None
        expected = f"{module.__name__}.{name}: expected a function of ({', '.join(first)}"
        if got is None:
            return f"{expected}), got none in {_version()}"
        rest = got[len(first) :]
        unknown = [each for each in rest if each not in later] if strict else []
        lacking = [] if strict else [each for each in LAYER_KNOWN if each not in rest]
        if tuple(got[: len(first)]) != first or unknown or lacking:
            known = f" and of {', '.join(later or LAYER_KNOWN)}"
            return f"{expected}{known}), got ({', '.join(got)}) in {_version()}"
    return None


def _import() -> ModuleType:
    if NAME == PACKAGE:
        raise ImportError(
            f"{NAME}: expected ROCm's package beside this one, got this one under its name; install this"
            " one with AITER_IMPORT_NAME=fused_moe_routing (docs/with_rocm_aiter.md)"
        )
    try:
        module = importlib.import_module(f"{NAME}.fused_moe")
    # NOTE: a module that it cannot build ends in sys.exit.
    except (Exception, SystemExit) as error:
        raise ImportError(
            f"{NAME}: expected ROCm's package ({DISTRIBUTION}), got {type(error).__name__}: {error}"
        ) from error
    if hasattr(module, "topk_routing_sorting"):
        raise ImportError(
            f"{NAME}: expected ROCm's package ({DISTRIBUTION}), got a second copy of this one in"
            f" {module.__file__}"
        )
    return module


def _version() -> str:
    """ROCm's aiter with its version, as it is called in messages."""
    try:
        return f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"
    except importlib.metadata.PackageNotFoundError:
        return "ROCm's aiter"


def _dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `moe_sorting` that gives the sort of a `Pending` to it, and every other to `original`."""
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)
    defaults = {name: each.default for name, each in parameters.items()}

    @functools.wraps(original)
    def moe_sorting(*args: Any, **kwargs: Any) -> Any:
        pending = _pending.get()
        if pending is None or pending.done:
            return original(*args, **kwargs)
        asked = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if not pending.is_for(asked["topk_ids"]):
            return original(*args, **kwargs)
        if asked.get("flat") or asked.get("output_aux") or asked.get("return_local_topk_ids"):
            pending.fill()
            return original(*args, **kwargs)
        return pending.sort(
            int(asked["block_size"]), asked["model_dim"], asked["moebuf_dtype"],
            asked["expert_mask"], asked["num_local_tokens"], asked.get("accumulate", True),
            asked.get("output"),
        )  # fmt: skip

    return moe_sorting
