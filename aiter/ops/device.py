"""Which device does a question without a tensor mean?"""

from __future__ import annotations

import torch

from ..jit.core import indexed


def current_device(device: torch.device | str | int | None = None) -> torch.device:
    """`device` with its index; for None the current GPU if there is one, else the CPU.

    Raises:
        TypeError, ValueError: it names no device.
        TargetError: it names a GPU that this PyTorch does not see.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return indexed(device)


def device_of_tensors(device: torch.device | str | int | None = None) -> torch.device:
    """As above, for tensors of a call to be made on: a cpu, cuda or meta device.

    Raises:
        TypeError, ValueError: as above, or it is of another kind.
    """
    chosen = current_device(device)
    if chosen.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device: expected a cpu, cuda or meta device, got {str(chosen)!r}")
    return chosen
