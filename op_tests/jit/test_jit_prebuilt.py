"""Are modules that were built into the package used, when they fit and only then?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE_SECONDS
from toy import MODULE, NAMES, REPOSITORY, Toy, build_wheel, toy_package

import aiter
from aiter.cli.main import main
from aiter.jit import compilers, load, paths, plan, prebuilt
from aiter.jit.cache import MANIFEST, Entry
from aiter.jit.errors import ConfigError, TargetError, ToolchainError
from aiter.jit.load import Loader
from aiter.jit.target import Target, cpu_target

Messages = Callable[[], list[str]]


class Packaged:
    """A toy whose module was built ahead into a folder of its own."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        self.folder = toy.root / "prebuilt"
        builder = Loader(toy.config_path, toy.csrc, self.folder)
        self.entry, _ = builder.ensure(MODULE, toy.target())
        prebuilt.tidy_prebuilt(self.folder)

    def loader(self) -> Loader:
        """A loader with nothing in memory that looks into the folder first."""
        return Loader(self.toy.config_path, self.toy.csrc, self.toy.cache_dir, self.folder)

    def load(self) -> Any:
        return self.loader().load(MODULE, self.toy.target())

    def edit_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        path = self.entry.folder / MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))


@pytest.fixture
def packaged(counted: Toy) -> Packaged:
    return Packaged(counted)


def test_a_prebuilt_module_needs_no_compiler_and_no_cache(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(packaged.toy.root / "empty"))
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(compilers, "_has_package", lambda name: False)
    assert packaged.load().value() == 1
    assert not packaged.toy.cache_dir.exists()
    packaged.folder.rename(packaged.folder.with_name("elsewhere"))
    with pytest.raises(ToolchainError, match="install g"):
        packaged.load()


def test_what_is_left_in_the_package_is_for_everybody_to_read(packaged: Packaged) -> None:
    assert [path.name for path in packaged.folder.iterdir()] == [MODULE]
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in packaged.folder.rglob("*")}
    assert modes == {(True, 0o755), (False, 0o644)}


def _edit_header(packaged: Packaged) -> None:
    packaged.toy.inner.write_text("#define TOY_VALUE 2\n")


def _edit_source(packaged: Packaged) -> None:
    source = packaged.toy.source
    source.write_text(source.read_text() + "// edited\n")


def _edit_flags(packaged: Packaged) -> None:
    packaged.toy.configure(flags_extra_cpu=["-DTOY_EXTRA=5"])


def _truncate(packaged: Packaged) -> None:
    library = packaged.entry.library
    library.write_bytes(library.read_bytes()[:100])


def _other_bytes(packaged: Packaged) -> None:
    library = packaged.entry.library
    library.write_bytes(bytes(library.stat().st_size))


def _remove_library(packaged: Packaged) -> None:
    packaged.entry.library.unlink()


def _break_manifest(packaged: Packaged) -> None:
    (packaged.entry.folder / MANIFEST).write_text("{")


def _break_compiler(packaged: Packaged) -> None:
    packaged.edit_manifest(lambda manifest: manifest["inputs"].update(compiler=[]))


def _other_python(packaged: Packaged) -> None:
    place = packaged.entry.folder.parents[1]
    place.rename(place.with_name(place.name.replace(plan.abi_tag(), "cpython-399-x86")))
    packaged.entry = type(packaged.entry)(
        packaged.folder.joinpath(
            MODULE,
            place.name.replace(plan.abi_tag(), "cpython-399-x86"),
            *packaged.entry.folder.parts[-2:],
        ),
        packaged.entry.manifest,
    )
    packaged.edit_manifest(lambda manifest: manifest.update(abi="cpython-399-x86"))


STALE = {
    _edit_header: "<csrc>/include/inner.h changed",
    _edit_source: "(csrc/toy.cpp changed)",
    _edit_flags: "(flags changed)",
    _truncate: "bytes, got 100",
    _other_bytes: "expected SHA-256",
    _remove_library: "got no such file",
    _break_manifest: "expected a complete manifest",
    _break_compiler: "expected a complete manifest",
    _other_python: "got one for cpython-399-x86",
}


@pytest.mark.parametrize("change", STALE)
def test_what_does_not_fit_is_reported_once_and_not_used(
    packaged: Packaged, messages: Messages, change: Callable[[Packaged], None]
) -> None:
    change(packaged)
    module = packaged.load()
    assert Path(module.__file__).is_relative_to(packaged.toy.cache_dir)
    assert module.value() == (2 if change is _edit_header else 1)
    (line,) = [line for line in messages() if line.startswith("prebuilt ")]
    assert f"prebuilt {MODULE} for {packaged.toy.target().label} is not used: " in line
    assert STALE[change] in line


