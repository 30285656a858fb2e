"""Which problems do the kernels solve under a checker?

A subset of what the op tests ask, small enough for an execution that is 5 to 50 times slower: every
op, path, dtype, mask, layout and alignment, and shapes around the limits of words, waves and
registers. A `Check` is one call with its result compared, by the op tests' own judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from cases import GATING_DTYPES, LOGITS, MASKS, Case
from route_calls import run_routing
from router_calls import run_router
from rule_calls import Call
from rule_cases import BIASES, MODELS, num_logits
from rule_cases import LOGITS as RULE_LOGITS
from runners import can_hand_over, run_fused, run_moe_sorting, run_topk_softmax
from targets import Target

import aiter

Run = Callable[[Case, Target], object]


def _fused(case: Case, target: Target) -> object:
    return run_fused(case, target, aiter.fused_topk_moe_sorting_fwd)


def _fused_cluster(case: Case, target: Target) -> object:
    # NOTE: every workgroup has LDS for the counts of all, which long rows leave for fewer of them.
    size = 16 if case.num_experts <= 600 else 4
    fused = partial(aiter.fused_topk_moe_sorting_fwd, cluster_size=size)
    return run_fused(case, target, fused)


def _fused_handover(case: Case, target: Target) -> object:
    hands_over = can_hand_over(target)
    fused = partial(aiter.fused_topk_moe_sorting_fwd, handover_size=5 if hands_over else 1)
    return run_fused(case, target, fused, hands_over)


def _router(case: Case, target: Target) -> object:
    return run_router(case, target, num_workgroups=5, width=44)


def _rule(model: str) -> Run:
    """By the rule of `model`, on every path and by several workgroups, with top-k for the caller."""

    def run(case: Case, target: Target) -> object:
        rule, num_experts, topk, has_bias = MODELS[model]
        generator = torch.Generator().manual_seed(case.seed)
        bias = BIASES["exact"](num_experts + rule.num_zero_experts, generator) if has_bias else None
        shape = (case.num_tokens, num_logits(rule, num_experts))
        logits = RULE_LOGITS["exact"](shape, generator).to(case.dtype)
        return Call(target, logits, topk, rule, bias, block_size=case.block_size).check()

    return run


def _topk_softmax(case: Case, target: Target) -> object:
    return run_topk_softmax(case, target, aiter.topk_softmax)


def _sorting(policy: int) -> Run:
    def run(case: Case, target: Target) -> object:
        size = aiter.moe_sorting_opus_get_workspace_size
        return run_moe_sorting(case, target, aiter.moe_sorting_opus_fwd, policy, size)

    return run


def _repeats(policy: int) -> Run:
    """The sort of ids that repeat in a row, and of some that are no expert's."""

    def run(case: Case, target: Target) -> object:
        size = aiter.moe_sorting_opus_get_workspace_size
        generator = torch.Generator().manual_seed(0)
        shape = (case.num_tokens, case.topk)
        ids = torch.randint(-1, min(5, case.num_experts), shape, generator=generator).int()
        return run_moe_sorting(case, target, aiter.moe_sorting_opus_fwd, policy, size, ids)

    return run


def _routing(policy: int) -> Run:
    return lambda case, target: run_routing(case, target, policy)


MODULES = (
    "module_fused_topk_moe_sorting", "module_fused_router_sorting", "module_topk_softmax",
    "module_moe_sorting_opus", "module_topk_routing",
)  # fmt: skip

# By the name that the table shows. Routing allocates its outputs, so that a sanitizer knows their
# exact bounds; the others have guards around theirs, and workspaces of exactly the size asked for.
OPS: dict[str, Run] = {
    "fused": _fused,
    "fused, several workgroups": _fused_cluster,
    "fused, handed over": _fused_handover,
    "router": _router,
    "topk_softmax": _topk_softmax,
    "sorting oneshot": _sorting(1),
    "sorting multiphase": _sorting(2),
    "repeated ids oneshot": _repeats(1),
    "repeated ids multiphase": _repeats(2),
    "routing automatic": _routing(0),
    "routing oneshot": _routing(1),
    "routing multiphase": _routing(2),
}
RULES: dict[str, Run] = {f"rule of {model}": _rule(model) for model in MODELS}
RUNS = {**OPS, **RULES}


