"""What has to be built and loaded before a server takes requests?

The first call of an op on a device loads its module, and builds it on a miss. `warmup` does that for
all of them ahead, so that no request waits for a compiler, and so that whatever is wrong with the
machine is raised when the server starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .load import Loader


@dataclass(frozen=True)
class Warmed:
    """One module that is ready.

    Attributes:
        module: its name.
        device: for which device, such as `cuda:0`.
        target: the target's label, such as `rocm-gfx942`.
        built: whether it was built now, not found.
        seconds: how long building and loading took.
    """

    module: str
    device: str
    target: str
    built: bool
    seconds: float


def warmup(
    *,
    modules: Iterable[str] | None = None,
    devices: Iterable[torch.device | str] | None = None,
    loader: Loader | None = None,
) -> list[Warmed]:
    """Builds and loads modules ahead of their first call.

    Args:
        modules: their names in the compiler config; None for all that support the device.
        devices: where they will be called; None for every GPU, and for the CPU if there is none.
        loader: where modules come from; None for the package's own.

    Returns:
        What is ready, devices in the order given and modules in the config's.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was built.
        JitError: the first module that could not be built or loaded, as in `Loader.load`.
    """
    from .core import indexed
    from .load import default_loader
    from .spec import load_spec
    from .target import target_for

    loader = loader or default_loader()
    names = loader.modules() if modules is None else _listed("modules", modules)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"modules: expected names, got {type(name).__name__}")
    places = _all_devices() if devices is None else _listed("devices", devices)
    targets = [(chosen, target_for(chosen)) for chosen in map(indexed, places)]
    ready = []
    for chosen, target in targets:
        for name in names:
            spec = load_spec(loader.config_path, name, loader.csrc_dir, target)
            if modules is None and target.kind not in spec.targets:
                continue
            start = time.monotonic()
            built = loader.load_now(name, target)[1]
            seconds = time.monotonic() - start
            ready.append(Warmed(name, str(chosen), target.label, built, seconds))
    return ready


def _listed(argument: str, several: Any) -> list[Any]:
    """The items of an iterable; a text is one item that lacks its brackets."""
    try:
        if not isinstance(several, (str, bytes)):
            return list(several)
    except TypeError:
        pass  # NOTE: some say that they can be iterated over, and cannot.
    raise TypeError(f"{argument}: expected a list or None, got {type(several).__name__}")


def _all_devices() -> list[torch.device | str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]
