"""Does the vLLM plugin compute what vLLM would have, for every router, product and activation?

Against a stand-in (`vllm_stand_in.py`), with plain loops in place of vLLM's kernels; `.ci/vllm`
generates with the real engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import _checkout  # noqa: F401
import pytest
import rocm_stand_in
import torch
import vllm_stand_in as engine
from torch import Tensor
from vllm_stand_in import vllm  # noqa: F401

from aiter import RoutingRule, reference
from aiter.fused_moe import topk_routing_sorting
from aiter.integrations import rocm_aiter, rocm_sort, vllm_layers, vllm_rocm
from aiter.reference.layer import moe_layer

GROUPS = {"num_expert_group": 4, "topk_group": 2}


def expected(
    layer: Any, rule: RoutingRule, topk: int, hidden: Tensor, logits: Tensor, **options: Any
) -> Any:
    """The layer's output and ids by the reference."""
    weights, ids = reference.topk_routing(
        logits, topk, rule=rule, correction_bias=layer.e_score_correction_bias
    )
    mask = None if layer.expert_map is None else (layer.expert_map >= 0).int()
    out = moe_layer(
        hidden, layer.w13_weight, layer.w2_weight, weights, ids, expert_mask=mask, **options
    )
    return out.float(), ids


BIAS = torch.linspace(-0.3, 0.4, 16)
SCALED = {"routed_scaling_factor": 2.5}
RULES = [
    ("FusedTopKRouter", {}, RoutingRule()),
    ("FusedTopKRouter", {"renormalize": False}, RoutingRule(need_renorm=False)),
    ("FusedTopKRouter", {"scoring_func": "sigmoid"}, RoutingRule("sigmoid")),
    ("FusedTopKBiasRouter", {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS, **SCALED},
     RoutingRule("sigmoid", **SCALED)),
    ("FusedTopKBiasRouter", {"scoring_func": "sqrtsoftplus", "e_score_correction_bias": BIAS},
     RoutingRule("sqrtsoftplus")),
    ("FusedTopKBiasRouter", {"e_score_correction_bias": BIAS}, RoutingRule()),
    ("GroupedTopKRouter", {**GROUPS, **SCALED}, RoutingRule("softmax", 4, 2, **SCALED)),
    ("GroupedTopKRouter", {**GROUPS, "scoring_func": "sigmoid", "e_score_correction_bias": BIAS},
     RoutingRule("sigmoid", 4, 2)),
    ("CPURouter", {**SCALED}, RoutingRule()),
    ("CPURouter", {"use_grouped_topk": True, **GROUPS, "scoring_func": "sigmoid",
                   "e_score_correction_bias": BIAS, **SCALED}, RoutingRule("sigmoid", 4, 2, **SCALED)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "attributes", "rule"), RULES)
def test_a_router_has_the_rule_by_which_it_chooses(
    kind: str, attributes: dict[str, Any], rule: RoutingRule
) -> None:
    router = engine.router_of(kind, **attributes)
    layer = engine.layer_of(router)
    taken = layer.experts.taken
    assert taken.routing == (rule, 3, router.e_score_correction_bias is not None)
    hidden, logits = engine.inputs(5)
    want, ids = expected(layer, rule, 3, hidden, logits)
    replay = torch.zeros((9, 3), dtype=torch.int16)
    torch.testing.assert_close(engine.call(layer, hidden, logits), want, rtol=1e-4, atol=1e-4)
    got = engine.call(layer, hidden, logits, routing_replay_out=replay)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:5], ids.short()) and not replay[5:].any()


def _llama4() -> None: ...


_llama4.__module__, _llama4.__qualname__ = vllm_layers.LLAMA4


def test_the_weight_of_llama4_multiplies_the_input() -> None:
    router = engine.router_of("CPURouter", topk=1, custom_routing_function=_llama4)
    layer = engine.layer_of(router, apply_router_weight_on_input=True)
    rule = RoutingRule("sigmoid", select_on="logit", need_renorm=False)
    hidden, logits = engine.inputs(4)
    want, _ = expected(layer, rule, 1, hidden, logits, doweight_stage1=True)
    torch.testing.assert_close(engine.call(layer, hidden, logits), want, rtol=1e-4, atol=1e-4)


def align(
    ids: Tensor, block: int, experts: int, mask: Tensor | None
) -> tuple[list[int], list[int]]:
    """Sorted flat ids and the local expert of every block, -1 for those of other ranks."""
    flat, slots, owners, local = ids.flatten().tolist(), [], [], 0
    for expert in range(experts):
        here = mask is None or bool(mask[expert])
        entries = [index for index, each in enumerate(flat) if each == expert]
        padding = -len(entries) % block
        slots += entries + [len(flat)] * padding
        owners += [local if here else -1] * ((len(entries) + padding) // block)
        local += here
    return slots, owners


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "topk", "experts", "block"),
                         [(1, 1, 4, 16), (7, 3, 16, 16), (33, 8, 32, 32), (130, 4, 24, 64)])  # fmt: skip
