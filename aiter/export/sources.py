"""What are our C++ sources in a tree that only knows HIP?

The same text, with three changes. Conditions on the target are decided, since there is one: what is
for the CPU or CUDA goes, and with it the headers that only these include. Headers lie in a folder of
ours in the tree's include folder, and are included by their whole name, as that project has headers
of the same names. And every file says where it comes from.

Conditions on anything else, such as an architecture, stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "fused_topk_moe_sorting"  # in csrc/include and in csrc/kernels
KERNELS = (
    "fused_topk_moe_sorting.cu",
    "fused_topk_moe_sorting_rules.cu",
    "topk_routing.cu",
    "rule_checks.cpp",
    "routing_checks.cpp",
    "tensor_view.cpp",
)
BINDING = ("fused_topk_moe_sorting_api.h", "topk_routing_api.h")  # what a binding includes
TORCH_BINDING = ("pybind_args.h",)  # where tensors are PyTorch's

ORIGIN = (
    "SPDX-License-Identifier: MIT",
    "Copyright (C) 2026, the aiter routing authors.",
    "Written by `python -m aiter export`; docs/ in comments is that project's.",
)

_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
_DIRECTIVE = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)$")
_TARGET = re.compile(r"(!?)defined\(AITER_TARGET_(ROCM|CUDA|CPU)\)")


def exported_sources(csrc: Path, binding: Iterable[str]) -> dict[str, str]:
    """The text of every C++ file by its path below the tree's csrc.

    Args:
        csrc: our folder of C++ sources.
        binding: headers that the binding includes.
    """
    found = {}
    waiting = list(binding)
    for name in KERNELS:
        text = for_hip((csrc / "kernels" / name).read_text(encoding="utf-8"))
        waiting += _INCLUDE.findall(text)
        found[f"kernels/{FOLDER}/{name}"] = _finished(text)
    done = set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        text = for_hip((csrc / "include" / name).read_text(encoding="utf-8"))
        waiting += _INCLUDE.findall(text)
        found[f"include/{FOLDER}/{name}"] = _finished(text)
    return dict(sorted(found.items()))


def _finished(text: str) -> str:
    origin = "".join(f"// {line}\n" for line in ORIGIN)
    return f"{origin}//\n" + _INCLUDE.sub(rf'#include "{FOLDER}/\1"', text)


@dataclass
class _Chain:
    """An #if with its #elifs and its #else, as far as it was read."""

    decided: bool = False  # a branch that is always taken was read
    open: bool = False  # an #if of it was kept
    kept: bool = True  # the branch that is read now is


def for_hip(text: str) -> str:
    """C++ text without conditions on the target.

    Raises:
        ValueError: such a condition is none of `defined`s that are joined by &&.
    """
    return "".join(_lines_for_hip(text.splitlines(keepends=True)))


def _lines_for_hip(lines: Iterable[str]) -> Iterator[str]:
    chains: list[_Chain] = []
    for line in lines:
        directive = _DIRECTIVE.match(line)
        if directive is None:
            if all(chain.kept for chain in chains):
                yield line
            continue
        word, rest = directive[1], directive[2].strip()
        if word.startswith("if"):
            chains.append(_Chain())
        chain, outer = chains[-1], all(chain.kept for chain in chains[:-1])
        if word == "endif":
            chains.pop()
            if outer and chain.open:
                yield line
            continue
        condition = _condition(word, rest, line)
        chain.kept = not chain.decided and condition is not False
        if not outer or not chain.kept:
            continue
        if condition is True:
            if chain.open:
                yield "#else\n"
            chain.decided = True
            continue
        yield line if condition == rest else f"#{'elif' if chain.open else 'if'} {condition}\n"
        chain.open = True


def _condition(word: str, rest: str, line: str) -> bool | str:
    """Whether a branch is always or never taken, or the condition that is left of its own."""
    if word == "else":
        return True
    if _TARGET.search(rest) is None:
        if "AITER_TARGET" in rest:
            raise ValueError(f"expected defined(AITER_TARGET_...), got {line.strip()!r}")
        return rest
    left = []
    for part in _factors(rest):
        found = _TARGET.fullmatch(part)
        if found is None:
            if _TARGET.search(part):
                raise ValueError(f"expected a condition joined by &&, got {line.strip()!r}")
            left.append(part)
        elif (found[2] == "ROCM") == bool(found[1]):
            return False
    return " && ".join(left) or True


def _factors(condition: str) -> list[str]:
    """The parts of a condition between the &&s that stand in no parentheses."""
    parts, depth = [""], 0
    for piece in re.split(r"(\(|\)|\s*&&\s*)", condition):
        if piece.strip() == "&&" and depth == 0:
            parts.append("")
            continue
        depth += {"(": 1, ")": -1}.get(piece, 0)
        parts[-1] += piece
    return parts
