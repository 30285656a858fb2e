"""How fast is routing: the fused launch, the chain under each policy, and PyTorch?

    python op_tests/bench_fused_topk_moe_sorting.py [--device cpu|cuda] [--shape E,K,D ...]
        [--tokens 1,4,8,...] [--dtype bf16] [--wave 64] [--csv FILE] [--plot FILE] [--[no-]compile]
        [--clusters 1,2,4,8,16] [--rule deepseek-v3]

Every contestant does the same work: logits to weights, ids, the sorted buffers and a zeroed
bf16 [M, D] buffer, block size 32, each allocating its outputs as a caller does. Results are compared
with `aiter.reference` before anything is timed. On a GPU, unless `--dtype` names one, all is done for
bf16 and then for f32 logits, whose files are named `..._fp32`. The first table there is by the strict
clock, by which nothing overlaps, the second by the overlapping one (see `aiter.cli.timing`), inputs
rotating, beside the floor of an empty kernel; more tables have the device time with a cold L2, and the
host time. torch.compile is among
the contestants there. On the CPU a figure is wall time, and says how fast the execution layer is, not
how fast the kernel is.
With --clusters the contestants are the fused launch with so many workgroups that route.
With --rule a model's rule chooses, by a random correction bias, and its shape is the default one; the
contestants are ours, as PyTorch has no such call, and top-k is compared with `aiter.reference.rules`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import get_args

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import torch
from bench_report import Record
from rule_cases import MODELS, check_routing
from torch import Tensor

from aiter import fused_moe, reference
from aiter.jit import envs
from aiter.ops.device import current_device
from aiter.ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from aiter.ops.rule import RoutingRule
from aiter.routing import dispatch
from aiter.routing import known as remembered
from aiter.routing.basis import basis_of
from aiter.routing.calls import topk_routing_sorting
from aiter.routing.graph import fused_topk_moe_sorting_fwd

SHAPES = ("128,4,2880", "256,8,7168", "512,10,4096", "896,16,3584")
BLOCK_SIZE = 32

# The width of the hidden states of models in MODELS.
MODEL_DIMS = {
    "deepseek-v3": 7168, "kimi-k2": 7168, "kimi-k3": 3584, "glm-4.5": 5120, "nemotron-3": 4096,
    "ling-2.5": 2560, "deepseek-v2": 5120, "deepseek-v4": 4096, "ernie-4.5": 2560, "longcat": 6144,
}  # fmt: skip

Routing = Callable[[Tensor], tuple[Tensor, ...]]


def pytorch_routing(
    logits: Tensor, topk: int, num_experts: int, model_dim: int
) -> tuple[Tensor, ...]:
    """The same work in PyTorch operations, without a host synchronisation."""
    num_tokens = logits.shape[0]
    device = logits.device
    values, ids = torch.topk(logits.float(), topk, dim=-1)
    weights = torch.softmax(values, dim=-1)
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    experts = flat[order]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (counts + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_block = torch.cumsum(blocks, 0) - blocks
    first_entry = torch.cumsum(counts, 0) - counts
    rank = torch.arange(flat.numel(), device=device) - first_entry[experts]
    slot = first_block[experts] * BLOCK_SIZE + rank
    slots = num_tokens * topk + num_experts * BLOCK_SIZE - topk
    sorted_ids = torch.full((slots,), topk << 24 | num_tokens, dtype=torch.int32, device=device)
    sorted_ids[slot] = ((order % topk) << 24 | order // topk).int()
    sorted_weights = torch.zeros(slots, dtype=torch.float32, device=device)
    sorted_weights[slot] = weights.flatten()[order]
    num_blocks = -(-slots // BLOCK_SIZE)
    block_idx = torch.arange(num_blocks, device=device)
    sorted_expert_ids = torch.searchsorted(torch.cumsum(blocks, 0), block_idx, right=True).int()
    num_valid_ids = torch.stack(
        (blocks.sum() * BLOCK_SIZE, torch.full((), num_tokens, device=device))
    ).int()
    moe_buf = torch.zeros((num_tokens, model_dim), dtype=torch.bfloat16, device=device)
    return sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf


def fused_routing(
    logits: Tensor, topk: int, num_experts: int, model_dim: int, cluster_size: int
) -> tuple[Tensor, ...]:
    """The fused launch with so many routing workgroups."""
    buffers = fused_moe.empty_sorted_buffers(
        logits.shape[0], topk, num_experts, model_dim, torch.bfloat16, BLOCK_SIZE,
        device=logits.device,
    )  # fmt: skip
    fused_topk_moe_sorting_fwd(
        logits, *buffers, num_experts, topk, BLOCK_SIZE, True, cluster_size=cluster_size
    )
    return buffers


def clusters(shape: tuple[int, int, int], sizes: tuple[int, ...]) -> dict[str, Routing | None]:
    """The fused launch with each number of routing workgroups."""
    num_experts, topk, model_dim = shape
    return {
        f"fused, {size}": partial(
            fused_routing,
            topk=topk,
            num_experts=num_experts,
            model_dim=model_dim,
            cluster_size=size,
        )
        for size in sizes
    }


def contestants(
    shape: tuple[int, int, int], tokens: int, device: torch.device, compiled: bool
) -> dict[str, Routing | None]:
    """Name to function of the logits, None for one that does not route this shape.

    Each is the call that users make. To be used with AITER_DISPATCH=capacity, by which policy 0 is the
    fused launch wherever it fits.
    """
    num_experts, topk, model_dim = shape

    def policy(number: int) -> Routing:
        return lambda logits: fused_moe.topk_softmax_sorting(
            logits, topk, num_experts, model_dim, torch.bfloat16, dispatch_policy=number
        )

    def eager(logits: Tensor) -> tuple[Tensor, ...]:
        return pytorch_routing(logits, topk, num_experts, model_dim)

    fits = tokens <= fused_topk_moe_sorting_max_tokens(num_experts, topk, device=device)
    found: dict[str, Routing | None] = {
        "fused": policy(dispatch.AUTOMATIC) if fits else None,
        "oneshot": policy(dispatch.ONESHOT),
        "multiphase": policy(dispatch.MULTIPHASE),
        "PyTorch": eager,
    }
    if compiled:
        # NOTE: without the reset, PyTorch gives up after 8 shapes and runs the function uncompiled.
        torch.compiler.reset()
        found["compiled"] = torch.compile(eager, dynamic=False, fullgraph=True)
    return found


def check(name: str, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raises RuntimeError if a contestant's result differs from the reference.

    Equal logits may come in any order out of torch.topk, and then PyTorch's entries differ: of its
    results the sizes, the sorted weights and the zeros are compared.
    """
    slots = int(expected[3][0])
    ours = name not in ("PyTorch", "compiled")
    for index, size in ((0, slots), (2, slots // BLOCK_SIZE), (3, 2)):
        if ours and not torch.equal(outputs[index][:size], expected[index][:size]):
            raise RuntimeError(f"{name}: output {index} differs from the reference")
    weights = [buffers[1][:slots] for buffers in (outputs, expected)]
    if not ours:
        weights = [each[each > 0].sort().values for each in weights]
    torch.testing.assert_close(*weights, rtol=2e-6, atol=1e-30)
    if bool(outputs[4].any()):
        raise RuntimeError(f"{name}: moe_buf is not zero")


def by_rule(
    options: argparse.Namespace, shape: tuple[int, ...], tokens: int
) -> tuple[list[Tensor], dict[str, Routing], tuple[Tensor, ...]]:
    """Inputs, contestants and the expected result by the rule of a model, whose top-k is checked."""
    num_experts, topk, model_dim = shape
    rule, _, _, has_bias = MODELS[options.rule]
    inputs = bench_report.logits(options, tokens, rule.num_logits(num_experts))
    bias = None
    if has_bias:
        generator = torch.Generator().manual_seed(bench_report.SEED + 1)
        size = num_experts - rule.num_shared_experts + rule.num_zero_experts
        bias = (torch.randn(size, generator=generator) * 0.1).to(options.device)

    def policy(number: int, rule: RoutingRule = rule) -> Routing:
        return lambda logits: topk_routing_sorting(
            logits, topk, num_experts, model_dim, torch.bfloat16, rule=rule, correction_bias=bias,
            dispatch_policy=number,
        )  # fmt: skip

    slots = topk + rule.num_shared_experts
    weights = torch.empty(tokens, slots, device=options.device)
    ids = torch.empty_like(weights, dtype=torch.int32)
    expected = topk_routing_sorting(
        inputs[0], topk, num_experts, model_dim, torch.bfloat16, rule=rule, correction_bias=bias,
        dispatch_policy=dispatch.ONESHOT, topk_out=(weights, ids),
    )  # fmt: skip
    check_routing(
        (weights.cpu(), ids.cpu()), inputs[0].cpu(), rule, None if bias is None else bias.cpu()
    )
    found = {"fused": policy(dispatch.AUTOMATIC)}
    if tokens > fused_topk_moe_sorting_max_tokens(
        num_experts + rule.num_zero_experts, slots, device=options.device
    ):
        del found["fused"]
    found["oneshot"] = policy(dispatch.ONESHOT)
    found["multiphase"] = policy(dispatch.MULTIPHASE)
    return inputs, found, expected


def measure_rule(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """As `measure`, by the rule of a model."""
    inputs, found, expected = by_rule(options, shape, tokens)
    record: Record = {"fused": None}
    for name, run in found.items():
        check(name, run(inputs[0]), expected)
        if fused_moe.last_path() != name:
            raise RuntimeError(f"expected the path {name}, got {fused_moe.last_path()}")
        calls = [lambda x=x, run=run: run(x) for x in inputs]
        record[name] = bench_timing.call_us(calls, options.device, everything=True)
    return record


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens, in microseconds."""
    num_experts, topk, model_dim = shape
    inputs = bench_report.logits(options, tokens, num_experts)
    expected = reference.topk_softmax_sorting(
        inputs[0], topk, num_experts, model_dim, torch.bfloat16
    )
    compiled = options.device.type == "cuda" if options.compile is None else options.compile
    record: Record = {}
    sizes = options.clusters
    found = (
        clusters((num_experts, topk, model_dim), sizes)
        if sizes
        else contestants((num_experts, topk, model_dim), tokens, options.device, compiled)
    )
    for name, run in found.items():
        if run is None:
            record[name] = None
            continue
        check(name, run(inputs[0]), expected)
        if name in get_args(dispatch.Path) and fused_moe.last_path() != name:
            raise RuntimeError(f"expected the path {name}, got {fused_moe.last_path()}")
        calls = [lambda x=x, run=run: run(x) for x in inputs]
        record[name] = bench_timing.call_us(calls, options.device, everything=True)
    return record


def make_parser() -> argparse.ArgumentParser:
    """The bench's options."""
    parser = bench_report.parser(__doc__)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also time torch.compile; default: on a GPU",
    )
    parser.add_argument(
        "--clusters",
        type=lambda text: tuple(int(size) for size in text.split(",")),
        default=(),
        help="time the fused launch alone, with these numbers of routing workgroups",
    )
    parser.add_argument("--rule", choices=MODEL_DIMS, help="route by the rule of a model")
    return parser


def one_dtype(options: argparse.Namespace, dtype: str) -> argparse.Namespace:
    """The options, for this dtype unless they name one; files of the second one have other names."""
    chosen = argparse.Namespace(**vars(options))
    chosen.dtype = options.dtype or dtype
    if options.dtype is None and dtype != "bf16":
        for name in ("csv", "plot"):
            path = getattr(options, name)
            setattr(chosen, name, path and path.with_stem(f"{path.stem}_{dtype}"))
    return chosen


def main() -> int:
    parser = make_parser()
    parser.set_defaults(dtype=None)
    options = parser.parse_args()
    device = options.device or current_device()
    origin = "" if options.from_csv else basis_of(device).origin
    os.environ[envs.AITER_DISPATCH.name] = "capacity"
    remembered.forget()
    shapes, what, run = SHAPES, "routing", measure
    if options.rule:
        rule, num_experts, topk, _ = MODELS[options.rule]
        width = num_experts + rule.num_shared_experts
        shapes = (f"{width},{topk},{MODEL_DIMS[options.rule]}",)
        what, run = f"routing by the rule of {options.rule}", measure_rule
    both = options.dtype is None and device.type == "cuda" and not options.from_csv
    for each in [one_dtype(options, dtype) for dtype in ("bf16", "fp32")[: 2 if both else 1]]:
        bench_report.run(each, what, ("E", "K", "D"), shapes, run)
    if origin:
        print(f"policy 0 is decided by {origin}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
