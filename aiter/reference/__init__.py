"""The maths of routing and of the layer in plain PyTorch, which every other path is compared with."""

from .router import router_logits, router_topk_sorting
from .routing import moe_sorting, topk_softmax, topk_softmax_sorting
from .rules import topk_routing, topk_routing_sorting

__all__ = [
    "moe_sorting",
    "router_logits",
    "router_topk_sorting",
    "topk_routing",
    "topk_routing_sorting",
    "topk_softmax",
    "topk_softmax_sorting",
]
