"""Which device does a question without a tensor mean?"""

from __future__ import annotations

import torch

from ..jit.core import indexed


def current_device(device: torch.device | str | int | None = None) -> torch.device:
    """`device` with its index; for None the current GPU if there is one, else the CPU.

    Raises TargetError for a GPU that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return indexed(device)
