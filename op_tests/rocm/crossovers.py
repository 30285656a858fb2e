"""Up to how many tokens is which path the fastest in the timing model, and by how much?

A `Table` keeps modelled times by architecture, shape, column and M: one column for each dtype's fused
launch (`fused bf16`), top-k launch (`topk bf16`) and top-k launch that counts for the multi-phase sort
(`counting bf16`), and one for each sort behind it (`oneshot`, `multiphase`), which know nothing of
dtypes. A path's time is a sum of columns and gaps.

Modelled are the neighbours of every crossover, and for M = 1, 2, 4, ... 4096 what it takes to know the
fastest path: a column grows with M, so that a time bounds those of larger and of smaller M, and a
launch of seconds that has lost, or one that has won, needs no time of its own. Bounds give way by
SURE, as columns are not quite monotone, which a test checks.

Rejected: every path at every M, which takes three times as long (91 s for three shapes) and tells
nothing more about a choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from amdgcn.timing import LAUNCH_GAP_US
from launches import kernels
from model import Routed, capacity, count, fused, kernels_us, select, sort

from aiter.jit.device_kernels import ARCHS as GPUS
from aiter.routing.dispatch import MODELLED

ARCHS = tuple(sorted(set(MODELLED.values())))
HERE = Path(__file__).resolve().parent
KEPT = HERE / "modelled_times.json"
MOST_TOKENS = 4096
POWERS = tuple(1 << i for i in range(MOST_TOKENS.bit_length()))
# How far a column may be from monotone: a wave more can fall on another SIMD; one row more can take
# another branch (256/8 on gfx942 takes 6.2 us for 33 rows and 5.8 us for 64); what counts takes rows of
# a tile in fewer rounds from 1,024 rows on (4.8 us for 512, 3.1 for 1,024), as groups of lanes go by
# M; and several workgroups that place share the padding, which one has for itself up to M = 32.
SURE = {"fused": 1.07, "topk": 1.1, "counting": 1.55, "oneshot": 1.05, "multiphase": 1.5}
EQUAL = 1.015  # times this close need no closer crossover
FAIR = 1.02  # how much slower than the fastest path a choice may be

# (E, K); the nearest speaks for the others: a shape takes a minute or more.
MODELLED_SHAPES = ((32, 4), (128, 4), (256, 8), (896, 16))
# Rows of more experts may be by keys, which take LDS of their own: the most of it.
MOST_WITHOUT_LDS = 128
BYTES_OF_ROWS = 24 * 512
MODULES = {
    "fused": "module_fused_topk_moe_sorting", "topk": "module_topk_softmax",
    "counting": "module_topk_softmax",
    "oneshot": "module_moe_sorting_opus", "multiphase": "module_moe_sorting_opus",
}  # fmt: skip
_MODEL = b"".join((HERE / name).read_bytes() for name in ("amdgcn/timing.py", "model.py"))

Column = dict[int, float]
Columns = dict[str, Column]
# What selects in front of a sort: a launch, as the sort is.
SELECTS = {"oneshot": "topk", "multiphase": "counting"}
PATHS = ("fused", *SELECTS)


@dataclass(frozen=True)
class Crossing:
    """Up to which M the fused launch and, of the chain, the oneshot sort are the faster."""

    fused_tokens: int = 32
    oneshot_tokens: int = 512


@dataclass(frozen=True)
class Bounds:
    """What is known of a time, in us."""

    low: float
    high: float


class Cells:
    """The times of one architecture and shape, in us; modelled where the kept ones leave a question."""

    def __init__(
        self, arch: str, num_experts: int, topk: int, columns: Columns, twins: list[Columns]
    ) -> None:
        self.arch = arch
        self.shape = num_experts, topk
        self.columns = columns
        self.twins = twins
        self.capacity = capacity(arch, num_experts, topk)
        if num_experts > MOST_WITHOUT_LDS:
            self.capacity -= self.capacity * BYTES_OF_ROWS // GPUS[arch].lds_bytes + 32

    def time(self, column: str, tokens: int) -> float:
        """The kernel time of a column's launches."""
        kept = self.columns.setdefault(column, {})
        if tokens not in kept:
            same = (twin[column] for twin in self.twins if tokens in twin.get(column, {}))
            found = next(same, None)
            kept[tokens] = found[tokens] if found else self._modelled(column, tokens)
        return kept[tokens]

    def _modelled(self, column: str, tokens: int) -> float:
        name, _, dtype = column.partition(" ")
        routed = Routed(tokens, *self.shape, dtype or "bf16")
        if name == "fused":
            found = fused(self.arch, routed)
        elif name == "topk":
            found = select(self.arch, routed)
        elif name == "counting":
            found = count(self.arch, routed)
        else:
            found = sort(self.arch, routed, name)
        return round(kernels_us(found), 3)

    def _known(self, column: str, tokens: int) -> Bounds:
        kept = self.columns.get(column, {})
        if tokens in kept:
            return Bounds(kept[tokens], kept[tokens])
        low = max((time for m, time in kept.items() if m < tokens), default=0.0)
        high = min((time for m, time in kept.items() if m > tokens), default=math.inf)
        sure = SURE[column.partition(" ")[0]]
        return Bounds(min(low / sure, high), max(low, high * sure))

    def known(self, path: str, dtype: str, tokens: int) -> Bounds:
        """The bounds of a path's time, gaps included, by what is kept."""
        if path == "fused":
            fits = tokens <= self.capacity
            return self._known(f"fused {dtype}", tokens) if fits else Bounds(math.inf, math.inf)
        first, then = self._known(f"{SELECTS[path]} {dtype}", tokens), self._known(path, tokens)
        return Bounds(first.low + LAUNCH_GAP_US + then.low, first.high + LAUNCH_GAP_US + then.high)

    def model(self, path: str, dtype: str, tokens: int) -> None:
        """Keeps the times of a path."""
        if path != "fused":
            self.time(f"{SELECTS[path]} {dtype}", tokens)
        self.time(f"fused {dtype}" if path == "fused" else path, tokens)

    def lead(self, path: str, others: tuple[str, ...], dtype: str, tokens: int) -> float:
        """log(the fastest other's time / the path's), or a bound of it on the same side of EQUAL."""
        while True:
            own = self.known(path, dtype, tokens)
            known = {other: self.known(other, dtype, tokens) for other in others}
            high = min(each.high for each in known.values())
            known = {other: each for other, each in known.items() if each.low <= high}
            low = min(each.low for each in known.values())
            if own.low == math.inf:
                return -math.inf
            open_ = {path: own, **known}
            open_ = {name: each for name, each in open_.items() if each.low < each.high}
            if own.high * EQUAL < low or (not open_ and own.high <= low):
                return math.log(low / own.high)
            if own.low > EQUAL * high or not open_:
                return math.log(high / own.low)
            if len(open_) > 1 and path in open_ and high < math.inf:
                self._raise(path, dtype, tokens)
            else:
                # NOTE: the other that may be the fastest first; it may settle the rest.
                choice = min(open_, key=lambda name: (name == path, open_[name].low))
                model = self._raise if choice == path else self.model
                model(choice, dtype, tokens)

    def _raise(self, path: str, dtype: str, tokens: int) -> None:
        """Models a path at the next power of two above what is kept below `tokens`, or there."""
        column = f"fused {dtype}" if path == "fused" else path
        below = [m for m in self.columns.get(column, {}) if m < tokens]
        step = 1 << max(below).bit_length() if below else tokens
        self.model(path, dtype, min(step, tokens))

    def crossing(self, dtype: str, hint: Crossing) -> Crossing:
        """Both crossovers, with all the times that tell whether they are right at every M of POWERS.

        Args:
            hint: where to look first, such as the crossing of a similar architecture.
        """

        def single(tokens: int) -> float:
            return self.lead("fused", tuple(SELECTS), dtype, tokens)

        def oneshot(tokens: int) -> float:
            return self.lead("oneshot", ("multiphase",), dtype, tokens)

        most = min(self.capacity, MOST_TOKENS)
        fused_tokens = last_crossover(single, most, hint.fused_tokens)
        found = Crossing(
            self.capacity if fused_tokens == most else fused_tokens,
            last_crossover(oneshot, MOST_TOKENS, hint.oneshot_tokens),
        )
        # NOTE: times of what wins bound smaller M, times of what loses larger ones.
        every = looked_at(found)
        for look, edge in ((single, found.fused_tokens), (oneshot, found.oneshot_tokens)):
            for tokens in (*(m for m in every[::-1] if m <= edge), *(m for m in every if m > edge)):
                look(tokens)
        return found


