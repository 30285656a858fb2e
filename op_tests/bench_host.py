"""What does a routing call cost the caller's thread, and in which piece?

python op_tests/bench_host.py [--device cpu|cuda] [--shape E,K,D] [--tokens M] [--rounds N] [--csv FILE]

Every figure is the time per call of many in a row, enqueued without synchronising, in inference mode,
as servers call: where gradients are on, a call asks for them as well, which takes 1.0 us more
(aiter/routing/autograd.py). Pieces are measured in turn, round after round, as a CPU that others use
as well is slower for seconds at a time: `time` is the median of a piece's rounds, and the fastest and
the slowest round stand beside it. A piece that launches nothing is pure host time on every device. A
known call is found by the compiled function, which asks whether the logits are negated before it looks
at the outputs; negated ones show what that takes without outputs and launch. Calls from hidden states
[M, D] are measured likewise; where dispatch makes our product alone, the routing behind it is a known
call of its own, and part of the time. What launches, on a GPU,
is host time as long as the device keeps up, as it does at decode sizes, and stands beside the launch
of a kernel that does nothing; on the cpu target a launch is over when the kernel has been executed,
and the row says so.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_timing
import torch

import aiter
from aiter import fused_moe, reference
from aiter.cli.table import format_table
from aiter.cli.tune import Shape, parse_shape
from aiter.jit import module_for
from aiter.ops.device import current_device
from aiter.ops.fused_router_sorting import (
    RouterCalls,
    fused_router_sorting_check,
    router_calls,
)
from aiter.ops.fused_topk_moe_sorting import FusedCalls, fused_calls
from aiter.routing import buffers as moe_buffers
from aiter.routing import known as remembered
from aiter.routing import plan as routing_plan
from aiter.routing.request import Request

ROUNDS = 9
PIECE_CALLS = 100  # of a piece that launches nothing, per repeat
BLOCK_SIZE = 32
# What answers in the place of a launch, by piece.
KNOWN: dict[str, tuple[str, object]] = {
    "topk_softmax_sorting without its op, known call": ("again", ()),
    "router_topk_sorting without its op, known call": ("router_again", ((), None)),
}

Pieces = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """A piece, what its time includes, and that time in every round, in us."""

    piece: str
    includes: str
    rounds_us: tuple[float, ...]

    @property
    def us(self) -> float:
        return statistics.median(self.rounds_us)


def pieces(logits: torch.Tensor, shape: Shape) -> tuple[Pieces, Pieces]:
    """What is measured, by name: what launches nothing, and what does.

    The first are to be called while plans are made by `silent_plans` and no call is known, but for
    those in `KNOWN`.
    """
    num_experts, topk, model_dim = shape
    tokens, device = logits.shape[0], logits.device
    request = request_of(shape)
    sizes = (device, tokens, num_experts, logits.dtype, False, *request)
    plan = routing_plan.plan_routing(*sizes)
    out = fused_moe.empty_sorted_buffers(
        tokens, topk, num_experts, model_dim, torch.bfloat16, BLOCK_SIZE, device=device
    )
    weights, ids = fused_moe.fused_topk(logits, logits, topk, True)
    sort = (ids, weights, *out, num_experts, BLOCK_SIZE, None, None, None, 1)
    into = fused_calls(device).into
    planned = (request, logits, None, None, None, None, out, plan.buffers, None)
    found = found_and_negated(planned)
    fused = (logits, *out, num_experts, topk, BLOCK_SIZE, True)
    nothing = (weights[:0], ids[:0], torch.empty_like(ids[:0]), logits[:0], True)  # no token
    selecting = module_for("module_topk_softmax", device).topk_softmax
    checked = module_for("module_moe_sorting_opus", device).moe_sorting_opus_check
    compiled = module_for("module_fused_topk_moe_sorting", device).fused_topk_moe_sorting_fwd

    def routing(**options: object) -> object:
        return fused_moe.topk_softmax_sorting(
            logits, topk, num_experts, model_dim, torch.bfloat16, **options
        )

    silent: Pieces = {
        "plan: made": lambda: routing_plan.plan_routing(*sizes),
        "plan: found": lambda: remembered.plan_of("plan_routing", sizes),
        "outputs: five allocations": lambda: moe_buffers.allocate(plan.layouts, device),
        "outputs: views of one allocation (not used)": lambda: views(plan.buffers, device),
        "outputs: check of given ones (the chain's)": lambda: moe_buffers.given(out, plan.buffers),
        "topk_softmax_sorting without its op, first call, out given": lambda: routing(out=out),
        "topk_softmax_sorting without its op, first call, allocating": routing,
        [*KNOWN][0]: routing,
        "a known call found but for its outputs, compiled function": found,
        "binding and checks of 7 tensors, compiled function": lambda: checked(*sort),
        "binding and checks of 4 tensors, compiled function": lambda: selecting(*nothing),
        "the same through the op's Python function": lambda: aiter.topk_softmax(*nothing),
    }
    launching: Pieces = {
        "fused launch, compiled function": lambda: compiled(*fused),
        "fused launch, as a first call makes it": lambda: into(*planned),
        "fused_topk_moe_sorting_fwd": lambda: aiter.fused_topk_moe_sorting_fwd(*fused),
        "topk_softmax_sorting, known call, out given": lambda: routing(out=out),
        "topk_softmax_sorting, known call, allocating": routing,
        "topk_softmax_sorting, chain, out given": lambda: routing(out=out, dispatch_policy=1),
        "topk_softmax_sorting, chain, allocating": lambda: routing(dispatch_policy=1),
    }
    for own, others in zip((silent, launching), from_hidden(out, shape), strict=True):
        own.update(others)
    if device.type == "cuda":
        launching["torch.cuda._sleep(0), an empty kernel"] = bench_timing.empty_kernel
    return silent, launching


def from_hidden(out: fused_moe.SortedBuffers, shape: Shape) -> tuple[Pieces, Pieces]:
    """The same for `router_topk_sorting` into `out`."""
    num_experts, topk, model_dim = shape
    tokens, device = len(out[4]), out[4].device
    hidden = torch.randn(tokens, model_dim, device=device).bfloat16()
    weight = (torch.randn(num_experts, model_dim, device=device) / model_dim**0.5).bfloat16()
    bias, logits = torch.randn(num_experts, device=device), torch.empty(tokens, num_experts)
    logits = logits.to(device)
    request = (*request_of(shape), False)
    sizes = (device, tokens, model_dim, num_experts, False, *request[:-1])
    plan = routing_plan.plan_router(*sizes)
    into, again = router_calls(device)
    checks = (hidden, weight, logits, *out, num_experts, topk, BLOCK_SIZE)
    inputs = (weight, bias, None, None, None, None)
    into(request, hidden, *inputs, out, logits, plan.buffers, None, None, True)
    negated, given = torch._neg_view(hidden), (*inputs, out, logits)
    if again(request, hidden, *given) is None or again(request, negated, *given) is not None:
        raise RuntimeError("the known call: expected to be found unless negated, got otherwise")

    def routing(**options: object) -> object:
        return fused_moe.router_topk_sorting(
            hidden, weight, topk, num_experts, model_dim, torch.bfloat16, router_bias=bias,
            **options,
        )  # fmt: skip

    first = "router_topk_sorting without its op, first call"
    silent: Pieces = {
        f"{first}, out and logits_out given": lambda: routing(out=out, logits_out=logits),
        f"{first}, allocating": routing,
        [*KNOWN][1]: routing,
        "a known call from hidden states found but for its outputs, compiled function": (
            lambda: again(request, negated, *given)
        ),
        "fused_router_sorting_check of 9 tensors, compiled function": (
            lambda: fused_router_sorting_check(*checks, router_bias=bias)
        ),
    }
    known = "router_topk_sorting, known call"
    launching: Pieces = {
        f"{known}, out and logits_out given": lambda: routing(out=out, logits_out=logits),
        f"{known}, allocating": routing,
    }
    return silent, launching


def views(buffers: moe_buffers.Buffers, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The five outputs as views of one allocation, 16-byte aligned."""
    slots, blocks, (tokens, model_dim) = buffers.slots, buffers.blocks, buffers.moe_buf
    ends = [-(-size // 16) * 16 for size in (4 * slots, 4 * slots, 4 * blocks, 8)]
    whole = torch.empty(sum(ends) + 2 * tokens * model_dim, dtype=torch.uint8, device=device)
    first, second, third, fourth, fifth = whole.split_with_sizes((*ends, whole.numel() - sum(ends)))
    return (
        first.view(torch.int32)[:slots], second.view(torch.float32)[:slots],
        third.view(torch.int32)[:blocks], fourth.view(torch.int32)[:2],
        fifth.view(torch.bfloat16).view(tokens, model_dim),
    )  # fmt: skip


def request_of(shape: Shape) -> Request:
    """What the calls here ask for."""
    num_experts, topk, model_dim = shape
    return Request(topk, num_experts, model_dim, torch.bfloat16, True, BLOCK_SIZE, 0, "slot", None)


@contextmanager
def silent_plans() -> Iterator[None]:
    """Plans of routings have one launch, which does nothing and which nobody remembers."""
    made, made_router = routing_plan.plan_routing, routing_plan.plan_router

    def silent(*sizes: Any) -> routing_plan.Plan:
        return made(*sizes)._replace(fused=FusedCalls(lambda *_: True, remembered._never))

    def silent_router(*sizes: Any) -> routing_plan.Plan:
        plan = made_router(*sizes)
        router = plan.router._replace(calls=RouterCalls(lambda *_: True, remembered._never))
        return plan._replace(path="router", router=router)

    remembered.forget()
    with (
        mock.patch.object(routing_plan, "plan_routing", silent),
        mock.patch.object(routing_plan, "plan_router", silent_router),
    ):
        yield
    remembered.forget()


def found_and_negated(planned: tuple[Any, ...]) -> Callable[[], object]:
    """The search for a known call that finds it and launches nothing, as its logits are negated.

    Raises RuntimeError if the call itself is not found, or the negated one is answered.
    """
    request, logits, *others = planned
    into, again = fused_calls(logits.device)
    into(*planned)
    negated, others = torch._neg_view(logits), others[:-2]
    if again(request, logits, *others) is None or again(request, negated, *others) is not None:
        raise RuntimeError("the known call: expected to be found unless negated, got otherwise")
    return lambda: again(request, negated, *others)


def check(logits: torch.Tensor, shape: Shape) -> None:
    """Raises RuntimeError unless the call routes right."""
    num_experts, topk, model_dim = shape
    arguments = (logits, topk, num_experts, model_dim, torch.bfloat16)
    got = fused_moe.topk_softmax_sorting(*arguments)
    expected = reference.topk_softmax_sorting(*arguments)
    slots = int(expected[3][0])
    if not torch.equal(got[0][:slots], expected[0][:slots]):
        raise RuntimeError(f"topk_softmax_sorting: sorted_ids differ from the reference, {shape}")


def measure(logits: torch.Tensor, shape: Shape, rounds: int) -> list[Row]:
    """Every piece, timed in every round."""
    device = logits.device
    silent, launching = pieces(logits, shape)
    what = "host and launch" if device.type == "cuda" else "host and the kernel on the CPU"
    times: dict[str, list[float]] = {name: [] for name in (*silent, *launching)}
    for _ in range(rounds):
        with silent_plans():
            for name, piece in silent.items():
                asked, answer = KNOWN.get(name, ("again", None))
                with mock.patch.object(remembered, asked, lambda *_, found=answer: found):
                    times[name].append(bench_timing.host_us(piece, device, PIECE_CALLS).us)
        for name, piece in launching.items():
            times[name].append(bench_timing.host_us(piece, device).us)
    return [
        Row(name, "host" if name in silent else what, tuple(values))
        for name, values in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", type=current_device, default=current_device())
    parser.add_argument("--shape", type=parse_shape, default=(128, 4, 2880), metavar="E,K,D")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--csv", type=Path, help="write the figures there")
    options = parser.parse_args()
    device = options.device
    logits = torch.randn(
        options.tokens, options.shape[0], generator=torch.Generator().manual_seed(0)
    )
    logits = logits.to(torch.bfloat16).to(device)
    check(logits, options.shape)
    with torch.inference_mode():
        rows = measure(logits, options.shape, options.rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu target"
    num_experts, topk, model_dim = options.shape
    print(f"host time per call, {name}, bf16, M={options.tokens} E={num_experts} K={topk}"
          f" D={model_dim}")  # fmt: skip
    cells = [
        (
            row.piece,
            row.includes,
            *(f"{us:.2f} us" for us in (row.us, min(row.rounds_us), max(row.rounds_us))),
        )
        for row in rows
    ]
    print(format_table(("piece", "includes", "time", "fastest round", "slowest round"), cells))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("piece", "includes", "round", "us"))
            for row in rows:
                for index, us in enumerate(row.rounds_us):
                    writer.writerow((row.piece, row.includes, index, us))
    return 0


if __name__ == "__main__":
    sys.exit(main())
