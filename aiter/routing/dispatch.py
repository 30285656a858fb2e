"""Which path routes a problem, and why?

A pure function of the shapes, of what the device can hold and of what was measured on devices like
it, so that it can be printed (`python -m aiter explain`), tested without a GPU, and does not cost a
launch anything.

Paths: "fused" is the single launch; "oneshot" and "multiphase" are the separate chain, top-k in
one launch and the sort in one or three more; "router" is the single launch from hidden states.
Under `dispatch_policy` 0 the first rule that applies decides between them:

1. override   AITER_DISPATCH names the largest M of the fused launch, or asks for capacity alone;
2. measured   a `Crossover` of this device (`aiter.routing.tuned`) or of its architecture (`MEASURED`) is
              close enough: at most a factor of 2 away in E and K together;
3. modelled   nothing is measured, but a timing model was asked about the architecture (`MODELLED`): by
              the nearest row for the logits' dtype, however far it is;
4. estimated  the architecture has an entry in `ESTIMATED`: the fused launch up to that M;
5. capacity   the fused launch wherever it fits.

Under the last two the chain sorts oneshot up to `MOST_ONESHOT_ENTRIES`.

Where the fused launch does not fit, the chain runs, whatever a row says.

From hidden states `choose_router` decides before that, by the same rules but for "estimated" and by
rows of its own (`ROUTER_TIMES`, `modelled_router`), how the router's product is made: "fused", in the
launch that routes (the path "router"); "product", by our product kernel, with the same bits, whose
logits are then routed as anybody's; or "linear", by PyTorch, beyond the M up to which bits are promised.

Rejected: a formula for the kernels' costs, which has more parameters than there are measurements (the
timing model replays machine code instead, and only its crossovers are kept here); one number per family
of architectures, which is wrong by up to 10 times, as crossovers go by E, K and dtype; a rule in C++,
where a measurement could change it only by a rebuild. A direct call of `moe_sorting_opus_fwd` under
policy 0 keeps its kernel's own rule, which is that of capacity; results do not differ.

Long because it is the whole rule, from logits and from hidden states, with what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Path = Literal["router", "fused", "oneshot", "multiphase"]
RouterPath = Literal["fused", "product", "linear"]
Rule = Literal["policy", "override", "measured", "modelled", "estimated", "capacity"]
Logits = Literal["f32", "f16", "bf16"]

AUTOMATIC, ONESHOT, MULTIPHASE = 0, 1, 2
# Of the launch from hidden states; its bits are kept up to there, whatever runs.
MOST_ROUTER_TOKENS = 64
POLICIES = (AUTOMATIC, ONESHOT, MULTIPHASE)
POLICY_OF_CHAIN: dict[Path, int] = {"oneshot": ONESHOT, "multiphase": MULTIPHASE}

MOST_ONESHOT_ENTRIES = 8192  # tokens x slots; also in moe_sorting_opus.cu, and a test compares
CAPACITY = -1  # as an override: every measurement is left aside
FARTHEST = 1.0  # powers of two between a problem's E and K and those of a row that speaks for it


@dataclass(frozen=True)
class Crossover:
    """Up to how many tokens a path is the fastest, for one E, K and D on one device.

    Attributes:
        model_dim: D; 0 in the timing model, which leaves the zeroing of moe_buf out.
        fused_tokens: the fused launch is the fastest up to this M; 0 for never.
        oneshot_tokens: of the chain, the oneshot sort is the faster up to this M; 0 for never.
        source: the device that it was measured on, or the model.
        date: when, as YYYY-MM-DD.
        command: what measured or modelled it.
    """

    num_experts: int
    topk: int
    model_dim: int
    fused_tokens: int
    oneshot_tokens: int
    source: str
    date: str
    command: str


_BENCH = "python op_tests/bench_fused_topk_moe_sorting.py --no-compile"
_H100 = ("NVIDIA H100 80GB HBM3", "2026-11-28", _BENCH)

# Rows by the beginning of the architecture's name. An empty entry is one that is not measured.
# NOTE: the cpu target stays that way. It executes the kernel lane by lane to show what it does; its
# times tell nothing about a GPU, and capacity keeps the kernel in use there.
MEASURED: dict[str, tuple[Crossover, ...]] = {
    "cpu": (),
    "gfx90a": (),
    "gfx94": (),
    "gfx95": (),
    "gfx11": (),
    "gfx12": (),
    "sm_8": (),
    "sm_9": (
        Crossover(128, 4, 2880, 1792, 8, *_H100),
        Crossover(256, 8, 7168, 1664, 32, *_H100),
        Crossover(512, 10, 4096, 256, 8, *_H100),
        # NOTE: by softmax both are equal at about M = 330.
        Crossover(896, 16, 3584, 256, 16, *_H100),
    ),
    "sm_10": (),
    "sm_12": (),
}

# The same by the dtype of the logits, where one is known to differ; these rows speak instead of those.
MEASURED_BY_DTYPE: dict[str, dict[Logits, tuple[Crossover, ...]]] = {
    "sm_9": {
        "f32": (
            Crossover(128, 4, 2880, 1664, 8, *_H100),
            Crossover(256, 8, 7168, 1088, 32, *_H100),
            Crossover(512, 10, 4096, 256, 8, *_H100),
            Crossover(896, 16, 3584, 256, 16, *_H100),
        ),
    },
}


# From hidden states: times of the paths "fused" and "product" in us by M, of D', E and K, by the
# beginning of the architecture's name. bf16 hidden states and weight.
ROUTER_TIMES: dict[str, dict[tuple[int, int, int], dict[int, tuple[float, float]]]] = {
    "sm_9": {
        (2880, 128, 4): {1: (5.15, 3.34), 4: (5.78, 3.86), 16: (6.33, 4.64), 64: (10.49, 7.07)},
        (7168, 256, 8): {1: (6.73, 4.32), 4: (8.14, 5.56), 16: (10.50, 8.01), 64: (21.33, 13.47)},
        (4096, 512, 10): {1: (6.86, 4.93), 4: (8.04, 6.09), 16: (11.13, 9.10), 64: (27.84, 17.53)},
    },
}
_ROUTER_H200 = (
    "NVIDIA H200", "2026-11-27", "python op_tests/bench_fused_router_sorting.py --bias",
)  # fmt: skip


# Whose rows of the timing model (`modelled`) speak for an architecture, by the beginning of its name.
MODELLED: dict[str, str] = {
    "gfx9": "gfx942",
    "gfx1": "gfx1201",
}


# Up to how many tokens the fused launch is taken where nothing is known: 8 rows for every wave of one
# workgroup. From sm_9 on, where several workgroups route, it is half of what was measured for the
# longest rows on an H100.
ESTIMATED: dict[str, int] = {
    "sm_8": 256,
    "sm_9": 512,
    "sm_10": 512,
    "sm_12": 512,
}


@dataclass(frozen=True)
class Problem:
    """What the choice depends on: M, E, K, D, the caller's `dispatch_policy` and the logits' dtype."""

    tokens: int
    num_experts: int
    topk: int
    model_dim: int
    dispatch_policy: int = AUTOMATIC
    logits: Logits = "bf16"


@dataclass(frozen=True)
class Choice:
    """The path, the rule that led to it, and the row behind it if that is "measured" or "modelled"."""

    path: Path
    rule: Rule
    row: Crossover | None = None


def choose(
    problem: Problem,
    max_tokens: int,
    rows: Sequence[Crossover],
    override: int | None = None,
    estimate: int | None = None,
    modelled: Sequence[Crossover] = (),
) -> Choice:
    """The path of a problem.

    Args:
        max_tokens: what `fused_topk_moe_sorting_max_tokens` says for E and K; 0 where there is
            nothing to fuse, as in a sort of ready ids.
        rows: what was measured on this device, or on ones like it.
        override: the largest M of the fused launch; `CAPACITY`; None to go by the rows.
        estimate: the largest M of the fused launch where no row speaks for the problem; None for
            what fits.
        modelled: what the timing model says for the architecture and the problem's dtype of logits;
            the nearest speaks where nothing measured does.
    """
    if problem.dispatch_policy == ONESHOT:
        return Choice("oneshot", "policy")
    if problem.dispatch_policy == MULTIPHASE:
        return Choice("multiphase", "policy")
    row: Crossover | None = None
    rule: Rule = "override"
    if override is None:
        row, rule = nearest(rows, problem), "measured"
        if row is None:
            row, rule = nearest(modelled, problem, math.inf), "modelled"
        if row is None:
            rule = "capacity" if estimate is None else "estimated"
    fused_tokens = max_tokens
    oneshot_entries = MOST_ONESHOT_ENTRIES
    if row is not None:
        fused_tokens = min(max_tokens, row.fused_tokens)
        oneshot_entries = row.oneshot_tokens * row.topk
    elif override is not None and override != CAPACITY:
        fused_tokens = min(max_tokens, override)
    elif override is None and estimate is not None:
        fused_tokens = min(max_tokens, estimate)
    if max_tokens and problem.tokens <= fused_tokens:
        return Choice("fused", rule, row)
    path: Path = "oneshot" if problem.tokens * problem.topk <= oneshot_entries else "multiphase"
    return Choice(path, rule, row)


@dataclass(frozen=True)
class RouterCrossover:
    """Up to how many tokens the product is best made in the launch that routes, for one D', E and K.

    Attributes:
        width: D', of hidden states and of the router's weight.
        fused_tokens: the largest M of the path "fused"; 0 for never.
        source, date, command: as of `Crossover`.
    """

    width: int
    num_experts: int
    topk: int
    fused_tokens: int
    source: str
    date: str
    command: str


@dataclass(frozen=True)
class RouterChoice:
    """How the product is made, the rule that led to it, and the row behind it if there is one."""

    path: RouterPath
    rule: Rule
    row: RouterCrossover | None = None


def choose_router(
    problem: Problem,
    max_tokens: int,
    rows: Sequence[RouterCrossover] = (),
    override: int | None = None,
    modelled: Sequence[RouterCrossover] = (),
    batch_invariant: bool = False,
) -> RouterChoice:
    """How the product of a router is made.

    Args:
        problem: of the routing; its `model_dim` is D', the width of the hidden states.
        max_tokens: what `fused_router_sorting_max_tokens` says for E and K.
        rows: what was measured on this device, or on ones like it.
        override: as in `choose`; up to as many tokens the launch that routes makes the product.
        modelled: what the timing model says for the architecture.
        batch_invariant: whether bits are promised for every M.
    """
    alone: RouterPath = "product"
    if problem.tokens > MOST_ROUTER_TOKENS and not batch_invariant:
        alone = "linear"
    if problem.dispatch_policy != AUTOMATIC:
        return RouterChoice(alone, "policy")
    row: RouterCrossover | None = None
    rule: Rule = "override"
    most = min(max_tokens, MOST_ROUTER_TOKENS)
    if override is None:
        row, rule = nearest_router(rows, problem), "measured"
        if row is None:
            row, rule = nearest_router(modelled, problem, math.inf), "modelled"
        if row is None:
            rule = "capacity"
        else:
            most = min(most, row.fused_tokens)
    elif override != CAPACITY:
        most = min(most, override)
    fuses = max_tokens > 0 and problem.tokens <= most
    return RouterChoice("fused" if fuses else alone, rule, row)


def nearest_router(
    rows: Sequence[RouterCrossover], problem: Problem, farthest: float = FARTHEST
) -> RouterCrossover | None:
    """As `nearest`, for rows of the router; the closest E and K, then the closest D'."""

    def distances(row: RouterCrossover) -> tuple[float, float]:
        width = abs(math.log2(row.width / max(1, problem.model_dim)))
        return _experts_apart(row, problem), width

    best = min(rows, key=distances, default=None)
    return best if best is not None and distances(best)[0] <= farthest else None


