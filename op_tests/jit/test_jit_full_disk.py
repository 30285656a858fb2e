"""Does the first line of an error say that the disk is full, or a quota, or inodes, and where?"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS
from toy import Toy, child_code, child_environment

from aiter.jit.full_disk import why_compiler_failed, why_full


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Callable[[int, list[str]], list[str]]:
    """Turns a command into one that finds a file system of so many KiB at `tmp_path / "disk"`.

    It is mounted in a mount namespace of the command's own, so it goes with the command, whatever
    ends that.
    """
    place = tmp_path / "disk"
    place.mkdir()
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]

    def prefixed(kib: int, command: list[str]) -> list[str]:
        mount = f'mount -t tmpfs -o size={kib}k,mode=0700 tmpfs "$0" && exec "$@"'
        return ["unshare", "--mount", *as_root, "sh", "-c", mount, str(place), *command]

    if shutil.which("unshare") is None:
        pytest.skip("mounting a file system takes unshare, which is not here")
    done = subprocess.run(prefixed(4, ["true"]), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    return prefixed


FULL = """
import subprocess
from aiter.jit.errors import JitError
def resize(kib):
    disk = str(loader.cache.root.parent)
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)
for kib in (4, 12, 24, 40, 64):
    resize(kib)
    try:
        loader.load(MODULE, target)
        print("no error")
    except JitError as error:
        print(type(error).__name__, str(error).splitlines()[0])
    assert loader.cache.entries() == []
resize(8192)
print(loader.load(MODULE, target).value())
"""


def test_a_full_disk_is_an_error_that_says_so(
    toy: Toy, on_a_small_disk: Callable[[int, list[str]], list[str]], tmp_path: Path
) -> None:
    """Full when a folder, the sources, an object, the library or the manifest is written."""
    toy.cache_dir = tmp_path / "disk" / "cache"
    done = subprocess.run(
        on_a_small_disk(4, child_code(toy, FULL)),
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *errors, value = done.stdout.splitlines()
    assert len(errors) == 5
    for error in errors:
        assert error.startswith(("CacheError", "BuildError")), error
        assert "got a full disk, without room: No space left on device in" in error, error
        assert str(toy.cache_dir) in error and "its log" not in error.split("got a full")[0], error
    assert value == "1"


FULL_OTHERWISE = """
import os, subprocess
from aiter.jit.errors import JitError
disk = loader.cache.root.parent
{setup}
try:
    loader.load(MODULE, target)
    print("no error")
except JitError as error:
    print(str(error).splitlines()[0])
"""
NO_INODES = """
subprocess.run(["mount", "-o", "remount,size=8192k,nr_inodes=12", str(disk)], check=True)
"""
FULL_TMP = """
subprocess.run(["mount", "-o", "remount,size=8192k", str(disk)], check=True)
(disk / "tmp").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk / "tmp")], check=True)
(disk / "tmp" / "fill").write_text("x" * 4096)
os.environ["TMPDIR"] = str(disk / "tmp")
"""


@pytest.mark.parametrize(
    ("setup", "expected"),
    [(NO_INODES, "got a full disk, without inodes: No space left on device in {disk}/cache"),
     (FULL_TMP, "got a full disk, without room: No space left on device in {disk}/tmp")],
    ids=["inodes", "tmp"],
)  # fmt: skip
def test_a_disk_that_is_full_otherwise_is_named(
    toy: Toy,
    on_a_small_disk: Callable[[int, list[str]], list[str]],
    tmp_path: Path,
    setup: str,
    expected: str,
) -> None:
    """Without inodes; and where it is not the cache's disk but that of the compiler's own files."""
    disk = tmp_path / "disk"
    toy.cache_dir = disk / "cache"
    done = subprocess.run(
        on_a_small_disk(64, child_code(toy, FULL_OTHERWISE.format(setup=setup))),
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected.format(disk=disk) in done.stdout, done.stdout + done.stderr


def test_what_compilers_say_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    quota = f"g++: fatal error: cannot write '{tmp_path}/x.o': Disk quota exceeded"
    said = {
        "{standard input}: Fatal error: can't close x.o: No space left on device": "a full disk, with",
        "/usr/bin/ld: final link failed: No space left on device": f"device in {tmp_path}",
        quota: f"a quota that is used up: Disk quota exceeded in {tmp_path}",
        "x.cpp:1:1: error: expected ';' before 'space'": "None",
    }
    for output, expected in said.items():
        assert expected in str(why_compiler_failed(f"first line\n{output}\n", tmp_path, False))
    assert why_compiler_failed("", tmp_path, True) is None, "killed, and there is room"
    quota_error = OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "x"))
    assert f"used up: Disk quota exceeded in {tmp_path}" in str(why_full(quota_error, Path("/")))
    assert why_full(OSError(errno.EACCES, "Permission denied"), tmp_path) is None


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))


def test_files_that_may_not_grow_are_an_error(toy: Toy) -> None:
    done = subprocess.run(
        child_code(toy, "loader.load(MODULE, target)"),
        env=child_environment(),
        preexec_fn=_limit_file_size,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "File size limit exceeded" in done.stderr or "File too large" in done.stderr
    assert "aiter.jit.errors." in done.stderr
    assert toy.builds() == []
    assert toy.load().value() == 1
