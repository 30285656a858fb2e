"""How does a test file run as a script? Options, a table of verdicts, and the exit status.

``python op_tests/test_X.py [--device cpu|cuda] [--wave 32|64] [--dtype bf16 ...]
[--shape M,E,K ...]``: one row per case and target; the status is 1 if any case fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from buffers import Mismatch
from cases import Case
from targets import CPU_WAVES, Target, select_targets

from aiter.cli.table import format_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """The parsed command line."""

    targets: list[Target]
    dtypes: list[torch.dtype]
    shapes: list[Shape]

    def cases(self) -> list[Case]:
        """Every shape with every dtype, renormalised and not."""
        return [
            Case(*shape, dtype=dtype, need_renorm=renorm)
            for shape in self.shapes
            for dtype in self.dtypes
            for renorm in (True, False)
        ]


def parse_options(description: str, default_shapes: Iterable[Shape]) -> Options:
    """Read ``sys.argv``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("--wave", type=int, choices=CPU_WAVES, help="one wave width of the CPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", type=_shape, metavar="M,E,K")
    arguments = parser.parse_args()
    return Options(
        select_targets(arguments.device, arguments.wave),
        [DTYPES[name] for name in arguments.dtype],
        arguments.shape or list(default_shapes),
    )


def run_script(
    options: Options,
    verdict_names: Sequence[str],
    verdicts: Callable[[Case, Target], Iterable[str]],
) -> int:
    """Print one row per case and target; ``verdicts`` yields a word per column, or raises.

    Returns the exit status.
    """
    rows: list[list[str]] = []
    failures: list[str] = []
    for target in options.targets:
        for case in options.cases():
            row = [
                str(target),
                DTYPE_NAMES[case.dtype],
                "yes" if case.need_renorm else "no",
                *(str(size) for size in (case.num_tokens, case.num_experts, case.topk)),
            ]
            try:
                row += verdicts(case, target)
            except Mismatch as error:
                failures.append(str(error))
                row += ["MISMATCH"] * len(verdict_names)
            rows.append(row)
    print(format_table(["target", "dtype", "renorm", "M", "E", "K", *verdict_names], rows))
    print(f"\n{len(rows)} configurations, {len(failures)} failed")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _shape(text: str) -> Shape:
    try:
        num_tokens, num_experts, topk = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected M,E,K, got {text!r}") from None
    return num_tokens, num_experts, topk
