"""How fast is routing from hidden states: one launch, two of ours, or PyTorch's product and ours?

    python op_tests/bench_fused_router_sorting.py [--bias] [--rotate-weights] [--shape E,K,D ...]
        [options of bench_report]

Every contestant goes from hidden states [M, D] and a weight [E, D] of `--dtype` to the sorted buffers
and a zeroed bf16 [M, D] buffer, block size 32:

    router            the one launch
    product, routing  our product, then the fused launch on its float32 logits
    linear, routing   torch.nn.functional.linear, then the fused launch on logits of `--dtype`
    mm f32, routing   torch.mm with a float32 result (the bias in a launch of its own), then the same
    PyTorch           linear, then routing in PyTorch operations

Logits of the first two are compared with the reference to the bit before anything is timed. With
--rotate-weights calls take turns with more weights than a GPU's L2 holds, as the layers of a model do;
without, the weight is the same in all. Clocks are those of bench_fused_topk_moe_sorting.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import torch
from bench_fused_topk_moe_sorting import BLOCK_SIZE, pytorch_routing
from bench_report import Record
from router_calls import check_logits
from torch import Tensor
from torch.nn.functional import linear

from aiter import fused_moe, reference
from aiter.jit import envs
from aiter.ops.fused_router_sorting import router_product
from aiter.routing import dispatch

SHAPES = ("128,4,2880", "256,8,7168", "512,10,4096")
ROTATED_BYTES = 128 << 20  # of weights: more than twice the L2 of an H100
MOST_WEIGHTS = 60  # as many calls as the longest graph has

Routing = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
Shape = tuple[int, int, int]


def in_one(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, logits: Tensor | None = None
) -> tuple[Tensor, ...]:
    experts, topk, width = shape
    return fused_moe.router_topk_sorting(
        hidden, weight, topk, experts, width, torch.bfloat16, router_bias=bias,
        block_size=BLOCK_SIZE, logits_out=logits,
    )  # fmt: skip


def routed(logits: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    experts, topk, width = shape
    return fused_moe.topk_softmax_sorting(
        logits, topk, experts, width, torch.bfloat16, True, BLOCK_SIZE
    )


def in_two(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> tuple[Tensor, ...]:
    logits = torch.empty(len(hidden), len(weight), device=hidden.device)
    router_product(hidden, weight, logits, router_bias=bias)
    return routed(logits, shape)


def by_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape
) -> tuple[Tensor, ...]:
    return routed(linear(hidden, weight, bias), shape)


def by_mm(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> tuple[Tensor, ...]:
    if hidden.dtype == torch.float32:
        logits = torch.mm(hidden, weight.t())
    else:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # type: ignore[call-overload]
    return routed(logits if bias is None else logits + bias, shape)


def eager(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> tuple[Tensor, ...]:
    experts, topk, width = shape
    return pytorch_routing(linear(hidden, weight, bias), topk, experts, width)


def contestants(shape: Shape, tokens: int, on_cpu: bool) -> dict[str, Routing | None]:
    """Name to function, None for one that does not take part."""
    return {
        "router": partial(in_one, shape=shape) if tokens <= dispatch.MOST_ROUTER_TOKENS else None,
        "product, routing": partial(in_two, shape=shape),
        "linear, routing": partial(by_linear, shape=shape),
        "mm f32, routing": None if on_cpu else partial(by_mm, shape=shape),
        "PyTorch": partial(eager, shape=shape),
    }


def check(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> None:
    """Ours, before it is timed: logits to the bit, and what is made of them."""
    wanted = reference.router_logits(
        hidden.cpu(), weight.cpu(), None if bias is None else bias.cpu()
    )
    logits = torch.full_like(wanted, float("nan"), device=hidden.device)
    if len(hidden) <= dispatch.MOST_ROUTER_TOKENS:
        out = in_one(hidden, weight, bias, shape, logits)
        if fused_moe.last_path() != "router":
            raise RuntimeError(f"router: expected one launch, got {fused_moe.last_path()}")
        check_logits("router", logits, wanted)
        expected = routed(logits, shape)
        slots = int(expected[3][0])
        if not all(
            torch.equal(a[:slots], b[:slots]) for a, b in zip(out[:2], expected, strict=False)
        ):
            raise RuntimeError(f"router: other slots than from its logits, {shape}")
    router_product(hidden, weight, logits, router_bias=bias)
    check_logits("product", logits, wanted)


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens; the result is checked first."""
    experts, topk, width = shape
    dtype, device = bench_report.DTYPES[options.dtype], options.device
    generator = torch.Generator().manual_seed(bench_report.SEED)
    hidden = bench_report.logits(options, tokens, width)
    drawn = torch.randn(experts, width, generator=generator) / width**0.5
    count = 1
    if options.rotate_weights and device.type != "cpu":
        size = drawn.numel() * dtype.itemsize
        count = min(MOST_WEIGHTS, -(-ROTATED_BYTES // size))
    weights = [drawn.to(device, dtype) for _ in range(count)]
    bias = torch.randn(experts, generator=generator).to(device, dtype) if options.bias else None
    check(hidden[0], weights[0], bias, (experts, topk, width))
    calls = max(len(hidden), count)
    pairs = [(hidden[i % len(hidden)], weights[i % count]) for i in range(calls)]
    record: Record = {}
    for name, run in contestants((experts, topk, width), tokens, device.type == "cpu").items():
        if run is None:
            record[name] = None
            continue
        made = [partial(run, x, w, bias) for x, w in pairs]
        record[name] = bench_timing.call_us(made, device, everything=True)
    return record


def main() -> int:
    os.environ[envs.AITER_DISPATCH.name] = "capacity"
    parser = bench_report.parser(__doc__)
    parser.add_argument("--bias", action="store_true", help="add a bias to the logits")
    parser.add_argument("--rotate-weights", action="store_true", help="as the layers of a model do")
    options = parser.parse_args()
    if options.tokens is None:
        options.tokens = "1,4,16,64"
    bench_report.run(options, "routing from hidden states", ("E", "K", "D"), SHAPES, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
