"""What does the op do in a model? A decode loop through a stack of MoE layers, checked and timed.

The routing has gpt-oss-20b's real shape (E=32, K=4, D=2880); the experts are narrower than the
model's (2880 wide there), because a laptop has to hold and to multiply them. Every layer of every
step goes router logits -> `topk_softmax_sorting` -> expert GEMMs over the sorted blocks, added into
the `moe_buf` that the launch zeroed. Every routing is compared with `aiter.reference`, and the
output of every layer's first step with a plain loop over tokens and slots.

With `--router` a layer's launch starts from the hidden states and makes the router's product as well
(`router_topk_sorting`); its logits are compared with the reference's to the bit.

`--model` shows the whole layer in a transformers model instead: `--model gpt-oss --help` tells more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import fused_moe, reference
from ..jit import cpu_wave
from ..jit.log import get_logger
from ..ops.device import current_device
from ..ops.fused_router_sorting import fused_router_sorting_max_tokens
from ..ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from ..routing.buffers import TOKEN_MASK
from ..routing.dispatch import MOST_ROUTER_TOKENS
from . import timing
from .options import (
    MOST_SEED,
    MOST_TOKENS,
    MOST_TOPK,
    PROGRAM,
    Parser,
    add_device,
    add_wave,
    check_memory,
    check_topk,
    whole,
)
from .table import format_table

_WEIGHT_TOLERANCE = 1e-6  # relative; exp and the sum may round differently in the reference
_OUTPUT_TOLERANCE = 2e-2  # relative to the output's norm; bf16 GEMMs in two orders


@dataclass(frozen=True)
class Layer:
    """One MoE layer: router [E, D], gate and up projections [E, 2*I, D], down projection [E, D, I]."""

    router: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass
class Record:
    """What the loop measured."""

    first_call_seconds: float = 0.0
    routing_us: list[float] = field(default_factory=list)
    experts_us: list[float] = field(default_factory=list)
    checked: int = 0
    paths: set[str] = field(default_factory=set)
    worst_weight: float = 0.0
    worst_output: float = 0.0


class Mismatch(Exception):
    """The routing differs from the reference."""


def main(argv: Sequence[str]) -> int:
    """Runs the demo; 0 if every routing was right, 1 if not."""
    if any(word == "--model" or word.startswith("--model=") for word in argv):
        from . import demo_model

        return demo_model.main(argv)
    parser = make_parser()
    options = parser.parse_args(argv)
    check_topk(parser, options.topk, options.experts)
    device = current_device(options.device)
    get_logger().setLevel("INFO")
    check_memory(parser, _bytes_of(options), device)
    torch.manual_seed(options.seed)
    print(
        f"decode through {options.layers} MoE layers, {options.steps} steps of {options.tokens} tokens:"
        f" E={options.experts} K={options.topk} D={options.model_dim}, expert width {options.width},"
        f" bf16, on {_device_name(device, options.wave)}, seed {options.seed}"
    )
    layers = [_make_layer(options, device) for _ in range(options.layers)]
    on_cpu = device.type == "cpu"
    record = Record()
    try:
        with cpu_wave(options.wave) if on_cpu else nullcontext():
            _warm_up(layers[0], options, device, record)
            _decode(layers, options, device, record)
    except Mismatch as error:
        print(f"MISMATCH: {error}", file=sys.stderr)
        return 1
    print(_report(record, options))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(f"{PROGRAM} demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model",
        help="generate with a small transformers model instead: deepseek-v3, gpt-oss, mixtral,"
        " qwen3-moe or qwen3-next (--model gpt-oss --help shows its options)",
    )
    add_device(parser)
    add_wave(parser)
    parser.add_argument(
        "--tokens", type=whole(1, MOST_TOKENS), default=8, help="sequences decoded at once (M)"
    )
    parser.add_argument("--steps", type=whole(1), default=8, help="tokens generated per sequence")
    parser.add_argument("--layers", type=whole(1, 10_000), default=4, help="MoE layers")
    parser.add_argument("--experts", type=whole(1), default=32, help="experts (E)")
    parser.add_argument("--topk", type=whole(1, MOST_TOPK), default=4, help="experts per token (K)")
    parser.add_argument("--model-dim", type=whole(1), default=2880, help="hidden size (D)")
    parser.add_argument("--width", type=whole(1), default=64, help="width of an expert")
    parser.add_argument(
        "--policy", type=int, choices=(0, 1, 2), default=0, help="dispatch_policy: 0, 1 or 2"
    )
    parser.add_argument(
        "--router", action="store_true", help="make the router's product in the routing launch"
    )
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="of weights and tokens")
    return parser


def _bytes_of(options: argparse.Namespace) -> int:
    """What weights and activations take, in bf16."""
    per_expert = options.model_dim * (1 + 3 * options.width)
    rows = options.tokens * (options.model_dim + options.experts)
    return int(2 * (options.layers * options.experts * per_expert + 4 * rows))


def _device_name(device: torch.device, wave: int) -> str:
    if device.type == "cpu":
        return f"the cpu target, wave {wave}"
    return f"{torch.cuda.get_device_name(device)} ({device})"


def _make_layer(options: argparse.Namespace, device: torch.device) -> Layer:
    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(shape[-1] ** -0.5)

    return Layer(
        weights(options.experts, options.model_dim),
        weights(options.experts, 2 * options.width, options.model_dim),
        weights(options.experts, options.model_dim, options.width),
    )


def _route(
    hidden: Tensor, logits: Tensor, layer: Layer, options: argparse.Namespace
) -> fused_moe.SortedBuffers:
    """The routing of logits; with `--router` that of hidden states, which writes them."""
    sizes = (options.topk, options.experts, options.model_dim, torch.bfloat16)
    if options.router:
        return fused_moe.router_topk_sorting(
            hidden, layer.router, *sizes, logits_out=logits, dispatch_policy=options.policy
        )
    return fused_moe.topk_softmax_sorting(logits, *sizes, dispatch_policy=options.policy)


def _logits(hidden: Tensor, layer: Layer, options: argparse.Namespace) -> Tensor:
    """The router's logits, or memory for those that the launch makes."""
    if not options.router:
        return hidden @ layer.router.T
    return torch.empty(len(hidden), options.experts, device=hidden.device)


