"""Run by test_exported_python.py: the exported modules of the tree that is `aiter` in this process."""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiter.fused_moe_from_logits as exported
import routing_of_ours as ours
import torch
from aiter.fused_moe_from_logits import fused_moe_from_logits, last_path
from aiter.ops.routing_rule import RoutingRule
from routing_of_ours import fused_moe as our_calls
from routing_of_ours.ops.rule import rule_of

import aiter.fused_moe as fused_moe_module
from aiter.fused_moe import topk_routing_sorting, topk_softmax_sorting  # what the edit brings
from aiter.jit import core

CALLS: list[str] = []


def fwd(
    gating: Any, ids: Any, weights: Any, experts: Any, num_valid: Any, moe_buf: Any, num_experts: int,
    topk: int, unit_size: int, need_renorm: bool, rule: list[float], bias: Any = None,
    mask: Any = None, num_local: Any = None, topk_weights: Any = None, topk_ids: Any = None,
) -> None:  # fmt: skip
    CALLS.append("fwd")
    ours.fused_topk_moe_sorting_fwd(
        gating, ids, weights, experts, num_valid, moe_buf, num_experts, topk, unit_size, need_renorm,
        local_expert_mask=mask, num_local_tokens=num_local, correction_bias=bias,
        rule=rule_of(rule) if rule else None,
        topk_out=None if topk_ids is None else (topk_weights, topk_ids),
    )  # fmt: skip


def topk_routing(weights: Any, ids: Any, gating: Any, rule: list[float], bias: Any = None) -> None:
    CALLS.append("topk")
    ours.topk_routing(weights, ids, gating, rule=rule_of(rule), correction_bias=bias)


def sort(*arguments: Any) -> Any:
    CALLS.append("sort")
    return our_calls.moe_sorting(*arguments)


core.FUNCTIONS.update(
    fused_topk_moe_sorting_fwd=fwd,
    topk_routing=topk_routing,
    fused_topk_moe_sorting_max_tokens=lambda experts, topk, index: 40,
)
fused_moe_module.SORT = sort
GROUPS = dict(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)


def expect_error(kind: type[BaseException], text: str, call: Any) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"expected {kind.__name__} {text!r}")


