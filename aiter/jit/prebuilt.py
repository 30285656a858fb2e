"""Is the module in the package already, built when the package was?

`aiter/_prebuilt` has the cache's layout and manifests, and is filled by the same build (`PREBUILD_
KERNELS=1 pip install`, `python -m aiter build --package`). A prebuilt module is used if its key is
what this machine would compute: sources, flags, Python's ABI, target and the package's own headers
by content. The compiler, the variables that it read and the headers of the system are taken as they
were recorded, since a machine that runs from prebuilt modules may have none of them.

The architecture has to be the device's own, as everywhere, so several architectures are several
builds. Who could write to the package is not asked: it is Python code that runs anyway.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .cache import BROKEN_DIR, COMPILER_DIR, FAILED_DIR, LOCK_DIR, TOOL_DIR, WORK_DIR
from .errors import TargetError
from .folders import MARKER
from .log import get_logger
from .manifest import Entry, file_sha256, foreign_part, open_library, read_manifest, subfolders
from .plan import Plan, abi_tag, make_plan
from .target import Target
from .trust import open_any

_OWN_HEADERS = "<csrc>/"


def find_prebuilt(
    root: Path, config_path: Path, csrc_dir: Path, module: str, target: Target
) -> Entry | None:
    """The intact prebuilt `module` for `target` in `root`; None, and why in the log, if none fits.

    Raises ConfigError if the compiler config is wrong, TargetError if the module has no such target.
    """
    places = subfolders(root / module)
    place = root / module / f"{target.label}-{abi_tag()}"
    problems: list[str] = []
    for folder in _builds(place):
        entry = read_manifest(folder)
        if entry is None or not _is_recorded(entry.manifest["inputs"]):
            problems.append("expected a complete manifest")
            continue
        plan = make_plan(config_path, csrc_dir, root, module, target, entry.manifest["inputs"])
        problem = foreign_part(entry, plan) or _changed_header(entry, plan)
        opened = open_any(folder) if problem is None else None
        if opened is not None:
            with opened:
                try:
                    problem, file = open_library(opened, entry)
                except PermissionError as error:
                    problem = f"expected a readable file, got {error.strerror}"
            if problem is None:
                return Entry(folder, entry.manifest, file)
        problems.append(problem or "expected a readable folder, got none")
    if places and place not in places:
        others = {entry.manifest["abi"] for entry in _same_target(places, target)}
        problems += [f"expected one for {abi_tag()}, got one for {other}" for other in others]
    if problems:
        get_logger().warning(
            "prebuilt %s for %s is not used: %s", module, target.label, "; ".join(sorted(problems))
        )
    return None


def _builds(place: Path) -> list[Path]:
    return [build for key in subfolders(place) for build in subfolders(key)]


def _same_target(places: list[Path], target: Target) -> list[Entry]:
    """The builds of a module for `target`, whatever the Python."""
    entries = (read_manifest(folder) for place in places for folder in _builds(place))
    return [entry for entry in entries if entry is not None and entry.target == target]


def _is_recorded(inputs: dict[str, Any]) -> bool:
    """Whether a build's inputs hold what stands for the compiler in `make_plan`."""
    compiler = inputs.get("compiler")
    return (
        isinstance(compiler, list)
        and len(compiler) >= 2
        and isinstance(compiler[0], str)
        and all(isinstance(identity, list) and identity for identity in compiler[1:])
        and isinstance(inputs.get("variables"), dict)
    )


def _changed_header(entry: Entry, plan: Plan) -> str | None:
    """The first header of the package that differs from what the build saw."""
    for path, _, _, _, sha256 in entry.manifest["headers"]:
        if path.startswith(_OWN_HEADERS):
            actual = Path(plan.roots.expand(path))
            if not actual.is_file() or file_sha256(actual) != sha256:
                return f"{path} changed"
    return None


def tidy_prebuilt(root: Path) -> None:
    """Removes what only builders need from a folder of builds, and lets every user read the rest."""
    for name in (BROKEN_DIR, COMPILER_DIR, FAILED_DIR, LOCK_DIR, TOOL_DIR, WORK_DIR):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / MARKER).unlink(missing_ok=True)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def single_targets(target: Target) -> list[Target]:
    """`target`, one architecture at a time."""
    return [
        Target(target.kind, (arch,), target.cpu_level, target.cpu_check) for arch in target.archs
    ]


def gpu_target(arch: str) -> Target:
    """The target of one GPU architecture, by its name."""
    for prefix, kind in (("sm_", "cuda"), ("gfx", "rocm")):
        if arch.startswith(prefix):
            return Target(kind, (arch,))
    raise TargetError(f"architecture: expected a name such as sm_90 or gfx942, got {arch!r}")
