"""Are our sources what that project has, and formatted as its own are?"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import _checkout  # noqa: F401
import pytest
from trees import LAYOUTS, write_tree

from aiter.export import edits, formatting, payload, sources
from aiter.export.errors import ExportError
from aiter.export.layout import find_layout
from aiter.jit import paths
from aiter.jit.errors import ToolchainError

HAS_TOOLS = all(importlib.util.find_spec(module) for module in ("black", "clang_format"))


@pytest.mark.parametrize("missing", [("black",), ("clang_format",), ("black", "clang_format")])
def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    """Whatever is installed where this runs."""
    there = importlib.util.find_spec("pytest")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else there
    )
    names = [module.replace("_", "-") for module in missing]
    wanted = f"got no {' and no '.join(names)}; pip install {' '.join(names)}$"
    with pytest.raises(ToolchainError, match=wanted):
        formatting.formatted({"x.py": "x=1\n"})


@pytest.mark.skipif(not HAS_TOOLS, reason="black or clang-format is missing")
def test_formatting() -> None:
    cpp = "int f(int* x){if(x){return *x;}\n return 0;}\n"
    found = formatted = formatting.formatted({"a/x.py": "x = {  'a':1}\n", "b/x.cu": cpp})
    assert found["a/x.py"] == 'x = {"a": 1}\n'
    assert found["b/x.cu"] == (
        "int f(int* x)\n{\n    if(x)\n    {\n        return *x;\n    }\n    return 0;\n}\n"
    )
    assert formatting.formatted(formatted) == formatted
    with pytest.raises(ToolchainError, match="expected black to take every file"):
        formatting.formatted({"x.py": "x = (\n", "y.h": ""})


@pytest.mark.skipif(not HAS_TOOLS, reason="black or clang-format is missing")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_files_are_formatted_ascii(tmp_path: Path, layout: str) -> None:
    made = payload.make_payload(find_layout(write_tree(tmp_path, layout)))
    assert formatting.formatted(made.files) == made.files
    for path, text in made.files.items():
        assert text.isascii() and not re.search(r"[ \t]$", text, re.MULTILINE), path
        assert text.endswith("\n") and sources.ORIGIN[0] in text.splitlines()[0], path
        if path.endswith(".py"):
            compile(text, path, "exec")


CONDITIONS = """\
#if defined(AITER_TARGET_ROCM)
rocm
#if defined(__gfx950__)
gfx950
#endif
#elif defined(AITER_TARGET_CUDA) && (A || B)
cuda
#if X
#endif
#else
neither
#endif
#if !defined(AITER_TARGET_CPU)
gpu
#endif
#if defined(AITER_TARGET_CPU)
cpu
#elif defined(AITER_TARGET_ROCM) && defined(__GFX9__)
gfx9
#else
other
#endif
"""


def test_conditions_on_the_target_are_decided() -> None:
    assert sources.for_hip(CONDITIONS) == (
        "rocm\n#if defined(__gfx950__)\ngfx950\n#endif\ngpu\n"
        "#if defined(__GFX9__)\ngfx9\n#else\nother\n#endif\n"
    )
    for wrong in (
        "defined(AITER_TARGET_CPU) || X",
        "AITER_TARGET_CPU",
        "(defined(AITER_TARGET_CPU))",
    ):
        with pytest.raises(ValueError, match="expected "):
            sources.for_hip(f"#if {wrong}\n#endif\n")


def test_sources_are_ours_and_know_no_other_target() -> None:
    files = sources.exported_sources(paths.csrc_dir(), sources.BINDING)
    text = files["include/fused_topk_moe_sorting/device/wave_rocm.h"]
    ours = (paths.csrc_dir() / "include/device/wave_rocm.h").read_text()
    assert text.endswith(ours) and "wave_cuda" not in "".join(files)
    for path, text in files.items():
        assert not re.search(r"^#.*AITER_TARGET", text, re.MULTILINE), path
        for included in re.findall(r'#include "([^"]+)"', text):
            assert f"include/{included}" in files, f"{path} includes {included}"


def test_edits_are_taken_out_to_the_byte() -> None:
    edit = edits.Edit(r"^b\n", "new\n", behind=True)
    assert edits.insert("x", "a\nb\nc", [edit]) == "a\nb\nnew\nc"
    assert edits.take_out("x", "a\nb\nnew\nc", ["new\n"]) == "a\nb\nc"
    for text in ("a\nb\nc", "new\nnew\n"):
        with pytest.raises(ExportError, match="x: expected the lines from 'new' on"):
            edits.take_out("x", text, ["new\n"])
