"""Do imports inside the package run in one direction only, by relative names?

Folders have ranks; a module imports from its own folder and from those of lower rank, and no chain of
imports leads back to where it began, those inside functions included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import _checkout  # noqa: F401  (makes a checkout importable)

ROOT = Path(__file__).resolve().parents[1] / "aiter"
# "": the top
FOLDERS = ("jit", "ops", "routing", "reference", "layer", "", "integrations", "export", "cli")
LOWEST = (
    "_installed",
    "_pytorch",
    "_version",
    "dtypes",
)  # modules at the top that anything may import
HIGHEST = "__main__"

Imports = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted names below the package, "" for the package itself, and their files."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "_src" not in parts:
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def imports_of(root: Path) -> Imports:
    """What every module imports of the package."""
    known = modules(root)
    return {name: set(_imported(name, path, known)) for name, path in known.items()}


def _imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        module = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{module}.{alias.name}".removeprefix(".")
            target = inner if inner in known else module
            if target != name:
                yield target


def rank(module: str) -> float:
    if module in LOWEST:
        return -1
    if module == HIGHEST:
        return len(FOLDERS)
    top = module.partition(".")[0]
    folder = top if top in FOLDERS else ""
    # NOTE: the package itself gathers the public names of the modules beside it.
    return FOLDERS.index(folder) + (0.5 if module == "" else 0)


def upward(imports: Imports) -> list[str]:
    return [
        f"{importer or 'the package'} imports {imported or 'the package'}"
        for importer, targets in imports.items()
        for imported in sorted(targets)
        if rank(imported) > rank(importer)
    ]


def circles(imports: Imports) -> list[list[str]]:
    """Chains of imports that lead back; packages count as what their own files import."""
    found: list[list[str]] = []
    done: set[str] = set()

    def follow(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append([*chain[chain.index(module) :], module])
        elif module not in done:
            for imported in sorted(imports[module]):
                follow(imported, [*chain, module])
            done.add(module)

    for module in imports:
        follow(module, [])
    return found


def test_imports_run_in_one_direction() -> None:
    imports = imports_of(ROOT)
    assert len(imports) > 60 and imports["routing.calls"] >= {"routing.known", "ops.rule"}
    assert upward(imports) == []
    assert circles(imports) == []


def test_imports_are_relative() -> None:
    package = ROOT.name
    absolute = []
    for name, path in modules(ROOT).items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            absolute += [name for each in names if each.partition(".")[0] == package]
    assert absolute == []


def test_a_bad_import_is_noticed(tmp_path: Path) -> None:
    for name, text in {
        "__init__.py": "",
        "jit/__init__.py": "",
        "jit/load.py": "def f():\n    from ..routing import plan\n",
        "routing/__init__.py": "",
        "routing/plan.py": "from .calls import x\n",
        "routing/calls.py": "from . import plan\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    imports = imports_of(tmp_path)
    assert upward(imports) == ["jit.load imports routing.plan"]
    assert circles(imports) == [["routing.plan", "routing.calls", "routing.plan"]]