def test_what_was_not_built_ahead_is_built_without_a_word(
    packaged: Packaged, messages: Messages
) -> None:
    other = packaged.toy.target(32)
    assert packaged.loader().load(MODULE, other).lanes() == 32
    assert not any("prebuilt" in line for line in messages())


def test_a_prebuilt_module_that_does_not_load_is_reported(
    packaged: Packaged, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose C library is older than the builder's."""
    load_extension = load.load_extension

    def failing(name: str, entry: Entry) -> object:
        if packaged.folder in entry.library.parents:
            raise ImportError("version `GLIBC_2.99' not found")
        return load_extension(name, entry)

    monkeypatch.setattr(load, "load_extension", failing)
    assert packaged.load().value() == 1
    (line,) = [line for line in messages() if line.startswith("prebuilt ")]
    assert "does not load here (version `GLIBC_2.99' not found)" in line


def test_rebuilding_on_request_goes_past_the_package(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_REBUILD", "1")
    assert Path(packaged.load().__file__).is_relative_to(packaged.toy.cache_dir)


def test_the_command_builds_into_the_package(
    counted: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = counted.root / "prebuilt"
    monkeypatch.setattr("aiter.cli.cache_commands.default_loader", counted.loader)
    monkeypatch.setattr(paths, "PREBUILT_DIR", folder)
    monkeypatch.setattr(paths, "config_path", lambda: counted.config_path)
    monkeypatch.setattr(paths, "csrc_dir", lambda: counted.csrc)
    assert main(["build", "--all", "--package"]) == 0
    assert str(folder) in capsys.readouterr().out
    loader = Loader(counted.config_path, counted.csrc, counted.cache_dir, folder)
    assert loader.ensure(MODULE, cpu_target())[1] is False
    assert counted.compiles() == 1


def test_each_architecture_is_prebuilt_by_itself() -> None:
    both = Target("rocm", ("gfx942", "gfx90a"))
    alone = [Target("rocm", ("gfx942",)), Target("rocm", ("gfx90a",))]
    assert prebuilt.single_targets(both) == alone
    assert [prebuilt.gpu_target("gfx942"), prebuilt.gpu_target("gfx90a")] == alone
    assert prebuilt.gpu_target("sm_90") == Target("cuda", ("sm_90",))
    with pytest.raises(TargetError, match="expected a name such as sm_90 or gfx942, got 'x86'"):
        prebuilt.gpu_target("x86")


USE = """
import {name}.jit
print({name}.jit.module_for("module_toy", "cpu").__file__)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_with_prebuilt_modules_runs_without_a_compiler(tmp_path: Path, name: str) -> None:
    """`PREBUILD_KERNELS=1 pip wheel` on a copy of the package whose only module is a small one."""
    checkout = tmp_path / "checkout"
    toy_package(checkout)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(REPOSITORY / file, checkout / file)
    (checkout / "constraints.txt").touch()
    wheel = build_wheel(checkout, tmp_path, name, PREBUILD_KERNELS="1")
    assert not wheel.name.endswith("none-any.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    shutil.rmtree(checkout)
    done = subprocess.run(
        [sys.executable, "-c", USE.format(name=name)],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(site), "AITER_JIT_DIR": str(tmp_path / "c")},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / name / "_prebuilt" / MODULE))
    assert done.stderr == ""
    assert os.listdir(tmp_path).count("c") == 0


def test_warmup_builds_what_is_missing_and_loads_all(counted: Toy) -> None:
    loader = counted.loader()
    (first,) = aiter.warmup(devices=["cpu"], loader=loader)
    assert (first.module, first.device, first.built) == (MODULE, "cpu", True)
    assert first.target == cpu_target().label
    (second,) = aiter.warmup(modules=[MODULE], devices=["cpu"], loader=loader)
    assert not second.built
    (third,) = aiter.warmup(devices=["cpu"], loader=counted.loader())
    assert not third.built
    assert counted.compiles() == 1


def test_warmup_leaves_out_modules_of_other_targets(counted: Toy) -> None:
    counted.configure(targets=["rocm"])
    assert aiter.warmup(devices=["cpu"], loader=counted.loader()) == []
    with pytest.raises(TargetError, match="expected one of its targets .rocm., got cpu"):
        aiter.warmup(modules=[MODULE], devices=["cpu"], loader=counted.loader())


def test_warmup_raises_what_is_wrong(counted: Toy) -> None:
    with pytest.raises(ConfigError, match="module module_nope: expected one of module_toy"):
        aiter.warmup(modules=["module_nope"], devices=["cpu"], loader=counted.loader())
    with pytest.raises(TargetError, match="expected a cpu or cuda device, got 'meta'"):
        aiter.warmup(devices=["meta"], loader=counted.loader())


def test_the_package_has_no_other_lazy_names() -> None:
    with pytest.raises(AttributeError, match="'aiter' has no attribute 'nope'"):
        aiter.nope  # noqa: B018