def looked_at(found: Crossing) -> list[int]:
    """Every M that a choice is held to: POWERS and the neighbours of the crossovers."""
    edges = found.fused_tokens, found.oneshot_tokens
    every = {*POWERS, *(edge + step for edge in edges for step in (0, 1))}
    return sorted(m for m in every if 1 <= m <= MOST_TOKENS)


def last_crossover(lead: Callable[[int], float], most: int, hint: int) -> int:
    """The crossover behind which no power of two has a lead, for a lead that may come back.

    A step in one column, such as a second group of workgroups, ends a lead for some M.
    """
    found = crossover(lead, most, hint)
    for tokens in POWERS:
        if found < tokens <= most and lead(tokens) > math.log(EQUAL):
            found = crossover(lead, most, tokens, tokens)
    return found


def crossover(lead: Callable[[int], float], most: int, hint: int, low: int = 0) -> int:
    """The largest M up to `most` with a lead of at least 0, for a lead that falls with M; 0 for none.

    Goes up or down from the hint by powers of two, and then halves down to neighbours, or to where the
    two are within EQUAL.

    Args:
        low: an M that is known to have a lead; 0 if none is.
    """
    high = most + 1
    tried = [min(hint, most), min(hint, most) + 1]
    while high - low > 1:
        if tried:
            middle = tried.pop(0)
        elif high > most and low:
            middle = min(1 << low.bit_length(), most)
        elif not low and high > 2:
            middle = 1 << ((high - 1).bit_length() - 1)
            middle = middle if middle < high else middle >> 1
        else:
            middle = (low + high) // 2
        if not low < middle < high:
            continue
        found = lead(middle)
        if abs(found) > math.log(EQUAL):
            low, high = (middle, high) if found > 0 else (low, middle)
        elif middle + 1 == high or lead(middle + 1) <= math.log(EQUAL):
            return middle
        else:
            low = middle + 1  # NOTE: the other way may take a step at a multiple of its tile.
    return low


