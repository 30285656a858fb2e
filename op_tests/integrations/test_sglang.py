"""Does the plugin of SGLang take the layers that it can, and compute in them what SGLang would?

Against stand-ins of SGLang's classes (`sglang_standin`), which keep its traps; each test is one of them.
`.ci/sglang` runs the real engine.
"""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import _checkout  # noqa: F401
import pytest
import rocm_stand_in
import sglang_standin as standin
import torch
from sglang_in_place import (
    BIAS,
    EXPERTS,
    TOPK,
    bound,
    close,
    config,
    in_place,
    inputs,
    routed,
    runner_config,
    wanted,
)
from torch import Tensor

from aiter import RoutingRule
from aiter.fused_moe import last_path
from aiter.integrations import rocm_sort, sglang_runner
from aiter.ops.topk_routing import topk_routing


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    return in_place(monkeypatch)


# --- what is taken ---------------------------------------------------------------------------------


def test_a_layer_routes_through_one_launch_and_says_so_once(
    state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="aiter")
    for _ in range(2):
        layer = standin.FusedMoE()
        topk = bound(layer)
    hidden, logits = inputs()
    choice = topk.forward_native(hidden, logits)
    assert isinstance(choice, standin.Bypassed)
    close(layer(hidden, choice), wanted(layer, hidden, *routed(logits)))
    said = [record.message for record in caplog.records if "SGLang layers" in record.message]
    assert said == [
        "SGLang layers of 8 experts, top-2: one launch by RoutingRule(); products: ours, on the CPU"
    ]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"lora": True}, "LoRA is on"),
        ({"a2a": "deepep"}, "--moe-a2a-backend deepep"),
        ({"remap": True}, "EPLB"),
        ({"compiled": True}, "--enable-torch-compile"),
        ({"amx": True}, "AMX"),
        ({"device": "xpu"}, "neither a GPU of CUDA or HIP nor the CPU"),
    ],
)
def test_what_stays_with_sglang_is_said(
    state: Any, caplog: pytest.LogCaptureFixture, setting: Any, reason: str
) -> None:
    caplog.set_level(logging.INFO, logger="aiter")
    state.__dict__.update(setting)
    layer = standin.FusedMoE()
    topk = bound(layer)
    assert layer.runner_backend is standin.MoeRunnerBackend.TRITON
    assert isinstance(topk.forward_native(*inputs()), standin.Standard)
    [said] = [record.message for record in caplog.records if "left to SGLang" in record.message]
    assert reason in said


def test_a_wrapped_method_and_a_subclass_are_left(state: Any) -> None:
    assert not hasattr(standin.FusedMoE(standin.OtherMethod()).runner_backend, sglang_runner.STATE)
    layer, inner = standin.FusedMoE(), standin.UnquantizedFusedMoEMethod()
    inner.create_moe_runner(layer, layer.config)
    assert inner.runner.runner_backend is standin.MoeRunnerBackend.TRITON


def test_another_runner_is_left_and_quantised_layers_are_named(
    state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="aiter")
    method = standin.UnquantizedFusedMoEMethod()
    method.backend = standin.MoeRunnerBackend.DEEP_GEMM
    standin.FusedMoE(method)
    standin.TopK(top_k=TOPK).bind_runner_backend(standin.MoeRunnerBackend.AITER)
    assert "its runner is deep_gemm" in caplog.text
    assert "layers whose runner is aiter: left to SGLang: they are quantised" in caplog.text


def test_our_name_as_a_runner_backend_is_refused(state: Any) -> None:
    name = standin.RegisteredMoeRunnerBackend(sglang_runner.STATE)
    with pytest.raises(ValueError, match="moe_runner_backend: expected auto or triton"):
        standin.MoeRunner(name, runner_config())


