"""Does this installation route correctly here? A report to read, or to paste into a bug report.

    selftest [--device cpu|cuda[:N]] [--wave 64|32] [--quick]

Builds what is missing, then compares every op under every policy and dtype with `aiter.reference` on
inputs with ties, infinities and NaN, goes through the list of `selftest_checks` (further ops, LDS at
its limit, graphs, streams, several GPUs), and times a decode call. On the CPU it does so for both
wave widths. It needs nothing but the installed package, so that an owner of hardware that the authors
do not have can say what happens on it; what cannot be shown here is listed as skipped, with the
reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import fused_moe, reference
from ..jit import cpu_wave
from ..ops.device import current_device
from ..ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from . import env_command, timing
from .options import PROGRAM, Parser, add_device
from .selftest_checks import BLOCK_SIZE, CHECKS, POLICY_NAMES, Skipped, difference
from .table import format_table

# (M, E, K): models' shapes, experts that are no power of two, tails.
SHAPES = (
    (1, 128, 4), (64, 128, 4), (13, 256, 8), (7, 32, 4), (5, 512, 10), (3, 896, 16), (9, 161, 9),
    (33, 8, 2), (2, 5, 5), (300, 128, 8), (0, 128, 4),
)  # fmt: skip
QUICK_SHAPES = SHAPES[:4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODEL_DIM = 37  # 74 bytes a row in bf16: not a multiple of 16


@dataclass(frozen=True)
class Problem:
    """One routing problem and what has to come out of it."""

    name: str
    logits: Tensor
    topk: int
    need_renorm: bool
    mask: Tensor | None
    num_local: Tensor | None


@dataclass
class Tally:
    """What became of the problems of one row of the report."""

    passed: int = 0
    failed: int = 0
    paths: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Prints the report; 0 if everything was right, 1 if not."""
    options = make_parser().parse_args(argv)
    device = current_device(options.device)
    failures: list[str] = []
    try:
        env_command.run(options)
        print()
        _report(device, options, failures)
    except Exception as error:
        failures.append(f"raised {type(error).__name__}: {error}")
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    sys.stderr.flush()
    wrong = f"NOT all right on {device}: {len(failures)} wrong, the first of them above"
    print(f"selftest: {wrong if failures else f'all right on {device}'}")
    return 1 if failures else 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        f"{PROGRAM} selftest",
        description=__doc__,
    )
    add_device(parser)
    parser.add_argument("--wave", type=int, choices=(64, 32), help="cpu wave width; else both")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    return parser


def _report(device: torch.device, options: argparse.Namespace, failures: list[str]) -> None:
    """Prints a table per wave and part; adds what is wrong to `failures`."""
    waves = (options.wave,) if options.wave else (64, 32)
    for wave in waves if device.type == "cpu" else (None,):
        print(format_table(("device", "value"), _device_rows(device, wave)))
        print()
        with nullcontext() if wave is None else cpu_wave(wave):
            print(_parity(device, QUICK_SHAPES if options.quick else SHAPES, failures))
            print()
            print(_checks(device, failures))
            print()
            rows = _calls(device)
            print(format_table(("decode call, M=32 E=128 K=4 D=2880", "result"), rows))
            print()


def _device_rows(device: torch.device, wave: int | None) -> list[tuple[str, str]]:
    if device.type == "cpu":
        return [("device", "the CPU, executing the HIP kernels"), ("wave", str(wave))]
    properties = torch.cuda.get_device_properties(device)
    return [
        ("device", f"{properties.name} ({device})"),
        ("architecture", getattr(properties, "gcnArchName", None)
         or f"sm_{properties.major}{properties.minor}"),
        ("runtime", f"HIP {torch.version.hip}" if torch.version.hip
         else f"CUDA {torch.version.cuda}"),
        ("compute units", str(properties.multi_processor_count)),
        ("wave", str(getattr(properties, "warp_size", "unknown"))),
    ]  # fmt: skip


