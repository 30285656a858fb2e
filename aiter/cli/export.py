"""How does the op get into ROCm's aiter? `python -m aiter export --into FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..export import tree


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--into",
        required=True,
        metavar="FOLDER",
        help="a checkout of ROCm's aiter, or its site-packages",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--remove", action="store_true", help="take an export away again")
    what.add_argument("--check", action="store_true", help="say whether an export is whole")
    what.add_argument("--diff", action="store_true", help="print what would be written, as a patch")
    parser.add_argument(
        "--force", action="store_true", help="write over, or remove, what was changed since as well"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the op into a tree, or does what the options say; the exit status."""
    # NOTE: empty is what an unset variable gives, and no name of the current folder.
    if not options.into or "\0" in options.into:
        raise ValueError(f"--into: expected a folder, got {options.into!r}")
    folder = Path(options.into)
    if options.check:
        problems, remarks = tree.check(folder)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        for remark in remarks:
            print(remark)
        return 1 if problems else 0
    if options.diff:
        sys.stdout.write(tree.diff(folder, options.force))
        return 0
    for line in (tree.remove if options.remove else tree.export)(folder, options.force):
        print(line)
    return 0
