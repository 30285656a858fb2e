"""On what does a test run? A torch device and, for the CPU target, a wave width.

A target is a plain parameter, entered explicitly around the op call, because hypothesis and the
scripts need it as much as pytest does; a fixture would serve only the last.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

CPU_WAVES = (64, 32)


@dataclass(frozen=True)
class Target:
    """A device; ``wave`` is the wave width on the CPU, None for the device's own."""

    device: str
    wave: int | None = None

    def __str__(self) -> str:
        return self.device if self.wave is None else f"{self.device}-w{self.wave}"

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Run the ops called inside at this target's wave width."""
        if self.wave is None:
            return contextlib.nullcontext()
        import aiter.jit

        width: contextlib.AbstractContextManager[object] = aiter.jit.cpu_wave(self.wave)
        return width

    def synchronize(self) -> None:
        """Wait for the device, so that an asynchronous failure belongs to its own test."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def default_device() -> str:
    """``cuda`` (ROCm builds use that name too) where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def select_targets(device: str | None, wave: int | None = None) -> list[Target]:
    """The targets for ``--device`` and ``--wave``: on the CPU both widths unless one is given."""
    device = device or default_device()
    if device != "cpu":
        if wave is not None:
            raise ValueError(f"--wave: expected only with --device cpu, got {wave} with {device}")
        return [Target(device)]
    return [Target(device, width) for width in ([wave] if wave else CPU_WAVES)]
