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
from toy import NAMES, REPOSITORY, build_wheel, child_environment, toy_package

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
import {name}
from {name}.jit import paths
from {name}.jit.load import default_loader
from {name}.jit.target import Target
from {name}.jit import spec
loader = default_loader()
names = loader.modules()
for name in names:
    spec.load_spec(loader.config_path, name, loader.csrc_dir, Target("cpu", ("wave64",)))
print(json.dumps([{name}.__file__, str(paths.source_root()), names]))
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


def test_wheels_carry_their_sources(tmp_path: Path) -> None:
    """Under both names, built one after the other in one folder, which keeps no trace of the first."""
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".*", "venv", "__pycache__", "_prebuilt", "build", "*.egg-info", "*.whl"
    )
    shutil.copytree(REPOSITORY, checkout, ignore=ignored)
    for name in NAMES:
        left = checkout / "build" / name / "lib" / name / "renamed_since.py"
        left.parent.mkdir(parents=True)
        left.write_text("")
    wheels = {name: build_wheel(checkout, tmp_path, name) for name in NAMES}
    shutil.rmtree(checkout)
    for name, wheel in wheels.items():
        site = tmp_path / f"site_{name}"
        shutil.unpack_archive(wheel, site, "zip")
        check_wheel(site, name)


def check_wheel(site: Path, name: str) -> None:
    (info,) = site.glob("*.dist-info")
    assert sorted(os.listdir(site)) == sorted([name, info.name])
    file, root, names = run(USE.format(name=name), PYTHONPATH=str(site))
    assert file == str(site / name / "__init__.py")
    assert root == str(site / name / "_src")
    assert names
    for folder, here in (("_src/csrc", "csrc"), ("_src/jit_config", "jit_config"), ("", "aiter")):
        assert files_of(site / name / folder) == files_of(REPOSITORY / here)
    requires = [
        line.split()[1]
        for line in (info / "METADATA").read_text().splitlines()
        if line.startswith("Requires-Dist: ") and "extra" not in line
    ]
    assert sorted(requires) == ["filelock", "jinja2", "pybind11", "torch"]
    entry_points = info / "entry_points.txt"
    plugins = entry_points.read_text() if entry_points.is_file() else ""
    for module, group in (("vllm", "vllm.general_plugins"), ("sglang", "sglang.srt.plugins")):
        line = f"[{group}]\n{name} = {name}.integrations.{module}:register\n"
        here = (REPOSITORY / "aiter" / "integrations" / f"{module}.py").is_file()
        assert (line in plugins) == here


def files_of(folder: Path) -> set[Path]:
    """The files below a folder but for what Python and builds leave there."""
    left_out = {"__pycache__", "_prebuilt", "_src"}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if not left_out & set(path.parts)}


def test_an_import_name_that_is_none_of_ours(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "setup.py"), "--version"]
    done = subprocess.run(
        command, env=child_environment(AITER_IMPORT_NAME="torch"), capture_output=True, text=True,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    expected = "AITER_IMPORT_NAME: expected one of aiter, fused_moe_routing, got 'torch'\n"
    assert done.stderr == expected


def test_checkout_finds_its_own_sources() -> None:
    file, root, _ = run(USE.format(name="aiter"))
    assert file == os.path.join(REPOSITORY, "aiter", "__init__.py")
    assert root == str(REPOSITORY)


def test_version_is_stated_once() -> None:
    import aiter
    from aiter._version import __version__

    assert aiter.__version__ == __version__
    command = [sys.executable, "setup.py", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert said.stdout.split() == [__version__]


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


STATE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import aiter
said = [str(each.message) for each in caught if "aiter: " in str(each.message)]
try:
    import aiter.integrations
except ImportError as error:
    said.append(f"refused: {error}")
print(json.dumps(said))
"""


def copied_package(place: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "_prebuilt")
    shutil.copytree(REPOSITORY / "aiter", place / "aiter", ignore=ignored)
    return place / "aiter"


@pytest.mark.parametrize(
    ("file", "owner"), [("tuned_gemm.py", "amd-aiter"), ("push_aiter.py", "aiter")]
)
def test_files_of_others_are_noticed(tmp_path: Path, file: str, owner: str) -> None:
    package = copied_package(tmp_path)
    assert run(STATE, PYTHONPATH=str(tmp_path)) == []
    (package / file).touch()
    (warning,) = map(str, run(STATE, PYTHONPATH=str(tmp_path)))
    assert warning.startswith(f"aiter: expected {package} to be this package's alone, got files of")
    assert f"files of {owner} as well" in warning
    assert "AITER_IMPORT_NAME=fused_moe_routing" in warning
    command = [sys.executable, "-W", "ignore", "-m", "aiter", "env", "--json"]
    variables = child_environment(PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, env=variables, cwd="/", capture_output=True, check=True)
    names = json.loads(done.stdout)["names"]
    assert names["its folder"] == warning
    assert names["import name"] == f"aiter, from {package}"


def test_a_package_that_another_one_was_installed_over(tmp_path: Path) -> None:
    package = copied_package(tmp_path)
    (package / "tuned_gemm.py").touch()
    (package / "__init__.py").write_text("")
    (refused,) = map(str, run(STATE, PYTHONPATH=str(tmp_path)))
    expected = f"aiter: expected this package's own __init__.py in {package}, got "
    assert refused.startswith(f"refused: {expected}that of amd-aiter, since another package")
    (package / "tuned_gemm.py").unlink()
    (package / "__init__.py").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "aiter", "env"], env=child_environment(PYTHONPATH=str(tmp_path)),
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {expected}none, since another package")
