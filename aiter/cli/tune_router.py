"""Up to which M is one launch from hidden states faster here than two? Measures, prints, keeps.

    python -m aiter tune --router D',E,K[,D',E,K ...] [--bias] [--dtype bf16|fp16|fp32]
        [--tokens 1,2,4,8,16,32,64] [--device cpu|cuda[:N]] [--wave 64|32] [--replays 20] [--dry-run]

For hidden states [M, D'] and a router's weight [E, D'], the launch that makes the router's product and
routes by it stands against our product in a launch of its own, then the fused launch on its logits. Both
make the same bits, which is compared before anything is kept. On a GPU it is the strict clock: nothing
overlaps with other kernels, but two launches may with each other; and calls take turns with more weights
than its caches hold, up to 60, as the layers of a model do. The largest M up to which the one launch is
the faster is kept per shape, in a file of its own per device, and counts from the next call on, where it
is nearer to a call's shape than the built-in rows; `python -m aiter explain --hidden D'` tells.
AITER_DISPATCH=capacity leaves them aside, and removing the file forgets them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import fused_moe
from ..jit import cpu_wave
from ..ops.device import current_device
from ..ops.fused_router_sorting import (
    fused_router_sorting_fwd,
    fused_router_sorting_max_tokens,
    router_product,
)
from ..ops.fused_topk_moe_sorting import (
    fused_topk_moe_sorting_fwd,
    fused_topk_moe_sorting_max_tokens,
)
from ..routing import dispatch, known, tuned
from ..routing.basis import basis_of
from ..routing.dispatch import RouterCrossover
from . import timing
from .options import MOST, PROGRAM, Parser, add_device, add_wave, check_memory, whole
from .table import format_table

TOKENS = (1, 2, 4, 8, 16, 32, 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCK_SIZE = 32
SEED = 0
ROTATED_BYTES = 128 << 20  # of weights: more than a GPU's L2 holds
MOST_WEIGHTS = timing.HIGH  # as many calls as the longest graph has

Shape = tuple[int, int, int]
"""D', E, K."""
Pair = tuple[float, float]
"""Microseconds of one launch and of two."""
Clock = Callable[[Shape, int], Pair]


