"""What happens when the cache vanishes, cannot be read, files are moved about or clocks jump?"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE_SECONDS, wait_for
from toy import MODULE, Toy, child_code, child_environment

from aiter.jit import build as build_module
from aiter.jit import compilers, envs
from aiter.jit.cache import MANIFEST
from aiter.jit.errors import BuildError, CacheError, EnvError, JitError
from aiter.jit.load import Loader

Messages = Callable[[], list[str]]


def test_a_cache_that_is_removed_during_the_build(counted: Toy, messages: Messages) -> None:
    counted.hold.touch()
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(counted.load().value()))
    thread.start()
    wait_for(counted.compiles_log.exists)
    shutil.rmtree(counted.cache_dir)
    counted.hold.unlink()
    thread.join(PATIENCE_SECONDS)
    assert values == [1]
    assert any(f"({counted.cache_dir} changed during the build)" in line for line in messages())
    assert counted.load().value() == 1


def test_a_cache_that_is_removed_again_and_again(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = toy.root / "removing-g++"
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) rm -rf {toy.cache_dir};; esac\nexit 1')
    wrapper.write_text(
        wrapper.read_text().replace("exit 1", '[ -z "${1##--v*}" ] && exec g++ "$@"')
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    with pytest.raises(BuildError, match=f"{toy.cache_dir} changed in each of 4 attempts; end"):
        toy.load()


def _copied(toy: Toy, change: Callable[[dict[str, Any]], None]) -> None:
    """Makes the only build look like one that came from elsewhere."""
    (folder,) = toy.builds()
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


ELSEWHERE = {
    "target": lambda inputs: inputs.update(target="cpu-wave32"),
    "compiler": lambda inputs: inputs["compiler"][1].append("another version"),
    "abi": lambda inputs: inputs.update(abi=[".cpython-399-x86_64-linux-gnu.so", ""]),
    "flags": lambda inputs: inputs["flags"][0].append("-DOTHER"),
    "another part": lambda inputs: inputs.update({"another part": 1}),
    "csrc/toy.cpp": lambda inputs: inputs["sources"].update({"<csrc>/toy.cpp": "0" * 64}),
}


@pytest.mark.parametrize("part", ELSEWHERE)
def test_a_build_from_elsewhere_is_not_loaded(toy: Toy, messages: Messages, part: str) -> None:
    toy.load()
    _copied(toy, lambda manifest: ELSEWHERE[part](manifest["inputs"]))
    assert toy.load().value() == 1
    assert any(f"got one from elsewhere ({part} changed)" in line for line in messages())


def test_a_folder_copied_from_another_wave_is_not_loaded(toy: Toy, messages: Messages) -> None:
    loader = toy.loader()
    entries = {wave: loader.ensure(MODULE, toy.target(wave))[0] for wave in (64, 32)}
    shutil.rmtree(entries[64].folder)
    shutil.copytree(entries[32].folder, entries[64].folder)
    assert toy.load(64).lanes() == 64
    assert any("(target changed)" in line for line in messages())


def test_a_library_under_another_name_is_not_loaded(toy: Toy, messages: Messages) -> None:
    toy.load()
    (folder,) = toy.builds()
    library = next(folder.glob("*.so"))
    library.rename(folder / "other.so")
    _copied(toy, lambda manifest: manifest["library"].update(name="other.so"))
    assert toy.load().value() == 1
    assert any(f"expected {library.name}, got other.so" in line for line in messages())


def test_a_name_that_no_file_can_have_is_damage(toy: Toy, messages: Messages) -> None:
    toy.load()
    _copied(toy, lambda manifest: manifest["library"].update(name="\ud800.so"))
    assert toy.load().value() == 1
    assert any("damaged build" in line for line in messages())


def test_another_pybind11_is_a_miss(counted: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    counted.source.write_text("#include <version.h>\n" + counted.source.read_text())
    for version in (1, 2, 1):
        folder = counted.root / f"pybind11-{version}"
        folder.mkdir(exist_ok=True)
        (folder / "version.h").write_text(f"#define VERSION {version}\n")
        monkeypatch.setattr(compilers, "pybind11_include", lambda folder=folder: folder)
        assert counted.load().value() == 1
    assert counted.compiles() == 2


def test_a_clock_that_is_set_back_during_the_build(
    counted: Toy, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit would then look older than the build; so the build is repeated."""
    offset = 0
    filesystem_time, run_jobs = build_module._filesystem_time, build_module.run_jobs

    def jumping(*arguments: Any) -> None:
        nonlocal offset
        offset = 3600 * 10**9
        run_jobs(*arguments)

    monkeypatch.setattr(
        build_module, "_filesystem_time", lambda path: filesystem_time(path) - offset
    )
    monkeypatch.setattr(build_module, "run_jobs", jumping)
    assert counted.load().value() == 1
    assert any("filesystem's clock changed during the build" in line for line in messages())
    assert counted.compiles() == 2


