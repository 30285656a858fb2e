"""GPU modules as they are for GPUs without clusters, so that a GPU with clusters runs the hand-over.

`request` is to be called before a module is loaded. The modules are built with a macro that
csrc/include/device/cluster.h names, in a folder of the cache of their own.
"""

from __future__ import annotations

import os

from aiter.jit.load import default_loader

FOLDER = "without-clusters"
_requested = False


def request() -> None:
    """Has this process, and those that it starts, build and load GPU modules without clusters."""
    global _requested
    root = default_loader().cache.root
    if root.parent.name != FOLDER:  # else a parent has asked for it
        os.environ["AITER_JIT_DIR"] = str(root.parent / FOLDER)
        os.environ["NVCC_APPEND_FLAGS"] = "-DAITER_WITHOUT_CLUSTERS"
        default_loader.cache_clear()
    _requested = True


def requested() -> bool:
    """Whether `request` was called."""
    return _requested
