"""Does the package say which PyTorch it needs, and do without what an older one has not got?"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import _checkout  # noqa: F401
import pytest
import torch

from aiter import _pytorch

PACKAGE = Path(_pytorch.__file__).parent


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "2.9.0a0+git1234", "3.0.1", "10.0"])
def test_these_versions_are_taken(version: str) -> None:
    assert _pytorch.parsed(version) >= _pytorch.OLDEST


@pytest.mark.parametrize("version", ["2.5.1", "1.13.1+cu117", "2.0.0"])
def test_older_ones_are_refused_at_import(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    got = version.replace("+", "\\+")
    with pytest.raises(ImportError, match=f"^torch: expected PyTorch 2.6 or newer, got {got}$"):
        importlib.reload(_pytorch)
    monkeypatch.undo()
    importlib.reload(_pytorch)


def test_some_requires_grad_says_what_pytorch_says() -> None:
    plain, needs = torch.ones(1), torch.ones(1, requires_grad=True)
    cases: list[tuple[object, ...]] = [
        (), (plain,), (needs,), (plain, needs), (None, 1, "a", True), ([plain], [needs, plain]),
        ([], [None, plain]), (plain, [plain, needs], None),
    ]  # fmt: skip
    for case in cases:
        assert _pytorch.some_requires_grad(*case) == _pytorch.any_requires_grad(*case)
        assert _pytorch.some_requires_grad(*case) == any(
            each is needs for item in case for each in (item if isinstance(item, list) else [item])
        )


def test_no_union_is_asked_of_isinstance() -> None:
    """`isinstance(x, A | B)` ends torch.compile's trace up to PyTorch 2.8; a tuple does not."""
    asked = [
        f"{path.name}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and isinstance(node.args[1], ast.BinOp)
    ]
    assert asked == []
