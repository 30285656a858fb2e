"""How does what we write look as that project's own code does?

By its own tools, black and clang-format, with its settings: black's defaults, and for clang-format what
is below (ROCm/aiter's `.clang-format` of 2026-08-22, as far as it differs from a style by name, or its
`Standard` would have it decide by content). Files are formatted once, when they are made; nothing else
of an export starts a process. Both are Python packages: `pip install black clang-format`.

Rejected: formatted copies in this repository, which would be a second source of the same code; a
`.clang-format` of ours in the tree's folders, which its commit hook would follow and its people not;
leaving files as they are where a tool is missing, as two exports would then differ.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..jit.errors import ToolchainError

# fmt: off
CLANG_FORMAT = {
    "BasedOnStyle": "LLVM", "Language": "Cpp", "Standard": "Latest", "ColumnLimit": 100,
    "IndentWidth": 4, "TabWidth": 8, "AccessModifierOffset": 0, "PointerAlignment": "Left",
    "AlignConsecutiveAssignments": "Consecutive", "AlignEscapedNewlines": "Left",
    "AllowShortBlocksOnASingleLine": "Always", "AllowShortCaseLabelsOnASingleLine": True,
    "AlwaysBreakTemplateDeclarations": "Yes", "BinPackArguments": False, "BinPackParameters": False,
    "BreakBeforeBraces": "Custom",
    "BraceWrapping": {
        "AfterCaseLabel": False, "AfterClass": True, "AfterControlStatement": "Always",
        "AfterEnum": True, "AfterFunction": True, "AfterNamespace": False, "AfterStruct": True,
        "AfterUnion": True, "AfterExternBlock": False, "BeforeCatch": True, "BeforeElse": True,
        "BeforeLambdaBody": False, "BeforeWhile": False, "IndentBraces": False,
        "SplitEmptyFunction": True, "SplitEmptyRecord": True, "SplitEmptyNamespace": True,
    },
    "EmptyLineBeforeAccessModifier": "LogicalBlock", "IncludeBlocks": "Preserve",
    "IndentGotoLabels": True, "KeepEmptyLinesAtTheStartOfBlocks": True,
    "PenaltyBreakAssignment": 2, "PenaltyBreakBeforeFirstCallParameter": 19,
    "PenaltyBreakTemplateDeclaration": 10, "PenaltyReturnTypeOnItsOwnLine": 60,
    "SpaceAfterTemplateKeyword": True, "SpaceBeforeParens": "Never",
}
# fmt: on

_TOOLS = {"black": "black", "clang_format": "clang-format"}  # by module: the package


def formatted(files: Mapping[str, str]) -> dict[str, str]:
    """The files as black and clang-format have them, by the same names.

    Raises:
        ToolchainError: one of the two is missing, or refuses a file.
    """
    missing = [name for module, name in _TOOLS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ToolchainError(
            f"export: expected black and clang-format, got no {' and no '.join(missing)};"
            f" pip install {' '.join(missing)}"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        (folder / ".clang-format").write_text(clang_format_yaml(), encoding="utf-8")
        python = [path for path in files if path.endswith(".py")]
        cpp = [path for path in files if not path.endswith(".py")]
        # NOTE: black would else go by a configuration above the folder.
        config = folder / "pyproject.toml"
        config.write_text("[tool.black]\n", encoding="utf-8")
        _run(folder, "black", "--quiet", "--config", str(config), *python)
        _run(folder, "clang_format", "-i", "--style=file", *cpp)
        return {path: (folder / path).read_text(encoding="utf-8") for path in files}


def clang_format_yaml() -> str:
    """The settings in the form that clang-format reads."""
    lines = []
    for key, value in CLANG_FORMAT.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {_scalar(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _run(folder: Path, module: str, *arguments: str) -> None:
    command = [sys.executable, "-c", _START, module, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolchainError(
            f"export: expected {_TOOLS[module]} to take every file, got status {done.returncode}:"
            f" {(done.stderr or done.stdout).strip()[-500:]}"
        )


# NOTE: not -m, which would look for modules in the folder of the files first.
_START = """\
import runpy, subprocess, sys
module, *arguments = sys.argv[1:]
if module == "clang_format":
    import clang_format
    sys.exit(subprocess.call([clang_format.get_executable("clang-format"), *arguments]))
sys.argv = [module, *arguments]
sys.path = [place for place in sys.path if place]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
