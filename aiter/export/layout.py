"""Which tree of ROCm's aiter is this, and where does what go?

Two places are known. A checkout has `csrc` and `op_tests` beside the package; an installed tree has
what its build needs in `aiter_meta`, and no tests. And two conventions of how a tensor comes to C++:

    aiter_tensor_t   `csrc/include/aiter_tensor.h`, and `compile_ops(..., develop=True)`, which hands
                     over the stream as well (seen 2026-08-22)
    torch            PyTorch's own tensors (0.1.7)

All that an export edits or builds on is looked for here. What is missing is an error before anything
is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import ExportError

Tensors = Literal["aiter_tensor_t", "torch"]

CORE = "aiter/jit/core.py"
CONFIG = "aiter/jit/optCompilerConfig.json"
PACKAGE = "aiter/__init__.py"
FUSED_MOE = "aiter/fused_moe.py"


@dataclass(frozen=True)
class Layout:
    """A tree that can be exported into.

    Attributes:
        root: the folder that holds the package `aiter`.
        csrc: its folder of C++ sources, relative to `root`.
        tests: its folder of op tests, relative to `root`; None where it has none.
        tensors: how tensors come to C++.
    """

    root: Path
    csrc: str
    tests: str | None
    tensors: Tensors

    @property
    def name(self) -> str:
        """The layout in two words, as the note keeps it."""
        return f"{'checkout' if self.csrc == 'csrc' else 'installed'}, {self.tensors}"


def find_layout(folder: Path) -> Layout:
    """The layout of the tree in `folder`.

    Raises:
        ExportError: it is none that is known; named with what is missing.
    """
    try:
        is_folder = folder.is_dir()
    except OSError:  # as of a name that is too long
        is_folder = False
    if not is_folder:
        raise ExportError(f"--into: expected a folder, got {str(folder)!r}")
    root = folder.resolve()
    for needed in (CORE, CONFIG, PACKAGE, FUSED_MOE):
        if not (root / needed).is_file():
            raise _unknown(folder, f"no {needed}")
    if (root / "csrc" / "include").is_dir():
        csrc = "csrc"
        tests = "op_tests" if (root / "op_tests").is_dir() else None
    elif (root / "aiter_meta" / "csrc" / "include").is_dir():
        csrc, tests = "aiter_meta/csrc", None
    else:
        raise _unknown(folder, "neither csrc/include nor aiter_meta/csrc/include")
    return Layout(root, csrc, tests, _tensors(folder, root / csrc, read_text(root / CORE)))


def _tensors(folder: Path, csrc: Path, core: str) -> Tensors:
    found = re.search(
        r"^def compile_ops\((.*?)\) *(?:->[^\n]*)?:\n", core, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise _unknown(folder, f"no function compile_ops in {CORE}")
    develop = re.search(r"\bdevelop\b", found[1]) is not None
    header = csrc / "include" / "aiter_tensor.h"
    if not header.is_file():
        if develop:
            raise _unknown(folder, f"compile_ops with develop, but no {header.name}")
        return "torch"
    if not develop:
        raise _unknown(folder, f"{header.name}, but no develop in compile_ops")
    stream = csrc / "include" / "aiter_stream.h"
    known = "struct aiter_tensor_t" in read_text(header) and stream.is_file()
    if not known or "_set_current_hip_stream" not in core:
        raise _unknown(
            folder, "no struct aiter_tensor_t, no aiter_stream.h, or no _set_current_hip_stream"
        )
    return "aiter_tensor_t"


def _unknown(folder: Path, missing: str) -> ExportError:
    return ExportError(
        f"--into: expected a checkout or an installed tree of ROCm's aiter, got"
        f" {str(folder)!r}, which has {missing}"
    )


def read_text(path: Path) -> str:
    """The text of a file, every byte of it; ExportError where it is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: expected UTF-8, got {error}") from None
