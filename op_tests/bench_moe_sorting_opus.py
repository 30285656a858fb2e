"""How fast is the sort of ready top-k ids, oneshot and multi-phase?

python op_tests/bench_moe_sorting_opus.py [--shape E,K,D ...] [options of bench_report]
"""

from __future__ import annotations

import argparse
import sys

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import torch
from bench_report import Record

from aiter import fused_moe, reference

SHAPES = ("32,4,2880", "128,4,2880", "256,8,7168", "512,10,4096", "896,16,3584")
POLICIES = {"policy 0": 0, "oneshot": 1, "multiphase": 2}


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens; the results are checked first."""
    num_experts, topk, model_dim = shape
    routed = [
        reference.topk_softmax(logits, topk, True)
        for logits in bench_report.logits(options, tokens, num_experts)
    ]
    weights, ids = routed[0]
    expected = reference.moe_sorting(ids, weights, num_experts, model_dim, torch.bfloat16)
    record: Record = {}
    for name, policy in POLICIES.items():

        def run(entry: tuple[torch.Tensor, torch.Tensor], policy: int = policy) -> object:
            weights, ids = entry
            return fused_moe.moe_sorting(
                ids, weights, num_experts, model_dim, torch.bfloat16, dispatch_policy=policy
            )

        slots = int(expected[3][0])
        if not torch.equal(run(routed[0])[0][:slots], expected[0][:slots]):  # type: ignore[index]
            raise RuntimeError(f"{name}: sorted_ids differ from the reference")
        record[name] = bench_timing.call_us(
            [lambda r=r, run=run: run(r) for r in routed], options.device
        )
    return record


def main() -> int:
    options = bench_report.parser(__doc__).parse_args()
    bench_report.run(options, "moe_sorting_opus", ("E", "K", "D"), SHAPES, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