def _problems(
    device: torch.device, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> Iterator[Problem]:
    generator = torch.Generator().manual_seed(0)
    for m, e, k in shapes:
        normal = torch.randn(m, e, generator=generator)
        kinds = {"normal": normal, "ties": (normal * 2).round()}
        odd = normal.clone()
        odd[torch.rand(m, e, generator=generator) < 0.3] = float("nan")
        odd[torch.rand(m, e, generator=generator) < 0.3] = -float("inf")
        odd[torch.rand(m, e, generator=generator) < 0.01] = float("inf")
        kinds["non-finite"] = odd
        mask = torch.randint(0, 2, (e,), generator=generator, dtype=torch.int32).to(device)
        local = torch.tensor([m * 2 // 3], dtype=torch.int32, device=device)
        for kind, logits in kinds.items():
            on_device = logits.to(dtype).to(device)
            name = f"M={m} E={e} K={k} {kind} {dtype}"
            yield Problem(name, on_device, k, True, None, None)
            yield Problem(f"{name}, no renorm", on_device, k, False, None, None)
            yield Problem(f"{name}, mask, num_local_tokens", on_device, k, True, mask, local)


def _parity(
    device: torch.device, shapes: Sequence[tuple[int, int, int]], failures: list[str]
) -> str:
    rows = []
    for dtype in DTYPES:
        for policy, policy_name in POLICY_NAMES.items():
            tally = Tally()
            for problem in _problems(device, shapes, dtype):
                wrong, path = _check(problem, policy)
                tally.paths = (*tally.paths, path)
                if wrong:
                    tally.failed += 1
                    failures.append(f"policy {policy}, {problem.name}: {wrong}")
                else:
                    tally.passed += 1
            paths = ", ".join(sorted(set(tally.paths)))
            rows.append((str(dtype), policy_name, paths, tally.passed, tally.failed))
    return format_table(("logits", "policy", "paths", "passed", "failed"), rows)


def _checks(device: torch.device, failures: list[str]) -> str:
    """A row per entry of CHECKS: right, wrong or skipped."""
    rows = []
    for name, check in CHECKS.items():
        try:
            wrong = check(device)
        except Skipped as reason:
            rows.append((name, f"skipped: {reason}"))
            continue
        except Exception as error:  # NOTE: whatever it is, the other checks are to be seen as well.
            wrong = f"raised {type(error).__name__}: {error}"
        if wrong:
            failures.append(f"{name}: {wrong}")
        rows.append((name, "wrong" if wrong else "right"))
    return format_table(("check", "result"), rows)


def _check(problem: Problem, policy: int) -> tuple[str, str]:
    """What is wrong with the routing of a problem ("" for nothing), and the path it took."""
    num_experts = problem.logits.shape[1]
    arguments = (problem.topk, num_experts, MODEL_DIM, torch.bfloat16, problem.need_renorm)
    got = fused_moe.topk_softmax_sorting(
        problem.logits, *arguments, BLOCK_SIZE, problem.mask, problem.num_local, policy
    )
    expected = reference.topk_softmax_sorting(
        problem.logits, *arguments, BLOCK_SIZE, problem.mask, problem.num_local
    )
    return difference(got, expected), str(fused_moe.last_path())


def _calls(device: torch.device) -> list[tuple[str, str]]:
    logits = torch.randn(32, 128, dtype=torch.bfloat16, device=device)

    def call() -> fused_moe.SortedBuffers:
        return fused_moe.topk_softmax_sorting(logits, 4, 128, 2880, torch.bfloat16)

    call()
    rows = [
        ("path", str(fused_moe.last_path())),
        ("largest M of the fused launch",
         str(fused_topk_moe_sorting_max_tokens(128, 4, device=device))),
    ]  # fmt: skip
    if device.type == "cuda":
        rows.append(("host time per call", f"{timing.host_us(call, device).us:.1f} us"))
    rows.append(("wall time per call", f"{timing.wall_us(call, device, 1).us:.1f} us"))
    return rows
