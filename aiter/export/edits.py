"""How do lines get into a file of that project, and out of it again?

An edit is text that goes in before or behind an anchor: whole lines that occur exactly once. Taken
out again, the file is what it was to the byte. Where an anchor is missing, or there twice, nothing is
written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ExportError
from .layout import CONFIG, FUSED_MOE, PACKAGE

MODULE = "module_fused_topk_moe_sorting"
NAMES = (
    "RoutingRule",
    "fused_moe_from_logits",
    "fused_topk_moe_sorting_fwd",
    "fused_topk_moe_sorting_max_tokens",
    "topk_routing",
    "topk_routing_sorting",
    "topk_softmax_sorting",
)  # functions and classes that must not be there before

_FUSED_MOE_IMPORTS = """\
from aiter.fused_moe_from_logits import (  # noqa: F401
    fused_moe_from_logits,
    given_prepared,
    topk_routing_sorting,
    topk_softmax_sorting,
)
"""
_OPS_IMPORT = "from .ops.fused_topk_moe_sorting import *\n"


@dataclass(frozen=True)
class Edit:
    """Text that is put into a file.

    Attributes:
        anchor: a regular expression for whole lines, which has to match once.
        text: what goes in, whole lines.
        behind: whether behind the anchor or before it.
    """

    anchor: str
    text: str
    behind: bool


def edits_for(config_entry: str, package_text: str) -> dict[str, tuple[Edit, ...]]:
    """The edits of each file, by its path.

    Args:
        config_entry: the module's entry of the compiler config, with a comma behind it.
        package_text: the package's `__init__.py`, for how far its imports are indented.
    """
    neighbour = (
        "moe_sorting_opus" if ".ops.moe_sorting_opus import *" in package_text else "moe_sorting"
    )
    ops = rf"^([ \t]*)from \.ops\.{neighbour} import \*\n"
    found = re.search(ops, package_text, re.MULTILINE)
    indent = found[1] if found else ""
    return {
        CONFIG: (Edit(r'^    "module_moe_sorting": \{\n', config_entry, behind=False),),
        PACKAGE: (Edit(ops, indent + _OPS_IMPORT, behind=True),),
        FUSED_MOE: (
            Edit(
                r"^from aiter import get_hip_quant as get_quant\n", _FUSED_MOE_IMPORTS, behind=True
            ),
            Edit(r"^def moe_sorting\(\n", "@given_prepared\n", behind=False),
        ),
    }


def insert(path: str, text: str, edits: Sequence[Edit]) -> str:
    """The text with the edits in it.

    Raises:
        ExportError: an anchor is not there exactly once, or the config is no JSON object.
    """
    before = text
    for edit in edits:
        found = list(re.finditer(edit.anchor, text, re.MULTILINE))
        if len(found) != 1:
            line = edit.anchor.strip("^").replace("\\n", "").replace("\\", "")
            raise ExportError(
                f"{path}: expected one line {line!r} to write beside, got {len(found)}"
            )
        place = found[0].end() if edit.behind else found[0].start()
        text = text[:place] + edit.text + text[place:]
    if path == CONFIG:
        _check_config(before, text)
    return text


def take_out(path: str, text: str, inserted: Sequence[str]) -> str:
    """The text without what was inserted.

    Raises:
        ExportError: some of it is not there exactly once.
    """
    for lines in inserted:
        pieces = re.split(rf"^{re.escape(lines)}", text, flags=re.MULTILINE)
        if len(pieces) != 2:
            first = lines.splitlines()[0].strip()
            raise ExportError(
                f"{path}: expected the lines from {first!r} on as they were written, to take them"
                f" out, got {len(pieces) - 1} places with them"
            )
        text = "".join(pieces)
    return text


def _check_config(before: str, after: str) -> None:
    """That the config is as it was, with one more module."""
    try:
        old, new = json.loads(before), json.loads(after)
    except ValueError as error:
        raise ExportError(f"{CONFIG}: expected JSON, got {error}") from None
    entry = new.pop(MODULE, None) if isinstance(new, dict) else None
    if not isinstance(entry, dict) or new != old:
        raise ExportError(f"{CONFIG}: expected modules by name, with one more of our own")
