"""What is written into a tree: which new files, and which lines in files that are there?

Everything is made of our sources and the templates beside this module. Two exports of one version with
the same tools into the same tree are the same to the byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from ..jit import paths
from ..routing import modelled
from . import sources
from .edits import MODULE, NAMES, Edit, edits_for
from .errors import ExportError
from .formatting import formatted
from .layout import CONFIG, FUSED_MOE, PACKAGE, Layout, read_text

_TEMPLATES = Path(__file__).parent / "templates"
_MODELLED_ARCH = "gfx942"
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# Our own modules that are written there, with what they are called there.
_MODULES = {"rule": "routing_rule", "rule_config": "routing_rule_config"}


@dataclass(frozen=True)
class Payload:
    """What an export writes.

    Attributes:
        files: the text of every new file, by its path below the root.
        edits: the edits of every file that is there.
    """

    files: dict[str, str]
    edits: dict[str, tuple[Edit, ...]]


def make_payload(layout: Layout) -> Payload:
    """What is to be written into this tree.

    Raises:
        ToolchainError: black or clang-format is missing.
    """
    binding: tuple[str, ...] = sources.BINDING
    if layout.tensors == "torch":
        binding += sources.TORCH_BINDING
    files = {
        f"{layout.csrc}/{path}": text
        for path, text in sources.exported_sources(paths.csrc_dir(), binding).items()
    }
    files[f"{layout.csrc}/pybind/fused_topk_moe_sorting_pybind.cu"] = _render(
        "pybind.cu.j2", layout
    )
    files["aiter/ops/fused_topk_moe_sorting.py"] = _render("ops.py.j2", layout)
    files["aiter/fused_moe_from_logits.py"] = _render("fused_moe_from_logits.py.j2", layout)
    for ours, theirs in _MODULES.items():
        files[f"aiter/ops/{theirs}.py"] = _module(ours)
    if layout.tests is not None:
        files[f"{layout.tests}/test_fused_topk_moe_sorting.py"] = _render("op_test.py.j2", layout)
    entry = _render("config.json.j2", layout)
    return Payload(formatted(files), edits_for(entry, read_text(layout.root / PACKAGE)))


def check_names(layout: Layout, payload: Payload) -> None:
    """That nothing that the payload names is there already.

    Raises:
        ExportError: something is; the first is named.
    """
    for path in payload.files:
        if (layout.root / path).exists() or (layout.root / path).is_symlink():
            raise ExportError(f"{path}: expected no such file, got one that no export wrote")
    for folder in ("include", "kernels"):
        place = f"{layout.csrc}/{folder}/{sources.FOLDER}"
        if (layout.root / place).exists() and any((layout.root / place).iterdir()):
            raise ExportError(f"{place}: expected no such folder, got one that no export made")
    if f'"{MODULE}"' in read_text(layout.root / CONFIG):
        raise ExportError(f"{CONFIG}: expected no {MODULE}, got one that no export wrote")
    taken = re.compile(rf"^(?:def|class) ({'|'.join(NAMES)})\b", re.MULTILINE)
    ops = sorted((layout.root / "aiter" / "ops").glob("*.py"))
    for file in (layout.root / FUSED_MOE, layout.root / PACKAGE, *ops):
        found = taken.search(read_text(file))
        if found:
            place = file.relative_to(layout.root).as_posix()
            raise ExportError(f"{place}: expected no {found[1]}, got one that no export wrote")


@cache
def _environment() -> jinja2.Environment:
    """The templates, each compiled once."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _render(template: str, layout: Layout) -> str:
    rows = {
        _DTYPES[logits]: tuple(row[:3] for row in table)
        for logits, table in modelled.ROWS[_MODELLED_ARCH].items()
    }
    return _environment().get_template(template).render(
        tensors=layout.tensors, module=MODULE, folder=sources.FOLDER, kernels=sources.KERNELS,
        origin=sources.ORIGIN, modelled=rows, modelled_arch=_MODELLED_ARCH,
    )  # fmt: skip


def _module(name: str) -> str:
    """A Python module of ours as it is there."""
    text = (paths.PACKAGE_DIR / "ops" / f"{name}.py").read_text(encoding="utf-8")
    for ours, theirs in _MODULES.items():
        text = re.sub(rf"^(\s*from \.){ours}( import )", rf"\1{theirs}\2", text, flags=re.MULTILINE)
    return "".join(f"# {line}\n" for line in sources.ORIGIN) + text