def _clock(device: torch.device) -> float:
    timing.synchronize(device)
    return time.perf_counter()


def _warm_up(
    layer: Layer, options: argparse.Namespace, device: torch.device, record: Record
) -> None:
    """The first call, which builds the module or finds it in the cache."""
    hidden = torch.randn(options.tokens, options.model_dim, dtype=torch.bfloat16, device=device)
    logits = _logits(hidden, layer, options)
    start = _clock(device)
    _route(hidden, logits, layer, options)
    record.first_call_seconds = _clock(device) - start
    print(
        f"first call: {record.first_call_seconds:.2f} s, path {fused_moe.last_path()}"
        f" (at most {_max_tokens(options, device)} tokens fit in one launch)"
    )


def _max_tokens(options: argparse.Namespace, device: torch.device) -> int:
    if options.router:
        most = fused_router_sorting_max_tokens(options.experts, options.topk, device=device)
        return min(most, MOST_ROUTER_TOKENS)
    return fused_topk_moe_sorting_max_tokens(options.experts, options.topk, device=device)


def _decode(
    layers: list[Layer], options: argparse.Namespace, device: torch.device, record: Record
) -> None:
    hidden = torch.randn(options.tokens, options.model_dim, dtype=torch.bfloat16, device=device)
    for step in range(options.steps):
        routing_us = experts_us = 0.0
        for index, layer in enumerate(layers):
            normed = torch.nn.functional.rms_norm(hidden, (options.model_dim,))
            logits = _logits(normed, layer, options)
            start = _clock(device)
            buffers = _route(normed, logits, layer, options)
            routed = _clock(device)
            path = fused_moe.last_path()
            zeroed = not bool(buffers[4].any())
            before = _clock(device)
            output = _experts(normed, layer, buffers, 32)
            done = _clock(device)
            routing_us += (routed - start) * 1e6
            experts_us += (done - before) * 1e6
            where = f"step {step}, layer {index}"
            if not zeroed:
                raise Mismatch(f"{where}: moe_buf: expected zeros after the launch, got others")
            if options.router and options.tokens <= MOST_ROUTER_TOKENS:
                _check_logits(where, normed, layer, logits)
            _check_routing(where, logits, buffers, options, record)
            if step == 0:
                _check_output(where, normed, layer, logits, output, options, record)
            record.paths.add(str(path))
            hidden = hidden + output
        record.routing_us.append(routing_us)
        record.experts_us.append(experts_us)


