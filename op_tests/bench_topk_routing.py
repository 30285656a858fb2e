"""How fast is topk_routing, top-k by the rule of a model, next to PyTorch?

python op_tests/bench_topk_routing.py [--rule kimi-k2] [--shape E,K ...] [options of bench_report]
"""

from __future__ import annotations

import argparse
import sys

import _checkout  # noqa: F401  (makes a checkout importable)
import bench_report
import bench_timing
import torch
from bench_report import Record
from rule_cases import MODELS, check_routing, num_logits
from torch import Tensor

from aiter.ops.rule import RoutingRule
from aiter.ops.topk_routing import topk_routing

# Rules that `eager` can express.
RULES = ("deepseek-v3", "kimi-k2", "kimi-k3", "glm-4.5", "nemotron-3", "deepseek-v4", "ernie-4.5")


def eager(logits: Tensor, topk: int, rule: RoutingRule, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The selection as models write it, in PyTorch operations; ties come in any order."""
    x = logits.float()
    if rule.scoring_func == "softmax":
        scores = torch.softmax(x, dim=-1)
    elif rule.scoring_func == "sigmoid":
        scores = torch.sigmoid(x)
    else:
        scores = torch.nn.functional.softplus(x).sqrt()
    keys = scores + bias
    if rule.num_expert_group > 1:
        groups = keys.view(len(keys), rule.num_expert_group, -1)
        value = groups.topk(2, dim=-1).values.sum(-1)
        stay = value.topk(rule.topk_group, dim=-1).indices
        stays = torch.zeros_like(value, dtype=torch.bool).scatter_(1, stay, True)
        keys = groups.masked_fill(~stays.unsqueeze(-1), float("-inf")).flatten(1)
    ids = keys.topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if rule.need_renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.routed_scaling_factor, ids


def measure(options: argparse.Namespace, shape: tuple[int, ...], tokens: int) -> Record:
    """The figures of one shape and number of tokens; the result is checked first."""
    num_experts, topk = shape
    rule = MODELS[options.rule][0]
    inputs = bench_report.logits(options, tokens, num_logits(rule, num_experts))
    generator = torch.Generator().manual_seed(bench_report.SEED + 1)
    bias = (torch.randn(num_experts, generator=generator) * 0.1).to(options.device)
    weights = torch.empty(tokens, topk, device=options.device)
    ids = torch.empty_like(weights, dtype=torch.int32)

    def ours(logits: Tensor) -> None:
        topk_routing(weights, ids, logits, rule=rule, correction_bias=bias)

    def pytorch(logits: Tensor) -> None:
        eager(logits, topk, rule, bias)

    ours(inputs[0])
    check_routing((weights.cpu(), ids.cpu()), inputs[0].cpu(), rule, bias.cpu())
    theirs, _ = eager(inputs[0], topk, rule, bias)
    torch.testing.assert_close(weights.sum(-1), theirs.sum(-1), rtol=1e-5, atol=1e-6)
    return {
        name: bench_timing.call_us([lambda x=x, run=run: run(x) for x in inputs], options.device)
        for name, run in (("topk_routing", ours), ("PyTorch", pytorch))
    }


def main() -> int:
    parser = bench_report.parser(__doc__)
    parser.add_argument("--rule", choices=RULES, default="deepseek-v3", help="of a model")
    options = parser.parse_args()
    _, num_experts, topk, _ = MODELS[options.rule]
    title = f"topk_routing by the rule of {options.rule}"
    bench_report.run(options, title, ("E", "K"), (f"{num_experts},{topk}",), measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
