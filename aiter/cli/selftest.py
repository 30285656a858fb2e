"""Does this installation route correctly here? A report to read, or to paste into a bug report.

    python -m aiter selftest [--device cpu|cuda[:N]] [--wave 64|32] [--quick]

Builds what is missing, then compares every op under every policy with `aiter.reference` on inputs
with ties, infinities and NaN, captures and replays a graph where there is a GPU, and times a decode
call. It needs nothing but the installed package, so that an owner of hardware that the authors do not
have can say what happens on it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import aiter
from aiter import fused_moe, reference
from aiter.cli import env_command
from aiter.cli.table import format_table
from aiter.jit import cpu_wave
from aiter.ops.device import current_device

# (M, E, K): models' shapes, experts that are no power of two, tails.
SHAPES = (
    (1, 128, 4), (64, 128, 4), (13, 256, 8), (7, 32, 4), (5, 512, 10), (3, 896, 16), (9, 161, 9),
    (33, 8, 2), (2, 5, 5), (300, 128, 8), (0, 128, 4),
)  # fmt: skip
QUICK_SHAPES = SHAPES[:4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POLICY_NAMES = {0: "automatic", 1: "oneshot", 2: "multiphase"}
WEIGHT_TOLERANCE = 1e-6  # relative: the reference's exp may round differently
SMALLEST_NORMAL = 2.0**-126  # absolute: a device may flush subnormal weights
BLOCK_SIZE = 32
MODEL_DIM = 37  # 74 bytes a row in bf16: not a multiple of 16


@dataclass(frozen=True)
class Problem:
    """One routing problem and what has to come out of it."""

    name: str
    logits: Tensor
    topk: int
    need_renorm: bool
    mask: Tensor | None
    num_local: Tensor | None


@dataclass
class Tally:
    """What became of the problems of one row of the report."""

    passed: int = 0
    failed: int = 0
    paths: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Prints the report; 0 if everything was right, 1 if not."""
    parser = argparse.ArgumentParser("python -m aiter selftest", description=__doc__)
    parser.add_argument("--device", help="cpu or cuda[:index]; the GPU if there is one, else cpu")
    parser.add_argument("--wave", type=int, choices=(64, 32), default=64, help="cpu wave width")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    options = parser.parse_args(argv)
    device = current_device(options.device)
    on_cpu = device.type == "cpu"
    env_command.run(options)
    print()
    print(format_table(("device", "value"), _device_rows(device, options.wave)))
    print()
    failures: list[str] = []
    with cpu_wave(options.wave) if on_cpu else nullcontext():
        print(_parity(device, QUICK_SHAPES if options.quick else SHAPES, failures))
        print()
        print(
            format_table(("decode call, M=32 E=128 K=4 D=2880", "result"), _calls(device, failures))
        )
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    print(f"\nselftest: {'FAILED' if failures else 'passed'} on {device}")
    return 1 if failures else 0


def _device_rows(device: torch.device, wave: int) -> list[tuple[str, str]]:
    if device.type == "cpu":
        return [("device", "the CPU, executing the HIP kernels"), ("wave", str(wave))]
    properties = torch.cuda.get_device_properties(device)
    return [
        ("device", f"{properties.name} ({device})"),
        ("architecture", getattr(properties, "gcnArchName", None)
         or f"sm_{properties.major}{properties.minor}"),
        ("runtime", f"HIP {torch.version.hip}" if torch.version.hip
         else f"CUDA {torch.version.cuda}"),
        ("compute units", str(properties.multi_processor_count)),
        ("wave", str(getattr(properties, "warp_size", "unknown"))),
    ]  # fmt: skip