def _experts_apart(row: Crossover | RouterCrossover, problem: Problem) -> float:
    """Powers of two between E and K of both."""
    experts = abs(math.log2(row.num_experts / problem.num_experts))
    return experts + abs(math.log2(row.topk / problem.topk))


def nearest(
    rows: Sequence[Crossover], problem: Problem, farthest: float = FARTHEST
) -> Crossover | None:
    """The row that speaks for a problem: closest E and K, then closest D.

    None if all are more than `farthest` powers of two away in E and K together.
    """

    def distances(row: Crossover) -> tuple[float, float]:
        width = abs(math.log2((row.model_dim + 1) / (problem.model_dim + 1)))
        return _experts_apart(row, problem), width

    best = min(rows, key=distances, default=None)
    return best if best is not None and distances(best)[0] <= farthest else None


def rows_of(arch: str) -> tuple[str, tuple[Crossover, ...]]:
    """The entry of `MEASURED` for an architecture: its name and rows, ("", ()) if there is none."""
    name = _longest_prefix(arch, MEASURED)
    return name, MEASURED.get(name, ())


def rows_by_dtype_of(arch: str) -> dict[Logits, tuple[Crossover, ...]]:
    """The entry of `MEASURED_BY_DTYPE` for an architecture; {} if there is none."""
    return MEASURED_BY_DTYPE.get(_longest_prefix(arch, MEASURED_BY_DTYPE), {})


