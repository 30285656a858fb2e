"""Do calls by any rule give one result on every path, as known calls, traced, and through the layer?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401  (makes a checkout importable)
import pytest
import torch
from known import watched
from rule_cases import MODELS, check_routing, num_logits
from targets import Target
from torch import Tensor

import aiter
from aiter import RoutingRule, reference
from aiter.fused_moe import (
    empty_sorted_buffers,
    fused_moe,
    fused_moe_from_logits,
    last_path,
    topk_routing_sorting,
    topk_softmax_sorting,
)
from aiter.routing.buffers import BUFFER_NAMES

CHOSEN = (
    "deepseek-v3",
    "kimi-k3",
    "deepseek-v4",
    "longcat",
    "qwen2+shared",
    "glm+shared",
    "granite",
)
TOKENS, WIDTH, BLOCK = 9, 20, 4
NO_MASK, HALF_MASK = "all experts", "half of the experts"

Call = dict[str, Any]


def inputs_of(model: str, target: Target, tokens: int = TOKENS) -> tuple[Tensor, int, int, Call]:
    """Logits, K, the experts in the sort, and the options of a call."""
    rule, experts, topk, has_bias = MODELS[model]
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, num_logits(rule, experts), generator=generator)
    options: Call = {"rule": rule}
    if has_bias:
        size = experts + rule.num_zero_experts
        options["correction_bias"] = (torch.randn(size, generator=generator) / 8).to(target.device)
    return logits.to(target.device), topk, experts + rule.num_shared_experts, options


def route(logits: Tensor, topk: int, experts: int, **options: Any) -> tuple[Tensor, ...]:
    return topk_routing_sorting(
        logits, topk, experts, WIDTH, torch.bfloat16, block_size=BLOCK, **options
    )


def empty_topk_out(logits: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Rows with room between them, filled with what no routing writes."""
    weights = torch.full((len(logits), slots + 3), float("nan"), device=logits.device)
    ids = torch.full((len(logits), slots + 1), -7, dtype=torch.int32, device=logits.device)
    return weights[:, :slots], ids[:, :slots]


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Equal in every defined bit."""
    slots, blocks = int(second[3][0]), int(second[3][0]) // BLOCK
    ends = (slots, slots, blocks, 2)
    return all(
        torch.equal(a[:end], b[:end]) for a, b, end in zip(first[:4], second[:4], ends, strict=True)
    )


@pytest.mark.parametrize("id_format", ["slot", "flat"])
@pytest.mark.parametrize("masked", [False, True], ids=[NO_MASK, HALF_MASK])
@pytest.mark.parametrize("model", CHOSEN)
def test_every_path_gives_the_same(
    target: Target, model: str, masked: bool, id_format: str
) -> None:
    logits, topk, experts, options = inputs_of(model, target)
    slots = topk + options["rule"].num_shared_experts
    options["id_format"] = id_format
    if masked:
        mask = torch.arange(experts, dtype=torch.int32) % 2
        options["expert_mask"] = mask.to(target.device)
        options["num_local_tokens"] = torch.tensor(TOKENS - 2, dtype=torch.int32).to(target.device)
    rows = TOKENS - 2 if masked else TOKENS
    results = []
    with target.active():
        chosen = torch.empty(TOKENS, slots), torch.empty(TOKENS, slots, dtype=torch.int32)
        weights, ids = (tensor.to(target.device) for tensor in chosen)
        bias = options.get("correction_bias")
        aiter.topk_routing(weights, ids, logits, rule=options["rule"], correction_bias=bias)
        for policy in (0, 1, 2):
            topk_out = empty_topk_out(logits, slots)
            routed = route(
                logits, topk, experts, dispatch_policy=policy, topk_out=topk_out, **options
            )
            assert last_path() == ("fused", "oneshot", "multiphase")[policy]
            assert torch.equal(topk_out[0][:rows], weights[:rows])
            assert torch.equal(topk_out[1][:rows], ids[:rows])
            assert not routed[4][:rows].any()
            results.append(routed)
    assert same(results[1], results[0]) and same(results[2], results[0])
    check_routing(
        (weights.cpu(), ids.cpu()),
        logits.cpu(),
        options["rule"],
        None if bias is None else bias.cpu(),
    )
    # NOTE: the sort of these weights and ids, whose choice the line above judges.
    plain = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = reference.topk_routing_sorting(
        logits.cpu(), topk, experts, WIDTH, torch.bfloat16, block_size=BLOCK, **plain
    )
    assert results[0][3].tolist() == expected[3].tolist()
    used = int(expected[3][0])
    assert torch.equal(results[0][0][:used].cpu(), expected[0][:used])
    assert torch.equal(results[0][2][: used // BLOCK].cpu(), expected[2][: used // BLOCK])


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("given", [True, False], ids=["out", "no out"])
def test_a_call_by_a_rule_is_known(target: Target, given: bool) -> None:
    """A rule that is made anew is the same rule; another one, another bias or format is not."""
    logits, topk, experts, options = inputs_of("deepseek-v3", target)
    topk_out = empty_topk_out(logits, topk)
    out = None
    if given:
        out = empty_sorted_buffers(
            TOKENS, topk, experts, WIDTH, torch.bfloat16, BLOCK, device=target.device
        )
    bias = options["correction_bias"]

    def call(**changes: Any) -> bool:
        rule = RoutingRule("sigmoid", 8, 4, routed_scaling_factor=2.5)
        full = {"rule": rule, "correction_bias": bias, "topk_out": topk_out, "out": out, **changes}
        with target.active(), watched() as answers:
            route(logits, topk, experts, **full)
        return answers[-1:] == [True]

    assert [call(), call(), call()] == [False, True, True]
    other = {
        "rule": RoutingRule("sigmoid", 8, 4, routed_scaling_factor=2.0),
        "correction_bias": bias.half(),
        "id_format": "flat",
        "topk_out": None,
    }
    for name, value in other.items():
        assert not call(**{name: value}), name
    call()  # the table has one place for calls that differ in such tensors only
    assert call(correction_bias=bias.clone())
    assert call()


def test_the_plain_rule_is_topk_softmax_sorting(target: Target) -> None:
    logits, topk = torch.randn(TOKENS, 24).to(target.device), 3
    for renorm in (True, False):
        with target.active():
            by_rule = route(logits, topk, 24, rule=RoutingRule(need_renorm=renorm))
            plain = topk_softmax_sorting(logits, topk, 24, WIDTH, torch.bfloat16, renorm, BLOCK)
        assert same(by_rule, plain)


def test_rows_do_not_depend_on_their_number(target: Target) -> None:
    """M = 1, 1024, 1025 and 4096: the same ids and weights for the same rows."""
    logits, topk, experts, options = inputs_of("deepseek-v3", target, 4096)
    first = None
    for tokens in (4096, 1025, 1024, 1):
        weights = torch.empty(tokens, topk, device=target.device)
        ids = torch.empty(tokens, topk, dtype=torch.int32, device=target.device)
        with target.active():
            route(logits[:tokens], topk, experts, topk_out=(weights, ids), **options)
        first = first or (weights, ids)
        assert torch.equal(weights, first[0][:tokens]) and torch.equal(ids, first[1][:tokens])


LAYER: dict[str, Callable[..., Any]] = {
    "routing": lambda logits, bias, rule: topk_routing_sorting(
        logits, 4, 32, 16, torch.float32, rule=rule, correction_bias=bias, block_size=BLOCK
    )[0],
    "top-k outputs": lambda logits, bias, rule: _with_topk_out(logits, bias, rule),
}


def _with_topk_out(logits: Tensor, bias: Tensor, rule: RoutingRule) -> Tensor:
    weights = torch.zeros(logits.shape[0], 4, device=logits.device)
    ids = torch.zeros(logits.shape[0], 4, dtype=torch.int32, device=logits.device)
    topk_routing_sorting(
        logits, 4, 32, 16, torch.float32, rule=rule, correction_bias=bias, topk_out=(weights, ids)
    )
    return weights + ids


@pytest.mark.parametrize("name", LAYER)
def test_compiled_whole(target: Target, name: str) -> None:
    rule = RoutingRule("sigmoid", 4, 2, routed_scaling_factor=2.5)
    logits, bias = torch.randn(5, 32).to(target.device), torch.randn(32).to(target.device)
    torch.compiler.reset()
    with target.active(), torch.no_grad():
        eager = LAYER[name](logits, bias, rule)
        traced = torch.compile(LAYER[name], backend="aot_eager", fullgraph=True)(logits, bias, rule)
        used = 4 * 5 if name == "routing" else len(eager)
    assert torch.equal(traced[:used], eager[:used])


def test_opcheck_with_a_rule(target: Target) -> None:
    """With as many slots as experts and blocks of one, every element of the outputs is defined."""
    rule = [float(n) for n in RoutingRule("sigmoid", routed_scaling_factor=2.5).packed]
    logits, bias = torch.randn(5, 4).to(target.device), torch.randn(4).to(target.device)
    arguments = (logits, 4, 4, 16, torch.float32, rule, bias, 1)
    outputs = torch.ops.aiter.topk_routing_sorting(*arguments)
    named = dict(zip(BUFFER_NAMES, (torch.zeros_like(t) for t in outputs), strict=True))
    weights, ids = torch.zeros(5, 4), torch.zeros(5, 4, dtype=torch.int32)
    named |= {"topk_weights": weights.to(target.device), "topk_ids": ids.to(target.device)}
    with target.active():
        torch.library.opcheck(torch.ops.aiter.topk_routing_sorting.default, arguments)
        torch.library.opcheck(torch.ops.aiter.topk_routing_sorting_out.default, arguments, named)


def test_the_layer_takes_a_rule(target: Target) -> None:
    """Equal to the layer of the same ids; shared experts are the last of the weights."""
    for model in ("deepseek-v3", "glm+shared"):
        logits, topk, experts, options = inputs_of(model, target)
        slots = topk + options["rule"].num_shared_experts
        generator = torch.Generator().manual_seed(0)
        hidden, w1, w2 = (
            torch.randn(shape, generator=generator).to(target.device) / 4
            for shape in ((TOKENS, 16), (experts, 24, 16), (experts, 16, 12))
        )
        weights = torch.empty(TOKENS, slots, device=target.device)
        ids = torch.empty(TOKENS, slots, dtype=torch.int32, device=target.device)
        with target.active(), torch.no_grad():
            aiter.topk_routing(weights, ids, logits, **options)
            layer = fused_moe_from_logits(hidden, w1, w2, logits, topk, **options)
            expected = fused_moe(hidden, w1, w2, weights, ids)
        torch.testing.assert_close(layer, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "sigmoid"}, "rule: expected a RoutingRule or None, got str"),
        ({"rule": RoutingRule("sigmoid", 5)}, "experts in 5 groups of equal size, got 32"),
        ({"id_format": "other"}, "id_format: expected 'slot' or 'flat', got 'other'"),
        ({"correction_bias": torch.zeros(31)}, "correction_bias.*32.*31"),
        ({"correction_bias": torch.zeros(32, dtype=torch.float64)}, "correction_bias.*float64"),
        ({"correction_bias": torch.zeros(64)[::2]}, "correction_bias"),
        ({"rule": RoutingRule(num_shared_experts=2)}, r"gating_output: expected shape \[any, 30\]"),
        ({"topk_out": (torch.zeros(5, 4),)}, "topk_out.*two"),
        ({"topk_out": (torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.int32))}, r"topk_out\[0\]"),
        ({"topk_out": (torch.zeros(5, 4), torch.zeros(5, 4))}, r"topk_out\[1\]"),
    ],
)
@pytest.mark.parametrize("policy", [0, 1])
def test_bad_input(changes: Call, words: str, policy: int) -> None:
    logits = torch.randn(5, 32)
    with pytest.raises((ValueError, TypeError), match=words):
        route(logits, 4, 32, dispatch_policy=policy, **changes)


def test_more_slots_than_experts_with_entries(target: Target) -> None:
    """Zero experts may take more of a row than there are others, where buffers have slots for them."""
    logits = torch.randn(5, 8, device=target.device)
    rule = RoutingRule(num_zero_experts=6)
    for policy in (0, 1, 2):
        words = "topk: expected at most 2, for num_experts = 2 .* and slot ids, got 4"
        with target.active(), pytest.raises(ValueError, match=words):
            route(logits, 4, 2, rule=rule, dispatch_policy=policy)
        with target.active():
            assert (
                int(route(logits, 4, 2, rule=rule, dispatch_policy=policy, id_format="flat")[3][1])
                == 5
            )


def shares_memory(target: Target) -> list[tuple[str, Call, tuple[Tensor, Tensor], str]]:
    """(what it shares, the call's other tensors, topk_out, the error's text) of 5 rows of 4 of 32."""

    def ints(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=target.device)

    logits = torch.zeros(5, 32, device=target.device)
    out = empty_sorted_buffers(5, 4, 32, WIDTH, torch.bfloat16, BLOCK, device=target.device)
    both = torch.zeros(5, 8, device=target.device)
    ids, weights, mask, count = (
        ints(20).view(5, 4),
        torch.zeros_like(both)[:, :4],
        ints(32),
        ints(20),
    )
    own = r"expected memory of its own, got memory that overlaps with"
    return [
        ("sorted_ids", {"out": out}, (weights, out[0][:25].view(5, 5)[:, :4]), f"{own} sorted_ids"),
        ("the logits", {"gating_output": logits}, (logits[:, :4], ids), f"{own} gating_output"),
        ("the mask", {"expert_mask": mask}, (weights, mask[:20].view(5, 4)),
         f"{own} (local_expert_mask|topk_ids)"),
        ("the count", {"num_local_tokens": count[:1]}, (weights, count.view(5, 4)),
         f"{own} (num_local_tokens|topk_ids)"),
        ("each other", {}, (both[:, :4], both.view(torch.int32)[:, 3:7]), f"{own} topk_out.1."),
        ("rows", {}, (weights[:1].expand(5, 4), ids), "rows that do not overlap, of stride 4"),
        ("columns", {}, (both[:, ::2], ids), r"topk_out\[0\]: expected inner stride 1, got 2"),
    ]  # fmt: skip


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_topk_out_has_memory_of_its_own(target: Target, policy: int) -> None:
    """Of the chain as well, whose sort reads a mask and a count after top-k is written."""
    for what, changes, topk_out, words in shares_memory(target):
        options = {"dispatch_policy": policy, "topk_out": topk_out} | changes
        logits = options.pop("gating_output", torch.zeros(5, 32, device=target.device))
        before = [tensor.clone() for tensor in topk_out]
        with target.active(), pytest.raises(ValueError, match=words):
            route(logits, 4, 32, **options)
        unwritten = zip(topk_out, before, strict=True)
        assert all(torch.equal(tensor, copy) for tensor, copy in unwritten), what
