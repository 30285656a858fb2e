"""How are the allocating functions of ``aiter.fused_moe`` called and judged?

They choose a path themselves; :func:`run_routing` checks the result like a guarded op's, as far as
freshly allocated outputs allow, and tells which path ran.
"""

from __future__ import annotations

import torch
import without_clusters
from buffers import FrozenInputs, require
from cases import Case, Inputs, make_inputs
from checks import check_equal, check_sorted
from runners import check_sorted_alone, expected_sorted, reporting
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe

PATH_OF_POLICY = {1: "oneshot", 2: "multiphase"}
PATHS = ("fused", *PATH_OF_POLICY.values())


def max_tokens(num_experts: int, topk: int, target: Target) -> int:
    """The largest M of the fused launch on ``target``."""
    with target.active():
        return aiter.fused_topk_moe_sorting_max_tokens(
            num_experts, topk, device=torch.device(target.device)
        )


def has_clusters(target: Target) -> bool:
    """Whether workgroups of the target can form clusters: the cpu, and NVIDIA GPUs from sm_90 on."""
    if target.device == "cpu":
        return True
    if without_clusters.requested():
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(target.device)[0] >= 9


def route(case: Case, inputs: Inputs, target: Target, policy: int) -> tuple[Tensor, ...]:
    """``topk_softmax_sorting`` of ``inputs`` under ``policy``."""
    with target.active():
        outputs = aiter.fused_moe.topk_softmax_sorting(
            inputs.gating,
            case.topk,
            case.num_experts,
            case.model_dim,
            case.moebuf_dtype,
            case.need_renorm,
            case.block_size,
            inputs.mask,
            inputs.num_local_tokens,
            policy,
        )
    target.synchronize()
    return outputs


def run_routing(case: Case, target: Target, policy: int) -> tuple[tuple[Tensor, ...], str]:
    """Route ``case`` under ``policy`` and check it; returns the outputs and the path that ran."""
    with reporting(f"policy {policy}, {case}", target):
        inputs = make_inputs(case, target.device)
        frozen = FrozenInputs(inputs.named())
        outputs = route(case, inputs, target, policy)
        path = aiter.fused_moe.last_path()
        frozen.check()
        check_allocated(case, inputs, target, outputs)
        wanted = [PATH_OF_POLICY[policy]] if policy else list(PATHS)
        require(path in wanted, f"last_path(): expected one of {wanted}, got {path!r}")
        return outputs, str(path)


def check_allocated(
    case: Case, inputs: Inputs, target: Target, outputs: tuple[Tensor, ...]
) -> None:
    """Shapes, device, values and zeroed rows of the five tensors that a function returned."""
    require(len(outputs) == 5, f"expected 5 tensors, got {len(outputs)}")
    for tensor in outputs:
        require(
            tensor.device.type == torch.device(target.device).type and tensor.is_contiguous(),
            f"outputs: expected contiguous tensors on {target.device}, "
            f"got strides {tensor.stride()} on {tensor.device}",
        )
    expected = expected_sorted(case, inputs)
    if case.num_tokens == 0:
        check_equal("num_valid_ids", outputs[3], expected[3])
        return
    check_sorted(outputs, expected, case.block_size)
    check_sorted_alone(case, inputs, outputs)
    moe_buf = outputs[4]
    require(
        moe_buf.shape == (case.num_tokens, case.model_dim) and moe_buf.dtype == case.moebuf_dtype,
        f"moe_buf: expected {case.moebuf_dtype} [{case.num_tokens}, {case.model_dim}], "
        f"got {moe_buf.dtype} {list(moe_buf.shape)}",
    )
    nonzero = int(moe_buf[: case.local_tokens].view(torch.uint8).count_nonzero())
    require(nonzero == 0, f"moe_buf: expected zero rows below n, got {nonzero} nonzero bytes")
