"""Do the functions of ``aiter.fused_moe`` give one result, whichever path runs?

The path is observed twice: by ``last_path()``, and by breaking the ops of the other path, so that
a test of the fused launch cannot pass through the chain.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from buffers import FrozenInputs, Mismatch
from cases import GATING_DTYPES, LOGITS, MODEL_SHAPES, PARITY_SHAPES, Case, make_inputs
from checks import check_equal, check_sorted, check_weights
from route_calls import PATH_OF_POLICY, check_allocated, max_tokens, route, run_routing
from runners import reporting
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe
from aiter import reference
from aiter.jit import envs
from aiter.ops.fused_topk_moe_sorting import FusedCalls
from aiter.routing import dispatch
from aiter.routing import known as remembered
from aiter.routing import plan as routing_plan

POLICIES = (0, *PATH_OF_POLICY)
DECODE = Case(8, 128, 4, torch.bfloat16, logits="ties")


def compare_policies(case: Case, target: Target) -> list[str]:
    """All policies give the result of policy 0; returns the paths that ran."""
    outputs, path = run_routing(case, target, 0)
    paths = [path]
    for policy in PATH_OF_POLICY:
        others, path = run_routing(case, target, policy)
        paths.append(path)
        if case.num_tokens:
            with reporting(f"policy {policy} against 0, {case}", target):
                check_sorted(others, [tensor.cpu() for tensor in outputs], case.block_size)
    return paths


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("dtype", GATING_DTYPES, ids=str)
def test_policies_agree(target: Target, dtype: torch.dtype, renorm: bool) -> None:
    for shape in PARITY_SHAPES:
        case = Case(*shape, dtype=dtype, need_renorm=renorm, logits="ties")
        compare_policies(case, target)


@pytest.mark.parametrize("model", MODEL_SHAPES)
def test_policies_agree_on_models(target: Target, model: str) -> None:
    num_experts, topk, model_dim = MODEL_SHAPES[model]
    case = Case(1, num_experts, topk, torch.bfloat16, model_dim=model_dim)
    assert compare_policies(case, target)[0] == "fused"
    masked = replace(case, num_tokens=12, model_dim=8, mask="random", num_local=10)
    compare_policies(masked, target)


@pytest.mark.parametrize("logits", LOGITS)
def test_policies_agree_on_special_rows(target: Target, logits: str) -> None:
    for shape in ((14, 128, 4), (9, 33, 9)):
        for renorm in (True, False):
            compare_policies(Case(*shape, logits=logits, need_renorm=renorm), target)


def test_no_tokens(target: Target) -> None:
    for num_local in (None, 0):
        compare_policies(Case(0, 128, 4, num_local=num_local), target)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_tokens_have_no_strides(target: Target, policy: int) -> None:
    """An empty array of NumPy has strides of 0, which are no reason to refuse it."""
    empty = torch.zeros(1, device=target.device).as_strided((0, 16), (0, 0))
    weight = torch.zeros(8, 16, device=target.device)
    with target.active():
        by_logits = aiter.fused_moe.topk_softmax_sorting(
            empty, 2, 16, 8, torch.bfloat16, dispatch_policy=policy
        )
        by_rule = aiter.fused_moe.topk_routing_sorting(
            empty, 2, 16, 8, torch.bfloat16, rule=aiter.RoutingRule("sigmoid"),
            dispatch_policy=policy,
        )  # fmt: skip
        from_hidden = aiter.fused_moe.router_topk_sorting(
            empty, weight, 2, 8, 8, torch.bfloat16, dispatch_policy=policy
        )
    for outputs in (by_logits, by_rule, from_hidden):
        assert outputs[3].tolist() == [0, 0]


def test_automatic_choice(target: Target) -> None:
    """Decode sizes take the fused launch, sizes beyond its limit take the chain."""
    for shape in ((1, 128, 4), (8, 128, 4), (1, 256, 8)):
        assert run_routing(Case(*shape), target, 0)[1] == "fused"
    limit = max_tokens(256, 8, target)
    assert run_routing(Case(limit + 1, 256, 8), target, 0)[1] in PATH_OF_POLICY.values()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", ["none", "random", "zeros"])
def test_moe_sorting(target: Target, mask: str, policy: int) -> None:
    """``moe_sorting`` of given ids: rows from n on hold garbage."""
    for shape in ((1, 128, 4), (50, 128, 4), (17, 257, 9), (700, 8, 2)):
        for num_local in (None, shape[0] // 2):
            case = Case(*shape, mask=mask, num_local=num_local)
            with reporting(f"policy {policy}, {case}", target):
                sort_given_ids(case, target, policy)


def sort_given_ids(case: Case, target: Target, policy: int) -> None:
    """Run ``moe_sorting`` on the reference's selection and check the five tensors."""
    inputs = make_inputs(case, target.device)
    weights, ids = reference.topk_softmax(inputs.gating.cpu(), case.topk, case.need_renorm)
    ids[case.local_tokens :] = -7
    ids, weights = ids.to(target.device), weights.to(target.device)
    frozen = FrozenInputs({**inputs.named(), "topk_ids": ids, "topk_weights": weights})
    with target.active():
        outputs = aiter.fused_moe.moe_sorting(
            ids,
            weights,
            case.num_experts,
            case.model_dim,
            case.moebuf_dtype,
            case.block_size,
            inputs.mask,
            inputs.num_local_tokens,
            policy,
        )
    target.synchronize()
    frozen.check()
    check_allocated(case, inputs, target, outputs)


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("dtype", GATING_DTYPES, ids=str)
def test_fused_topk(target: Target, dtype: torch.dtype, renorm: bool) -> None:
    for shape in ((0, 128, 4), (1, 128, 4), (33, 256, 8), (7, 161, 9)):
        case = Case(*shape, dtype=dtype, logits="ties")
        gating = make_inputs(case, target.device).gating
        hidden_states = torch.zeros(case.num_tokens, 64, dtype=dtype, device=target.device)
        with reporting(case, target):
            with target.active():
                weights, ids = aiter.fused_moe.fused_topk(hidden_states, gating, case.topk, renorm)
            target.synchronize()
            want_weights, want_ids = reference.topk_softmax(gating.cpu(), case.topk, renorm)
            check_equal("ids", ids, want_ids)
            check_weights("weights", weights, want_weights)