def test_an_edit_during_the_build_with_an_old_mtime_is_noticed(counted: Toy) -> None:
    counted.hold.touch()
    values: list[int] = []
    thread = threading.Thread(target=lambda: values.append(counted.load().value()))
    thread.start()
    wait_for(counted.compiles_log.exists)
    before = counted.inner.stat()
    counted.inner.write_text("#define TOY_VALUE 2\n")
    os.utime(counted.inner, ns=(before.st_atime_ns, before.st_mtime_ns))
    counted.hold.unlink()
    thread.join(PATIENCE_SECONDS)
    assert values == [2]
    assert counted.compiles() == 2


@pytest.mark.parametrize("year", [1980, 2099])
def test_files_of_any_age_hit(counted: Toy, year: int) -> None:
    moment = time.mktime((year, 1, 1, 0, 0, 0, 0, 0, 0))
    for path in (counted.source, counted.inner, counted.outer):
        os.utime(path, (moment, moment))
    assert counted.load().value() == 1
    compiles = counted.compiles()
    for path in counted.cache_dir.rglob("*"):
        os.utime(path, (moment, moment))
    assert counted.load().value() == 1
    assert counted.compiles() == compiles


ODD_NAMES = {
    "spaces": "with spaces",
    "other scripts": "Größe-Ελλάδα-東京",
    "shell": "a#b $c 'd' \"e\" %f & (g)",
    "not UTF-8": os.fsdecode(b"not UTF-8 \xff\xfe"),
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    check_folder(Toy(tmp_path / ODD_NAMES[name]))


def check_folder(toy: Toy) -> None:
    """A build, a hit, a rebuild and a compiler's error are as they are anywhere."""
    assert toy.load().value() == 1
    found = toy.loader().cache.lookup(toy.loader().plan(MODULE, toy.target()))
    assert not hasattr(found, "reason")
    toy.inner.write_text("#define TOY_VALUE 2\n")
    assert toy.load().value() == 2
    toy.source.write_text("#error stop\n")
    with pytest.raises(BuildError, match="stop"):
        toy.load()


def test_an_unwritable_manifest_refresh_is_no_reason_to_fail(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.load()
    (folder,) = toy.builds()
    before = sorted(folder.iterdir())
    os.utime(toy.inner, ns=(1, 1))
    time.sleep(0.1)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert toy.load().value() == 1
    monkeypatch.undo()
    assert sorted(folder.iterdir()) == before


def test_a_cache_folder_that_is_a_file(toy: Toy) -> None:
    toy.cache_dir.write_text("")
    with pytest.raises(CacheError, match=f"cache folder {toy.cache_dir}: .*AITER_JIT_DIR"):
        toy.load()


def test_no_home_and_no_entry_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", missing)
    with pytest.raises(
        EnvError, match="^cache folder: expected .*, got no home folder.*; set AITER"
    ):
        envs.cache_dir()
    with pytest.raises(JitError, match="^cache folder: "):
        Loader()
    monkeypatch.setenv("HOME", "")
    with pytest.raises(EnvError, match="^cache folder: expected .*, got no home folder"):
        envs.cache_dir()
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(EnvError, match="got relative/.cache; set AITER_JIT_DIR"):
        envs.cache_dir()


def test_an_empty_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the root folder, into which builds went as root."""
    monkeypatch.delenv("AITER_JIT_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert envs.cache_dir() == Path(home) / ".cache" / envs.PACKAGE
    monkeypatch.setenv("AITER_JIT_DIR", "~/jit")
    assert envs.cache_dir() == Path(home) / "jit" / envs.PACKAGE


def test_a_cache_folder_in_a_device_is_no_folder(toy: Toy) -> None:
    """It may be anybody's to write, but nobody is to change its mode for that."""
    toy.cache_dir = Path("/dev/null/cache")
    with pytest.raises(CacheError, match="expected to build in it, got Not a directory"):
        toy.load()


@pytest.mark.parametrize("part", ["parent", "cache"])
def test_a_folder_that_may_not_be_read_is_an_error(
    toy: Toy, obey_permissions: Callable[[], None], part: str
) -> None:
    folder = {"parent": toy.root / "parent", "cache": toy.root / "parent" / "cache"}[part]
    toy.cache_dir = toy.root / "parent" / "cache"
    toy.load()
    folder.chmod(0o000)
    try:
        done = subprocess.run(
            child_code(toy, "loader.load(MODULE, target)"),
            env=child_environment(),
            preexec_fn=obey_permissions,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        folder.chmod(0o700)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("aiter.jit.errors.CacheError: cache folder"), (
        last
    )
    assert "got Permission denied" in last and "set AITER_JIT_DIR" in last
