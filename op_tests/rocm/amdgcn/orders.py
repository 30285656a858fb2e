"""Which stores of one workgroup may another workgroup of the same launch look at?

Those that were handed over (csrc/include/device/handover.h), step by step:

    the store; where caches of dies differ, a write-back behind it; a wait for both
    a barrier, unless the same wave goes on
    an atomic on a word of memory, and a later one of the other workgroup on the same word
    a barrier, unless the same wave goes on
    an invalidation of the caches, and a barrier or not; the load

Any other load of what another workgroup has stored in this launch, and any other store over it, is an
error whatever the order in which workgroups happen to run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_WRITE_BACKS = ("buffer_wbl2 sc1", "global_wb scope:SCOPE_DEV")
_INVALIDATIONS = (
    "buffer_inv sc1", "buffer_wbinvl1_vol", "buffer_gl1_inv", "global_inv scope:SCOPE_DEV",
)  # fmt: skip
# NOTE: gfx9 counts stores and loads together, and waits for all of them or none that matters here.
_WAITS = re.compile(
    r"s_waitcnt .*\bvmcnt\(0\)|s_waitcnt_vscnt null, 0x0$|s_wait_storecnt(_dscnt)? 0x0$"
)
_NEEDS_WRITE_BACK = ("gfx942", "gfx950", "gfx1250")

# Workgroup and wave.
Place = tuple[int, int]


def step_of(text: str) -> str:
    """Which step an instruction is: write-back, wait, invalidation, or none, the empty string."""
    if text.startswith(_WRITE_BACKS):
        return "write-back"
    if text.startswith(_INVALIDATIONS):
        return "invalidation"
    return "wait" if _WAITS.match(text) else ""


@dataclass
class _Wave:
    stores: int = 0
    written_back: int = 0  # of these, in the order of the program
    released: list[tuple[int, int]] = field(default_factory=list)  # (epoch, of these), ascending


class Orders:
    """Of one launch.

    Args:
        arch: such as `gfx942`.
    """

    def __init__(self, arch: str = "") -> None:
        self._needs_write_back = arch in _NEEDS_WRITE_BACK
        self._waves: dict[Place, _Wave] = {}
        self._left: dict[int, dict[Place, int]] = {}  # at a word of memory, by address
        # By workgroup: what its atomic found there, and by which wave in which epoch.
        self._found: dict[int, tuple[dict[Place, int], int, int]] = {}
        self._taken: dict[int, list[tuple[int, int]]] = {}  # wave and epoch of invalidations

    def store(self, place: Place) -> int:
        """The number of this store among those of its wave, from 1 on."""
        wave = self._waves.setdefault(place, _Wave())
        wave.stores += 1
        return wave.stores

    def step(self, kind: str, place: Place, epoch: int) -> None:
        """A wave executes an instruction that is a step."""
        wave = self._waves.setdefault(place, _Wave())
        if kind == "write-back":
            wave.written_back = wave.stores
        elif kind == "wait":
            count = wave.written_back if self._needs_write_back else wave.stores
            wave.released.append((epoch, count))
        elif place[0] in self._found:
            _, finder, found_at = self._found[place[0]]
            if place[1] == finder or found_at < epoch:
                self._taken.setdefault(place[0], []).append((place[1], epoch))

    def atomic(self, address: int, place: Place, epoch: int) -> None:
        """A wave leaves what its workgroup has released at a word, and finds what others have left."""
        left = self._left.setdefault(address, {})
        for other, wave in self._waves.items():
            if other[0] == place[0]:
                counts = [n for at, n in wave.released if at < epoch or other == place]
                left[other] = max(counts, default=0)
        self._found[place[0]] = (dict(left), place[1], epoch)

    def sees(self, place: Place, epoch: int, writer: Place, store: int) -> bool:
        """Whether a wave may touch what the wave `writer` of another workgroup has stored."""
        taken = self._taken.get(place[0], ())
        if not any(wave == place[1] or at < epoch for wave, at in taken):
            return False
        return self._found[place[0]][0].get(writer, 0) >= store
