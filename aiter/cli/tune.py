"""Which path is the fastest on this device, from which M on? Measures, prints, keeps.

    python -m aiter tune [--device cpu|cuda[:N]] [--wave 64|32] [--shape E,K,D ...]
        [--tokens 1,2,4,...] [--dtype bf16|fp16|fp32] [--replays 20] [--rows] [--dry-run]

For every shape, the fused launch and the chain with the oneshot and the multi-phase sort route the
same logits into the same buffers, from M = 1 to the largest M that the fused launch takes, and the
chain beyond. Results are compared before anything is timed. A fused launch that is the fastest at
every M measured is taken wherever it fits. The crossovers go to the cache folder, one file per device,
and count from the next call on; `python -m aiter explain` shows them. AITER_DISPATCH=capacity leaves
them aside, and removing the file forgets them.

    python -m aiter tune --experts E,K,D,inter ...

measures the tiles of the Triton backend instead; `--experts 32,4,2880,2880 --help` has the options.

    python -m aiter tune --router D',E,K ...

measures routing from hidden states instead; `--router 2880,128,4 --help` has the options.
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
from ..ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from ..routing import dispatch, known, tuned
from ..routing.basis import basis_of
from ..routing.dispatch import Crossover
from ..routing.graph import fused_topk_moe_sorting_fwd
from . import timing, tune_experts, tune_router
from .options import MOST, MOST_TOKENS, PROGRAM, Parser, add_device, add_wave, check_memory, whole
from .table import format_table

SHAPES = (
    "8,2,4096", "16,1,5120", "32,4,2880", "128,1,5120", "128,4,2880", "128,8,2048", "128,8,4096",
    "160,8,5120", "256,8,3072", "256,8,7168", "384,8,7168", "512,10,2048", "512,10,4096",
    "896,16,3584", "129,5,2880", "161,9,5120", "257,9,7168", "385,9,7168", "513,11,4096",
)  # fmt: skip
CHAIN_TOKENS = {"cuda": 16384, "cpu": 2048}  # how far the chain is measured at least
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATHS: tuple[dispatch.Path, ...] = ("fused", "oneshot", "multiphase")
BLOCK_SIZE = 32
SEED = 0

Shape = tuple[int, int, int]
Times = dict[int, dict[str, float]]
Clock = Callable[[Shape, int, Sequence[dispatch.Path]], dict[str, float]]


def main(argv: Sequence[str]) -> int:
    """Measures what the options say; 0 if everything was measured and kept, 1 if nothing was."""
    words = [word.partition("=")[0] for word in argv]
    if "--experts" in words:
        return tune_experts.main(argv)
    if "--router" in words:
        return tune_router.main(argv)
    parser = make_parser()
    options = parser.parse_args(argv)
    device = current_device(options.device)
    shapes = options.shape or [parse_shape(text) for text in SHAPES]
    if options.tokens:
        wide = max(4 * num_experts + 2 * model_dim for num_experts, _, model_dim in shapes)
        check_memory(parser, wide * max(options.tokens), device)
    command = shlex.join([*PROGRAM.split(), "tune", *argv])
    on_cpu = device.type == "cpu"
    where = "cpu target (executes the kernel lane by lane: no GPU's times)" if on_cpu else "device"
    with cpu_wave(options.wave) if on_cpu else torch.cuda.device(device):
        name = tuned.device_name(device)
        print(f"{where}: {name}, {options.dtype} logits, block size {BLOCK_SIZE}, us per call")
        clock = device_clock(device, DTYPES[options.dtype], options.replays)
        measured = []
        for shape in shapes:
            try:
                most = fused_topk_moe_sorting_max_tokens(shape[0], shape[1], device=device)
                tokens = options.tokens or token_grid(most, CHAIN_TOKENS[device.type])
                times = measure(shape, tokens, most, clock)
            except ValueError as error:
                print(f"error: {','.join(map(str, shape))}: {error}", file=sys.stderr)
                return 1
            row = crossover(shape, times, most, (name, time.strftime("%Y-%m-%d"), command))
            measured.append(tuned.Measured(row, times_as_rows(times)))
            print("\n" + times_table(shape, times), flush=True)
            if options.rows:
                print(f"\n{row},", flush=True)
        print("\n" + crossover_table([each.row for each in measured]))
        if options.dry_run:
            print("\nkept nothing, as --dry-run asks")
            return 0
        try:
            path = tuned.keep(device, measured, tuned.LOGITS)
        except OSError as error:
            print(f"error: expected to write the cache folder, got {error}", file=sys.stderr)
            return 1
        known.forget()
        origin = basis_of(device).origin
        print(f"\nkept in {path}; dispatch_policy 0 goes by {origin}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        f"{PROGRAM} tune",
        description=(__doc__ or "").replace("python -m aiter", PROGRAM),
    )
    add_device(parser)
    add_wave(parser)
    parser.add_argument(
        "--shape", action="append", type=parse_shape, metavar="E,K,D",
        help=f"may be repeated; {len(SHAPES)} shapes of models unless given",
    )  # fmt: skip
    parser.add_argument(
        "--tokens",
        type=parse_tokens,
        metavar="M,...",
        help="these alone; powers of two unless given",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the logits")
    parser.add_argument("--replays", type=whole(1, 10**6), default=20, help="of a graph, on a GPU")
    parser.add_argument(
        "--rows", action="store_true", help="print the rows for MEASURED of routing/dispatch.py"
    )
    parser.add_argument("--dry-run", action="store_true", help="print, but keep nothing")
    return parser


def token_grid(max_tokens: int, chain_tokens: int) -> list[int]:
    """Powers of two up to twice the capacity, at least up to `chain_tokens`, and the capacity."""
    powers = [1]
    while powers[-1] < max(2 * max_tokens, chain_tokens):
        powers.append(powers[-1] * 2)
    return sorted({*powers, *([max_tokens] if max_tokens else [])})


def measure(shape: Shape, tokens: Sequence[int], max_tokens: int, clock: Clock) -> Times:
    """Microseconds by M and path; the fused launch where it fits."""
    return {m: clock(shape, m, PATHS if m <= max_tokens else PATHS[1:]) for m in sorted(tokens)}


def crossover(
    shape: Shape, times: Times, max_tokens: int, provenance: tuple[str, str, str]
) -> Crossover:
    """What the times say. A fused launch that is the fastest wherever measured is so to capacity."""
    best_chain = {m: min(t["oneshot"], t["multiphase"]) for m, t in times.items()}
    fused = {m: (t["fused"], best_chain[m]) for m, t in times.items() if "fused" in t}
    fused_tokens = dispatch.threshold(fused)
    if fused and fused_tokens == max(fused):
        fused_tokens = max_tokens
    chain = {m: (t["oneshot"], t["multiphase"]) for m, t in times.items()}
    return Crossover(*shape, fused_tokens, dispatch.threshold(chain), *provenance)


def device_clock(device: torch.device, dtype: torch.dtype, replays: int) -> Clock:
    """Measures on `device`: graph slope on a GPU, wall time on the cpu target."""

    def clock(shape: Shape, tokens: int, paths: Sequence[dispatch.Path]) -> dict[str, float]:
        num_experts, topk, model_dim = shape
        generator = torch.Generator().manual_seed(SEED)
        logits = torch.randn(tokens, num_experts, generator=generator).to(dtype).to(device)
        buffers = fused_moe.empty_sorted_buffers(
            tokens, topk, num_experts, model_dim, torch.bfloat16, BLOCK_SIZE, device=device
        )
        found: dict[str, float] = {}
        expected: Tensor | None = None
        for path in paths:
            call = _call(path, shape, logits, buffers)
            call()
            slots = int(buffers[3][0])
            result = buffers[0][:slots].clone()
            if expected is not None and not torch.equal(result, expected):
                raise RuntimeError(
                    f"M={tokens} E={num_experts} K={topk}: {path} gives other sorted_ids than"
                    f" {paths[0]}; `{PROGRAM} selftest` tells more"
                )
            expected = result
            if device.type == "cuda":
                found[path] = timing.graph_slope_us([call], replays).us
            else:
                found[path] = timing.cpu_us(call, seconds=0.05).us
        return found

    return clock


def _call(
    path: dispatch.Path, shape: Shape, logits: Tensor, buffers: fused_moe.SortedBuffers
) -> timing.Call:
    num_experts, topk, model_dim = shape
    if path == "fused":
        return lambda: fused_topk_moe_sorting_fwd(
            logits, *buffers, num_experts, topk, BLOCK_SIZE, True
        )
    return lambda: fused_moe.topk_softmax_sorting(
        logits, topk, num_experts, model_dim, torch.bfloat16, block_size=BLOCK_SIZE,
        dispatch_policy=dispatch.POLICY_OF_CHAIN[path], out=buffers,
    )  # fmt: skip


def times_as_rows(times: Times) -> list[list[float | None]]:
    """The times as the file keeps them: [M, fused, oneshot, multiphase]."""
    return [[m, *(by_path.get(path) for path in PATHS)] for m, by_path in times.items()]


def times_table(shape: Shape, times: Times) -> str:
    """One row per M; the fastest path by name."""
    rows = []
    for m, by_path in times.items():
        cells = [f"{by_path[path]:.2f}" if path in by_path else "-" for path in PATHS]
        rows.append([*shape, m, *cells, min(by_path, key=lambda path: by_path[path])])
    return format_table(("E", "K", "D", "M", *PATHS, "fastest"), rows)


def crossover_table(rows: Sequence[Crossover]) -> str:
    """Up to which M each path is to be taken."""
    cells = [(r.num_experts, r.topk, r.model_dim, r.fused_tokens, r.oneshot_tokens) for r in rows]
    return format_table(("E", "K", "D", "fused up to M", "of the chain, oneshot up to M"), cells)


def parse_shape(text: str) -> Shape:
    """E,K,D as an option."""
    try:
        num_experts, topk, model_dim = map(whole(1, MOST), text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"expected E,K,D, each from 1 to {MOST}, got {text!r}"
        ) from None
    if topk > num_experts:
        raise argparse.ArgumentTypeError(f"expected 1 <= K <= E, got {text!r}")
    return num_experts, topk, model_dim


def parse_tokens(text: str) -> list[int]:
    """M,M,... as an option."""
    try:
        return list(map(whole(1, MOST_TOKENS), text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected M,M,..., each from 1 to {MOST_TOKENS}, got {text!r}"
        ) from None