def test_flat_ids_are_what_an_alignment_writes(
    tokens: int, topk: int, experts: int, block: int, masked: bool
) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    mask = (torch.arange(experts) % 3 == 1).int() if masked else None
    topk_out = (torch.empty(tokens, topk), torch.empty(tokens, topk, dtype=torch.int32))
    rule = RoutingRule("sigmoid")
    sorted_ids, _, owners, num_valid, _ = topk_routing_sorting(
        logits, topk, experts, 0, torch.float32, rule=rule, block_size=block, expert_mask=mask,
        topk_out=topk_out, id_format="flat",
    )  # fmt: skip
    slots, blocks = align(reference.topk_routing(logits, topk, rule=rule)[1], block, experts, mask)
    assert int(num_valid[0]) == len(slots)
    assert sorted_ids[: len(slots)].tolist() == slots
    assert owners[: len(blocks)].tolist() == blocks


HALF = torch.tensor([-1, 0, 1, -1, -1, 2, -1, 3, 4, 5, -1, -1, 6, -1, -1, 7], dtype=torch.int32)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """PyTorch fills what it allocates, so that a row that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("expert_map", [None, HALF], ids=["all", "half"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 40])
@pytest.mark.parametrize(("kind", "attributes", "rule"), [RULES[0], RULES[7]])
def test_vllm_s_triton_kernels_get_what_they_read(
    kind: str, attributes: dict[str, Any], rule: RoutingRule, tokens: int, expert_map: Tensor | None
) -> None:
    layer = engine.layer_of(
        engine.router_of(kind, topk=2, **attributes), "TRITON", expert_map=expert_map
    )
    assert layer.experts.taken.products == "triton"
    hidden, logits = engine.inputs(tokens)
    want, ids = expected(layer, rule, 2, hidden, logits)
    replay = torch.zeros((64, 2), dtype=torch.int16)
    got = engine.call(layer, hidden, logits, routing_replay_out=replay)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:tokens], ids.short())
    skipped = expert_map is None and tokens * 2 * 4 <= 16
    assert [each["sorted"] is None for each in engine.launches] == [skipped] * (2 * (tokens > 0))
    assert all(each["compute_type"] == "f32" for each in engine.launches)


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for ROCm's aiter, which vLLM's experts call."""
    module = rocm_stand_in.load()
    monkeypatch.setattr(rocm_sort, "_found", None)
    monkeypatch.setattr(rocm_sort, "_import", lambda: module)
    monkeypatch.setattr(engine.AiterExperts, "rocm", module)
    yield module
    rocm_aiter.restore()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "attributes", "rule"), [RULES[0], RULES[7]])
