"""Which device does a question without a tensor mean?"""

from __future__ import annotations

import torch


def current_device(device: torch.device | str | int | None = None) -> torch.device:
    """`device` with its index; for None the current GPU if there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen
