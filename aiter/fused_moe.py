"""What does a MoE layer call? Routing alone, or the whole layer, by the names of ROCm's aiter.

The public names; `layer.calls` has the layer, `routing.calls` the routing by itself, for engines with
expert GEMMs of their own. Functions of ROCm's aiter have its names, argument orders and defaults
(docs/rocm_aiter_names.md); extras are keyword-only.
"""

from .layer.calls import fused_moe, fused_moe_from_logits
from .layer.experts import expert_backend
from .layer.from_hidden import fused_moe_from_hidden
from .layer.types import ActivationType, QuantType
from .layer.warmup import warmup_layer
from .routing.buffers import SortedBuffers
from .routing.calls import empty_sorted_buffers, topk_routing_sorting, topk_softmax_sorting
from .routing.known import last_path
from .routing.router import router_topk_sorting
from .routing.upstream import fused_topk, moe_sorting

__all__ = [
    "ActivationType",
    "QuantType",
    "SortedBuffers",
    "empty_sorted_buffers",
    "expert_backend",
    "fused_moe",
    "fused_moe_from_hidden",
    "fused_moe_from_logits",
    "fused_topk",
    "last_path",
    "moe_sorting",
    "router_topk_sorting",
    "topk_routing_sorting",
    "topk_softmax_sorting",
    "warmup_layer",
]
