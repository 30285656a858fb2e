"""How fast is a whole MoE layer in decode: ours fused, ours through the chain, and transformers'?

    python op_tests/bench_fused_moe.py [--small] [--compile] [--launches] [options of bench_report]

Every contestant does the same work with the same weights: hidden states [M, D] through the router's
product, routing and experts to [M, D]. "chain" is ours with the routing in two launches.
gpt-oss-20b's layer has biases, clamped Swiglu and transposed weights; Qwen3-30B-A3B's has none of
these. Every contestant's output is compared with `aiter.reference.layer` before anything is timed. A
shape of one's own is measured as `--layer` says.

On a GPU the figure is the slope of graph replay, but for transformers' "eager" path: it reads back
which experts are hit, cannot be captured, and is timed as single calls, host included. `batched_mm`
copies the weights of every entry's expert and is left out above 8 tokens. On the CPU the figures are
wall time, and say how fast the execution layer and PyTorch's CPU products are; `--small` cuts the
sizes to what a laptop multiplies. `--goals` measures a layer from router logits on, as `moe_goals` says.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import moe_goals
import torch
from bench_report import Record
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from aiter import ActivationType, fused_moe, reference
from aiter.cli.table import format_table
from aiter.layer import triton_experts
from aiter.layer.experts import Backend
from aiter.reference.layer import moe_layer

NAMES = ("E", "K", "D", "inter")
FULL = {"gpt-oss": "32,4,2880,2880", "qwen3": "128,8,2048,768"}
SMALL = {"gpt-oss": "32,4,256,256", "qwen3": "128,8,256,96"}
GPU_TOKENS, CPU_TOKENS = "1,2,4,8,16,32,64,128", "1,8"
BATCHED_TOKENS = 8
TOLERANCE = 4e-2  # of the largest output; bfloat16 rounds weights, products and steps between
LEAST_CHECKED = 0.5  # of the rows

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """A layer's tensors under transformers' names, and as `fused_moe` takes them."""

    state: dict[str, Tensor]
    router: tuple[Tensor, Tensor | None]
    w1: Tensor
    w2: Tensor
    options: dict[str, Any]


def make_weights(kind: str, shape: tuple[int, ...], like: Tensor) -> Weights:
    """Random weights on the device and in the dtype of `like`."""
    num_experts, _, model_dim, inter = shape
    generator = torch.Generator(like.device).manual_seed(bench_report.SEED)

    def random(*sizes: int, fan: int) -> Tensor:
        return torch.empty(sizes, dtype=like.dtype, device=like.device).normal_(
            std=fan**-0.5, generator=generator
        )

    router = random(num_experts, model_dim, fan=model_dim)
    if kind == "qwen3":
        up = random(num_experts, 2 * inter, model_dim, fan=model_dim)
        down = random(num_experts, model_dim, inter, fan=inter)
        state = {"gate.weight": router, "experts.gate_up_proj": up, "experts.down_proj": down}
        return Weights(state, (router, None), up, down, {})
    up = random(num_experts, model_dim, 2 * inter, fan=model_dim)
    down = random(num_experts, inter, model_dim, fan=inter)
    biases = [random(num_experts, n, fan=16) for n in (2 * inter, model_dim)]
    router_bias = random(num_experts, fan=16)
    state = {
        "router.weight": router,
        "router.bias": router_bias,
        "experts.gate_up_proj": up,
        "experts.gate_up_proj_bias": biases[0],
        "experts.down_proj": down,
        "experts.down_proj_bias": biases[1],
    }
    options = {
        "activation": ActivationType.Swiglu,
        "bias1": biases[0],
        "bias2": biases[1],
        "gate_up_interleaved": True,
    }
    return Weights(state, (router, router_bias), up.transpose(1, 2), down.transpose(1, 2), options)


def transformers_block(kind: str, shape: tuple[int, ...], weights: Weights, how: str) -> Layer:
    """transformers' own block over the same tensors, with the experts implementation `how`."""
    transformers = importlib.import_module("transformers")
    num_experts, topk, model_dim, inter = shape
    sizes = {"hidden_size": model_dim, "num_experts_per_tok": topk}
    if kind == "qwen3":
        config = transformers.Qwen3MoeConfig(
            **sizes, num_experts=num_experts, moe_intermediate_size=inter, norm_topk_prob=True
        )
        name, block_name = "qwen3_moe", "Qwen3MoeSparseMoeBlock"
    else:
        config = transformers.GptOssConfig(
            **sizes, num_local_experts=num_experts, intermediate_size=inter
        )
        name, block_name = "gpt_oss", "GptOssMLP"
    config._experts_implementation = how
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with torch.device("meta"):
        block = getattr(modeling, block_name)(config).eval()
    block.load_state_dict(weights.state, assign=True)

    def run(hidden: Tensor) -> Tensor:
        output = block(hidden.unsqueeze(0))
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first.view(hidden.shape)

    return run


