"""Does our launch take the place of the sort of ROCm's aiter, and of nothing else?

Against a stand-in (`rocm_stand_in.py`); `.ci/side_by_side` does the same with the real package.

Long because every test needs the stand-in in the place of ROCm's package, and what it is compared with.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rocm_stand_in
import torch
from torch import Tensor

from aiter import RoutingRule, reference, topk_routing
from aiter.fused_moe import last_path
from aiter.integrations import rocm_aiter, rocm_sort

EXPERTS, TOPK, WIDTH, INNER = 12, 3, 16, 8
DEEPSEEK = RoutingRule("sigmoid", num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)
SHARED = RoutingRule("sigmoid", num_shared_experts=1)


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, found in the place of ROCm's package."""
    module = rocm_stand_in.load()
    monkeypatch.setattr(rocm_sort, "_found", None)
    monkeypatch.setattr(rocm_sort, "_import", lambda: module)
    yield module
    rocm_aiter.restore()


def layer(tokens: int, rule: RoutingRule | None = None, seed: int = 0) -> dict[str, Any]:
    """The arguments of a call, with a bias where the rule is not softmax."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    experts = EXPERTS + (rule.num_shared_experts if rule else 0)
    return {
        "hidden_states": make(tokens, WIDTH).bfloat16(),
        "w1": make(experts, 2 * INNER, WIDTH).bfloat16(),
        "w2": make(experts, WIDTH, INNER).bfloat16(),
        "gating_output": make(tokens, EXPERTS).bfloat16(),
        "topk": TOPK,
        "rule": rule,
        "correction_bias": make(EXPERTS) if rule else None,
    }


def topk_of(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights and ids by a top-k of its own; of the reference's ids."""
    options = {"rule": call["rule"], "correction_bias": call["correction_bias"]}
    close, ids = reference.topk_routing(call["gating_output"], call["topk"], **options)
    weights, chosen = torch.empty_like(close), torch.empty_like(ids)
    topk_routing(weights, chosen, call["gating_output"], **options)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, close, rtol=1e-6, atol=0)
    return weights, ids


def expected(upstream: ModuleType, call: dict[str, Any], **keywords: Any) -> Tensor:
    """Upstream's own sort and products for the ids of a top-k, in a copy that nobody patched."""
    own = rocm_stand_in.load()
    for name in ("READS", "GFX", "ACCUMULATE"):
        setattr(own, name, getattr(upstream, name))
    for name in ("activation", "quant_type"):
        if name in keywords:
            keywords[name] = getattr(own, type(keywords[name]).__name__)(keywords[name].value)
    weights, ids = topk_of(call)
    result = own.fused_moe(call["hidden_states"], call["w1"], call["w2"], weights, ids, **keywords)
    upstream.expected = own.seen[-1]
    return result