@pytest.mark.parametrize("simulated", [True, False])
def test_ids_of_sglang_go_to_our_experts_where_no_rule_says_the_choice(
    state: Any, simulated: bool
) -> None:
    state.simulated = simulated

    def choose(logits: Tensor, topk: int) -> Any:
        ids = logits.argsort(-1)[:, :topk]  # the worst
        return torch.full(ids.shape, 0.25), ids

    layer = standin.FusedMoE()
    topk = bound(layer, **({} if simulated else {"custom_routing_function": choose}))
    hidden, logits = inputs()
    choice = topk.forward_native(hidden, logits)
    assert isinstance(choice, standin.Standard)
    close(layer(hidden, choice), wanted(layer, hidden, choice.topk_weights, choice.topk_ids))
    empty = standin.select_experts(logits[:0], topk.topk_config)
    assert layer(hidden[:0], empty).shape == (0, 16)


def test_local_ids_of_expert_parallelism_go_to_our_experts(state: Any) -> None:
    layer = standin.FusedMoE(ranks=2, rank=1)
    topk = bound(layer, custom_routing_function=lambda logits, k: routed(logits))
    hidden, logits = inputs()
    got = layer(hidden, topk.forward_native(hidden, logits))
    close(got, wanted(layer, hidden, *routed(logits)))


# --- traps of bypassed choices ---------------------------------------------------------------------

