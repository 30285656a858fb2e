"""What did `python -m aiter tune` measure on this device?

One JSON file per device name in the folder `.tuned` of the cache, written in one step and read once
per process. It holds the crossovers that `dispatch` decides by, the times that they come from, and
the builds of the modules that were measured: when one of these is no longer the build in use, the
file says nothing about today's kernels and is left aside, with a warning. So is a damaged one. A
file or folder that others may write to is an error, as for everything in the cache (`jit.trust`).

Looking for the file costs one `stat`; only where it exists are the builds looked up. Rejected: a
name made of the builds' hashes, which would leave a file behind for every rebuild and could not
tell a user why the measurement no longer counts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..jit import envs
from ..jit.target import cpu_target, target_for
from .dispatch import Crossover

MODULES = ("module_fused_topk_moe_sorting", "module_topk_softmax", "module_moe_sorting_opus")
FOLDER = ".tuned"
FORMAT = 1  # NOTE: raise it when the meaning of the file changes.


@dataclass(frozen=True)
class Measured:
    """A crossover and the times behind it: [M, fused, oneshot, multiphase], us, None for no path."""

    row: Crossover
    times: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What was found for a device: its file, the rows that count, and why there are none."""

    path: Path
    measured: tuple[Measured, ...] = ()
    reason: str = "not measured"

    @property
    def rows(self) -> tuple[Crossover, ...]:
        """The crossovers alone."""
        return tuple(measured.row for measured in self.measured)


def device_name(device: torch.device) -> str:
    """The name that a device's measurements are kept under; the CPU's has its wave width."""
    if device.type == "cpu":
        return f"cpu wave{cpu_target().wave_size}"
    return str(torch.cuda.get_device_name(device))


def path_of(device: torch.device) -> Path:
    """The file of a device, whether it exists or not."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-")
    return envs.cache_dir() / FOLDER / f"{slug}.json"


def find(device: torch.device) -> Found:
    """What is kept for `device` and still counts.

    Raises:
        aiter.jit.CacheError: others may write to the file or to a folder above it.
    """
    path = path_of(device)
    if not os.path.exists(path):
        return Found(path)
    # NOTE: imported late, as `import aiter` should not pay for what only tuned devices need.
    from ..jit.log import get_logger

    try:
        content = read_kept(path)
        if content is None:
            return Found(path)
        kept = _parse(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{path}: expected what `python -m aiter tune` writes, got {error!r}"
        get_logger().warning("%s; its measurements are left aside", reason)
        return Found(path, reason=reason)
    name, builds, measured = kept
    if name != device_name(device):
        return Found(path, reason=f"measured on {name}, which is not {device_name(device)}")
    for module, build in builds_of(device).items():
        if builds.get(module) != build:
            reason = (
                f"{module} is not the build that was measured; run `python -m aiter tune` again"
                if build
                else f"{module} is not built, so that nobody can tell whether it is what was"
                " measured; run `python -m aiter build --all` or `python -m aiter tune`"
            )
            get_logger().warning("%s: %s", path, reason)
            return Found(path, reason=reason)
    return Found(path, measured, "measured")


def keep(device: torch.device, measured: Iterable[Measured]) -> Path:
    """Keeps measurements beside those of other shapes that still count; returns the file.

    Raises:
        aiter.jit.CacheError: others may write to the cache.
        OSError: the file cannot be written.
    """
    found = find(device)
    shapes = {_shape(each.row): each for each in (*found.measured, *measured)}
    content = {
        "format": FORMAT,
        "device": device_name(device),
        "builds": builds_of(device),
        "measured": [{**asdict(each.row), "times": each.times} for each in shapes.values()],
    }
    write_kept(found.path, content)
    return found.path


def read_kept(path: Path) -> Any:
    """What a file of measurements holds, judged as it was opened; None where there is none.

    Raises:
        aiter.jit.CacheError: others may write to the file or to a folder above it.
        OSError, ValueError: it cannot be read, or is no JSON.
    """
    from ..jit.trust import read_trusted

    content = read_trusted(path.parent.parent, path.parts[-2:])
    return None if content is None else json.loads(content)


def write_kept(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of measurements in one step.

    Raises:
        aiter.jit.CacheError: others may write to the cache.
        OSError: the file cannot be written.
    """
    from ..jit.folders import make_private_folder, write_atomically
    from ..jit.trust import check_trusted

    folder = make_private_folder(path.parent.parent, path.parent.name)
    check_trusted(folder.parent, (folder,))
    write_atomically(path, json.dumps(content, indent=1))


def builds_of(device: torch.device) -> dict[str, str]:
    """The build in use of every module that is measured, "" where there is none yet."""
    from ..jit.load import default_loader
    from ..jit.manifest import Entry

    loader, target = default_loader(), target_for(device)
    builds = {}
    for module in MODULES:
        found = loader.cache.lookup(loader.plan(module, target))
        parts = found.folder.parts[-2:] if isinstance(found, Entry) else ()
        builds[module] = "/".join(parts)
    return builds


def _shape(row: Crossover) -> tuple[int, int, int]:
    return row.num_experts, row.topk, row.model_dim


def _parse(content: Any) -> tuple[str, dict[str, str], tuple[Measured, ...]]:
    """Device name, builds and measurements of a file; ValueError, KeyError or TypeError if not so."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r} instead of {FORMAT}")
    types = {"source": str, "date": str, "command": str}
    measured = []
    for entry in content["measured"]:
        row = Crossover(**{each.name: entry[each.name] for each in fields(Crossover)})
        for name, value in asdict(row).items():
            if type(value) is not types.get(name, int):
                raise TypeError(f"{name}: {value!r}")
        if row.num_experts < 1 or row.topk < 1 or row.model_dim < 0:
            raise ValueError(f"shape {_shape(row)}")
        measured.append(Measured(row, entry["times"]))
    return str(content["device"]), dict(content["builds"]), tuple(measured)