def _experts(
    hidden: Tensor, layer: Layer, buffers: fused_moe.SortedBuffers, block_size: int
) -> Tensor:
    """The expert GEMMs, block by block as a grouped GEMM would take them; returns moe_buf."""
    sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = buffers
    slots, num_tokens = num_valid_ids.tolist()
    ids = (sorted_ids[:slots] & TOKEN_MASK).view(-1, block_size)
    weights = sorted_weights[:slots].view(-1, block_size, 1)
    for block, expert in enumerate(sorted_expert_ids[: slots // block_size].tolist()):
        used = int((ids[block] < num_tokens).sum())
        tokens = ids[block, :used].long()
        out = _expert(hidden[tokens], layer, expert)
        moe_buf.index_add_(0, tokens, (out * weights[block, :used]).to(moe_buf.dtype))
    return moe_buf


def _expert(hidden: Tensor, layer: Layer, expert: int) -> Tensor:
    gate, up = (hidden @ layer.gate_up[expert].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ layer.down[expert].T


def _check_logits(where: str, hidden: Tensor, layer: Layer, logits: Tensor) -> None:
    wanted = reference.router_logits(hidden, layer.router)
    if not torch.equal(logits, wanted):
        raise Mismatch(f"{where}: logits: expected the bits of {wanted}, got {logits}")


def _check_routing(
    where: str,
    logits: Tensor,
    buffers: fused_moe.SortedBuffers,
    options: argparse.Namespace,
    record: Record,
) -> None:
    expected = reference.topk_softmax_sorting(
        logits, options.topk, options.experts, options.model_dim, torch.bfloat16
    )
    slots = int(expected[3][0])
    names = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")
    sizes = (slots, slots, slots // 32, 2)
    for name, got, want, size in zip(names, buffers, expected, sizes, strict=False):
        if name == "sorted_weights":
            error = ((got[:size] - want[:size]).abs() / want[:size].clamp_min(1e-30)).max().item()
            record.worst_weight = max(record.worst_weight, error)
            same = error <= _WEIGHT_TOLERANCE
        else:
            same = torch.equal(got[:size], want[:size])
        if not same:
            raise Mismatch(f"{where}: {name}: expected {want[:size]}, got {got[:size]}")
    record.checked += 1


def _check_output(
    where: str,
    hidden: Tensor,
    layer: Layer,
    logits: Tensor,
    output: Tensor,
    options: argparse.Namespace,
    record: Record,
) -> None:
    """Compares a layer's output with a loop over tokens and slots, in float32."""
    weights, ids = reference.topk_softmax(logits, options.topk, True)
    expected = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    for token in range(hidden.shape[0]):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            expected[token] += weight * _expert(hidden[token : token + 1], layer, expert)[0].float()
    error = ((output.float() - expected).norm() / expected.norm()).item()
    record.worst_output = max(record.worst_output, error)
    if not error <= _OUTPUT_TOLERANCE:
        raise Mismatch(
            f"{where}: layer output: expected within {_OUTPUT_TOLERANCE:.0e}, got {error:.1e}"
        )


def _report(record: Record, options: argparse.Namespace) -> str:
    routing = statistics.median(record.routing_us)
    experts = statistics.median(record.experts_us)
    rows = [
        ("shape (M, E, K, D)",
         f"{options.tokens}, {options.experts}, {options.topk}, {options.model_dim}"),
        ("path taken", ", ".join(sorted(record.paths))),
        ("first call, build included", f"{record.first_call_seconds:.2f} s"),
        ("routing, per step", f"{routing:.0f} us ({routing / options.layers:.0f} us per layer)"),
        ("expert GEMMs, per step", f"{experts:.0f} us"),
        ("routings equal to the reference", f"{record.checked} of {record.checked}"),
        ("largest weight error", f"{record.worst_weight:.1e} (relative)"),
        ("largest layer output error", f"{record.worst_output:.1e} (relative, bf16)"),
    ]  # fmt: skip
    return "\n" + format_table(("decode step", "result"), rows)
