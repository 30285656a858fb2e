"""Which tiles did `python -m aiter tune --experts` find the fastest on this device?

One JSON file per device name beside the crossovers of the routing (`aiter.routing.tuned`), in the folder
`.tuned` of the cache; written in one step, read once per process. A layer is found by what its tiles
depend on: the number of experts, the shape of w1 and the layout. The file names the kernels' source
and Triton's version: when either is another one, it says nothing about today's kernels and is left
aside, with a warning. So is a damaged one. A file that others may write to is an error, as for
everything in the cache (`jit.trust`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from ..routing import tuned
from .triton_configs import Family, Layout, Row, Tile

FORMAT = 1  # NOTE: raise it when the meaning of the file changes.

Layer = tuple[int, int, int, Layout]
"""Experts, rows of w1, its inner dimension, layout."""


def path_of(device: torch.device) -> Path:
    """The file of a device, whether it exists or not."""
    routing = tuned.path_of(device)
    return routing.with_name(f"{routing.stem}-experts.json")


@cache
def kernels() -> str:
    """What the measured kernels are: a hash of their source, and Triton's version."""
    import triton

    sources = (Path(__file__).with_name(f"triton_{name}.py") for name in ("kernels", "hopper"))
    source = b"".join(path.read_bytes() for path in sources)
    return f"{hashlib.sha256(source).hexdigest()[:16]}, Triton {triton.__version__}"


@cache
def families(device: torch.device) -> Mapping[Layer, Family]:
    """What is kept for `device` and still counts.

    Raises:
        aiter.jit.CacheError: others may write to the file or to a folder above it.
    """
    path = path_of(device)
    if not path.exists():
        return {}
    from ..jit.log import get_logger

    try:
        content = tuned.read_kept(path)
        if content is None:
            return {}
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} instead of {FORMAT}")
        found = {_layer(entry["layer"]): _family(entry["family"]) for entry in content["layers"]}
        name, measured = str(content["device"]), str(content["kernels"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        get_logger().warning(
            "%s: expected what `python -m aiter tune --experts` writes, got %r; left aside",
            path,
            error,
        )
        return {}
    if (name, measured) != (tuned.device_name(device), kernels()):
        get_logger().warning(
            "%s: measured on %s with %s, not with %s; run `python -m aiter tune --experts` again",
            path, name, measured, kernels(),
        )  # fmt: skip
        return {}
    return found


def keep(device: torch.device, layer: Layer, family: Family) -> Path:
    """Keeps a layer's tiles beside those of others that still count; returns the file.

    Raises:
        aiter.jit.CacheError: others may write to the cache.
        OSError: the file cannot be written.
    """
    kept = {**families(device), layer: family}
    path = path_of(device)
    content = {
        "format": FORMAT,
        "device": tuned.device_name(device),
        "kernels": kernels(),
        "layers": [{"layer": key, "family": asdict(value)} for key, value in kept.items()],
    }
    tuned.write_kept(path, content)
    families.cache_clear()
    return path


def _layer(entry: list[Any]) -> Layer:
    experts, rows, inner, layout = entry
    if not all(type(size) is int and size > 0 for size in (experts, rows, inner)):
        raise ValueError(f"layer {entry!r}")
    if layout not in ("inner", "columns"):
        raise ValueError(f"layout {layout!r}")
    return experts, rows, inner, cast(Layout, layout)


def _tile(entry: dict[str, Any]) -> Tile:
    tile = Tile(**entry)
    sizes = (tile.rows, tile.columns, tile.inner, tile.warps, tile.stages, tile.group)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"tile {entry!r}")
    return tile


def _family(entry: dict[str, Any]) -> Family:
    rows = tuple(
        Row(float(row["entries"]), _tile(row["first"]), _tile(row["second"]))
        for row in entry["rows"]
    )
    if not rows or [row.entries for row in rows] != sorted(row.entries for row in rows):
        raise ValueError("rows that do not ascend")
    return Family(
        _tile(entry["one_first"]),
        _tile(entry["one_second"]),
        bool(entry["split"]),
        rows,
        str(entry["source"]),
    )
