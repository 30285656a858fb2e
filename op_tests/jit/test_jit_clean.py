"""Does `clean` remove what is ours and nothing else, whatever folder AITER_JIT_DIR leads to?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from toy import MODULE, Toy

from aiter.cli.main import main
from aiter.jit import paths
from aiter.jit.cache import MANIFEST
from aiter.jit.cleanup import check_is_cache
from aiter.jit.errors import CacheError
from aiter.jit.folders import MARKER, is_marked, make_private_folder
from aiter.jit.load import default_loader
from aiter.routing import tuned

Output = pytest.CaptureFixture[str]


@pytest.fixture
def installed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy tree in the place of the package's own."""
    monkeypatch.setattr(paths, "config_path", lambda: toy.config_path)
    monkeypatch.setattr(paths, "csrc_dir", lambda: toy.csrc)
    monkeypatch.setenv("AITER_JIT_DIR", str(toy.jit_dir))
    return toy


def clean(*options: str) -> int:
    """The command in a process that has read nothing yet."""
    default_loader.cache_clear()
    try:
        return main(["clean", *options])
    finally:
        default_loader.cache_clear()


def listing(folder: Path) -> list[tuple[str, bytes]]:
    """Everything in a folder, with the contents of files."""
    return sorted(
        (str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    )


FOREIGN = (
    "notes.txt",
    "project/deep/down/here/file.txt",
    "module_toy/cpu/thesis/chapter/text.tex",
    "module_toy/cpu/0123456789abcdef/0123456789abcdef/photo.jpg",
    "pkg/dist/assets/icons/manifest.json",
    ".config/app/a/b/settings",
)


def put(folder: Path, names: tuple[str, ...] = FOREIGN) -> None:
    """Other people's files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"other people's {name}\n")


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("all_", [[], ["--all"]])
def test_a_folder_that_holds_anything_else_is_refused(
    installed: Toy, capsys: Output, name: str, all_: list[str]
) -> None:
    put(installed.cache_dir, (name,))
    before = listing(installed.cache_dir)
    assert clean(*all_) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"error: cache folder {installed.cache_dir}: expected the mark")
    assert (
        "nothing was removed; set AITER_JIT_DIR to a folder that holds nothing else" in output.err
    )
    assert len(output.err.splitlines()) == 1 and output.out == ""
    assert listing(installed.cache_dir) == before


def test_a_home_that_also_got_builds_loses_nothing(installed: Toy, capsys: Output) -> None:
    """A folder with other things never becomes ours by being built into."""
    put(installed.cache_dir)
    installed.cache_dir.chmod(0o700)
    installed.load()
    assert not is_marked(installed.cache_dir)
    before = listing(installed.cache_dir)
    assert clean("--all") == 1
    assert listing(installed.cache_dir) == before


def test_what_is_put_into_our_folder_later_stays(installed: Toy, capsys: Output) -> None:
    installed.load()
    assert is_marked(installed.cache_dir)
    put(installed.cache_dir)
    put(installed.cache_dir, (".build/main.swift", ".failed/note.txt", ".broken/mine/file",
                              ".device_code/readme.md", ".zig2/file"))  # fmt: skip
    kept = [
        item
        for item in listing(installed.cache_dir)
        if "other people's" in item[1].decode("latin1")
    ]
    assert len(kept) == len(FOREIGN) + 5
    assert clean("--all") == 0
    assert "removed 1 builds from" in capsys.readouterr().out
    left = listing(installed.cache_dir)
    assert [item for item in left if item in kept] == kept
    assert not any(name.endswith(".so") for name, _ in left)


def test_links_are_not_followed(installed: Toy) -> None:
    """A link in the cache, to a folder that looks just like ours, is left with what it leads to."""
    installed.load()
    elsewhere = installed.root / "elsewhere"
    shutil.move(installed.cache_dir / MODULE, elsewhere)
    (installed.cache_dir / MODULE).symlink_to(elsewhere)
    outside = installed.root / "outside"
    put(outside, ("kept.log", "x-1-0123abcd/file"))
    (installed.cache_dir / ".failed").symlink_to(outside)
    (installed.cache_dir / ".broken").mkdir()
    (installed.cache_dir / ".broken" / "x-1-0123abcd").symlink_to(outside)
    before = listing(elsewhere), listing(outside)
    assert clean("--all") == 0
    assert (listing(elsewhere), listing(outside)) == before


def test_it_lists_what_goes_and_a_dry_run_removes_nothing(installed: Toy, capsys: Output) -> None:
    installed.load()
    (build,) = installed.builds()
    installed.inner.write_text("#define TOY_VALUE 2\n")
    broken = installed.cache_dir / ".broken" / "module_toy-12-0123abcd"
    log = installed.cache_dir / ".failed" / "module_toy.log"
    put(installed.cache_dir, (".failed/module_toy.log", ".broken/module_toy-12-0123abcd/x"))
    before = listing(installed.cache_dir)
    assert clean("--dry-run") == 0
    dry = capsys.readouterr().out.splitlines()
    assert listing(installed.cache_dir) == before
    assert dry == [
        f"would remove {build} (stale: csrc/include/inner.h changed)",
        f"would remove {broken} (moved aside as damaged)",
        f"would remove {log} (log of a failed build)",
        f"would remove 1 builds from {installed.cache_dir}, and 2 others",
    ]
    assert clean() == 0
    done = capsys.readouterr().out.splitlines()
    assert [line.replace("would remove", "removing") for line in dry[:-1]] == done[:-1]
    assert not build.exists() and not broken.exists() and not log.exists()
    assert is_marked(installed.cache_dir)


def test_a_cache_from_before_the_mark_is_ours(installed: Toy) -> None:
    installed.load()
    (installed.cache_dir / MARKER).unlink()
    (installed.cache_dir / tuned.FOLDER).mkdir()
    installed.load()
    assert not is_marked(installed.cache_dir)
    assert clean("--all") == 0
    assert not (installed.cache_dir / MODULE).exists()
    assert (installed.cache_dir / tuned.FOLDER).exists()


def test_a_damaged_manifest_is_ours(installed: Toy, capsys: Output) -> None:
    installed.load()
    (build,) = installed.builds()
    (build / MANIFEST).write_text("{")
    assert clean() == 0
    assert f"removing {build} (damaged: no complete {MANIFEST})" in capsys.readouterr().out
    assert not build.exists()


def test_there_is_nothing_to_clean(installed: Toy, capsys: Output) -> None:
    assert clean("--all") == 0
    assert "removed 0 builds" in capsys.readouterr().out
    assert not installed.cache_dir.exists()


def test_the_mark_is_written_when_the_folder_is_made_or_empty(tmp_path: Path) -> None:
    new, empty, full = (tmp_path / name for name in ("new", "empty", "full"))
    empty.mkdir()
    put(full, ("a",))
    other = tmp_path / "other"
    put(other, (MARKER,))
    for root in (new, empty, full, other):
        make_private_folder(root, "x/y")
        assert (root / "x" / "y").is_dir()
    assert is_marked(new) and is_marked(empty)
    assert not is_marked(full) and not is_marked(other)
    assert (new / MARKER).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    with pytest.raises(CacheError, match=f"got {other / MARKER}|got {other / 'x'}"):
        check_is_cache(other)


def test_the_package_has_no_mark(installed: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = installed.root / "prebuilt"
    monkeypatch.setattr(paths, "PREBUILT_DIR", prebuilt)
    default_loader.cache_clear()
    assert main(["build", MODULE, "--package"]) == 0
    default_loader.cache_clear()
    assert [path.name for path in prebuilt.iterdir()] == [MODULE]
    assert os.listdir(prebuilt / MODULE)
