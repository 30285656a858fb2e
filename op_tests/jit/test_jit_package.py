"""Does the package work as it is shipped, and is importing it free of side effects?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import REPOSITORY, child_environment, toy_package

IMPORT = """
import json, sys
import torch
before = set(sys.modules)
events = []
def audit(event, args):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system",
                 "fcntl.flock", "os.mkdir"):
        events.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        events.append(f"open {args[0]}")
sys.addaudithook(audit)
import aiter
import aiter.jit
heavy = ("jinja2", "filelock", "pybind11", "aiter.jit.build", "aiter.jit.load", "aiter.jit.warmup",
         "aiter.reference")
print(json.dumps([events, [name for name in heavy if name in set(sys.modules) - before],
                  torch.cuda.is_initialized()]))
"""

USE = """
import json
import aiter
from aiter.jit import paths
from aiter.jit.load import default_loader
from aiter.jit.target import Target
from aiter.jit import spec
loader = default_loader()
names = loader.modules()
for name in names:
    spec.load_spec(loader.config_path, name, loader.csrc_dir, Target("cpu", ("wave64",)))
print(json.dumps([aiter.__file__, str(paths.source_root()), names]))
"""


def run(code: str, **variables: str) -> list[object]:
    """What the code prints as JSON, run in a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_import_has_no_side_effects() -> None:
    assert run(IMPORT, PYTHONDONTWRITEBYTECODE="1") == [[], [], False]


def test_package_in_a_read_only_folder(
    tmp_path: Path, read_only: Callable[[Path], None], obey_permissions: Callable[[], None]
) -> None:
    place = tmp_path / "place"
    toy_package(place)
    before = sorted(place.rglob("*"))
    read_only(place)
    code = (
        "from aiter.jit import module_for; import aiter.jit.load\n"
        "print(module_for('module_toy', 'cpu').__file__)"
    )
    cache = tmp_path / "cache"
    variables = {"PYTHONPATH": str(place), "AITER_JIT_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(**variables),
        cwd="/",
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(cache))
    assert sorted(place.rglob("*")) == before


def test_wheel_carries_its_sources(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".*", "venv", "__pycache__", "_prebuilt", "build", "*.egg-info", "*.whl"
    )
    shutil.copytree(REPOSITORY, checkout, ignore=ignored)
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(checkout),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("aiter-*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    shutil.rmtree(checkout)
    file, root, names = run(USE, PYTHONPATH=str(site))
    assert file == str(site / "aiter" / "__init__.py")
    assert root == str(site / "aiter" / "_src")
    assert names
    for name in ("csrc", "jit_config"):
        shipped = {
            path.relative_to(site / "aiter" / "_src")
            for path in (site / "aiter" / "_src" / name).rglob("*")
            if path.is_file()
        }
        here = {
            path.relative_to(REPOSITORY)
            for path in (REPOSITORY / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert shipped == here
    metadata = next(site.glob("aiter-*.dist-info")) / "METADATA"
    requires = [
        line.split()[1]
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist: ") and "extra" not in line
    ]
    assert sorted(requires) == ["filelock", "jinja2", "pybind11", "torch"]


def test_checkout_finds_its_own_sources() -> None:
    file, root, _ = run(USE)
    assert file == os.path.join(REPOSITORY, "aiter", "__init__.py")
    assert root == str(REPOSITORY)


def test_version_is_stated_once() -> None:
    import aiter
    from aiter._version import __version__

    assert aiter.__version__ == __version__
    assert pytest.importorskip("tomllib").loads((REPOSITORY / "pyproject.toml").read_text())[
        "project"
    ]["dynamic"] == ["version"]


NAMED = """
import contextlib, io, json, os
import second.jit.load
from second.cli.main import main

said = []
def command(*words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main(words)
        except SystemExit:
            pass
    said.append(text.getvalue())

file = second.jit.module_for("module_toy", "cpu").__file__
command("--version")
command("explain", "--help")
command("build", "module_toy", "--force")
command("status")
os.environ["AITER_NO_BUILD"] = "1"
os.environ["XDG_CACHE_HOME"] += "-empty"
second.jit.load.default_loader.cache_clear()
command("build", "module_toy")
print(json.dumps([file, *said]))
"""


def test_the_same_tree_under_a_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache folder, log and command line go by the name that the package has."""
    place, caches = tmp_path / "place", tmp_path / "caches"
    toy_package(place)
    (place / "aiter").rename(place / "second")
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    file, version, usage, built, status, forbidden = map(str, run(NAMED, PYTHONPATH=str(place)))
    assert Path(file).is_relative_to(caches / "second" / "module_toy")
    assert version.startswith("second ")
    assert "usage: python -m second explain" in usage and "aiter" not in usage
    assert built.startswith("[second] building module_toy")
    assert f"cache folder: {caches / 'second'}\n" in status
    assert "with `python -m second build module_toy --target" in forbidden
