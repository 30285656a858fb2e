"""How long does a call take? The clocks that the benches share.

`graph_slope_us`: device time of one call inside a stream of calls, with no launch gap and no
graph-launch cost: the slope between a CUDA/HIP graph of `LOW` and one of `HIGH` copies.
`event_us`: one call between two device events, the L2 flushed before (cold) or not (warm).
`host_us`: what the caller's thread pays per call, enqueueing without synchronising.
`cpu_us`: wall time of a call on the cpu target, where a call is done when it returns.
All are medians; the spread is the distance between the quartiles, over the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

LOW, HIGH = 20, 60  # calls per graph
REPLAYS = 60
EVENT_REPEATS = 100
HOST_CALLS = 300
FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median, and the interquartile range relative to it."""

    us: float
    spread: float


def summary(samples: Sequence[float]) -> Timing:
    """Median and relative spread of samples in microseconds."""
    quartiles = statistics.quantiles(samples, n=4)
    median = statistics.median(samples)
    return Timing(median, (quartiles[2] - quartiles[0]) / median if median else 0.0)


def graph_slope_us(calls: Sequence[Call]) -> Timing:
    """Device time per call; `calls` are the same work on rotating inputs, used in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graphs = []
        for count in (LOW, HIGH):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(count):
                    calls[i % len(calls)]()
            graphs.append(graph)
        slopes = []
        for _ in range(REPLAYS):
            low, high = (_elapsed_us(graph.replay, stream) for graph in graphs)
            slopes.append((high - low) / (HIGH - LOW))
    return summary(slopes)


def event_us(call: Call, cold: bool) -> Timing:
    """Device time of a single call, launch latency included; `cold` flushes the L2 before."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cold else None
    stream = torch.cuda.current_stream()
    samples = []
    for _ in range(EVENT_REPEATS):
        if flush is not None:
            flush.zero_()
        samples.append(_elapsed_us(call, stream))
    return summary(samples)


def host_us(call: Call) -> Timing:
    """Host time per call while the device works behind."""
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        samples.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    torch.cuda.synchronize()
    return summary(samples)


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


def call_us(calls: Sequence[Call]) -> Timing:
    """What a bench's table shows for the same work on rotating inputs: graph slope on a GPU."""
    return graph_slope_us(calls) if torch.cuda.is_initialized() else cpu_us(calls[0])


def _elapsed_us(call: Call, stream: torch.cuda.Stream) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