def contestants(
    kind: str, shape: tuple[int, ...], weights: Weights, options: argparse.Namespace, tokens: int
) -> dict[str, Layer | None]:
    """Name to function of the hidden states; None for what does not take part."""
    topk = shape[1]

    def ours(policy: int, backend: Backend | None = None) -> Layer:
        def run(hidden: Tensor) -> Tensor:
            return fused_moe.fused_moe_from_logits(
                hidden,
                weights.w1,
                weights.w2,
                F.linear(hidden, *weights.router),
                topk,
                moe_sorting_dispatch_policy=policy,
                backend=backend,
                **weights.options,
            )

        return run

    fused, chain = ours(0), ours(1)
    found: dict[str, Layer | None] = {"fused": fused, "chain": chain}
    if fused_moe.expert_backend(weights.w1, weights.w2) == "triton":
        found["fused, without Triton"] = ours(0, backend_without_triton(weights))
    blocks = ("grouped_mm", "batched_mm", "eager") if has_transformers() else ()
    for how in blocks:
        taking_part = how != "batched_mm" or tokens <= BATCHED_TOKENS
        found[how] = transformers_block(kind, shape, weights, how) if taking_part else None
    if options.compile:
        torch.compiler.reset()
        found["fused, compiled"] = torch.compile(fused, fullgraph=True, dynamic=False)
        if blocks:
            grouped = transformers_block(kind, shape, weights, "grouped_mm")
            found["grouped_mm, compiled"] = torch.compile(grouped, dynamic=False)
    return found


def backend_without_triton(weights: Weights) -> Backend:
    """What `expert_backend` says where there is no Triton."""
    with mock.patch.object(triton_experts, "why_not", lambda device: "left out"):
        return fused_moe.expert_backend(weights.w1, weights.w2)


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def kind_of(options: argparse.Namespace, shape: tuple[int, ...]) -> str:
    """Which model's layer a shape stands for."""
    text = ",".join(map(str, shape))
    known = {sizes: kind for table in (FULL, SMALL) for kind, sizes in table.items()}
    return known.get(text, options.layer)


