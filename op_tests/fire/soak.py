"""Does a process that routes for a long time stay right, and as large as it was?

Run as `python op_tests/fire/soak.py [--minutes 10] [--device cpu|cuda] [--seed 0]`. Calls every path
with shapes, dtypes, masks, `num_local_tokens`, policies and layouts that keep changing, on streams
and from replayed graphs where there is a GPU, from threads elsewhere, and starts child processes
with an empty cache folder now and then, which build a module and use it. Every result is judged
against `aiter.reference`. At the end the memory of the process and of the GPU and the number of its
open files must be within the stated limits of what they were after the warm-up.

Shapes come from a fixed set, as a serving engine's do. The limits leave room for what allocators
keep: a leak of one call's smallest output, 8 bytes, would be `calls * 8` bytes, so the number of
calls is printed beside the growth.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import _checkout  # noqa: E402, F401
import torch  # noqa: E402
from buffers import Mismatch, require  # noqa: E402
from cases import GATING_DTYPES, LAYOUTS, LOGITS, MASKS, Case, make_inputs  # noqa: E402
from checked import REPOSITORY, python  # noqa: E402
from route_calls import run_routing  # noqa: E402
from runners import run_fused, run_moe_sorting, run_topk_softmax  # noqa: E402
from targets import Target, default_device, select_targets  # noqa: E402

import aiter  # noqa: E402

SHAPES = ((1, 128, 4), (8, 32, 4), (16, 8, 2), (33, 128, 8), (5, 257, 9), (0, 64, 6), (64, 64, 6))
WARM_UP_SHARE = 0.2  # of the time; caches and allocators fill
MOST_GROWTH_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}  # resident; a driver keeps some for itself
MOST_GPU_GROWTH_BYTES = 0  # PyTorch counts what is allocated exactly
MOST_MORE_FILES = 0
POOLED_STREAMS = 32  # that PyTorch hands out in turn
COLD_START_EVERY_SECONDS = 45.0
CHILD_SECONDS = 600

COLD_START = """
import torch, aiter
from aiter.ops.expert_load import expert_load
load = torch.empty(4, dtype=torch.int32)
expert_load(torch.tensor([[0, 3], [3, 1]], dtype=torch.int32), load)
assert load.tolist() == [1, 1, 0, 2], load
"""


@dataclass(frozen=True)
class Size:
    """What the process holds."""

    memory: int
    gpu_memory: int
    files: int


def size_now(device: str) -> Size:
    """The resident memory in bytes, the GPU memory that PyTorch has allocated, open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    gpu = torch.cuda.memory_allocated() if device != "cpu" else 0
    return Size(pages * os.sysconf("SC_PAGE_SIZE"), gpu, len(os.listdir("/proc/self/fd")))


