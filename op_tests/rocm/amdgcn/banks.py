"""How long does LDS take for an access of a wave, counted in passes over its banks?

LDS has 32 banks of 4 bytes. A pass serves 32 lanes of a 4-byte access (half a wave64), 16 lanes of
an 8-byte and 8 of a 16-byte one, in lane order, if no two of them need different words of one bank;
lanes that need the same word share it. Atomics share nothing: every lane takes its bank for itself.
What an access needs beyond one pass per group of lanes with an active lane is bank conflicts.

The model is the one of the instruction set documents' data-share chapters. gfx950 reads wider than
that, and a WGP of gfx11 and gfx12 has two such halves; neither makes more conflicts than counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BANKS = 32
WORD_BYTES = 4


@dataclass
class BankTally:
    """What the accesses of one instruction needed.

    Attributes:
        accesses: executions, of all waves; both halves of a double access count.
        passes: over the banks, that they took.
        least: passes that they would take without conflicts.
        worst: passes that one group of lanes needed at most.
    """

    accesses: int = 0
    passes: int = 0
    least: int = 0
    worst: int = 0

    def note(self, needed: list[int]) -> None:
        """Adds one access."""
        self.accesses += 1
        self.passes += sum(needed)
        self.least += len(needed)
        self.worst = max(self.worst, *needed)


def passes(
    offsets: NDArray[np.int64], lanes: NDArray[np.int64], size: int, is_atomic: bool
) -> list[int]:
    """Passes that every group of lanes needs.

    Args:
        offsets: byte offsets in LDS of the active lanes.
        lanes: the indices of these lanes.
        size: bytes per lane.
        is_atomic: whether lanes that need the same word have to wait for each other.
    """
    num_words = max(1, size // WORD_BYTES)
    groups = lanes // (NUM_BANKS // (1 << (num_words - 1).bit_length()))
    needed = []
    for group in np.unique(groups):
        first = offsets[groups == group] // WORD_BYTES
        words = (first[:, None] + np.arange(num_words)).reshape(-1)
        if not is_atomic:
            words = np.unique(words)
        needed.append(int(np.bincount(words % NUM_BANKS).max()))
    return needed
