"""What would a launch take on an AMD GPU, by one model for all kernels?

python op_tests/rocm/model.py --arch gfx942 --shape 128,4 --tokens 1,16,64 --dtype bf16,f32
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "op_tests")]

import torch  # noqa: E402
from amdgcn.timing import LAUNCH_GAP_US, Timing, replay  # noqa: E402
from launches import Device  # noqa: E402
from torch import Tensor  # noqa: E402

from aiter.cli.table import format_table  # noqa: E402
from aiter.routing.graph import sorted_sizes  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BLOCK_SIZE = 32
SEED = 1


@dataclass(frozen=True)
class Problem:
    """What is routed: M, E, K and the dtype of the logits."""

    tokens: int
    num_experts: int
    topk: int
    dtype: str = "bf16"

    def logits(self) -> Tensor:
        """Random ones."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.tokens, self.num_experts)
        return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name and the timing of its longest workgroup."""

    kernel: str
    timing: Timing


def fused(arch: str, problem: Problem) -> tuple[Launched, ...]:
    """The one launch."""
    device = Device(arch, traced=True)
    logits, outputs = problem.logits(), _outputs(problem)
    device.fused_topk_moe_sorting_fwd(
        logits, *outputs, problem.num_experts, problem.topk, BLOCK_SIZE, True
    )
    return _launched(device)


@cache
def select(arch: str, problem: Problem) -> tuple[Launched, ...]:
    """The top-k launch of the chain: its first workgroup, since others have as many rows or fewer."""
    device = Device(arch, traced=True, workgroups=(0,))
    shape = (problem.tokens, problem.topk)
    out = (torch.empty(shape), *(torch.empty(shape, dtype=torch.int32) for _ in range(2)))
    device.topk_softmax(*out, problem.logits(), True)
    return _launched(device)


def sort(arch: str, problem: Problem, policy: int) -> tuple[Launched, ...]:
    """The sort's launches: one under policy 1, three under 2."""
    device = Device(arch, traced=True)
    logits = problem.logits().float()
    ids = logits.topk(problem.topk).indices.to(torch.int32)
    weights = torch.rand(ids.shape)
    workspace = None
    if policy == 2:
        from aiter.ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size

        size = moe_sorting_opus_get_workspace_size(
            problem.tokens, problem.num_experts, problem.topk, policy, device="cpu"
        )
        workspace = torch.zeros(size, dtype=torch.uint8)
    device.moe_sorting_opus_fwd(
        ids, weights, *_outputs(problem), problem.num_experts, BLOCK_SIZE,
        workspace=workspace, dispatch_policy=policy,
    )  # fmt: skip
    return _launched(device)


def _outputs(problem: Problem) -> tuple[Tensor, ...]:
    """The five outputs of a sort, without a row to zero: workgroups that zero are apart."""
    slots, blocks = sorted_sizes(problem.tokens, problem.topk, problem.num_experts, BLOCK_SIZE)
    return (
        torch.zeros(slots, dtype=torch.int32),
        torch.zeros(slots),
        torch.zeros(blocks, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros((problem.tokens, 0), dtype=torch.bfloat16),
    )


def _launched(device: Device) -> tuple[Launched, ...]:
    found = []
    for name, statistics in device.statistics.items():
        timings = [
            replay(statistics.instructions, traces, device.arch)
            for traces in statistics.traces.values()
        ]
        found.append(Launched(name, max(timings, key=lambda timing: timing.cycles)))
    return tuple(found)


def kernels_us(launches: Iterable[Launched]) -> float:
    """Kernel time, without gaps."""
    return sum(each.timing.us for each in launches)


def total_us(launches: tuple[Launched, ...]) -> float:
    """Kernel time and the gap of every further launch."""
    return kernels_us(launches) + LAUNCH_GAP_US * (len(launches) - 1)


CLASSES = ("VALU", "DPP", "SALU", "SMEM", "LDS", "VMEM", "branch", "barrier", "waitcnt", "nop")
TRIPS = ("global", "scalar", "lds", "store")


def rows_of(arch: str, problem: Problem, way: str, launches: tuple[Launched, ...]) -> list[tuple]:
    head = (arch, problem.dtype, f"{problem.num_experts}/{problem.topk}", problem.tokens, way)
    rows = []
    for each in launches:
        t = each.timing
        rows.append(
            (
                *head,
                each.kernel,
                f"{t.us:.2f}",
                "",
                t.first_load,
                *(t.trips[k] for k in TRIPS),
                *(t.mix[c] for c in CLASSES),
            )
        )
    mix: Counter[str] = Counter()
    for each in launches:
        mix.update(each.timing.mix)
    if len(launches) > 1:
        rows.append(
            (
                *head,
                "all",
                f"{kernels_us(launches):.2f}",
                f"{total_us(launches):.2f}",
                *[""] * 5,
                *(mix[c] for c in CLASSES),
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", default="gfx942")
    parser.add_argument("--shape", action="append", help="E,K")
    parser.add_argument("--tokens", default="1,16,64")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--ways", default="fused,oneshot")
    o = parser.parse_args()
    rows = []
    for arch in o.arch.split(","):
        for shape in o.shape or ["128,4"]:
            e, k = map(int, shape.split(","))
            for dtype in o.dtype.split(","):
                for m in map(int, o.tokens.split(",")):
                    p = Problem(m, e, k, dtype)
                    for way in o.ways.split(","):
                        if way == "fused":
                            found = fused(arch, p)
                        else:
                            found = select(arch, p) + sort(arch, p, 1 if way == "oneshot" else 2)
                        rows += rows_of(arch, p, way, found)
    print(
        format_table(
            (
                "arch",
                "dtype",
                "E/K",
                "M",
                "way",
                "kernel",
                "us",
                "with gaps",
                "first load",
                *TRIPS,
                *CLASSES,
            ),
            rows,
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
