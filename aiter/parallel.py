"""Experts shared by several GPUs: the public names of `layer.parallel`."""

from .layer.parallel import ExpertShard, expert_shard, fused_moe_expert_parallel

__all__ = ["ExpertShard", "expert_shard", "fused_moe_expert_parallel"]