def same(found: Any, expected: Any, block: int) -> None:
    """Two sorts, as far as they are defined."""
    slots = int(expected[3][0])
    assert found[3].equal(expected[3])
    assert found[0][:slots].equal(expected[0][:slots])
    assert found[1][:slots].equal(expected[1][:slots])
    assert found[2][: slots // block].equal(expected[2][: slots // block])
    assert found[4].shape == expected[4].shape and found[4].dtype == expected[4].dtype
    assert not found[4].view(torch.uint8).any()
    assert [t.shape for t in found] == [t.shape for t in expected]


def called(call: Any) -> tuple[Any, list[str]]:
    CALLS.clear()
    return call(), list(CALLS)


expect_error(
    ValueError, "gating_output: expected a tensor on a GPU, got one on cpu",
    lambda: topk_softmax_sorting(torch.randn(2, 8), 2, 8, 16, torch.bfloat16),
)  # fmt: skip
exported._check_gpu = lambda gating_output: None

# Plain softmax and a rule with everything, in one launch and in a chain.
mask = torch.tensor([1, 0, 1, 1] * 4, dtype=torch.int32)
local = torch.tensor([5], dtype=torch.int32)


def check_routing(tokens: int, policy: int, path: str) -> None:
    logits, bias = torch.randn(tokens, 16), torch.rand(16)
    calls = ["fwd"] if path == "fused" else ["topk", "sort"]
    for renorm in (True, False):
        plain = (logits, 4, 16, 24, torch.bfloat16, renorm, 8, mask, local)
        found, made = called(lambda plain=plain: topk_softmax_sorting(*plain, policy))
        assert made == calls and last_path() == path
        expected = our_calls.topk_softmax_sorting(*plain)
        for buffers in (found, expected):
            buffers[4][5:] = 0  # NOTE: rows that do not count are left alone.
        same(found, expected, 8)
    out = torch.empty(tokens, 4), torch.empty(tokens, 4, dtype=torch.int32)
    found, made = called(
        lambda: topk_routing_sorting(
            logits, 4, 16, 24, torch.float16, rule=RoutingRule("sigmoid", **GROUPS),
            correction_bias=bias, dispatch_policy=policy, topk_out=out,
        )
    )  # fmt: skip
    expected_out = torch.empty_like(out[0]), torch.empty_like(out[1])
    expected = our_calls.topk_routing_sorting(
        logits, 4, 16, 24, torch.float16, rule=ours.RoutingRule("sigmoid", **GROUPS),
        correction_bias=bias, topk_out=expected_out,
    )  # fmt: skip
    assert made == calls and last_path() == path
    same(found, expected, 32)
    assert all(map(torch.equal, out, expected_out))


for case in ((7, 0, "fused"), (7, 1, "chain"), (7, 2, "chain"), (41, 0, "chain")):
    check_routing(*case)

logits = torch.randn(7, 16)
expect_error(
    ValueError, "dispatch_policy: expected 0, 1 or 2, got 3",
    lambda: topk_softmax_sorting(logits, 4, 16, 24, torch.bfloat16, dispatch_policy=3),
)  # fmt: skip
expect_error(
    ValueError, "block_size: expected at least 1",
    lambda: topk_softmax_sorting(logits, 4, 16, 24, torch.bfloat16, block_size=0),
)  # fmt: skip
zero = RoutingRule(num_zero_experts=4)
expect_error(
    ValueError, "without zero experts",
    lambda: topk_routing_sorting(
        torch.randn(50, 16), 4, 12, 24, torch.bfloat16, rule=zero, dispatch_policy=1
    ),
)  # fmt: skip
same(
    topk_routing_sorting(logits, 4, 12, 24, torch.bfloat16, rule=zero),
    our_calls.topk_routing_sorting(
        logits, 4, 12, 24, torch.bfloat16, rule=ours.RoutingRule(num_zero_experts=4)
    ),
    32,
)

# fused_moe takes the buffers of the launch from its second call on, whatever block size it chooses.
hidden, w1, w2 = torch.randn(7, 24), torch.empty(16, 64, 24), torch.empty(16, 24, 32)


def layer(**options: Any) -> Any:
    return fused_moe_from_logits(hidden, w1, w2, logits, 4, **options)


def check_layer(block: int, calls: list[str], path: str, **options: Any) -> None:
    (weights, ids, buffers), made = called(lambda: layer(**options))
    assert made == calls and last_path() == path, (made, last_path())
    same_weights, same_ids = our_calls.fused_topk(hidden, logits, 4, True)
    assert weights.equal(same_weights) and ids.equal(same_ids)
    if buffers[4].numel():
        expected = our_calls.topk_softmax_sorting(
            logits,
            4,
            16,
            24,
            torch.float32,
            block_size=block,
            expert_mask=options.get("expert_mask"),
        )
        same(buffers, expected, block)
    assert exported._state.prepared is None


check_layer(32, ["fwd"], "fused")
fused_moe_module.BLOCK_SIZE = 8
check_layer(8, ["fwd", "sort"], "chain")
check_layer(8, ["fwd"], "fused")
check_layer(8, ["fwd"], "fused")
check_layer(16, ["fwd"], "fused", block_size_M=16)
check_layer(8, ["fwd", "sort"], "chain", expert_mask=mask)
check_layer(8, ["fwd"], "fused", expert_mask=mask)
check_layer(8, ["topk", "sort"], "chain", moe_sorting_dispatch_policy=1)
check_layer(8, ["fwd", "sort"], "chain", activation="gelu")  # others may get another block size
# No output is to be zeroed: remembered as well.
fused_moe_module.MORE = {"accumulate": False}
check_layer(8, ["fwd", "sort"], "chain")
(_, _, buffers), made = called(layer)
assert made == ["fwd"] and last_path() == "fused" and buffers[4].shape == (0, 0)
# More than the launch writes: from then on top-k alone.
fused_moe_module.MORE = {"output_aux": True}
check_layer(8, ["fwd", "sort"], "chain")
check_layer(8, ["topk", "sort"], "chain")
fused_moe_module.MORE = {}
check_layer(8, ["topk", "sort"], "chain")
check_layer(8, ["fwd"], "fused")

# Other sorts are left alone, also behind a call that failed.
fused_moe_module.MORE = {"nonsense": 1}
with suppress(TypeError):
    layer()
assert exported._state.prepared is None
fused_moe_module.MORE = {}
weights, ids = our_calls.fused_topk(hidden, logits, 4, True)
_, made = called(lambda: fused_moe_module.moe_sorting(ids, weights, 16, 24, torch.float32, 8))
assert made == ["sort"]
exported.prepare_moe_sorting_(
    logits, 4, 16, 24, torch.float32, list(RoutingRule().packed), "", block_size=8
)
prepared = exported._state.prepared
_, made = called(lambda: fused_moe_module.moe_sorting(ids, weights, 16, 24, torch.float32, 8))
assert made == ["sort"] and exported._state.prepared is prepared

expect_error(TypeError, "topk_ids: expected none", lambda: layer(topk_ids=ids))
expect_error(ValueError, "without zero experts", lambda: layer(rule=zero))

# The op test, as far as it can be run: right results pass, a wrong one is a status.
op_test = Path("op_tests/test_fused_topk_moe_sorting.py")
if op_test.is_file():
    test = runpy.run_path(str(op_test))
    test["main"].__globals__["DEVICE"] = "cpu"
    sys.argv = [str(op_test), "--tokens", "1", "33", "--block", "16"]
    test["main"]()

    def spoilt(*arguments: Any) -> None:
        fwd(*arguments)
        arguments[2][:1] += 1e-4

    core.FUNCTIONS["fused_topk_moe_sorting_fwd"] = spoilt
    expect_error(SystemExit, "32 cases failed", test["main"])
print("all as expected")