class Table:
    """All times that are kept, and what they were modelled from.

    Attributes:
        times: columns by architecture and `E/K`.
        digests: of the machine code and the model behind the columns of an architecture.
    """

    def __init__(self, times: dict[str, dict[str, Columns]], digests: dict[str, dict[str, str]]):
        self.times = times
        self.digests = digests

    @classmethod
    def read(cls) -> Table:
        """The kept one, empty if there is none."""
        if not KEPT.exists():
            return cls({}, {})
        content = json.loads(KEPT.read_text(encoding="utf-8"))
        times = {
            arch: {
                shape: {
                    column: {int(m): time for m, time in cells.items()}
                    for column, cells in columns.items()
                }
                for shape, columns in shapes.items()
            }
            for arch, shapes in content["times"].items()
        }
        return cls(times, content["digests"])

    def cells(self, arch: str, num_experts: int, topk: int) -> Cells:
        """Those of an architecture and shape."""
        shape = f"{num_experts}/{topk}"
        columns = self.times.setdefault(arch, {}).setdefault(shape, {})
        return Cells(arch, num_experts, topk, columns, list(self._twins(arch, shape)))

    def _twins(self, arch: str, shape: str) -> Iterator[Columns]:
        """The columns of a shape that other architectures have from the same machine code."""
        own = self.digests.get(arch, {})
        for other, digests_ in self.digests.items():
            same = {name for name in own if other != arch and own[name] == digests_.get(name)}
            columns = self.times.get(other, {}).get(shape, {})
            yield {name: each for name, each in columns.items() if name.partition(" ")[0] in same}

    def drop_stale(self, arch: str) -> list[str]:
        """Drops the columns whose kernels or model have changed; returns their names."""
        kept, now = self.digests.get(arch, {}), digests(arch)
        stale = [name for name in MODULES if kept.get(name) != now[name]]
        for columns in self.times.get(arch, {}).values():
            for column in list(columns):
                if column.partition(" ")[0] in stale:
                    del columns[column]
        self.digests[arch] = now
        return stale

    def write(self) -> None:
        """Keeps it: one line per architecture and shape."""
        shapes = []
        for arch, entries in sorted(self.times.items()):
            lines = [
                f"{json.dumps(shape)}: {json.dumps(_sorted(columns), separators=(',', ':'))}"
                for shape, columns in entries.items()
            ]
            shapes.append(f"{json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n}")
        content = f'{{"digests": {json.dumps(self.digests)},\n"times": {{\n' + ",\n".join(shapes)
        KEPT.write_text(content + "\n}}\n", encoding="utf-8")


def _sorted(columns: Columns) -> Columns:
    return {name: dict(sorted(columns[name].items())) for name in sorted(columns)}


def digests(arch: str) -> dict[str, str]:
    """What the columns' times depend on, by the first word of their names."""
    found = {}
    for name, module in MODULES.items():
        digest = hashlib.sha256(_MODEL)
        for kernel, text in kernels(module, arch).items():
            digest.update("\n".join((kernel, *(each.text for each in text.instructions))).encode())
        found[name] = digest.hexdigest()[:12]
    return found
