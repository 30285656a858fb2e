"""Fused MoE routing in one launch, compiled on first use.

Importing this package compiles nothing, starts no process and touches no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _installed, dtypes
from ._version import __version__
from .layer.types import ActivationType, QuantType
from .ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from .ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size
from .ops.rule import RoutingRule
from .routing.graph import fused_topk_moe_sorting_fwd, topk_routing
from .routing.upstream import moe_sorting_fwd, moe_sorting_opus_fwd
from .routing.upstream_topk import (
    biased_grouped_topk,
    grouped_topk,
    moe_fused_gate,
    topk_gating,
    topk_sigmoid,
    topk_softmax,
    topk_softplus,
)

if TYPE_CHECKING:
    from .jit.warmup import warmup

_installed.begin()

__all__ = [
    "ActivationType",
    "QuantType",
    "RoutingRule",
    "__version__",
    "biased_grouped_topk",
    "dtypes",
    "fused_topk_moe_sorting_fwd",
    "fused_topk_moe_sorting_max_tokens",
    "grouped_topk",
    "moe_fused_gate",
    "moe_sorting_fwd",
    "moe_sorting_opus_fwd",
    "moe_sorting_opus_get_workspace_size",
    "topk_gating",
    "topk_routing",
    "topk_sigmoid",
    "topk_softmax",
    "topk_softplus",
    "warmup",
]


def __getattr__(name: str) -> object:
    # NOTE: imported when asked for, as `import aiter` should not pay for what a server calls once.
    if name == "warmup":
        from .jit.warmup import warmup

        return warmup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
