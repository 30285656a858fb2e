"""How fast is topk_softmax, the first launch of the separate chain, next to PyTorch?

python op_tests/bench_topk_softmax.py [--shape E,K ...] [options of bench_report]
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

import aiter
from aiter import reference

SHAPES = ("32,4", "128,4", "128,8", "256,8", "512,10", "896,16")


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens; the result is checked first."""
    num_experts, topk = shape
    inputs = bench_report.logits(options, tokens, num_experts)
    weights = torch.empty(tokens, topk, device=options.device)
    ids, token_expert_ids = (
        torch.empty(tokens, topk, dtype=torch.int32, device=options.device) for _ in range(2)
    )

    def ours(logits: Tensor) -> None:
        aiter.topk_softmax(weights, ids, token_expert_ids, logits, True)

    def eager(logits: Tensor) -> None:
        values, _ = torch.topk(logits.float(), topk, dim=-1)
        torch.softmax(values, dim=-1)

    ours(inputs[0])
    expected_weights, expected_ids = reference.topk_softmax(inputs[0], topk, True)
    if not torch.equal(ids, expected_ids):
        raise RuntimeError(f"topk_softmax: ids differ from the reference, E={num_experts} K={topk}")
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-30)
    return {
        name: bench_timing.call_us([lambda x=x, run=run: run(x) for x in inputs], options.device)
        for name, run in (("topk_softmax", ours), ("PyTorch", eager))
    }


def main() -> int:
    options = bench_report.parser(__doc__).parse_args()
    bench_report.run(options, "topk_softmax", ("E", "K"), SHAPES, measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