def check_seen(upstream: ModuleType, rows: int) -> None:
    """What the products read is what they read behind upstream's own sort."""
    (got,), want = upstream.seen, upstream.expected
    slots = int(want["num_valid_ids"][0])
    for name in ("sorted_ids", "sorted_weights"):
        assert torch.equal(got[name][:slots], want[name][:slots]), name
    blocks = -(-slots // rocm_stand_in.BLOCK)
    assert torch.equal(got["sorted_expert_ids"][:blocks], want["sorted_expert_ids"][:blocks])
    assert torch.equal(got["num_valid_ids"], want["num_valid_ids"])
    for name in ("ids", "weights"):
        assert torch.equal(got[name][:rows], want[name][:rows]), name


@pytest.mark.parametrize("rule", [None, DEEPSEEK, SHARED], ids=["softmax", "groups", "shared"])
@pytest.mark.parametrize(
    ("reads", "masked", "local"),
    # NOTE: the stand-in's products by ids know no mask, and no rows that do not count.
    [("ids", False, None), *itertools.product(["sorted"], [False, True], [None, 5])],
)
def test_equal_to_upstreams_own_sort(
    upstream: ModuleType, rule: RoutingRule | None, masked: bool, local: int | None, reads: str
) -> None:
    upstream.READS = reads
    call = layer(9, rule)
    keywords: dict[str, Any] = {"block_size_M": rocm_stand_in.BLOCK}
    if masked:
        mask = torch.arange(call["w1"].shape[0], dtype=torch.int32) % 2
        keywords["expert_mask"] = mask
        call["w1"], call["w2"] = call["w1"][mask.bool()], call["w2"][mask.bool()]
    if local is not None:
        keywords["num_local_tokens"] = torch.tensor([local], dtype=torch.int32)
    out = rocm_aiter.fused_moe_from_logits(**call, **keywords)
    assert last_path() == "fused"
    rows = 9 if local is None else local
    want = expected(upstream, call, **keywords)
    assert torch.equal(out[:rows], want[:rows])
    check_seen(upstream, rows)
    assert upstream.own_sorts == []


@pytest.mark.parametrize("policy", [0, 1, 2])
@pytest.mark.parametrize(
    ("activation", "limit"), list(itertools.product(["Silu", "Gelu"], [None, 0.5]))
)
def test_keywords_reach_upstream(
    upstream: ModuleType, policy: int, activation: str, limit: float | None
) -> None:
    call = layer(4)
    keywords = {
        "activation": upstream.ActivationType[activation],
        "quant_type": upstream.QuantType.No,
        "swiglu_limit": limit,
        "dtype": torch.float32,
        "moe_sorting_dispatch_policy": policy,
    }
    out = rocm_aiter.fused_moe_from_logits(**call, **keywords)
    assert out.dtype == torch.float32
    assert last_path() == "fused"  # NOTE: the policy is of ROCm's sort, which did not run.
    assert torch.equal(out, expected(upstream, call, **keywords))


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_each_sort_has_a_policy_of_its_own(upstream: ModuleType, policy: int) -> None:
    call = layer(4)
    out = rocm_aiter.fused_moe_from_logits(**call, dispatch_policy=policy)
    assert (last_path() == "fused") == (policy == 0)
    assert torch.equal(out, expected(upstream, call)) and upstream.own_sorts == []
    upstream.OUTPUT_AUX = True
    rocm_aiter.fused_moe_from_logits(**call, moe_sorting_dispatch_policy=policy)
    assert upstream.own_policies == [policy]


def test_a_policy_of_ours_is_checked_before_upstream_begins(upstream: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"dispatch_policy: expected 0 \(automatic\), .* got 3"):
        rocm_aiter.fused_moe_from_logits(**layer(4), dispatch_policy=3)
    assert upstream.seen == []


def test_a_mask_longer_than_the_experts(upstream: ModuleType) -> None:
    """Engines append an entry for ids of no expert."""
    call = layer(4)
    mask = torch.tensor([1] * EXPERTS + [0], dtype=torch.int32)
    out = rocm_aiter.fused_moe_from_logits(**call, expert_mask=mask)
    assert torch.equal(out, expected(upstream, call, expert_mask=mask))


def test_outputs_of_the_caller(upstream: ModuleType) -> None:
    call = layer(4, DEEPSEEK)
    output = torch.full((4, WIDTH), 7.0, dtype=torch.bfloat16)
    topk_out = (torch.zeros(4, TOPK), torch.zeros(4, TOPK, dtype=torch.int32))
    out = rocm_aiter.fused_moe_from_logits(**call, output=output, topk_out=topk_out)
    assert out is output
    assert torch.equal(out, expected(upstream, call))
    assert torch.equal(topk_out[1], upstream.expected["ids"])
    assert torch.equal(topk_out[0], upstream.expected["weights"])
    wide = (torch.zeros(4, 2 * TOPK)[:, ::2], torch.zeros(4, 5, dtype=torch.int32)[:, :TOPK])
    rocm_aiter.fused_moe_from_logits(**call, topk_out=wide)
    assert torch.equal(wide[0], topk_out[0]) and torch.equal(wide[1], topk_out[1])


def test_no_buffer_is_zeroed_where_upstream_wants_none(upstream: ModuleType) -> None:
    upstream.ACCUMULATE = False
    call = layer(4)
    out = rocm_aiter.fused_moe_from_logits(**call)
    assert torch.equal(out, expected(upstream, call))
    assert upstream.seen[0]["moe_buf"].shape == (0, 0)


@pytest.mark.parametrize("what", ["FLAT", "OUTPUT_AUX", "LOCAL_IDS"])
def test_what_we_lack_is_upstreams_own_sort_behind_our_topk(
    upstream: ModuleType, what: str
) -> None:
    setattr(upstream, what, True)
    call = layer(4, DEEPSEEK)
    out = rocm_aiter.fused_moe_from_logits(**call)
    assert torch.equal(out, expected(upstream, call))
    (ids,) = upstream.own_sorts
    assert torch.equal(ids, upstream.expected["ids"])


@pytest.mark.parametrize(
    ("keywords", "gfx"),
    [
        ({"gate_mode": "interleave"}, "gfx1250"),
        ({"shared_w1": torch.zeros(1)}, "gfx942"),
        ({"newer_than_we": 0.5}, "gfx942"),
    ],
)
def test_ids_are_filled_first_where_upstream_may_read_them(
    upstream: ModuleType, keywords: dict[str, Any], gfx: str
) -> None:
    upstream.GFX = gfx
    call = layer(4)
    out = rocm_aiter.fused_moe_from_logits(**call, **keywords)
    assert torch.equal(out, expected(upstream, call, **keywords))
    (got,) = upstream.seen
    assert torch.equal(got["ids before"], upstream.expected["ids"])
    assert torch.equal(got["weights before"], upstream.expected["weights"])


def test_the_usual_keywords_take_one_launch(upstream: ModuleType) -> None:
    for keywords in ({"gate_mode": "interleave"}, {"newer_than_we": None}, {"shared_w1": None}):
        rocm_aiter.fused_moe_from_logits(**layer(4), **keywords)
    assert upstream.own_sorts == []


def test_a_version_that_never_sorts_is_an_error(upstream: ModuleType) -> None:
    upstream.SORTS = False
    with pytest.raises(RuntimeError, match="moe_sorting: expected the fused_moe of .* to call it"):
        rocm_aiter.fused_moe_from_logits(**layer(4))


def test_other_callers_keep_the_module_s_own_sort(upstream: ModuleType) -> None:
    call = layer(4)
    rocm_aiter.fused_moe_from_logits(**call)
    weights, ids = topk_of(call)
    out = upstream.fused_moe(call["hidden_states"], call["w1"], call["w2"], weights, ids)
    assert torch.equal(out, expected(upstream, call))
    assert len(upstream.own_sorts) == 1


def test_threads_do_not_see_each_other(upstream: ModuleType) -> None:
    """Ours and upstream's own calls, at once, each with ids of its own."""
    calls = [layer(6, seed=seed) for seed in range(6)]
    want = [expected(upstream, call) for call in calls]
    wrong: list[object] = []
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        call = calls[index]
        start.wait()
        for _ in range(5):
            if index % 2:
                weights, ids = topk_of(call)
                tensors = (call["hidden_states"], call["w1"], call["w2"], weights, ids)
                out = upstream.fused_moe(*tensors)
            else:
                out = rocm_aiter.fused_moe_from_logits(**call)
            if not torch.equal(out, want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(upstream.own_sorts) == 5 * len(calls) // 2


def test_the_attribute_is_put_back(upstream: ModuleType) -> None:
    own = upstream.moe_sorting
    rocm_aiter.fused_moe_from_logits(**layer(4))
    assert upstream.moe_sorting is not own
    assert rocm_aiter.restore()
    assert upstream.moe_sorting is own
    assert not rocm_aiter.restore()
    rocm_aiter.fused_moe_from_logits(**layer(4))
    assert upstream.own_sorts == []


def test_an_attribute_that_somebody_else_replaced(upstream: ModuleType) -> None:
    rocm_aiter.fused_moe_from_logits(**layer(4))
    ours, asked = upstream.moe_sorting, []

    def theirs(
        topk_ids: Tensor, topk_weights: Tensor, num_experts: int, model_dim: int,
        moebuf_dtype: torch.dtype, block_size: int = 32, expert_mask: Tensor | None = None,
        num_local_tokens: Tensor | None = None, dispatch_policy: int = 0, **later: Any,
    ) -> Any:  # fmt: skip
        asked.append(topk_ids)
        return ours(
            topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask,
            num_local_tokens, dispatch_policy, **later,
        )  # fmt: skip

    theirs.__signature__ = rocm_sort.inspect.signature(ours)  # type: ignore[attr-defined]
    upstream.moe_sorting = theirs
    call = layer(4)
    assert torch.equal(rocm_aiter.fused_moe_from_logits(**call), expected(upstream, call))
    assert asked == []
    weights, ids = topk_of(call)
    upstream.fused_moe(call["hidden_states"], call["w1"], call["w2"], weights, ids)
    assert len(asked) == 1 and len(upstream.own_sorts) == 1


@pytest.mark.parametrize(
    ("name", "function", "text"),
    [
        ("moe_sorting", None, r"moe_sorting: expected a function of \(topk_ids, .*\), got none in"),
        ("moe_sorting", lambda *args, **kwargs: None, r"got \(args, kwargs\) in"),
        (
            "fused_moe",
            lambda hidden_states, w1, w2, topk_ids: None,
            r"fused_moe: expected a function",
        ),
    ],
)
def test_unknown_signatures_are_refused(
    upstream: ModuleType, name: str, function: object, text: str
) -> None:
    setattr(upstream, name, function)
    assert rocm_aiter.available() is not None
    with pytest.raises(ImportError, match=text):
        rocm_aiter.fused_moe_from_logits(**layer(4))


def test_an_unknown_parameter_of_the_sort_is_refused(upstream: ModuleType) -> None:
    own = rocm_sort.inspect.signature(upstream.moe_sorting)
    extra = rocm_sort.inspect.Parameter("stride", rocm_sort.inspect.Parameter.KEYWORD_ONLY)
    upstream.moe_sorting.__signature__ = own.replace(parameters=[*own.parameters.values(), extra])
    reason = rocm_aiter.available()
    assert reason is not None and "output, stride)" in reason


def test_available(upstream: ModuleType) -> None:
    assert rocm_aiter.available() is None


@pytest.mark.parametrize("text", ["raise SystemExit(1)", "import no_such_module"])
def test_an_import_that_fails_is_a_sentence(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROCm's package ends the process where it cannot build its first module."""
    (tmp_path / "broken_rocm").mkdir()
    (tmp_path / "broken_rocm" / "fused_moe.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rocm_sort, "NAME", "broken_rocm")
    reason = rocm_aiter.available()
    kind = "SystemExit: 1" if "Exit" in text else "ModuleNotFoundError: "
    assert reason is not None
    assert f"broken_rocm: expected ROCm's package (amd-aiter), got {kind}" in reason


def test_under_one_name_ours_is_no_rocm_aiter() -> None:
    reason = rocm_aiter.available()
    assert reason is not None
    assert reason.startswith("aiter: expected ROCm's package beside this one, got this one")


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"rule": RoutingRule(num_zero_experts=2)}, ValueError, "rule: .*num_zero_experts=2"),
        ({"rule": "softmax"}, TypeError, "rule: expected a RoutingRule or None, got str"),
        ({"hidden_states": [1]}, TypeError, "hidden_states: expected a tensor, got list"),
        ({"gating_output": torch.zeros(3, EXPERTS)}, ValueError, "gating_output: .* 4 rows"),
        ({"gating_output": torch.zeros(4, 8)}, ValueError, "w1: expected 8 experts"),
        ({"topk": 13}, ValueError, "topk: expected at most 12"),
        ({"expert_mask": torch.ones(5)}, ValueError, r"expert_mask: .*\[at least 12\].*got \[5\]"),
        ({"expert_mask": 1}, TypeError, "expert_mask: expected a tensor or None, got int"),
        ({"topk_ids": None}, TypeError, "topk_ids: expected a keyword of the fused_moe"),
        ({"unheard": 1}, TypeError, "unheard: expected a keyword of the fused_moe"),
        ({"topk_out": (torch.zeros(4, 2),) * 2}, ValueError, r"topk_out\[0\]: .*\[4, 3\]"),
        ({"w2": torch.zeros(1, requires_grad=True)}, ValueError, "w2: .* needs no gradient"),
    ],
)
def test_bad_arguments(
    upstream: ModuleType, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        rocm_aiter.fused_moe_from_logits(**{**layer(4), **changes})
    assert upstream.seen == [] and upstream.own_sorts == []


@pytest.mark.parametrize("rule", [None, DEEPSEEK])
def test_compiled(upstream: ModuleType, rule: RoutingRule | None) -> None:
    """One op in the graph, with enums, dtypes and tensors among the keywords."""
    call = layer(4, rule)
    keywords = {
        "activation": upstream.ActivationType.Gelu,
        "quant_type": upstream.QuantType.No,
        "dtype": torch.float16,
        "block_size_M": 32,
        "expert_mask": torch.ones(EXPERTS, dtype=torch.int32),
        "swiglu_limit": 0.5,
        "dispatch_policy": 2,
    }
    output = torch.empty(4, WIDTH, dtype=torch.float16)
    topk_out = (torch.zeros(4, TOPK), torch.zeros(4, TOPK, dtype=torch.int32))

    def step(hidden: Tensor, logits: Tensor) -> Tensor:
        tensors = {"hidden_states": hidden * 2, "gating_output": logits + 1}
        return rocm_aiter.fused_moe_from_logits(
            **{**call, **tensors}, **keywords, output=output, topk_out=topk_out
        )

    want = step(call["hidden_states"], call["gating_output"]).clone()
    ids = topk_out[1].clone()
    topk_out[1].zero_()
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = compiled(call["hidden_states"], call["gating_output"])
    assert torch.equal(got, want) and torch.equal(topk_out[1], ids)
    assert upstream.own_sorts == [] and last_path() != "fused"


def test_a_keyword_that_no_tracer_can_keep(upstream: ModuleType) -> None:
    with pytest.raises(ValueError, match="swiglu_limit: expected a number, text, enum, dtype"):
        rocm_aiter._plain_text({"swiglu_limit": object()})


def test_the_registered_op(upstream: ModuleType) -> None:
    call = layer(4)
    op = torch.ops.aiter.rocm_aiter_fused_moe
    rule = [float(number) for number in RoutingRule().packed]
    text = rocm_aiter._plain_text({"dtype": torch.float16})
    arguments = (
        call["hidden_states"], call["w1"], call["w2"], call["gating_output"], TOPK, rule, None,
        [], [], text, torch.zeros(4, TOPK), torch.zeros(4, TOPK, dtype=torch.int32),
    )  # fmt: skip
    torch.library.opcheck(op, arguments)
