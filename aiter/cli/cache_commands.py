"""Commands on modules and the cache: list, build, status and clean."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from pathlib import Path

from ..jit import cleanup, paths
from ..jit.errors import JitError
from ..jit.load import Loader, default_loader
from ..jit.manifest import MANIFEST, Entry, changed_input, shown_path
from ..jit.plan import abi_tag
from ..jit.prebuilt import single_targets, tidy_prebuilt
from ..jit.spec import load_spec
from ..jit.target import Target, cpu_level, cpu_target, named_target
from .table import format_table

STALE = "stale"
DAMAGED = "damaged"


def run_list(options: argparse.Namespace) -> int:
    """Lists the modules with their targets and sources."""
    del options
    loader = default_loader()
    rows = []
    wrong = 0
    for name in loader.modules():
        try:
            spec = load_spec(loader.config_path, name, loader.csrc_dir, cpu_target())
        except JitError as error:
            print(f"error: {error}", file=sys.stderr)
            wrong += 1
            continue
        sources = ", ".join(source.name for source in spec.srcs)
        rows.append((name, ", ".join(spec.targets), sources))
    print(format_table(("module", "targets", "sources"), rows))
    return 1 if wrong else 0


def run_build(options: argparse.Namespace) -> int:
    """Builds the named modules, or all of them, and shows where they are."""
    loader = default_loader()
    known = loader.modules()
    everything = options.all or (options.compile_commands is not None and not options.modules)
    if everything == bool(options.modules):
        print(
            "error: expected module names or --all, got " + ("both" if options.all else "neither"),
            file=sys.stderr,
        )
        return 2
    archs = tuple(filter(None, map(str.strip, re.split("[;,]", options.arch))))
    modules = known if everything else options.modules
    if options.mix and not options.device_only:
        print("error: --mix: expected --device-only beside it, got --mix alone", file=sys.stderr)
        return 2
    if options.device_only:
        if options.target != "rocm":
            print(
                f"error: --device-only: expected --target rocm, got {options.target}",
                file=sys.stderr,
            )
            return 2
        # NOTE: imported late, as no other command needs it.
        from . import device_code

        return device_code.run(modules, archs, options.mix)
    target = named_target(options.target, archs)
    if options.compile_commands is not None:
        from . import compile_commands

        return compile_commands.run(loader, modules, target, Path(options.compile_commands))
    if not options.package:
        return _build(loader, modules, [target], options.force)
    status = _build(
        Loader(cache_dir=paths.PREBUILT_DIR), modules, single_targets(target), options.force
    )
    tidy_prebuilt(paths.PREBUILT_DIR)
    return status


def _build(loader: Loader, modules: list[str], targets: list[Target], force: bool) -> int:
    """Builds every module for every target, and shows where they are."""
    rows = []
    failures = 0
    for module, target in itertools.product(modules, targets):
        start = time.monotonic()
        try:
            entry, built = loader.ensure(module, target, force)
        except JitError as error:
            print(f"error: {error}", file=sys.stderr)
            failures += 1
            continue
        seconds = f"{time.monotonic() - start:.1f} s"
        rows.append((module, "built" if built else "cached", seconds, entry.library))
    if rows:
        print(format_table(("module", "result", "time", "file"), rows))
    return 1 if failures else 0


def run_status(options: argparse.Namespace) -> int:
    """Shows every build of the cache, and whether it would be used now."""
    del options
    loader = default_loader()
    rows = []
    for entry, folder in loader.cache.entries():
        module, place = folder.parts[-4], folder.parts[-3]
        named = (place, "", "")
        if entry is not None:
            target = entry.target
            parts = filter(None, (*target.archs, target.cpu_level, target.cpu_check))
            named = (target.kind, ",".join(parts), str(entry.manifest["abi"]))
        try:
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            age = _age(time.time() - folder.stat().st_mtime)
        except OSError:  # NOTE: another process removes it, or may read what this one may not.
            size, age = 0, "-"
        rows.append((module, *named, f"{size / 1024:.0f} KiB", age, state_of(loader, entry)))
    print(f"cache folder: {loader.cache.root}")
    if rows:
        print(format_table(("module", "target", "arch", "abi", "size", "age", "state"), rows))
    else:
        print("no builds")
    return 0


def run_clean(options: argparse.Namespace) -> int:
    """Removes stale and damaged builds, failed builds' logs, device code's text and leftovers.

    Lists what goes before anything does. Raises CacheError where the folder may hold other things.
    """
    loader = default_loader()
    cache = loader.cache
    cleanup.check_is_cache(cache.root)

    def why(entry: Entry | None) -> str | None:
        state = state_of(loader, entry)
        return state if state.startswith((STALE, DAMAGED)) else None

    items = cleanup.removable(cache, options.all, why)
    verb = "would remove" if options.dry_run else "removing"
    for item in items:
        print(f"{verb} {item.path} ({item.reason})")
    sys.stdout.flush()
    builds = sum(item.is_build for item in items)
    if options.dry_run:
        print(f"would remove {builds} builds from {cache.root}, and {len(items) - builds} others")
        return 0
    cleanup.remove(cache, items)
    print(f"removed {builds} builds from {cache.root}, and {len(items) - builds} others")
    return 0


def state_of(loader: Loader, entry: Entry | None) -> str:
    """Whether a build would be used now, and why not: `valid`, or a word and a reason."""
    if entry is None:
        return f"{DAMAGED}: no complete {MANIFEST}"
    try:
        problem = loader.cache.damage(entry)
    except PermissionError:
        return "unchecked: this user may not read it"
    if problem is not None:
        return f"{DAMAGED}: {problem}"
    if entry.manifest["abi"] != abi_tag():
        return "unchecked: built for another Python"
    module = entry.folder.parts[-4]
    if module not in loader.modules():
        return f"{STALE}: no such module in the config"
    if entry.target.kind == "cpu" and entry.target.cpu_level != cpu_level():
        return "unchecked: built for another machine"
    try:
        plan = loader.plan(module, entry.target)
    except JitError as error:
        return f"unchecked: {error}"
    changed = changed_input(entry.manifest["inputs"], plan.inputs)
    if changed is None:
        header = loader.cache.first_changed_header(entry, plan.roots)
        changed = None if header is None else f"{shown_path(header)} changed"
    return "valid" if changed is None else f"{STALE}: {changed}"


def _age(seconds: float) -> str:
    """A duration in its largest unit, such as `3 h`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