def main(argv: Sequence[str]) -> int:
    """Measures what the options say; 0 if everything was measured and kept, 1 if nothing was."""
    parser = make_parser()
    options = parser.parse_args(argv)
    device = current_device(options.device)
    dtype = DTYPES[options.dtype]
    on_cpu = device.type == "cpu"
    shapes: list[Shape] = options.router
    needed = (_bytes(shape, max(options.tokens), dtype, on_cpu) for shape in shapes)
    check_memory(parser, max(needed), device)
    command = shlex.join([*PROGRAM.split(), "tune", *argv])
    where = "cpu target (executes the kernel lane by lane: no GPU's times)" if on_cpu else "device"
    with cpu_wave(options.wave) if on_cpu else torch.cuda.device(device):
        name = tuned.device_name(device)
        print(f"{where}: {name}, {options.dtype} hidden states and weight"
              f"{', with a bias' if options.bias else ''}, us per call")  # fmt: skip
        clock = device_clock(device, dtype, options.bias, options.replays)
        measured = []
        for shape in shapes:
            try:
                times = measure(shape, options.tokens, device, clock)
            except ValueError as error:
                print(f"error: {','.join(map(str, shape))}: {error}", file=sys.stderr)
                return 1
            row = RouterCrossover(
                *shape, dispatch.threshold(times), name, time.strftime("%Y-%m-%d"), command
            )
            measured.append(tuned.Measured(row, [[m, *pair] for m, pair in times.items()]))
            print("\n" + times_table(shape, times), flush=True)
        cells = [
            (r.width, r.num_experts, r.topk, r.fused_tokens) for r in (m.row for m in measured)
        ]
        print("\n" + format_table(("D'", "E", "K", "one launch up to M"), cells))
        if options.dry_run:
            print("\nkept nothing, as --dry-run asks")
            return 0
        try:
            path = tuned.keep(device, measured, tuned.ROUTER)
        except OSError as error:
            print(f"error: expected to write the cache folder, got {error}", file=sys.stderr)
            return 1
        known.forget()
        origin = basis_of(device).router_origin(measured[0].row)
        print(f"\nkept in {path}; dispatch_policy 0 goes by {origin}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        f"{PROGRAM} tune --router",
        description=(__doc__ or "").replace("python -m aiter", PROGRAM),
    )
    parser.add_argument(
        "--router",
        action="extend",
        type=parse_shapes,
        required=True,
        metavar="D',E,K[,...]",
        help="the shapes, one after the other",
    )
    parser.add_argument("--bias", action="store_true", help="add a bias to the logits")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of hidden states and weight"
    )
    parser.add_argument(
        "--tokens", type=parse_tokens, default=list(TOKENS), metavar="M,...", help="to measure"
    )
    add_device(parser)
    add_wave(parser)
    parser.add_argument("--replays", type=whole(1, 10**6), default=20, help="of a graph, on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="print, but keep nothing")
    return parser


def measure(
    shape: Shape, tokens: Sequence[int], device: torch.device, clock: Clock
) -> dict[int, Pair]:
    """The times by M, wherever both ways fit.

    Raises:
        ValueError: not 1 <= K <= min(E, 255), an E that no launch takes, or no M that fits.
    """
    _, num_experts, topk = shape
    most = min(
        fused_router_sorting_max_tokens(num_experts, topk, device=device),
        fused_topk_moe_sorting_max_tokens(num_experts, topk, device=device),
    )
    fitting = [m for m in tokens if m <= most]
    if not fitting:
        raise ValueError(f"--tokens: expected one of at most {most}, which fit, got {tokens}")
    return {m: clock(shape, m) for m in fitting}


def device_clock(device: torch.device, dtype: torch.dtype, with_bias: bool, replays: int) -> Clock:
    """Measures on `device`: strict clock on a GPU, wall time on the cpu target."""

    def clock(shape: Shape, tokens: int) -> Pair:
        width, num_experts, topk = shape
        generator = torch.Generator().manual_seed(SEED)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        hidden = drawn(tokens, width).to(device, dtype)
        weight = (drawn(num_experts, width) / width**0.5).to(device, dtype)
        bias = drawn(num_experts).to(device, dtype) if with_bias else None
        count = _num_weights(shape, dtype, device.type == "cpu")
        weights = [weight, *(weight.clone() for _ in range(count - 1))]
        logits = torch.empty(tokens, num_experts, device=device)
        buffers = fused_moe.empty_sorted_buffers(
            tokens, topk, num_experts, width, torch.bfloat16, BLOCK_SIZE, device=device
        )

        def one(weight: Tensor) -> None:
            fused_router_sorting_fwd(
                hidden, weight, logits, *buffers, num_experts, topk, BLOCK_SIZE, router_bias=bias
            )

        def two(weight: Tensor) -> None:
            router_product(hidden, weight, logits, router_bias=bias)
            fused_topk_moe_sorting_fwd(logits, *buffers, num_experts, topk, BLOCK_SIZE, True)

        found, results = [], []
        for way in (one, two):
            logits.fill_(float("nan"))
            way(weight)
            slots = int(buffers[3][0])
            results.append([logits.clone(), *(t[:slots].clone() for t in buffers[:2])])
            # NOTE: bound as a default, since a name in a loop is looked up when the call is made.
            calls: list[timing.Call] = [lambda w=w, way=way: way(w) for w in weights]  # type: ignore[misc]
            if device.type == "cuda":
                found.append(timing.strict_us(calls, replays).us)
            else:
                found.append(timing.cpu_us(calls[0], seconds=0.05).us)
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            raise RuntimeError(
                f"M={tokens} D'={width} E={num_experts} K={topk}: one launch gives other logits or"
                f" slots than two; `{PROGRAM} selftest` tells more"
            )
        return found[0], found[1]

    return clock


def times_table(shape: Shape, times: dict[int, Pair]) -> str:
    """One row per M; the faster way by name."""
    rows = [
        [*shape, m, f"{one:.2f}", f"{two:.2f}", "one launch" if one <= two else "two launches"]
        for m, (one, two) in times.items()
    ]
    return format_table(("D'", "E", "K", "M", "one launch", "two launches", "faster"), rows)


def parse_shapes(text: str) -> list[Shape]:
    """D',E,K,D',E,K,... as an option."""
    expected = f"expected D',E,K or several of these, each from 1 to {MOST}, got {text!r}"
    try:
        sizes = [whole(1, MOST)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(expected) from None
    if len(sizes) % 3:
        raise argparse.ArgumentTypeError(expected)
    shapes = [(sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(0, len(sizes), 3)]
    if any(topk > num_experts for _, num_experts, topk in shapes):
        raise argparse.ArgumentTypeError(f"expected 1 <= K <= E, got {text!r}")
    return shapes


def parse_tokens(text: str) -> list[int]:
    """M,M,... as an option, ascending; no more than the one launch is there for."""
    most = dispatch.MOST_ROUTER_TOKENS
    try:
        return sorted({whole(1, most)(part) for part in text.split(",")})
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected M,M,..., each from 1 to {most}, got {text!r}"
        ) from None


def _num_weights(shape: Shape, dtype: torch.dtype, on_cpu: bool) -> int:
    width, num_experts, _ = shape
    return (
        1
        if on_cpu
        else min(MOST_WEIGHTS, -(-ROTATED_BYTES // (width * num_experts * dtype.itemsize)))
    )


def _bytes(shape: Shape, tokens: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """What the clock allocates, but for what is small beside it."""
    width, num_experts, _ = shape
    # NOTE: drawn as float32 on the CPU first.
    weights = _num_weights(shape, dtype, on_cpu) * dtype.itemsize + 4
    return width * num_experts * weights + tokens * (width * (dtype.itemsize + 2) + 4 * num_experts)
