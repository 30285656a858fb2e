"""What did `python -m aiter tune` measure on this device?

One JSON file per device name and `Kind` of measurement (from logits, or from hidden states) in the
folder `.tuned` of the cache, written in one step and read once per process. It holds the crossovers
that `dispatch` decides by, the times that they come from, and the builds of the modules that were
measured: when one of these is no longer the build in use, the file says nothing about today's kernels
and is left aside, with a warning. So is a damaged one. A file or folder that others may write to is an
error, as for everything in the cache (`jit.trust`).

Looking for the file costs one `stat`; only where it exists are the builds looked up. Rejected: a
name made of the builds' hashes, which would leave a file behind for every rebuild and could not
tell a user why the measurement no longer counts; and one file for both kinds, where what measures
one would have to write the other's rows anew, and a build that only one of them goes by would make
both stale.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..jit import envs
from ..jit.target import cpu_target, target_for
from .dispatch import Crossover, RouterCrossover

Row = TypeVar("Row", bound=Crossover | RouterCrossover)

MODULES = ("module_fused_topk_moe_sorting", "module_topk_softmax", "module_moe_sorting_opus")
FOLDER = ".tuned"
FORMAT = 1  # NOTE: raise it when the meaning of the file changes.


@dataclass(frozen=True)
class Kind(Generic[Row]):
    """One kind of measurement.

    Attributes:
        row: the class of its crossovers.
        shape: which of their numbers say what was measured; no two rows of a file agree in them.
        modules: which builds it is a measurement of.
        ending: of the name of its files.
        command: what measures it.
    """

    row: type[Row]
    shape: tuple[str, ...]
    modules: tuple[str, ...]
    ending: str
    command: str


LOGITS = Kind(Crossover, ("num_experts", "topk", "model_dim"), MODULES, "", "tune")
ROUTER = Kind(
    RouterCrossover, ("width", "num_experts", "topk"),
    ("module_fused_router_sorting", "module_fused_topk_moe_sorting"), "-router",
    "tune --router D',E,K",
)  # fmt: skip


@dataclass(frozen=True)
class Measured(Generic[Row]):
    """A crossover and the times behind it, in us, None for no path.

    They are [M, fused, oneshot, multiphase] from logits, [M, one launch, two] from hidden states.
    """

    row: Row
    times: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Found(Generic[Row]):
    """What was found for a device: its file, the rows that count, and why there are none."""

    path: Path
    measured: tuple[Measured[Row], ...] = ()
    reason: str = "not measured"

    @property
    def rows(self) -> tuple[Row, ...]:
        """The crossovers alone."""
        return tuple(measured.row for measured in self.measured)


def device_name(device: torch.device) -> str:
    """The name that a device's measurements are kept under; the CPU's has its wave width."""
    if device.type == "cpu":
        return f"cpu wave{cpu_target().wave_size}"
    return str(torch.cuda.get_device_name(device))


def path_of(device: torch.device, ending: str = "") -> Path:
    """The file of a device whose name has that ending, whether it exists or not."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-")
    return envs.cache_dir() / FOLDER / f"{slug}{ending}.json"


def find(device: torch.device, kind: Kind[Row]) -> Found[Row]:
    """What of a kind is kept for `device` and still counts.

    Raises:
        aiter.jit.CacheError: others may write to the file or to a folder above it.
    """
    path = path_of(device, kind.ending)
    again = f"`python -m aiter {kind.command}`"
    if not os.path.exists(path):
        return Found(path)
    # NOTE: imported late, as `import aiter` should not pay for what only tuned devices need.
    from ..jit.log import get_logger

    try:
        content = read_kept(path)
        if content is None:
            return Found(path)
        kept = _parse(content, kind)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{path}: expected what {again} writes, got {error!r}"
        get_logger().warning("%s; its measurements are left aside", reason)
        return Found(path, reason=reason)
    name, builds, measured = kept
    if name != device_name(device):
        return Found(path, reason=f"measured on {name}, which is not {device_name(device)}")
    for module, build in builds_of(device, kind.modules).items():
        if builds.get(module) != build:
            reason = (
                f"{module} is not the build that was measured; run {again} again"
                if build
                else f"{module} is not built, so that nobody can tell whether it is what was"
                f" measured; run `python -m aiter build --all` or {again}"
            )
            get_logger().warning("%s: %s", path, reason)
            return Found(path, reason=reason)
    return Found(path, measured, "measured")


def keep(device: torch.device, measured: Iterable[Measured[Row]], kind: Kind[Row]) -> Path:
    """Keeps measurements beside those of other shapes that still count; returns the file.

    Raises:
        aiter.jit.CacheError: others may write to the cache.
        OSError: the file cannot be written.
    """
    found = find(device, kind)
    shapes = {_shape(each.row, kind): each for each in (*found.measured, *measured)}
    content = {
        "format": FORMAT,
        "device": device_name(device),
        "builds": builds_of(device, kind.modules),
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


def builds_of(device: torch.device, modules: Iterable[str]) -> dict[str, str]:
    """The build in use of every module, "" where there is none yet."""
    from ..jit.load import default_loader
    from ..jit.manifest import Entry

    loader, target = default_loader(), target_for(device)
    builds = {}
    for module in modules:
        found = loader.cache.lookup(loader.plan(module, target))
        parts = found.folder.parts[-2:] if isinstance(found, Entry) else ()
        builds[module] = "/".join(parts)
    return builds


def _shape(row: Row, kind: Kind[Row]) -> tuple[int, ...]:
    return tuple(getattr(row, name) for name in kind.shape)


def _parse(content: Any, kind: Kind[Row]) -> tuple[str, dict[str, str], tuple[Measured[Row], ...]]:
    """Device name, builds and measurements of a file; ValueError, KeyError or TypeError if not so."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r} instead of {FORMAT}")
    types = {"source": str, "date": str, "command": str}
    measured = []
    for entry in content["measured"]:
        row = kind.row(**{each.name: entry[each.name] for each in fields(kind.row)})
        for name, value in asdict(row).items():
            if type(value) is not types.get(name, int):
                raise TypeError(f"{name}: {value!r}")
        # NOTE: a width of 0 is that of no moe_buf; all others are those of something.
        if any(getattr(row, name) < (name != "model_dim") for name in kind.shape):
            raise ValueError(f"shape {_shape(row, kind)}")
        measured.append(Measured(row, entry["times"]))
    return str(content["device"]), dict(content["builds"]), tuple(measured)