def modelled_of(arch: str) -> dict[Logits, tuple[Crossover, ...]]:
    """What the timing model says for an architecture, by the logits' dtype; {} if nothing."""
    name = MODELLED.get(_longest_prefix(arch, MODELLED))
    if name is None:
        return {}
    # NOTE: imported late, as only AMD's GPUs need it.
    from . import modelled

    provenance = (f"the timing model, {name}", modelled.DATE, modelled.COMMAND)
    return {
        logits: tuple(
            Crossover(e, k, 0, fused, oneshot, *provenance) for e, k, fused, oneshot in rows
        )
        for logits, rows in modelled.ROWS[name].items()
    }


def router_rows_of(arch: str) -> tuple[RouterCrossover, ...]:
    """What was measured from hidden states on an architecture, by `threshold` of `ROUTER_TIMES`."""
    measured = ROUTER_TIMES.get(_longest_prefix(arch, ROUTER_TIMES), {})
    return tuple(
        RouterCrossover(*shape, threshold(times), *_ROUTER_H200)
        for shape, times in measured.items()
    )


def router_modelled_of(arch: str) -> tuple[RouterCrossover, ...]:
    """What the timing model says from hidden states for an architecture; () if nothing."""
    name = MODELLED.get(_longest_prefix(arch, MODELLED))
    if name is None:
        return ()
    # NOTE: imported late, as only AMD's GPUs need it.
    from . import modelled_router

    provenance = (f"the timing model, {name}", modelled_router.DATE, modelled_router.COMMAND)
    return tuple(RouterCrossover(*row, *provenance) for row in modelled_router.ROWS.get(name, ()))