def _problems(
    device: torch.device, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype
) -> Iterator[Problem]:
    generator = torch.Generator().manual_seed(0)
    for m, e, k in shapes:
        normal = torch.randn(m, e, generator=generator)
        kinds = {"normal": normal, "ties": (normal * 2).round()}
        odd = normal.clone()
        odd[torch.rand(m, e, generator=generator) < 0.3] = float("nan")
        odd[torch.rand(m, e, generator=generator) < 0.3] = -float("inf")
        odd[torch.rand(m, e, generator=generator) < 0.01] = float("inf")
        kinds["non-finite"] = odd
        mask = torch.randint(0, 2, (e,), generator=generator, dtype=torch.int32).to(device)
        local = torch.tensor([m * 2 // 3], dtype=torch.int32, device=device)
        for kind, logits in kinds.items():
            on_device = logits.to(dtype).to(device)
            name = f"M={m} E={e} K={k} {kind} {dtype}"
            yield Problem(name, on_device, k, True, None, None)
            yield Problem(f"{name}, no renorm", on_device, k, False, None, None)
            yield Problem(f"{name}, mask, num_local_tokens", on_device, k, True, mask, local)


def _parity(
    device: torch.device, shapes: Sequence[tuple[int, int, int]], failures: list[str]
) -> str:
    rows = []
    for dtype in DTYPES:
        for policy, policy_name in POLICY_NAMES.items():
            tally = Tally()
            for problem in _problems(device, shapes, dtype):
                wrong, path = _check(problem, policy)
                tally.paths = (*tally.paths, path)
                if wrong:
                    tally.failed += 1
                    failures.append(f"policy {policy}, {problem.name}: {wrong}")
                else:
                    tally.passed += 1
            paths = ", ".join(sorted(set(tally.paths)))
            rows.append((str(dtype), policy_name, paths, tally.passed, tally.failed))
    return format_table(("logits", "policy", "paths", "passed", "failed"), rows)


def _check(problem: Problem, policy: int) -> tuple[str, str]:
    """What is wrong with the routing of a problem ("" for nothing), and the path it took."""
    num_experts = problem.logits.shape[1]
    arguments = (problem.topk, num_experts, MODEL_DIM, torch.bfloat16, problem.need_renorm)
    got = fused_moe.topk_softmax_sorting(
        problem.logits, *arguments, BLOCK_SIZE, problem.mask, problem.num_local, policy
    )
    expected = reference.topk_softmax_sorting(
        problem.logits, *arguments, BLOCK_SIZE, problem.mask, problem.num_local
    )
    return _difference(got, expected), str(fused_moe.last_path())


def _difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    slots, num_local = expected[3].tolist()
    if got[3].tolist() != [slots, num_local]:
        return f"num_valid_ids: expected {[slots, num_local]}, got {got[3].tolist()}"
    for index, name, size in (
        (0, "sorted_ids", slots),
        (2, "sorted_expert_ids", slots // BLOCK_SIZE),
    ):
        if not torch.equal(got[index][:size], expected[index][:size]):
            at = int((got[index][:size] != expected[index][:size]).nonzero()[0])
            return f"{name}[{at}]: expected {int(expected[index][at])}, got {int(got[index][at])}"
    error = (got[1][:slots] - expected[1][:slots]).abs()
    bound = WEIGHT_TOLERANCE * expected[1][:slots] + SMALLEST_NORMAL
    if not bool((error <= bound).all()):
        return f"sorted_weights: expected within {WEIGHT_TOLERANCE}, got {float(error.max())} off"
    if bool(got[4][:num_local].view(torch.uint8).any()):
        return f"moe_buf: expected {num_local} rows of zeros, got others"
    return ""


def _calls(device: torch.device, failures: list[str]) -> list[tuple[str, str]]:
    logits = torch.randn(32, 128, dtype=torch.bfloat16, device=device)

    def call() -> fused_moe.SortedBuffers:
        return fused_moe.topk_softmax_sorting(logits, 4, 128, 2880, torch.bfloat16)

    call()
    rows = [
        ("path", str(fused_moe.last_path())),
        ("largest M of the fused launch",
         str(aiter.fused_topk_moe_sorting_max_tokens(128, 4, device=device))),
    ]  # fmt: skip
    if device.type == "cuda":
        rows.append(("graph replay with new logits", _graph(logits, call, failures)))
        rows.append(("host time per call", f"{_wall_us(call, 200, device, wait=False):.1f} us"))
    rows.append(("wall time per call", f"{_wall_us(call, 20, device, wait=True):.1f} us"))
    return rows


def _wall_us(call: Callable[[], object], count: int, device: torch.device, wait: bool) -> float:
    """Median time per call over ten samples; with `wait`, until the device is done."""
    samples = []
    for _ in range(10):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
            if wait:
                _synchronize(device)
        samples.append((time.perf_counter() - start) / count * 1e6)
    return statistics.median(samples)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _graph(logits: Tensor, call: Callable[[], fused_moe.SortedBuffers], failures: list[str]) -> str:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers = call()
    for _ in range(3):
        logits.copy_(torch.randn_like(logits))
        graph.replay()
        expected = reference.topk_softmax_sorting(logits, 4, 128, 2880, torch.bfloat16)
        wrong = _difference(buffers, expected)
        if wrong:
            failures.append(f"graph replay: {wrong}")
            return "wrong"
    return "right"
