"""How long does a call take? The clocks that the benches and `python -m aiter tune` share.

`strict_us`: device time of one call between kernels that do nothing and let nothing start early: the
slope of a graph of (call, empty kernel) pairs less that of one of empty kernels, both between `LOW` and
`HIGH` copies. It is what a call takes among other kernels, and the clock to compare launches by.
`graph_slope_us`: device time of one call inside a stream of calls, with no launch gap and no
graph-launch cost: the slope between a CUDA/HIP graph of `LOW` and one of `HIGH` copies. Its inputs
and outputs stay in the L2 (warm). Where launches may overlap (compute capability 9.0), a call that
follows its like starts up while that one still runs: the overlapping clock.
`cold_us`: device time of one call after the L2 was flushed: what a graph of flushes and calls takes
more than a graph of the flushes alone.
`host_us`: what the caller's thread pays per call, enqueueing without synchronising.
`wall_us`: wall time per call of several in a row, the last one's work included: for what synchronises,
and so cannot be captured in a graph.
`floor_us`: device time of a kernel that does nothing, by the same slope: no launch can beat it.
`cpu_us`: wall time of a call on the cpu target, where a call is done when it returns.
All are medians, of 60 replays on a GPU unless these would take longer than half a second; the spread is
the distance between the quartiles, over the median.

Rejected: two events around a single call. The second one is recorded when the host has got through
the call, so that below about 10 us they measure the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

Call = Callable[[], object]

LOW, HIGH = 20, 60  # calls per graph
REPLAYS = 60
LEAST_REPLAYS, MOST_US = 10, 5e5  # fewer replays where 60 would take longer than that
COLD_CALLS, COLD_REPLAYS = 10, 20
HOST_CALLS, HOST_REPEATS = 30, 20  # NOTE: more calls would fill the launch queue, and wait for it.
WALL_CALLS = 5
FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU


@dataclass(frozen=True)
class Timing:
    """Microseconds per call.

    Attributes:
        us: the median: device time with a warm L2 on a GPU, where calls may overlap; wall time on the
            cpu target.
        spread: the interquartile range over the median.
        strict_us: the median where nothing overlaps; None where it was not measured.
        cold_us: the median with a cold L2; None where it was not measured.
        host_us: the median of what the caller's thread pays; None where it was not measured.
    """

    us: float
    spread: float
    strict_us: float | None = None
    cold_us: float | None = None
    host_us: float | None = None


def summary(samples: Sequence[float]) -> Timing:
    """Median and relative spread of at least two samples in microseconds."""
    quartiles = statistics.quantiles(samples, n=4)
    median = statistics.median(samples)
    return Timing(median, (quartiles[2] - quartiles[0]) / median if median else 0.0)


def slopes(low_us: Sequence[float], high_us: Sequence[float], calls: int) -> list[float]:
    """Time per call from pairs of runs, the second of which makes `calls` more calls."""
    return [(high - low) / calls for low, high in zip(low_us, high_us, strict=True)]


def affordable(replays: int, round_us: float) -> int:
    """As many of `replays` rounds of `round_us` each as take `MOST_US`, at least `LEAST_REPLAYS`."""
    return min(replays, max(LEAST_REPLAYS, int(MOST_US / round_us)))


def graph_slope_us(calls: Sequence[Call], replays: int = REPLAYS) -> Timing:
    """Device time per call; `calls` are the same work on rotating inputs, used in turn."""
    rotated = [[calls[i % len(calls)] for i in range(count)] for count in (LOW, HIGH)]
    low, high = _replay_us(calls, rotated, replays)
    return summary(slopes(low, high, HIGH - LOW))


def cold_us(calls: Sequence[Call]) -> Timing:
    """Device time per call with an L2 that holds nothing of it."""
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    return _behind(flushed.zero_, calls, COLD_CALLS, COLD_REPLAYS)


def strict_us(calls: Sequence[Call], replays: int = REPLAYS) -> Timing:
    """Device time per call between kernels that do nothing and overlap with nothing."""
    graphs: list[list[Call]] = []
    for count in (LOW, HIGH):
        pairs: list[Call] = []
        for i in range(count):
            pairs += [calls[i % len(calls)], empty_kernel]
        graphs += [pairs, [empty_kernel] * count]
    low, low_empty, high, high_empty = _replay_us(calls, graphs, replays)
    pairs_us = slopes(low, high, HIGH - LOW)
    empty_us = slopes(low_empty, high_empty, HIGH - LOW)
    return summary([both - empty for both, empty in zip(pairs_us, empty_us, strict=True)])


def floor_us() -> Timing:
    """Device time of a kernel of one thread that returns at once."""
    return graph_slope_us([empty_kernel])


def host_us(call: Call, device: torch.device, count: int = HOST_CALLS) -> Timing:
    """Host time per call of `count` in a row, while the device works behind."""
    return _in_a_row(call, device, count, waits=False)


def wall_us(call: Call, device: torch.device, count: int = WALL_CALLS) -> Timing:
    """Wall time per call of `count` in a row, until the device has done them."""
    return _in_a_row(call, device, count, waits=True)


def cpu_us(call: Call, seconds: float = 0.2) -> Timing:
    """Wall time per call on the CPU, over about `seconds`, at least 7 calls."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 7 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return summary(samples)


def call_us(calls: Sequence[Call], device: torch.device, everything: bool = False) -> Timing:
    """What a bench's table shows for the same work on rotating inputs: graph slope on a GPU.

    Args:
        device: where the calls work, the current one if it is a GPU.
        everything: also measure the strict clock, cold L2 and host time, on a GPU.
    """
    if device.type != "cuda":
        return cpu_us(calls[0])
    timing = graph_slope_us(calls)
    if everything:
        timing = replace(
            timing,
            strict_us=strict_us(calls).us,
            cold_us=cold_us(calls).us,
            host_us=host_us(calls[0], device).us,
        )
    return timing


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; the cpu target is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_a_row(call: Call, device: torch.device, count: int, waits: bool) -> Timing:
    """The caller's time per call of `count`; `waits`: until the device has done them."""
    call()
    samples = []
    for _ in range(HOST_REPEATS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        if waits:
            synchronize(device)
        samples.append((time.perf_counter() - start) / count * 1e6)
    synchronize(device)
    return summary(samples)


def empty_kernel() -> None:
    """Launches a kernel that does nothing."""
    torch.cuda._sleep(0)  # type: ignore[no-untyped-call]


def _behind(other: Call, calls: Sequence[Call], count: int, replays: int) -> Timing:
    """What calls, each behind one of `count` other calls, take more than those."""
    both: list[Call] = []
    for i in range(count):
        both += [other, calls[i % len(calls)]]
    low, high = _replay_us(calls, [[other] * count, both], replays)
    return summary(slopes(low, high, count))


def _replay_us(
    warm_up: Sequence[Call], graphs: Sequence[Sequence[Call]], replays: int
) -> list[list[float]]:
    """What every replay of each graph takes, the graphs replayed in turn."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in warm_up:
            call()
        torch.cuda.synchronize()
        captured = []
        round_us = 0.0
        for calls in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
            graph.replay()
            round_us += _elapsed_us(graph.replay, stream)
            captured.append(graph)
        times: list[list[float]] = [[] for _ in captured]
        for _ in range(affordable(replays, round_us)):
            for graph, samples in zip(captured, times, strict=True):
                samples.append(_elapsed_us(graph.replay, stream))
    return times


def _elapsed_us(call: Call, stream: torch.cuda.Stream) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3