GROUPED = {
    "use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2, "correction_bias": BIAS,
    "routed_scaling_factor": 2.5,
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda", "hip"])
def test_a_rebuilt_configuration_does_not_change_the_rule(state: Any, device: str) -> None:
    state.device, state.scale_in_topk = device, True
    layer = standin.FusedMoE(inplace=False)
    bound(layer, **GROUPED)
    hidden, logits = inputs()
    rebuilt = config(correction_bias=BIAS, num_expert_group=4, topk_group=2, layer_id=0)
    rule = RoutingRule("sigmoid", 4, 2, "top2", renorm_eps=1e-20, routed_scaling_factor=2.5)
    got = layer(hidden, standin.Bypassed(hidden, logits, rebuilt))
    close(got, wanted(layer, hidden, *routed(logits, rule, BIAS)))


def test_two_rules_for_one_layer_are_refused(state: Any) -> None:
    layer = standin.FusedMoE()
    bound(layer)
    bound(layer)
    with pytest.raises(RuntimeError, match="the top-k of layer 0: expected RoutingRule"):
        bound(layer, scoring_func="sigmoid")


def test_logits_without_a_bound_choice_are_refused(state: Any) -> None:
    layer = standin.FusedMoE()
    hidden, logits = inputs()
    with pytest.raises(RuntimeError, match="its top-k was not bound"):
        layer(hidden, standin.Bypassed(hidden, logits, config()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_read_at_every_call_in_its_own_dtype(state: Any, dtype: torch.dtype) -> None:
    layer = standin.FusedMoE()
    bias = torch.nn.Parameter(torch.zeros(EXPERTS, dtype=dtype))
    topk = bound(layer, **GROUPED | {"correction_bias": bias})
    bias.data.copy_(BIAS)
    hidden, logits = inputs()
    rule = RoutingRule("sigmoid", 4, 2, "top2", renorm_eps=1e-20)
    with torch.no_grad():
        got = layer(hidden, topk.forward_native(hidden, logits))
    close(got, wanted(layer, hidden, *routed(logits, rule, bias.detach())))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_that_have_moved_are_chosen_by_sglang(state: Any, device: str, ranks: int) -> None:
    state.device = device
    layer = standin.FusedMoE(ranks=ranks, rank=ranks - 1)
    topk = bound(layer, moved=torch.arange(EXPERTS).flip(0))
    hidden, logits = inputs()
    choice = topk.forward_cuda(hidden, logits)
    weights, ids = routed(logits)
    if device == "cpu":
        close(layer(hidden, choice), wanted(layer, hidden, weights, 7 - ids))
        return
    layer(hidden, choice)
    [(given, _)] = layer.runner_backend.fused_moe_routing.sglang_runner.given
    local = 7 - ids - (ranks - 1) * layer.num_local_experts
    assert torch.equal(given.topk_ids, local.masked_fill((local < 0) | (local > 7), -1))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_rows_that_do_not_count_come_out_zero(state: Any, device: str, shape: Any) -> None:
    state.device = device
    layer = standin.FusedMoE()
    topk = bound(layer, rows=torch.full(shape, 4, dtype=torch.int32))
    hidden, logits = inputs()
    choice = topk.forward_cuda(hidden, logits)
    want = wanted(layer, hidden, *routed(logits))
    want[4:] = 0.0
    close(layer(hidden.clone(), choice), want)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_recorders_see_the_ids(state: Any, device: str) -> None:
    state.device, state.recorder, state.captured = device, standin.Recorder(), []
    layer = standin.FusedMoE()
    topk = bound(layer, rows=torch.tensor(4, dtype=torch.int32))
    hidden, logits = inputs()
    choice = topk.forward_cuda(hidden, logits)
    want = wanted(layer, hidden, *routed(logits))
    want[4:] = 0.0
    close(layer(hidden.clone(), choice), want)
    ids = routed(logits)[1]
    ids[4:] = -1
    [seen], [(layer_id, captured)] = state.recorder.seen, state.captured
    assert torch.equal(seen, ids) and torch.equal(captured, ids) and layer_id == 0


# --- SGLang's Triton experts on flat ids ------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "hip"])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_triton_experts_read_our_buffers(
    state: Any, device: str, inplace: bool, ranks: int, rank: int
) -> None:
    state.device = device
    layer = standin.FusedMoE(ranks=ranks, rank=rank, inplace=inplace, routed_scaling_factor=2.5)
    topk = bound(layer)
    hidden, logits = inputs()
    got = layer(hidden.clone(), topk.forward_cuda(hidden, logits))
    # NOTE: the experts apply the scale of their configuration, so the rule has none.
    close(got, 2.5 * wanted(layer, hidden, *routed(logits)))
    [call] = state.calls
    assert call.config == {"BLOCK_SIZE_M": 16} and state.block_config["USE_TMA"] is True


def test_the_down_products_tensor_memory_path_is_off_under_a_mask(state: Any) -> None:
    state.device, state.tma, state.down_config = "cuda", True, {"BLOCK_SIZE_M": 16, "USE_TMA": True}
    hidden, logits = inputs()
    for ranks in (1, 2):
        layer = standin.FusedMoE(ranks=ranks)
        layer(hidden.clone(), bound(layer).forward_cuda(hidden, logits))
    assert [(call.down_tma, call.up_tma) for call in state.calls] == [(True, True), (False, True)]
    assert state.down_config["USE_TMA"] is True


def test_the_mask_is_a_buffer_and_goes_when_the_layer_gets_all_experts(state: Any) -> None:
    layer = standin.FusedMoE(ranks=2, rank=1)
    bound(layer)
    mask = dict(layer.named_buffers())[sglang_runner.MASK]
    assert mask.dtype == torch.int32 and mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sglang_runner.MASK not in layer.state_dict()
    assert layer.fused_moe_routing.mask() is mask
    layer.moe_ep_size = 1
    assert layer.fused_moe_routing.mask() is None


# --- ROCm's products --------------------------------------------------------------------------------


@pytest.fixture
def rocm(state: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLANG_USE_AITER=1 on HIP, with a stand-in of our adapter, which keeps what it was given."""
    state.device, state.given, state.missing = "hip", [], None
    adapter = types.ModuleType("aiter.integrations.rocm_aiter")

    def fused_moe_from_logits(hidden: Tensor, *more: Any, **by_name: Any) -> Tensor:
        state.given.append((more, by_name))
        if by_name["topk_out"] is not None:
            topk_routing(*by_name["topk_out"], more[2], rule=by_name["rule"])
        return torch.full_like(hidden, torch.nan)

    adapter.__dict__.update(
        available=lambda: state.missing, fused_moe_from_logits=fused_moe_from_logits
    )
    monkeypatch.setitem(sys.modules, adapter.__name__, adapter)
    return state


def rocm_layer(**fields: Any) -> standin.FusedMoE:
    method = standin.UnquantizedFusedMoEMethod()
    method.use_aiter = True
    return standin.FusedMoE(method, **fields)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rocm_products_get_the_logits_and_the_mask(rocm: Any, ranks: int) -> None:
    rocm.recorder = standin.Recorder()
    layer = rocm_layer(ranks=ranks)
    assert layer.runner_backend.is_aiter() and layer.quant_method.runner.runner_backend.is_triton()
    topk = bound(layer, rows=torch.tensor(4, dtype=torch.int32))
    hidden, logits = inputs()
    got = layer(hidden, topk.forward_cuda(hidden, logits))
    assert torch.equal(got[4:], torch.zeros(2, 16)) and got[:4].isnan().all()
    [((w1, w2, gating, k), by_name)] = rocm.given
    assert w1 is layer.w13_weight and w2 is layer.w2_weight and gating is logits and k == TOPK
    assert by_name["num_local_tokens"].shape == (1,) and by_name["rule"] == RoutingRule()
    assert by_name["activation"] == "ROCm's silu" and by_name["moe_sorting_dispatch_policy"] == 2
    mask = by_name["expert_mask"]
    assert mask is None if ranks == 1 else mask.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert rocm.recorder.seen[0][:4].equal(routed(logits)[1][:4])


def test_rocm_products_are_behind_one_launch(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapter itself: SGLang's sort policy, 2, is ROCm's and no chain of ours."""
    upstream = rocm_stand_in.load()
    monkeypatch.setattr(rocm_sort, "_found", None)
    monkeypatch.setattr(rocm_sort, "_import", lambda: upstream)
    monkeypatch.setattr(
        sglang_runner.srt("layers.moe.moe_runner.aiter"), "_aiter_activation",
        lambda config: upstream.ActivationType.Silu,
    )  # fmt: skip
    state.device = "hip"
    layer = rocm_layer()
    topk = bound(layer)
    hidden, logits = inputs()
    got = layer(hidden, topk.forward_cuda(hidden, logits))
    assert last_path() == "fused" and upstream.own_sorts == [] and len(upstream.seen) == 1
    close(got, wanted(layer, hidden, *routed(logits)))
    upstream.OUTPUT_AUX = True  # NOTE: which we do not write, so that ROCm sorts, by its policy.
    layer(hidden, topk.forward_cuda(hidden, logits))
    assert upstream.own_policies == [2]


def test_ids_stay_global_for_rocm_products_and_get_the_mask(rocm: Any) -> None:
    layer = rocm_layer(ranks=2, rank=1)
    topk = bound(layer, moved=torch.arange(EXPERTS).flip(0))
    hidden, logits = inputs()
    layer(hidden, topk.forward_cuda(hidden, logits))
    [(given, quant_info)] = layer.fused_moe_routing.sglang_runner.given
    assert torch.equal(given.topk_ids, 7 - routed(logits)[1])
    assert quant_info.expert_mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_without_the_adapter_rocm_layers_stay_with_sglang(
    rocm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="aiter")
    rocm.missing = "ROCm's aiter is not installed"
    assert rocm_layer().runner_backend is standin.MoeRunnerBackend.AITER
    rocm.missing = None
    assert rocm_layer(gemm1_clamp_limit=7.0).runner_backend is standin.MoeRunnerBackend.AITER
    assert rocm_layer(activation="situ").runner_backend is standin.MoeRunnerBackend.AITER
    assert "SGLANG_USE_AITER=1, and ROCm's aiter is not installed" in caplog.text
