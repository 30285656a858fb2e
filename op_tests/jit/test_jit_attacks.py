"""Is what is loaded what was checked, whatever others do meanwhile and wherever the cache lies?

The attacker is another user who owns a folder on the way, or may write to one. Every test but the
first few needs root, who alone can act as two users.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from racing import built, cache_in, racing
from toy import MODULE, Toy
from users import ALICE, only_root

from aiter.jit import load as load_module
from aiter.jit import trust
from aiter.jit.cache import Entry
from aiter.jit.errors import CacheError, JitError
from aiter.jit.trust import check_trusted

RACE_SECONDS = 2.0


def rename_away_and_back(path: Path) -> None:
    aside = path.with_name(f"{path.name}-aside")
    os.rename(path, aside)
    os.rename(aside, path)


@only_root
def test_foreign_code_is_never_loaded_in_a_race(toy: Toy) -> None:
    """The folder of a module belongs to somebody else, who renames it away and back."""
    module_folder = built(toy, 666).parents[2]
    for path in (module_folder, *module_folder.rglob("*")):
        os.chown(path, ALICE, ALICE)
    results = {"refused": 0, "missing": 0}
    loader = toy.loader()
    plan = loader.plan(MODULE, toy.target())
    with racing(lambda: rename_away_and_back(module_folder)):
        end = time.monotonic() + RACE_SECONDS
        while time.monotonic() < end:
            try:
                found = loader.cache.lookup(plan)
            except CacheError as error:
                assert f"got owner {ALICE}" in str(error)
                results["refused"] += 1
                continue
            assert not isinstance(found, Entry), "a build that belongs to another user was taken"
            results["missing"] += 1
    assert results["refused"] > 20, results


@only_root
@pytest.mark.parametrize("part", ["library", "build", "key"])
def test_what_is_swapped_after_the_check_is_not_loaded(toy: Toy, part: str) -> None:
    """Between the check and the load another file takes the name: it is not what is loaded."""
    good = built(toy, 1)
    loader = toy.loader()
    entry = loader.cache.lookup(loader.plan(MODULE, toy.target()))
    assert isinstance(entry, Entry)
    path = {"library": entry.library, "build": good, "key": good.parent}[part]
    aside = toy.root / "aside"
    path.rename(aside)
    if part == "library":
        path.write_bytes(b"not a library")
    module = load_module.load_extension(MODULE, entry)
    assert module.value() == 1
    assert module.__file__ == str(entry.library)


def test_swapping_builds_while_loads_run_gives_one_or_the_other(toy: Toy) -> None:
    """Our own rebuilds race as well: every load is one whole build, and no raw error comes out."""
    build = built(toy, 1)
    other = toy.root / "other"
    shutil.copytree(build, other)
    seen: set[str] = set()

    def step() -> None:
        aside = build.with_name("aside")
        os.rename(build, aside)
        os.rename(other, build)
        os.rename(aside, other)

    loads = 0
    with racing(step):
        end = time.monotonic() + RACE_SECONDS
        loader = toy.loader()
        plan = loader.plan(MODULE, toy.target())
        while time.monotonic() < end:
            found = loader.cache.lookup(plan)
            if isinstance(found, Entry):
                assert load_module.load_extension(MODULE, found).value() == 1
                loads += 1
            seen.add(type(found).__name__)
    assert loads > 20 and "Entry" in seen


def test_a_build_that_vanishes_anywhere_in_a_lookup_is_a_miss(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the steps of a lookup, and of a load, another process takes the cache away."""
    built(toy, 1)
    real = os.open
    kept = toy.root / "kept"
    shutil.copytree(toy.cache_dir, kept)
    for step in range(1, 60):
        shutil.rmtree(toy.cache_dir, ignore_errors=True)
        shutil.copytree(kept, toy.cache_dir)
        left = step

        def vanishing(path: object, flags: int, *rest: object, **options: object) -> int:
            nonlocal left
            left -= 1
            if left == 0:
                shutil.rmtree(toy.cache_dir)
            return real(path, flags, *rest, **options)  # type: ignore[arg-type]

        loader = toy.loader()
        plan = loader.plan(MODULE, toy.target())
        monkeypatch.setattr(trust.os, "open", vanishing)
        try:
            loader.cache.lookup(plan)
        finally:
            monkeypatch.undo()
        if left > 0:
            break
    assert step > 8


def test_threads_that_load_while_the_cache_is_cleaned(toy: Toy) -> None:
    """Builds, lookups and removals at once: every load succeeds or is a JitError."""
    built(toy, 1)
    errors: list[BaseException] = []
    values: list[int] = []
    stop = time.monotonic() + RACE_SECONDS

    def load() -> None:
        while time.monotonic() < stop:
            try:
                values.append(toy.load().value())
            except JitError:
                continue
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        shutil.rmtree(toy.cache_dir / MODULE, ignore_errors=True)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert values and set(values) == {1}


def test_a_check_of_several_paths_does_not_end_at_the_first_that_is_missing(tmp_path: Path) -> None:
    root = cache_in(tmp_path)
    (root / "open").mkdir()
    (root / "open").chmod(0o777)
    with pytest.raises(CacheError, match="writable by everyone"):
        check_trusted(root, (root / "missing", root / "missing" / "deep", root / "open"))


def test_a_named_pipe_in_a_build_is_not_waited_for(toy: Toy) -> None:
    library = next(built(toy, 1).glob("*.so"))
    library.unlink()
    os.mkfifo(library, 0o600)
    assert toy.load().value() == 1


def test_loads_go_by_content_and_not_by_the_name_of_a_descriptor(toy: Toy) -> None:
    """Descriptors are used again, and the linker takes a library for loaded by its name alone."""
    for value in range(1, 4):
        built(toy, value)
        module = toy.load()
        assert module.value() == value
        name = f"/proc/{os.getpid()}/fd/"
        assert not module.__file__.startswith(name) and not module.__spec__.origin.startswith(name)
    assert toy.load() is module


def test_a_machine_without_proc_is_told(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.readlink

    def missing(path: str, **options: int) -> str:
        if path == "/proc/self":
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, **options)

    built(toy, 7)
    monkeypatch.setattr(load_module.os, "readlink", missing)
    with pytest.raises(JitError, match="expected /proc to be mounted"):
        toy.load()