def estimate_of(arch: str) -> int | None:
    """The entry of `ESTIMATED` for an architecture."""
    return ESTIMATED.get(_longest_prefix(arch, ESTIMATED))


def _longest_prefix(arch: str, names: Iterable[str]) -> str:
    return max((name for name in names if arch.startswith(name)), key=len, default="")


def threshold(samples: Mapping[int, tuple[float, float]]) -> int:
    """Up to which M the first of two ways is to be taken, from times at some M.

    It is the measured M that makes the product of all times taken the smallest, so that one
    outlier moves nothing; 0 if the second way is better from the first M on. Equal times go to the
    first way.

    Args:
        samples: M to (time of the first way, time of the second), any unit, above 0.
    """
    limit, gain, best = 0, 0.0, 0.0
    for tokens in sorted(samples):
        first, second = samples[tokens]
        gain += math.log(second / first)
        if gain >= best:
            limit, best = tokens, gain
    return limit


def explain(problem: Problem, choice: Choice, max_tokens: int) -> str:
    """The reason for a choice, in words. Arguments as of `choose`, and what it returned."""
    if choice.rule == "policy":
        return f"dispatch_policy {problem.dispatch_policy} forces the separate chain"
    if max_tokens and problem.tokens > max_tokens:
        why = f"M = {problem.tokens} is more than the {max_tokens} that the fused launch's LDS can hold"
    elif choice.row is not None:
        row = choice.row
        is_measured = choice.rule == "measured"
        what = f" D={row.model_dim}" if is_measured else f" and {problem.logits} logits"
        why = (
            f"{choice.rule} for E={row.num_experts} K={row.topk}{what}: fused up to"
            f" M = {row.fused_tokens}, oneshot up to M = {row.oneshot_tokens}"
        )
    elif choice.rule == "estimated":
        why = "nothing is measured; a wave that routes should have about 8 rows at most"
    elif choice.path == "fused":
        why = f"M = {problem.tokens} fits in the fused launch's LDS (at most {max_tokens})"
    elif max_tokens:
        why = "AITER_DISPATCH keeps the fused launch to fewer tokens"
    else:
        why = "ready ids, or a shape of which not one token fits: there is nothing to fuse"
    return why


def explain_router(problem: Problem, choice: RouterChoice, max_tokens: int) -> str:
    """The reason for a choice from hidden states; arguments as of `choose_router`, and its result."""
    tokens = problem.tokens
    if choice.rule == "policy":
        return f"dispatch_policy {problem.dispatch_policy} forces launches of their own"
    if tokens > MOST_ROUTER_TOKENS:
        return (
            f"M = {tokens} is more than the {MOST_ROUTER_TOKENS} that the one launch is there for"
        )
    if tokens > max_tokens:
        return f"M = {tokens} is more than the {max_tokens} rows that one workgroup's LDS can hold"
    if choice.row is not None:
        row = choice.row
        return (
            f"{choice.rule} for D'={row.width} E={row.num_experts} K={row.topk}: the one launch up to"
            f" M = {row.fused_tokens}"
        )
    if choice.path == "fused":
        return f"M = {tokens} fits, and nothing is known of its speed here"
    return "AITER_DISPATCH keeps the one launch to fewer tokens"


def check_policy(dispatch_policy: int) -> None:
    """Raises TypeError for what is not an int, and ValueError for anything but 0, 1 and 2."""
    if not isinstance(dispatch_policy, int) or isinstance(dispatch_policy, bool):
        raise TypeError(f"dispatch_policy: expected an int, got {type(dispatch_policy).__name__}")
    if dispatch_policy not in POLICIES:
        raise ValueError(
            "dispatch_policy: expected 0 (automatic), 1 (oneshot chain) or 2 (multi-phase chain),"
            f" got {dispatch_policy!r}"
        )