def test_rocm_s_products_get_our_launch_in_place_of_their_sort(
    kind: str, attributes: dict[str, Any], rule: RoutingRule, masked: bool, rocm: Any
) -> None:
    mask = torch.cat(((HALF >= 0).int(), torch.zeros(1, dtype=torch.int32)))  # NOTE: as vLLM's.
    options = {"expert_map": HALF, "expert_mask": mask} if masked else {}
    layer = engine.layer_of(engine.router_of(kind, **attributes), "AITER", **options)
    assert layer.experts.taken.products == "rocm"
    assert layer.expert_map is (mask if masked else None)
    hidden, logits = engine.inputs(6)
    replay = torch.zeros((8, 3), dtype=torch.int16)
    got = engine.call(layer, hidden, logits, routing_replay_out=replay)
    layer.experts.consumes_expert_mask = False
    want, ids = expected(layer, rule, 3, hidden, logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(replay[:6], ids.short())
    assert len(rocm.seen) == 1 and not rocm.own_sorts


def test_other_calls_of_rocm_s_function_go_on_as_they_are(rocm: Any) -> None:
    engine.layer_of(engine.router_of("FusedTopKRouter"), "AITER")
    (hidden, logits), weights = engine.inputs(4), torch.randn(16, 64, 64)
    rows, ids = reference.topk_routing(logits, 2)
    rocm.fused_moe(hidden, weights, weights[:, :, :32], rows, ids)
    assert len(rocm.own_sorts) == 1
    with pytest.raises(RuntimeError, match="expected one call of ROCm's"):
        with vllm_rocm.routed(logits, 2, RoutingRule(), None, (rows, ids)):
            pass
    with pytest.raises(ValueError, match="topk_weight: expected the tensor that was given"):
        with vllm_rocm.routed(logits, 2, RoutingRule(), None, (rows, ids)):
            rocm.fused_moe(hidden, weights, weights[:, :, :32], rows.clone(), ids)


def test_rocm_s_products_are_refused_by_the_adapter_s_sentence(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rocm_sort, "_found", None)
    layer = engine.layer_of(engine.router_of("FusedTopKRouter"), "AITER")
    assert type(layer.experts) is engine.OwnExperts
    assert f"stay vLLM's: {rocm_sort.available()}" in caplog.text


def test_biases_reach_both_products() -> None:
    torch.manual_seed(1)
    biases = {"w13_bias": torch.randn(16, 64), "w2_bias": torch.randn(16, 64)}
    hidden, logits = engine.inputs(9)
    for backend in ("CPU", "TRITON"):
        layer = engine.layer_of(engine.router_of("FusedTopKRouter"), backend, **biases)
        want, _ = expected(
            layer,
            RoutingRule(),
            3,
            hidden,
            logits,
            bias1=biases["w13_bias"],
            bias2=biases["w2_bias"],
        )
        torch.testing.assert_close(engine.call(layer, hidden, logits), want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("backend", ["TRITON", "CPU"])
def test_rows_of_padding_are_left_out(backend: str) -> None:
    """On a GPU alone, so that the layer is told that it is on one."""
    layer = engine.layer_of(engine.router_of("FusedTopKRouter"), backend)
    layer.experts.taken = layer.experts.taken._replace(skips_padding=True)
    hidden, logits = engine.inputs(12)
    logits[7:], hidden[7:] = float("nan"), float("nan")
    engine.context.is_padding = torch.arange(20) >= 7
    replay = torch.full((12, 3), -1, dtype=torch.int16)
    got = engine.call(layer, hidden, logits, routing_replay_out=replay)
    want, ids = expected(layer, RoutingRule(), 3, hidden[:7], logits[:7])
    torch.testing.assert_close(got[:7], want, rtol=1e-4, atol=1e-4)
    assert not got[7:].any()
    assert torch.equal(replay[:7], ids.short()) and not replay[7:].any()
    if backend == "CPU":
        return
    sorted_ids = engine.launches[0]["sorted"]
    assert not ((sorted_ids[: 16 * 16] >= 21) & (sorted_ids[: 16 * 16] < 36)).any()


@pytest.mark.parametrize(("value", "limit", "alpha", "beta"), [
    ("swigluoai_uninterleave", 7.0, 1.702, 1.0), ("swigluoai_uninterleave", 5.0, 1.702, 1.0),
    ("swigluoai_uninterleave", 5.0, 1.5, 0.5), ("silu", 2.0, 1.0, 0.0), ("gelu_tanh", None, 1.0, 0.0),
    ("gelu", None, 1.0, 0.0), ("silu", None, 1.0, 0.0), ("swigluoai", None, 1.0, 0.0),
])  # fmt: skip
def test_activations_are_vllm_s(
    value: str, limit: float | None, alpha: float, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(clamp_limit=limit, alpha=alpha, beta=beta)
    monkeypatch.setattr(vllm_layers, "settings_of", lambda method, layer: settings)
    router = engine.router_of("FusedTopKRouter", topk=1)
    layer = engine.layer_of(router, moe={"activation": SimpleNamespace(value=value)})
    hidden, logits = engine.inputs(6)
    hidden *= 9
    best = logits.argmax(1)
    got = engine.call(layer, hidden, logits)
    first = torch.einsum("td,tnd->tn", hidden, layer.w13_weight[best])
    gate, up = first.chunk(2, 1)
    if value == "swigluoai":
        (gate, up), (limit, alpha, beta) = (first[:, 0::2], first[:, 1::2]), (7.0, 1.702, 1.0)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gate = {"gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}.get(
                value, lambda x: x * torch.sigmoid(alpha * x))(gate)  # fmt: skip
    want = torch.einsum("ti,tdi->td", gate * (up + beta), layer.w2_weight[best])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_what_a_layer_was_not_taken_with_is_an_error() -> None:
    layer = engine.layer_of(engine.router_of("FusedTopKRouter"))
    hidden, logits = engine.inputs(3)
    with pytest.raises(ValueError, match="e_score_correction_bias: expected none"):
        engine.call(layer, hidden, logits, e_score_correction_bias=BIAS)
    with pytest.raises(ValueError, match="router_logits: expected 16 columns, got shape"):
        engine.call(layer, hidden, logits[:, :8])
    with pytest.raises(ValueError, match="hash_indices_table: expected None"):
        engine.call(layer, hidden, logits, hash_indices_table=BIAS)
    layer.own_map = HALF
    with pytest.raises(
        ValueError, match="expert_map: expected that of when the weights were loaded"
    ):
        engine.call(layer, hidden, logits)
