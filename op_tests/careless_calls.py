"""What does a careless caller pass? A valid call of every function, and what to put in its arguments.

Every value of `WRONG` and every `broken` tensor is wrong for any argument: a call that takes one was not
checked. Freed tensors end the process in PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import aiter
from aiter import ActivationType, QuantType, RoutingRule, fused_moe, parallel, reference

Arguments = dict[str, Any]
M, E, K, D, INTER, BLOCK = 4, 8, 2, 16, 8, 32
BUFFERS = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf")
WRONG = (object(), "x", float("nan"), 10**30, complex(1, 2), torch.ones(2, 2, 2, 2))
SIZES = {"num_experts": E, "model_dim": D, "moebuf_dtype": torch.bfloat16}


def ids() -> Tensor:
    return torch.arange(M * K, dtype=torch.int32).view(M, K) % E


def masks(name: str = "expert_mask") -> Arguments:
    count = torch.tensor([M], dtype=torch.int32)
    return {name: torch.ones(E, dtype=torch.int32), "num_local_tokens": count}


def chosen(ids_name: str = "topk_ids") -> Arguments:
    return {"topk_weights": torch.zeros(M, K), ids_name: torch.zeros(M, K, dtype=torch.int32)}


def buffers(first: str = "sorted_ids") -> Arguments:
    made = fused_moe.empty_sorted_buffers(M, K, E, D, torch.bfloat16, BLOCK, device="cpu")
    return dict(zip((first, *BUFFERS[1:]), made, strict=True))


def out() -> Arguments:
    return {"out": tuple(buffers().values())}


def logits() -> Arguments:
    return {"gating_output": torch.randn(M, E)}


def layer() -> Arguments:
    return {
        "hidden_states": torch.randn(M, D), "w1": torch.randn(E, 2 * INTER, D),
        "w2": torch.randn(E, D, INTER), "bias1": torch.randn(E, 2 * INTER), "bias2": torch.randn(E, D),
        "activation": ActivationType.Silu, "doweight_stage1": False, "gate_up_interleaved": False,
    }  # fmt: skip


def without(arguments: Arguments, name: str) -> Arguments:
    return {each: value for each, value in arguments.items() if each != name}


def layer_options() -> Arguments:
    return {
        **layer(), **masks(), "block_size_M": None, "moe_sorting_dispatch_policy": 0,
        "dtype": torch.float32, "backend": "block_bmm",
    }  # fmt: skip


def groups() -> Arguments:
    return {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0}


def by_rule() -> Arguments:
    return {"rule": RoutingRule("sigmoid"), "correction_bias": torch.randn(E)}


def hidden() -> Arguments:
    return {"hidden_states": torch.randn(M, D), "router_weight": torch.randn(E, D)}


def sorted_slots() -> int:
    return M * K + E * BLOCK - K


CALLS: dict[Callable[..., Any], Callable[[], Arguments]] = {
    aiter.topk_softmax: lambda: {
        **chosen("topk_indices"), "token_expert_indices": torch.zeros(M, K, dtype=torch.int32),
        **logits(), "need_renorm": True, "num_shared_experts": 0, "shared_expert_scoring_func": "",
    },
    aiter.topk_routing: lambda: {**chosen(), **logits(), **by_rule()},
    aiter.biased_grouped_topk: lambda: {
        **logits(), "correction_bias": torch.randn(E), **chosen(), **groups(), "need_renorm": True,
    },
    aiter.grouped_topk: lambda: {
        **logits(), **chosen(), **groups(), "need_renorm": True, "is_softmax": True,
    },
    aiter.topk_gating: lambda: {
        **chosen("topk_indices"), **logits(), "correction_bias": torch.randn(E), "need_renorm": True,
        "routed_scaling_factor": 1.0, "score_func": "sigmoid",
    },
    aiter.topk_sigmoid: lambda: {**chosen("topk_indices"), **logits()},
    aiter.moe_fused_gate: lambda: {
        "input": torch.randn(M, E), "bias": torch.randn(E), **chosen(), **groups(), "topk": K,
        "n_share_experts_fusion": 0,
    },
    aiter.fused_topk_moe_sorting_fwd: lambda: {
        **logits(), **buffers(), "num_experts": E, "topk": K, "unit_size": BLOCK, "need_renorm": True,
        **masks("local_expert_mask"), "cluster_size": 1, "handover_size": None, "rule": None,
        "correction_bias": None, "topk_out": tuple(chosen().values()), "id_format": "slot",
    },
    aiter.fused_topk_moe_sorting_max_tokens: lambda: {"num_experts": E, "topk": K, "device": "cpu"},
    aiter.moe_sorting_opus_get_workspace_size: lambda: {
        "tokens": M, "num_experts": E, "topk": K, "dispatch_policy": 0, "device": "cpu",
    },
    aiter.moe_sorting_fwd: lambda: {
        "topk_ids": ids(), "topk_weights": torch.rand(M, K), **buffers("sorted_token_ids"),
        "num_experts": E, "unit_size": BLOCK, **masks("local_expert_mask"), "dispatch_policy": 0,
    },
    aiter.moe_sorting_opus_fwd: lambda: {
        "topk_ids": ids(), "topk_weights": torch.rand(M, K), **buffers("sorted_token_ids"),
        "num_experts": E, "unit_size": BLOCK, **masks("local_expert_mask"),
        "workspace": torch.zeros(10_000, dtype=torch.uint8), "dispatch_policy": 2,
        "local_topk_ids": torch.zeros(M, K, dtype=torch.int32),
        "m_indices": torch.zeros(sorted_slots(), dtype=torch.int32),
        "reverse_sorted": torch.zeros(M * K, dtype=torch.int32),
    },
    aiter.warmup: lambda: {"modules": ["module_topk_softmax"], "devices": ["cpu"]},
    fused_moe.empty_sorted_buffers: lambda: {
        "tokens": M, "topk": K, **SIZES, "block_size": BLOCK, "device": "cpu",
    },
    fused_moe.expert_backend: lambda: {
        name: value for name, value in layer().items() if name in ("w1", "w2", "activation")
    },
    fused_moe.fused_moe: lambda: {
        **layer_options(), "topk_weight": torch.rand(M, K), "topk_ids": ids(),
        "quant_type": QuantType.No, "splitk": 0, "swiglu_limit": None, "gate_mode": "separated",
        "w1_scale": None, "hidden_pad": 0, "beta": None, "shared_expert_id": -1,
    },
    fused_moe.fused_moe_from_logits: lambda: {
        **layer_options(), **logits(), "topk": K, "renormalize": True, "rule": None,
        "correction_bias": None,
    },
    fused_moe.fused_moe_from_hidden: lambda: {
        **layer_options(), **hidden(), "topk": K, "renormalize": True, "rule": None,
        "correction_bias": None, "router_input": torch.randn(M, D), "router_bias": torch.randn(E),
        "logits_out": torch.zeros(M, E), "batch_invariant": False,
    },
    fused_moe.fused_topk: lambda: {
        "hidden_states": torch.randn(M, D), **logits(), "topk": K, "renormalize": True, **chosen(),
    },
    fused_moe.moe_sorting: lambda: {
        "topk_ids": ids(), "topk_weights": torch.rand(M, K), **SIZES, "block_size": BLOCK, **masks(),
        "dispatch_policy": 0, "return_local_topk_ids": False, "accumulate": True, "flat": False,
        "output_aux": False, **out(),
    },
    fused_moe.router_topk_sorting: lambda: {
        **hidden(), "topk": K, **SIZES, "router_bias": torch.randn(E), **by_rule(),
        "logits_out": torch.zeros(M, E), "block_size": BLOCK, **masks(), "dispatch_policy": 0,
        "topk_out": tuple(chosen().values()), "id_format": "slot", "batch_invariant": False, **out(),
    },
    fused_moe.topk_routing_sorting: lambda: {
        **logits(), "topk": K, **SIZES, **by_rule(), "block_size": BLOCK, **masks(),
        "dispatch_policy": 0, "topk_out": tuple(chosen().values()), "id_format": "slot", **out(),
    },
    fused_moe.topk_softmax_sorting: lambda: {
        **logits(), "topk": K, **SIZES, "need_renorm": True, "block_size": BLOCK, **masks(),
        "dispatch_policy": 0, **out(),
    },
    fused_moe.warmup_layer: lambda: {
        **without(layer(), "hidden_states"), "topk": K, "num_experts": E, "max_tokens": M,
        "swiglu_limit": None, "dtype": torch.float32, "all_routed": True,
    },
    reference.moe_sorting: lambda: {
        "topk_ids": ids(), "topk_weights": torch.rand(M, K), **SIZES, "block_size": BLOCK, **masks(),
    },
    reference.router_logits: lambda: {**hidden(), "router_bias": torch.randn(E)},
    reference.topk_routing: lambda: {**logits(), "topk": K, **by_rule()},
    reference.topk_routing_sorting: lambda: {
        **logits(), "topk": K, **SIZES, **by_rule(), "block_size": BLOCK, **masks(),
        "id_format": "slot",
    },
    reference.topk_softmax: lambda: {**logits(), "topk": K, "need_renorm": True},
    reference.topk_softmax_sorting: lambda: {
        **logits(), "topk": K, **SIZES, "need_renorm": True, "block_size": BLOCK, **masks(),
    },
    parallel.expert_shard: lambda: {"num_experts": E, "rank": 0, "world_size": 2, "device": "cpu"},
}  # fmt: skip
"""A valid call's arguments, made anew, of every function that takes arguments."""


def broken(tensor: Tensor) -> Iterator[Any]:
    """What is no tensor of numbers in memory, though it was made of one."""
    yield tensor.tolist()
    yield tensor.float().numpy()
    yield tensor.to_sparse()
    if tensor.dim() > 1:
        yield torch.nested.nested_tensor(list(tensor))
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    yield freed


def mistakes(arguments: Arguments) -> Iterator[tuple[str, Any]]:
    """Names of arguments, each with a value that is wrong for it."""
    for name, valid in arguments.items():
        yield from ((name, value) for value in WRONG if takes_no(name, value))
        if isinstance(valid, Tensor):
            yield from ((name, value) for value in broken(valid))
        if isinstance(valid, tuple):
            yield from ((name, value) for value in (valid[:-1], (*valid, valid[0]), iter(valid)))
            for i, tensor in enumerate(valid):
                for value in broken(tensor):
                    yield name, (*valid[:i], value, *valid[i + 1 :])


def takes_no(name: str, value: object) -> bool:
    """Whether the argument has no meaning for this value of `WRONG`."""
    a_number = isinstance(value, int) and name in ("routed_scaling_factor", "splitk")
    return not a_number and not (name == "workspace" and isinstance(value, Tensor))
