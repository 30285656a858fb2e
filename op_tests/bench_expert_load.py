"""How fast is expert_load next to torch.bincount?

python op_tests/bench_expert_load.py [--shape E,K ...] [options of bench_report]
"""

from __future__ import annotations

import argparse
import sys

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import torch
from bench_report import Record
from torch import Tensor

from aiter.ops.expert_load import expert_load


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens; the result is checked first."""
    num_experts, topk = shape
    ids = [
        torch.topk(logits.float(), topk, dim=-1).indices.int()
        for logits in bench_report.logits(options, tokens, num_experts)
    ]
    load = torch.empty(num_experts, dtype=torch.int32, device=options.device)

    def ours(topk_ids: Tensor) -> None:
        expert_load(topk_ids, load)

    def eager(topk_ids: Tensor) -> None:
        torch.zeros_like(load).scatter_add_(
            0, topk_ids.view(-1).long(), torch.ones_like(ids[0]).view(-1)
        )

    ours(ids[0])
    if not torch.equal(
        load.cpu(), torch.bincount(ids[0].cpu().view(-1), minlength=num_experts).int()
    ):
        raise RuntimeError(f"expert_load: counts differ from torch.bincount, E={num_experts}")
    return {
        name: bench_timing.call_us([lambda i=i, run=run: run(i) for i in ids], options.device)
        for name, run in (("expert_load", ours), ("PyTorch", eager))
    }


def main() -> int:
    options = bench_report.parser(__doc__).parse_args()
    bench_report.run(options, "expert_load", ("E", "K"), ("128,4", "256,8"), measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
