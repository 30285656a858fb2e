"""Is an export into a tree whole, repeatable, refused in time, and gone without a trace?

On miniature trees; `.ci/export` has the real one. Formatting is left out where it decides nothing.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import pytest
from trees import LAYOUTS, state_of, write_tree

from aiter.cli.main import main
from aiter.export import edits, note, payload, sources, tree

exported_sources = cache(sources.exported_sources)  # hundreds of exports have the same sources

NOTE = {
    "checkout": "csrc/include/fused_topk_moe_sorting/export.json",
    "installed": "aiter_meta/csrc/include/fused_topk_moe_sorting/export.json",
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(payload, "formatted", dict)
    monkeypatch.setattr(sources, "exported_sources", exported_sources)
    return write_tree(tmp_path / "tree", layout)


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `export` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(["export", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def refused(root: Path, *arguments: str) -> str:
    """The one sentence of a refusal that wrote nothing."""
    before = state_of(root)
    status, out, err = run("--into", str(root), *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert state_of(root) == before
    return err


def test_written_where_it_belongs(root: Path, layout: str) -> None:
    before = state_of(root)
    assert run("--into", str(root))[0] == 0
    after = state_of(root)
    csrc = "csrc" if layout == "checkout" else "aiter_meta/csrc"
    new = {path for path in after if path not in before}
    assert {
        f"{csrc}/include/fused_topk_moe_sorting/device/wave_rocm.h",
        f"{csrc}/kernels/fused_topk_moe_sorting/fused_topk_moe_sorting.cu",
        f"{csrc}/pybind/fused_topk_moe_sorting_pybind.cu",
        "aiter/fused_moe_from_logits.py",
        "aiter/ops/fused_topk_moe_sorting.py",
        "aiter/ops/routing_rule.py",
        NOTE[layout],
    } <= new
    assert ("op_tests/test_fused_topk_moe_sorting.py" in new) == (layout == "checkout")
    edited = {path for path in before if after[path] != before[path]}
    assert edited == {
        "aiter/__init__.py", "aiter/fused_moe.py", "aiter/jit/optCompilerConfig.json"
    }  # fmt: skip
    assert all(after[path][0] == before[path][0] for path in edited)  # modes


def test_the_edits(root: Path, layout: str) -> None:
    run("--into", str(root))
    package = (root / "aiter/__init__.py").read_text()
    behind = "moe_sorting_opus" if layout == "checkout" else "moe_sorting"
    line = "    from .ops.fused_topk_moe_sorting import *\n"
    assert f"    from .ops.{behind} import *\n{line}    from .ops.topk" in package
    assert "\n@given_prepared\ndef moe_sorting(\n" in (root / "aiter/fused_moe.py").read_text()
    config = json.loads((root / "aiter/jit/optCompilerConfig.json").read_text())
    assert list(config) == ["module_quant", edits.MODULE, "module_moe_sorting"]
    entry = config[edits.MODULE]
    csrc = root / ("csrc" if layout == "checkout" else "aiter_meta/csrc")
    for source in entry["srcs"]:
        assert Path(eval(source, {"AITER_CSRC_DIR": str(csrc)})).is_file()
    ops = (root / "aiter/ops/fused_topk_moe_sorting.py").read_text()
    assert ops.count("develop=True") == (3 if layout == "checkout" else 0)
    assert compile(ops, "ops", "exec")


def test_a_second_export_changes_nothing(root: Path) -> None:
    run("--into", str(root))
    exported = state_of(root)
    status, out, _ = run("--into", str(root))
    assert status == 0 and out.startswith("nothing to change in ") and out.count("\n") == 1
    assert state_of(root) == exported


def test_removed_to_the_byte_with_what_was_built(root: Path) -> None:
    (root / "aiter/ops/__pycache__").mkdir()
    before = state_of(root)
    run("--into", str(root))
    (root / f"aiter/jit/{edits.MODULE}.so").write_bytes(b"built")
    (root / "aiter/ops/__pycache__/routing_rule.cpython-311.pyc").write_bytes(b"compiled")
    build = root / "aiter/jit/build" / edits.MODULE
    build.mkdir(parents=True)
    (build / "build.ninja").touch()
    status, out, _ = run("--into", str(root), "--remove")
    assert status == 0 and f"removed aiter/jit/{edits.MODULE}.so" in out
    (root / "aiter/jit/build").rmdir()
    assert state_of(root) == before
    assert "expected a tree with an export" in refused(root, "--remove")


def test_another_version_replaces_what_was_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(root)
    real = payload.formatted
    older = {"aiter/ops/fused_topk_moe_sorting.py": "OLD = 1\n", "aiter/ops/gone.py": "GONE = 1\n"}
    monkeypatch.setattr(payload, "formatted", lambda files: {**files, **older})
    run("--into", str(root))
    built = root / f"aiter/jit/{edits.MODULE}.so"
    built.write_bytes(b"of the older sources")
    monkeypatch.setattr(payload, "formatted", real)
    patch = run("--into", str(root), "--diff")[1]
    assert "\n-OLD = 1\n" in patch and "--- a/aiter/ops/gone.py\n+++ /dev/null\n" in patch
    assert run("--into", str(root))[1].startswith("removed what an earlier export wrote\n")
    assert not (root / "aiter/ops/gone.py").exists() and not built.exists()
    run("--into", str(root), "--remove")
    assert state_of(root) == before


def test_check(root: Path) -> None:
    status, _, err = run("--into", str(root), "--check")
    assert status == 1 and err.startswith("error: nothing was exported into ")
    run("--into", str(root))
    status, out, err = run("--into", str(root), "--check")
    assert (status, err) == (0, "") and " files of version " in out
    config = root / "aiter/jit/optCompilerConfig.json"
    config.write_text(config.read_text().replace("module_quant", "module_quants"))
    status, out, _ = run("--into", str(root), "--check")
    assert status == 0 and "optCompilerConfig.json was changed, our lines in it were not" in out
    config.write_text(config.read_text().replace("rule_checks.cpp", "other.cpp"))
    (root / "aiter/ops/routing_rule.py").unlink()
    (root / "aiter/fused_moe_from_logits.py").write_text("")
    status, _, err = run("--into", str(root), "--check")
    assert status == 1 and len(err.splitlines()) == 3
    assert "aiter/ops/routing_rule.py is missing" in err
    assert "aiter/fused_moe_from_logits.py was changed" in err
    assert "optCompilerConfig.json: expected the lines from '\"module_fused_topk" in err


@pytest.mark.skipif(shutil.which("patch") is None, reason="there is no patch here")
def test_diff_is_a_patch_that_does_the_same(root: Path, tmp_path: Path) -> None:
    before = state_of(root)
    status, text, _ = run("--into", str(root), "--diff")
    assert status == 0 and state_of(root) == before
    patched = tmp_path / "patched"
    shutil.copytree(root, patched)
    subprocess.run(["patch", "-p1", "-s"], cwd=patched, input=text.encode(), check=True)
    run("--into", str(root))
    (note_file,) = root.rglob(note.NAME)
    note_file.unlink()
    assert state_of(patched) == state_of(root)


def test_diff_of_an_export_is_empty(root: Path) -> None:
    run("--into", str(root))
    assert run("--into", str(root), "--diff") == (0, "", "")


def taken_file(root: Path) -> None:
    (root / "aiter/ops/routing_rule.py").write_text("theirs = 1\n")


def taken_folder(root: Path) -> None:
    (csrc,) = root.rglob("csrc")
    (csrc / "kernels/fused_topk_moe_sorting").mkdir(parents=True)
    (csrc / "kernels/fused_topk_moe_sorting/theirs.cu").touch()


def taken_module(root: Path) -> None:
    config = root / "aiter/jit/optCompilerConfig.json"
    config.write_text(config.read_text().replace("module_quant", edits.MODULE))


def taken_function(root: Path) -> None:
    (root / "aiter/ops/quant.py").write_text("def topk_routing(x):\n    return x\n")


def no_anchor(root: Path) -> None:
    config = root / "aiter/jit/optCompilerConfig.json"
    config.write_text(config.read_text().replace("module_moe_sorting", "module_sorting"))


def two_anchors(root: Path) -> None:
    file = root / "aiter/fused_moe.py"
    file.write_text(file.read_text() + "\n\ndef moe_sorting(\n    x,\n):\n    return x\n")


def broken_config(root: Path) -> None:
    config = root / "aiter/jit/optCompilerConfig.json"
    config.write_text(config.read_text() + "}")


def no_core(root: Path) -> None:
    (root / "aiter/jit/core.py").unlink()


def no_compile_ops(root: Path) -> None:
    (root / "aiter/jit/core.py").write_text("def compile_op():\n    pass\n")


def no_sources(root: Path) -> None:
    (csrc,) = root.rglob("csrc")
    csrc.rename(csrc.with_name("sources"))


def not_utf8(root: Path) -> None:
    (root / "aiter/fused_moe.py").write_bytes(b"\xff\n")


def half_new(root: Path) -> None:
    core = root / "aiter/jit/core.py"
    header = next(root.rglob("aiter_enum.h")).with_name("aiter_tensor.h")
    if header.exists():
        core.write_text(core.read_text().replace("develop: bool", "stream: bool"))
    else:
        header.write_text("struct aiter_tensor_t {};\n")


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (taken_file, "aiter/ops/routing_rule.py: expected no such file"),
    (taken_folder, "csrc/kernels/fused_topk_moe_sorting: expected no such folder"),
    (taken_module, f"optCompilerConfig.json: expected no {edits.MODULE}"),
    (taken_function, "aiter/ops/quant.py: expected no topk_routing"),
    (no_anchor, "optCompilerConfig.json: expected one line"),
    (
        two_anchors,
        "aiter/fused_moe.py: expected one line 'def moe_sorting(' to write beside, got 2",
    ),
    (broken_config, "optCompilerConfig.json: expected JSON"),
    (no_core, "--into: expected a checkout or an installed tree of ROCm's aiter"),
    (no_compile_ops, "no function compile_ops"),
    (no_sources, "neither csrc/include nor aiter_meta/csrc/include"),
    (not_utf8, "aiter/fused_moe.py: expected UTF-8"),
    (half_new, "but no develop in compile_ops"),
]


@pytest.mark.parametrize(
    ("spoil", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", "")
)
def test_refused_before_anything_is_written(
    root: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    assert message in refused(root)
    assert message in refused(root, "--diff")


def test_our_own_checkout_is_refused() -> None:
    status, _, err = run("--into", str(Path(_checkout.__file__).parents[1]))
    assert status == 2 and "got no" not in err and "no aiter/jit/optCompilerConfig.json" in err


def test_changed_files_are_named_and_left_alone(root: Path) -> None:
    before = state_of(root)
    run("--into", str(root))
    (root / "aiter/ops/routing_rule.py").write_text("mine = 1\n")
    package = root / "aiter/__init__.py"
    package.write_text(package.read_text() + "mine = 1\n")
    for arguments in (("--remove",), ()):
        message = refused(root, *arguments)
        assert "aiter/__init__.py" in message and "--force" in message
        assert "aiter/fused_moe_from_logits.py" not in message
    assert "aiter/ops/routing_rule.py" in refused(root, "--remove")
    assert run("--into", str(root), "--remove", "--force")[0] == 0
    after = state_of(root)
    assert {path for path in after if after[path] != before.get(path)} == {"aiter/__init__.py"}
    assert {*after} == {*before}
    assert package.read_text().endswith("import *\nmine = 1\n")
    assert "fused_topk" not in package.read_text()


def test_what_is_left_of_changed_lines_is_named(root: Path) -> None:
    run("--into", str(root))
    file = root / "aiter/fused_moe.py"
    file.write_text(file.read_text().replace("@given_prepared\n", "@given_prepared  # mine\n"))
    assert "aiter/fused_moe.py" in refused(root, "--remove")
    message = refused(root, "--remove", "--force")
    assert "aiter/fused_moe.py" in message and "take it out by hand" in message


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("removing", [False, True], ids=["export", "remove"])
def test_interrupted_anywhere_it_can_be_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch, removing: bool
) -> None:
    """Ends an export, or a removal, at its first, second, ... change of the tree."""
    before = state_of(root)
    ends = 0
    for most in range(0, 60, 1 if removing else 4):
        if removing:
            run("--into", str(root))
        try:
            with monkeypatch.context() as patched:
                _end_after(patched, most)
                (tree.remove if removing else tree.export)(root)
        except Interrupted:
            ends += 1
            if not removing and most > 0:
                assert run("--into", str(root), "--check")[0] == 1
                if most % 8 == 0:  # another export takes it from there
                    assert run("--into", str(root))[0] == 0
        if state_of(root) != before:
            assert run("--into", str(root), "--remove")[0] == 0
        assert state_of(root) == before, f"interrupted after {most} changes"
    assert ends > 5


def _end_after(patched: pytest.MonkeyPatch, most: int) -> None:
    """Lets `most` files be renamed into place or removed, then ends whatever goes on."""
    left = [most]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any, **named: Any) -> Any:
            if path.exists() or not named:
                left[0] -= 1
                if left[0] < 0:
                    raise Interrupted
            return real(path, *arguments, **named)

        return call

    for name in ("replace", "unlink"):
        patched.setattr(Path, name, counted(getattr(Path, name)))


def test_a_note_that_leads_outside_is_refused(root: Path, layout: str) -> None:
    run("--into", str(root))
    file = root / NOTE[layout]
    whole = json.loads(file.read_text())
    (root.parent / "outside").write_text("theirs")
    for spoilt in (
        {**whole, "files": {"../outside": "0"}},
        {**whole, "folders": ["/"]},
        {**whole, "edits": {}, "more": 1},
        [],
    ):
        file.write_text(json.dumps(spoilt))
        assert "expected the note of an export" in refused(root, "--remove", "--force")
    file.write_text("{")
    assert "got no JSON" in refused(root, "--check")


def test_linked_files_are_written_through(root: Path) -> None:
    """An installer may have linked a file into several environments: only this one changes."""
    package = root / "aiter/__init__.py"
    other = root.parent / "other.py"
    other.hardlink_to(package)
    text = other.read_text()
    run("--into", str(root))
    assert other.read_text() == text != package.read_text()