def make_inputs(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> list[Tensor]:
    """Hidden states [M, D]; what `bench_report.logits` makes is as random."""
    return bench_report.logits(options, tokens, shape[2])


def check(name: str, run: Layer, hidden: Tensor, weights: Weights, topk: int) -> None:
    """Raises RuntimeError if a contestant's output is not the layer's.

    Rows in which a rounding of the logits decides between experts are left out: equal 16-bit logits
    are common, and contestants may choose differently among them.
    """
    logits = F.linear(hidden, *weights.router)
    routed = reference.topk_softmax(logits, topk, True)
    ranked = logits.float().sort(dim=-1, descending=True).values
    step = torch.finfo(logits.dtype).eps * ranked[:, topk - 1].abs()
    clear = ranked[:, topk - 1] - ranked[:, topk] > 2 * step
    if clear.float().mean() < LEAST_CHECKED and hidden.shape[0] > 4:
        raise RuntimeError(
            f"{name}: only {int(clear.sum())} of {hidden.shape[0]} rows can be checked"
        )
    options = dict(weights.options)
    activation = options.pop("activation", ActivationType.Silu).name.lower()
    expected = moe_layer(hidden, weights.w1, weights.w2, *routed, activation=activation, **options)
    error = (run(hidden) - expected).abs().amax(dim=-1)[clear]
    if not bool((error <= TOLERANCE * expected.abs().max()).all()):
        raise RuntimeError(f"{name}: expected within {TOLERANCE} of the layer, got {error.max()}")


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one layer and number of tokens, in microseconds."""
    kind = kind_of(options, shape)
    inputs = make_inputs(options, shape, tokens)
    weights = make_weights(kind, shape, inputs[0])
    record: Record = {}
    with torch.inference_mode():
        for name, run in contestants(kind, shape, weights, options, tokens).items():
            if run is None:
                record[name] = None
                continue
            check(name, run, inputs[0], weights, shape[1])
            if name.startswith("fused") and fused_moe.last_path() != "fused":
                record[name] = None  # the chain is known to be faster here, and was taken
                continue
            if name == "eager" and options.device.type == "cuda":
                record[name] = bench_timing.wall_us(lambda run=run: run(inputs[0]), options.device)
            else:
                calls = [lambda x=x, run=run: run(x) for x in inputs]
                record[name] = bench_timing.call_us(calls, options.device)
    return record


class Launches(TorchDispatchMode):
    """Counts ATen operations that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not op.is_view and "empty" not in op.name():
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def launches(options: argparse.Namespace, shapes: list[str], compiled: bool) -> str:
    """What a layer of 8 tokens launches: the router's product, and routing as one, included."""
    rows = []
    options.compile = False
    for text in shapes:
        shape = tuple(map(int, text.split(",")))
        kind = kind_of(options, shape)
        hidden = make_inputs(options, shape, 8)[0]
        weights = make_weights(kind, shape, hidden)
        for name, run in contestants(kind, shape, weights, options, 8).items():
            if run is None or name == "eager":
                continue
            run(hidden)
            with torch.no_grad(), Launches() as seen:
                run(hidden)
            rows.append([kind, name, str(len(seen.names)), generated(run, hidden, compiled)])
    return format_table(("layer", "contestant", "ATen operations", "kernels if compiled"), rows)


def generated(run: Layer, hidden: Tensor, compiled: bool) -> str:
    """How many kernels torch.compile makes of a layer, next to the products and our op."""
    if not compiled:
        return "-"
    from torch._inductor import metrics

    torch.compiler.reset()
    metrics.reset()
    with torch.no_grad():
        torch.compile(run, dynamic=False)(hidden)
    return str(metrics.generated_kernel_count)


def host_times(options: argparse.Namespace, shapes: list[str]) -> str:
    """Host time per call of 8 tokens, on a GPU: what an uncaptured decode step waits for."""
    rows = []
    for text in shapes:
        shape = tuple(map(int, text.split(",")))
        kind = kind_of(options, shape)
        hidden = make_inputs(options, shape, 8)[0]
        weights = make_weights(kind, shape, hidden)
        with torch.inference_mode():
            for name, run in contestants(kind, shape, weights, options, 8).items():
                if run is not None and name != "eager":
                    time = bench_timing.host_us(lambda run=run, x=hidden: run(x), options.device)
                    rows.append((kind, name, f"{time.us:.1f} us"))
    return format_table(("layer", "contestant", "host time per call"), rows)


def main() -> int:
    parser = bench_report.parser(__doc__)
    parser.add_argument("--layer", choices=FULL, default="qwen3", help="what --shape stands for")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, not a model's")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--goals", action="store_true", help="from logits on, against the peers")
    parser.add_argument("--launches", action="store_true", help="count launches, time nothing")
    options = parser.parse_args()
    options.device = options.device or bench_report.current_device()
    shapes = options.shape or list((SMALL if options.small else FULL).values())
    on_gpu = options.device.type == "cuda"
    options.tokens = options.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    if not has_transformers():
        print("transformers is not installed: its paths do not take part")
    if options.goals:
        print(moe_goals.table(options.device))
        return 0
    if options.launches:
        print(launches(options, shapes, options.compile))
        return 0
    what = "MoE layer, small sizes (no model's)" if options.small else "MoE layer in decode"
    bench_report.run(options, what, NAMES, shapes, measure)
    if on_gpu:
        print(host_times(options, shapes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