class PlantedFailure(RuntimeError):
    """Raised by an op that a test broke."""


def break_op(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Replace ``aiter.<name>`` by an op that raises, wherever an aiter module refers to it."""
    op = getattr(aiter, name)

    def broken(*args: object, **kwargs: object) -> None:
        raise PlantedFailure(name)

    for module_name, module in list(sys.modules.items()):
        if module_name == "aiter" or module_name.startswith("aiter."):
            for attribute, value in list(vars(module).items()):
                if value is op:
                    monkeypatch.setattr(module, attribute, broken)
    # NOTE: a plan holds the compiled functions behind the ops.
    plan = routing_plan.plan_routing

    def broken_plan(*sizes: Any) -> routing_plan.Plan:
        made = plan(*sizes)
        fused, chain = made.fused, made.chain
        if fused is not None and name == "fused_topk_moe_sorting_fwd":
            fused = FusedCalls(broken, lambda *_: None)
        if chain is not None:
            part = {"topk_softmax": "topk", "moe_sorting_opus_fwd": "sort"}.get(name)
            chain = chain._replace(**{part: broken}) if part else chain
        return made._replace(fused=fused, chain=chain)

    monkeypatch.setattr(routing_plan, "plan_routing", broken_plan)
    remembered.forget()  # what an earlier test called is answered without a plan


def assert_fails(case: Case, target: Target, policies: Sequence[int], words: str) -> None:
    inputs = make_inputs(case, target.device)
    for policy in policies:
        with pytest.raises(PlantedFailure, match=words):
            route(case, inputs, target, policy)


@pytest.mark.usefixtures("nothing_known")
def test_fused_path_runs_without_the_chain(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    break_op(monkeypatch, "moe_sorting_opus_fwd")
    break_op(monkeypatch, "topk_softmax")
    assert run_routing(DECODE, target, 0)[1] == "fused"
    assert_fails(DECODE, target, (1, 2), "topk_softmax")


@pytest.mark.usefixtures("nothing_known")
def test_chain_runs_without_the_fused_path(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    break_op(monkeypatch, "fused_topk_moe_sorting_fwd")
    for policy, path in PATH_OF_POLICY.items():
        assert run_routing(DECODE, target, policy)[1] == path


@pytest.mark.usefixtures("nothing_known")
def test_failure_in_the_fused_path_is_raised(
    monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    break_op(monkeypatch, "fused_topk_moe_sorting_fwd")
    assert_fails(DECODE, target, (0,), "fused_topk_moe_sorting_fwd")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_call_asks_nothing_again(
    monkeypatch: pytest.MonkeyPatch, target: Target, policy: int
) -> None:
    """No environment read, no file, no device query and no new plan for a shape that was seen."""
    inputs = make_inputs(DECODE, target.device)
    first = route(DECODE, inputs, target, policy)

    def refused(*args: object, **kwargs: object) -> None:
        raise PlantedFailure("asked again")

    with monkeypatch.context() as patched:
        patched.setattr(envs.Variable, "text", refused)
        patched.setattr(builtins, "open", refused)
        patched.setattr(torch.cuda, "get_device_properties", refused)
        patched.setattr(dispatch, "choose", refused)
        again = route(DECODE, inputs, target, policy)
    slots = int(first[3][0])
    assert torch.equal(first[0][:slots], again[0][:slots])
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "choose", refused)
        remembered.forget()
        with pytest.raises(PlantedFailure, match="asked again"):
            route(DECODE, inputs, target, policy)


@pytest.mark.parametrize("policy", [-1, 3, 2**40])
def test_unknown_policy(target: Target, policy: int) -> None:
    inputs = make_inputs(DECODE, target.device)
    words = rf"dispatch_policy.*expected.*got {policy}"
    with pytest.raises(ValueError, match=words):
        route(DECODE, inputs, target, policy)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=target.device)
    with target.active(), pytest.raises(ValueError, match=words):
        aiter.fused_moe.moe_sorting(ids, ids.float(), 1, 8, torch.bfloat16, dispatch_policy=policy)


def test_comparison_of_policies_can_fail(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """A fused launch with a wrong weight is noticed."""
    genuine: Callable[..., tuple[Tensor, ...]] = aiter.fused_moe.topk_softmax_sorting

    def wrong(*args: object) -> tuple[Tensor, ...]:
        outputs = genuine(*args)
        if args[-1] == 0:
            outputs[1][0] *= 1 + 4e-6
        return outputs

    monkeypatch.setattr(aiter.fused_moe, "topk_softmax_sorting", wrong)
    with pytest.raises(Mismatch, match="sorted_weights"):
        compare_policies(DECODE, target)


def main() -> int:
    """Print which path policy 0 took and that all policies agree."""
    from script import parse_options, run_script

    models = sorted({shape[:2] for shape in MODEL_SHAPES.values()})
    options = parse_options(__doc__ or "", [*PARITY_SHAPES, *((8, *model) for model in models)])
    return run_script(options, ["policy 0", "policy 1", "policy 2"], compare_policies)


if __name__ == "__main__":
    sys.exit(main())