@dataclass(frozen=True)
class Check:
    """One call: the name of its run in `RUNS`, and the problem."""

    run: str
    case: Case


QUICK_CASES = (
    Case(7, 128, 4, torch.bfloat16, logits="ties"),
    Case(33, 32, 4, torch.float16, need_renorm=False, model_dim=7, moe_buf_offset=2),
    Case(37, 128, 5, torch.float16, logits="every_kind", block_size=16),
    Case(9, 250, 8, torch.bfloat16, layout="padded", block_size=6, mask="random", num_local=8),
    Case(5, 512, 8, torch.bfloat16, logits="ties", block_size=4, slots_offset=4),
    Case(513, 136, 4, torch.bfloat16, logits="every_kind"),
    Case(5, 100, 70, logits="mixed", block_size=3),
    Case(9, 257, 9, torch.float32, mask="random", num_local=6, moe_buf_offset=10),
    Case(3, 1030, 5, torch.bfloat16, logits="few_finite", mask="last", model_dim=1),
    Case(90, 512, 10, model_dim=1),  # rounds of rows in every wave
    Case(0, 16, 2),
    Case(6, 8, 8, layout="padded", logits="infinite", num_local=0, block_size=1),
)


QUICK_ROUTER_TOKENS = 64


def make_checks(quick: bool) -> list[Check]:
    """The checks, in the order in which they run."""
    cases = QUICK_CASES if quick else (*QUICK_CASES, *_more_cases())
    checks = [
        Check(name, case)
        for case in cases
        for name in OPS
        # NOTE: every product of hundreds of rows is watched, which takes longer than all the rest.
        if not quick or name != "router" or case.num_tokens <= QUICK_ROUTER_TOKENS
    ]
    for name, (_, num_experts, topk, _) in zip(RULES, MODELS.values(), strict=True):
        base = Case(37, num_experts, topk, block_size=4)
        ruled = [base]
        if not quick:
            ruled += [
                replace(base, num_tokens=tokens, dtype=dtype, seed=tokens)
                for tokens, dtype in itertools.product((1, 7, 130), GATING_DTYPES)
            ]
        checks += [Check(name, case) for case in ruled]
    return checks


def _more_cases() -> list[Case]:
    base = Case(13, 128, 4)
    cases = [replace(base, logits=logits) for logits in LOGITS]
    cases += [replace(base, dtype=dtype, need_renorm=False) for dtype in GATING_DTYPES]
    cases += [replace(base, mask=mask, num_local=11) for mask in MASKS]
    cases += [replace(base, layout=layout) for layout in ("padded", "broadcast", "sliding")]
    cases += [
        replace(base, model_dim=dim, moe_buf_offset=offset, moebuf_dtype=dtype)
        for dim, offset, dtype in (
            (1, 1, torch.uint8),
            (17, 15, torch.uint8),
            (2880, 0, torch.bfloat16),
            (33, 4, torch.float32),
            (3, 8, torch.float64),
        )
    ]
    cases += [
        Case(tokens, experts, topk, dtype, block_size=block)
        for tokens, experts, topk, dtype, block in (
            (1, 1, 1, torch.float32, 1),
            (31, 64, 6, torch.bfloat16, 16),
            (32, 65, 6, torch.float16, 16),
            (64, 128, 4, torch.bfloat16, 32),
            (65, 129, 5, torch.float32, 64),
            (60, 256, 8, torch.bfloat16, 32),
            (4, 512, 10, torch.float32, 128),
            (2, 896, 16, torch.bfloat16, 32),
            (2, 1024, 255, torch.float32, 7),
            (3, 1025, 33, torch.float16, 32),
            (200, 32, 4, torch.bfloat16, 32),
        )
    ]
    return cases
