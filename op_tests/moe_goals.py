"""How near is a whole layer, from router logits on, to what reading its weights once takes?

    python op_tests/bench_fused_moe.py --goals

Router logits are given; four sets of hidden states and logits in turn; the slope of graph replay
between 6 and 18 calls. "read once" is the weights of the experts that these logits hit, at 3.0 TB/s:
what a read kernel reaches on an H100 over some hundred MB. "goal" and "peer" were measured the same way
elsewhere with other logits, which hit other numbers of experts; "peer read once" is what reading
took there, and the shares of it are what compares. The outputs of every contestant are compared with
`aiter.reference.layer` first, on some rows where M is large. "host" is what the caller's thread pays.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import _checkout  # noqa: F401  (makes a checkout importable)
import torch
from torch import Tensor

from aiter import ActivationType, fused_moe, reference
from aiter.cli import timing
from aiter.cli.table import format_table
from aiter.reference.layer import moe_layer

BYTES_PER_US = 3.0e6
SETS, LOW, HIGH, REPLAYS = 4, 6, 18, 12
TOLERANCE = 4e-2  # of the largest output, bfloat16
CHECKED_ROWS = 12
MOST_HOST_TOKENS = 64
TOKENS = (1, 4, 8, 16, 64, 256, 1024, 2048, 8192)
SHAPES = {"gpt-oss": (32, 4, 2880, 2880), "qwen3": (128, 8, 2048, 768)}

# The better of vLLM 0.33.0's kernel with the best routing of a peer and triton_kernels 3.6's layer, and
# the time of reading once there (NVIDIA H100 80GB HBM3, bfloat16, 2026-11-26).
GOAL = {
    "gpt-oss": (73, 231, 345, 472, 537, 575, 680, 900, 2700),
    "qwen3": (30, 98, 164, 263, 399, 424, 465, 545, 1270),
}
PEER = {
    "gpt-oss": (81, 242, 354, 479, 550, 607, 709, 965, 2852),
    "qwen3": (39, 107, 173, 269, 406, 443, 491, 575, 1333),
}
PEER_READ = {
    "gpt-oss": (66.4, 224, 340, 469, 531, 531, 531, 531, 531),
    "qwen3": (25.2, 92.0, 159, 258, 393, 403, 403, 403, 403),
}

Layer = Callable[[Tensor, Tensor], Tensor]


def make_layer(kind: str, device: torch.device) -> dict[str, Any]:
    """Weights and options of a layer, laid out as its model has them."""
    num_experts, _, model_dim, inter = SHAPES[kind]
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int, fan: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(
            std=fan**-0.5, generator=generator
        )

    if kind == "qwen3":
        w1 = random(num_experts, 2 * inter, model_dim, fan=model_dim)
        return {"w1": w1, "w2": random(num_experts, model_dim, inter, fan=inter)}
    return {
        "w1": random(num_experts, model_dim, 2 * inter, fan=model_dim).transpose(1, 2),
        "w2": random(num_experts, inter, model_dim, fan=inter).transpose(1, 2),
        "bias1": random(num_experts, 2 * inter, fan=16),
        "bias2": random(num_experts, model_dim, fan=16),
        "activation": ActivationType.Swiglu,
        "gate_up_interleaved": True,
    }


def layer_of(weights: dict[str, Any], topk: int, backend: Any) -> Layer:
    def run(hidden: Tensor, logits: Tensor) -> Tensor:
        return fused_moe.fused_moe_from_logits(
            hidden, gating_output=logits, topk=topk, backend=backend, **weights
        )

    return run


def check(run: Layer, hidden: Tensor, logits: Tensor, weights: dict[str, Any], topk: int) -> float:
    """The largest error over the largest output, on some rows; RuntimeError if that is too much."""
    rows = torch.linspace(0, hidden.shape[0] - 1, min(CHECKED_ROWS, hidden.shape[0])).long()
    rows = rows.to(hidden.device)
    output = run(hidden, logits)[rows].double()
    options = dict(weights)
    activation = options.pop("activation", ActivationType.Silu).name.lower()
    routed = reference.topk_softmax(logits[rows], topk, True)
    expected = moe_layer(
        hidden[rows],
        options.pop("w1"),
        options.pop("w2"),
        *routed,
        activation=activation,
        **options,
    )
    error = float((output - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"M={hidden.shape[0]}: expected an error of {TOLERANCE}, got {error}")
    return error


def slope_us(calls: Sequence[Callable[[], object]]) -> float:
    """Device time per call between graphs of LOW and HIGH calls, used in turn."""
    stream = torch.cuda.Stream()
    graphs = []
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        for count in (LOW, HIGH):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for index in range(count):
                    calls[index % len(calls)]()
            graph.replay()
            graphs.append(graph)
        samples = []
        for _ in range(REPLAYS):
            times = []
            for graph in graphs:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e3)
            samples.append((times[1] - times[0]) / (HIGH - LOW))
    return statistics.median(samples)


def host_us(weights: dict[str, Any], topk: int, given: Sequence[Tensor]) -> str:
    """What the caller's thread pays for a call outside of a graph; not asked where a call is long."""
    if given[0].shape[0] > MOST_HOST_TOKENS:
        return "-"
    run = layer_of(weights, topk, None)
    with torch.inference_mode():
        return f"{timing.host_us(lambda: run(*given), given[0].device).us:.1f}"


def table(device: torch.device, backends: Sequence[Any] = (None, "grouped_mm")) -> str:
    """Every row of both layers, as text."""
    rows = []
    for kind, (num_experts, topk, model_dim, inter) in SHAPES.items():
        weights = make_layer(kind, device)
        for index, tokens in enumerate(TOKENS):
            generator = torch.Generator(device).manual_seed(tokens)
            sets = [
                tuple(
                    torch.randn(tokens, width, generator=generator, device=device).bfloat16()
                    for width in (model_dim, num_experts)
                )
                for _ in range(SETS)
            ]
            hit = [logits.topk(topk, -1).indices.unique().numel() for _, logits in sets]
            read_us = statistics.mean(hit) * 3 * inter * model_dim * 2 / BYTES_PER_US
            times, errors = [], []
            with torch.inference_mode():
                for backend in backends:
                    run = layer_of(weights, topk, backend)
                    errors.append(check(run, *sets[0], weights, topk))
                    calls = [lambda run=run, given=given: run(*given) for given in sets]
                    times.append(slope_us(calls))
            peer, peer_read = PEER[kind][index], PEER_READ[kind][index]
            rows.append(
                [
                    kind, tokens, f"{read_us:.1f}", *(f"{time:.1f}" for time in times),
                    f"{read_us / times[0]:.0%}", peer_read, GOAL[kind][index], peer,
                    f"{peer_read / peer:.0%}", f"{max(errors):.4f}", host_us(weights, topk, sets[0]),
                ]
            )  # fmt: skip
            print(rows[-1], flush=True)
        del weights
        torch.cuda.empty_cache()
    names = ["chosen" if backend is None else backend for backend in backends]
    header = ("layer", "M", "read once", *names, "share", "peer read once", "goal", "best peer",
              "its share", "largest error", "host")  # fmt: skip
    return format_table(header, rows)