def draw_case(rng: random.Random) -> Case:
    """A problem of one of the shapes."""
    tokens, experts, topk = rng.choice(SHAPES)
    return Case(
        tokens,
        experts,
        topk,
        rng.choice(GATING_DTYPES),
        need_renorm=rng.random() < 0.5,
        block_size=rng.choice((1, 16, 32, 64)),
        model_dim=rng.choice((1, 7, 64)),
        logits=rng.choice(list(LOGITS)),
        layout=rng.choice(list(LAYOUTS)),
        mask=rng.choice(list(MASKS)),
        num_local=rng.choice((None, 0, tokens, tokens // 2)),
        moe_buf_offset=2 * rng.randrange(8),
        seed=rng.randrange(4),
    )


Step = Callable[[random.Random, Target], None]


def _fused(rng: random.Random, target: Target) -> None:
    run_fused(draw_case(rng), target, aiter.fused_topk_moe_sorting_fwd)


def _topk(rng: random.Random, target: Target) -> None:
    run_topk_softmax(draw_case(rng), target, aiter.topk_softmax)


def _sorting(rng: random.Random, target: Target) -> None:
    size = aiter.moe_sorting_opus_get_workspace_size
    run_moe_sorting(draw_case(rng), target, aiter.moe_sorting_opus_fwd, rng.choice((1, 2)), size)


def _routing(rng: random.Random, target: Target) -> None:
    run_routing(draw_case(rng), target, rng.choice((0, 1, 2)))


def _threads(rng: random.Random, target: Target) -> None:
    """Two threads that route at the same time."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            _routing(random.Random(seed), target)
        except BaseException as error:  # NOTE: handed to the main thread below.
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rng.random(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def _refused(rng: random.Random, target: Target) -> None:
    """A call that raises, which is where references are lost."""
    gating = torch.zeros(3, rng.choice((8, 16)), device=target.device)
    try:
        aiter.fused_moe.topk_softmax_sorting(gating, 2, 4, 8, torch.float32)
    except ValueError:
        return
    raise Mismatch("a width other than num_experts was accepted")


def _stream(rng: random.Random, target: Target) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        _fused(rng, target)


def _graph(rng: random.Random, target: Target) -> None:
    """A captured call, replayed with other logits and another number of tokens."""
    from test_graphs_streams import Pipeline, warm

    path = rng.choice(("fused", "oneshot", "multiphase"))
    case = Case(48, 128, 4, torch.bfloat16, num_local=48, mask="random", model_dim=37)
    pipeline = warm(Pipeline(case, path, target.device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pipeline.launch()
    for seed in range(3):
        variant = replace(case, seed=seed, num_local=rng.randint(0, 48))
        inputs = make_inputs(variant, target.device)
        pipeline.load(inputs)
        graph.replay()
        torch.cuda.synchronize()
        pipeline.check(variant, inputs, target)


STEPS: dict[str, Step] = {
    "fused": _fused,
    "topk_softmax": _topk,
    "moe_sorting_opus": _sorting,
    "routing": _routing,
    "threads": _threads,
    "refused": _refused,
}
GPU_STEPS: dict[str, Step] = {"stream": _stream, "graph": _graph}


def cold_start() -> None:
    """A process with an empty cache folder builds a module and uses it."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "AITER_JIT_DIR": cache}
        done = subprocess.run(
            python("-c", COLD_START),
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    require(done.returncode == 0, f"a process with an empty cache failed:\n{done.stderr[-3000:]}")


def soak(seconds: float, device: str, seed: int) -> tuple[Counter[str], Size, Size]:
    """Runs for so long; the calls by name, and the sizes after the warm-up and at the end."""
    rng = random.Random(seed)
    targets = select_targets(device)
    steps = {**STEPS, **(GPU_STEPS if device != "cpu" else {})}
    counts: Counter[str] = Counter()
    cold_start()
    for target in targets:
        for step in steps.values():
            step(rng, target)
    if device != "cpu":
        for _ in range(POOLED_STREAMS):
            _stream(rng, targets[0])
    start = last_cold = time.monotonic()
    before = None
    while before is None or time.monotonic() - start < seconds:
        name = rng.choice(list(steps))
        steps[name](rng, rng.choice(targets))
        counts[name] += 1
        if time.monotonic() - last_cold > COLD_START_EVERY_SECONDS:
            cold_start()
            counts["cold start"] += 1
            last_cold = time.monotonic()
        if before is None and time.monotonic() - start > seconds * WARM_UP_SHARE:
            before = size_now(device)
    return counts, before, size_now(device)


def problems(device: str, before: Size, after: Size) -> list[str]:
    """What grew beyond its limit on `device`, in words."""
    most = MOST_GROWTH_BYTES["cpu" if device == "cpu" else "cuda"]
    limits = (
        ("resident memory", before.memory, after.memory, most),
        ("GPU memory", before.gpu_memory, after.gpu_memory, MOST_GPU_GROWTH_BYTES),
        ("open files", before.files, after.files, MOST_MORE_FILES),
    )
    return [
        f"{what}: expected at most {limit} more than {old}, got {new - old} more"
        for what, old, new, limit in limits
        if new - old > limit
    ]


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        counts, before, after = soak(60 * options.minutes, options.device, options.seed)
    except Mismatch as error:
        print(f"wrong after seed {options.seed}: {error}")
        return 1
    skipped = "" if options.device != "cpu" else "; streams and graphs skipped, as there is no GPU"
    print(f"device {options.device}, seed {options.seed}, {options.minutes} minutes{skipped}")
    print(f"{counts.total()} calls, all right: {dict(sorted(counts.items()))}")
    grown = (after.memory - before.memory) / 2**20
    print(f"resident memory {before.memory / 2**20:.1f} MiB, then {grown:+.1f} MiB")
    print(f"GPU memory {before.gpu_memory} bytes, then {after.gpu_memory - before.gpu_memory:+d}")
    print(f"open files {before.files}, then {after.files - before.files:+d}")
    found = problems(options.device, before, after)
    for problem in found:
        print(f"error: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
