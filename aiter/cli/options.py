"""Which values may an option have?

Types for argparse, so that a wrong value is one sentence that names the option, and exit status 2,
before anything is imported, built or allocated for it. What only several options together decide
(more experts per token than experts, more memory than there is) is asked by `check_topk` and
`check_memory` with the same end.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ..jit.errors import TargetError
from ..jit.paths import PACKAGE

if TYPE_CHECKING:
    import torch

PROGRAM = f"python -m {PACKAGE}"
MOST = 2**31 - 1  # of any size
MOST_TOKENS = 2**24 - 1  # a token's number has 24 bits in sorted_ids
MOST_TOPK = 255  # a slot's number has 8 bits there
MOST_SEED = 2**63 - 1
_MOST_DIGITS = 30


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with the text as it is written, and every option's default behind what it is for."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or isinstance(default, bool) or default is argparse.SUPPRESS:
            return action.help
        shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{action.help or ''} (default {shown})".lstrip() if shown else action.help


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage is what `--help` is for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def whole(low: int, high: int = MOST) -> Callable[[str], int]:
    """The type of a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        digits = re.fullmatch(rf"[+-]?[0-9]{{1,{_MOST_DIGITS}}}", text.strip())
        if not digits or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {high}, got {text!r}"
            )
        return int(text)

    return parse


def existing_device(text: str) -> torch.device:
    """The type of a device that is there: cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    # NOTE: imported late, as a command line that asks for no device should not pay for PyTorch.
    from ..jit.core import indexed

    try:
        return indexed(text)
    except TargetError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from None


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`."""
    parser.add_argument(
        "--device",
        type=existing_device,
        help="cpu or cuda[:index]; the GPU if there is one, else cpu",
    )


def add_wave(parser: argparse.ArgumentParser) -> None:
    """The option `--wave` of what runs with one of the two."""
    parser.add_argument("--wave", type=int, choices=(64, 32), default=64, help="cpu wave width")


def check_topk(parser: argparse.ArgumentParser, topk: int, experts: int) -> None:
    """Ends the program where a token would choose more experts than there are."""
    if topk > experts:
        parser.error(f"argument --topk: expected at most --experts, which is {experts}, got {topk}")


def check_memory(parser: argparse.ArgumentParser, needed: int, place: torch.device) -> None:
    """Ends the program where tensors of `needed` bytes do not fit the memory of `place`."""
    if place.type == "cuda":
        import torch

        there = int(torch.cuda.mem_get_info(place)[1])
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        parser.error(
            f"expected sizes that fit the memory of {place} ({there >> 20} MiB), got ones that take"
            f" {needed >> 20} MiB"
        )
