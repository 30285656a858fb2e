"""How is an op called and judged? One function per op: inputs, guarded outputs, call, all checks.

Each takes the op as an argument, so that the tests of the checks can plant bugs in a fake one.
A failure is reported with the case and the target that show it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import without_clusters
from buffers import FrozenInputs, GuardedBuffer, Mismatch
from cases import Case, Inputs, make_inputs
from checks import (
    check_distinct,
    check_equal,
    check_selection,
    check_sorted,
    check_structure,
    check_weight_sums,
    check_weights,
)
from targets import Target
from torch import Tensor

from aiter import reference

Op = Callable[..., None]


@contextlib.contextmanager
def reporting(case: object, target: object) -> Iterator[None]:
    """Name the failing case and target in whatever goes wrong inside."""
    try:
        yield
    except Mismatch as error:
        raise Mismatch(f"{error}\n  in {case} on {target}") from error
    except Exception as error:
        kind = type(error).__name__
        raise Mismatch(f"raised {kind}: {error}\n  in {case} on {target}") from error


@dataclass(frozen=True)
class SortedOutputs:
    """The five guarded outputs of a sorting op, in the order of its arguments."""

    buffers: tuple[GuardedBuffer, ...]

    @classmethod
    def allocate(cls, case: Case, device: str) -> SortedOutputs:
        rows = (
            ("sorted_ids", (case.capacity,), torch.int32, case.slots_offset),
            ("sorted_weights", (case.capacity,), torch.float32, case.slots_offset),
            ("sorted_expert_ids", (case.max_blocks,), torch.int32, 0),
            ("num_valid_ids", (2,), torch.int32, 0),
            (
                "moe_buf",
                (case.num_tokens, case.model_dim),
                case.moebuf_dtype,
                case.moe_buf_offset,
            ),
        )
        return cls(
            tuple(
                GuardedBuffer(name, shape, dtype, device, offset)
                for name, shape, dtype, offset in rows
            )
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(buffer.tensor for buffer in self.buffers)

    def check_guards(self) -> None:
        """Nothing was written outside the five tensors."""
        for buffer in self.buffers:
            buffer.check_guards()

    def check(
        self,
        case: Case,
        inputs: Inputs,
        expected: tuple[Tensor, ...],
        given_ids: Tensor | None = None,
        handed_over: int = 0,
    ) -> None:
        """Guards, values, invariants, and nothing written behind the slots in use, the first
        `handed_over` ones, and the rows of ``moe_buf`` that count.
        """
        self.check_guards()
        if case.num_tokens == 0:
            check_equal("num_valid_ids", self.tensors[3], expected[3])
            for buffer in (*self.buffers[:3], self.buffers[4]):
                buffer.check_untouched()
            return
        check_sorted(self.tensors, expected, case.block_size)
        num_valid = int(expected[3][0])
        self.buffers[0].check_untouched_from(max(num_valid, handed_over))
        self.buffers[1].check_untouched_from(max(num_valid, handed_over))
        self.buffers[2].check_untouched_from(num_valid // case.block_size)
        self.buffers[4].check_zero_then_untouched(case.local_tokens)
        check_sorted_alone(case, inputs, self.tensors, given_ids)


def check_sorted_alone(
    case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], given_ids: Tensor | None = None
) -> None:
    """The invariants that need no reference, on the five tensors of ``case``."""
    experts, weights = check_structure(
        outputs,
        num_tokens=case.local_tokens,
        num_experts=case.num_experts,
        topk=case.topk,
        block_size=case.block_size,
        mask=inputs.mask,
        ids=None if given_ids is None else given_ids[: case.local_tokens],
    )
    if given_ids is not None:
        return
    check_selection(experts, inputs.gating[: case.local_tokens])
    if case.need_renorm and inputs.mask is None:
        check_weight_sums(weights)


def expected_sorted(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference's five tensors, computed on the CPU."""
    return reference.topk_softmax_sorting(
        inputs.gating.cpu(),
        case.topk,
        case.num_experts,
        case.model_dim,
        case.moebuf_dtype,
        case.need_renorm,
        case.block_size,
        None if inputs.mask is None else inputs.mask.cpu(),
        None if inputs.num_local_tokens is None else inputs.num_local_tokens.cpu(),
    )


def expected_of_ids(case: Case, inputs: Inputs, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The reference's five tensors for ready ids, computed on the CPU."""
    return reference.moe_sorting(
        ids.cpu(),
        weights.cpu(),
        case.num_experts,
        case.model_dim,
        case.moebuf_dtype,
        case.block_size,
        None if inputs.mask is None else inputs.mask.cpu(),
        None if inputs.num_local_tokens is None else inputs.num_local_tokens.cpu(),
    )


def fused_arguments(case: Case, inputs: Inputs, outputs: SortedOutputs) -> dict[str, Any]:
    """The arguments of ``fused_topk_moe_sorting_fwd``, by name and in its order."""
    return {
        "gating_output": inputs.gating,
        **{buffer.name: buffer.tensor for buffer in outputs.buffers},
        "num_experts": case.num_experts,
        "topk": case.topk,
        "unit_size": case.block_size,
        "need_renorm": case.need_renorm,
        "local_expert_mask": inputs.mask,
        "num_local_tokens": inputs.num_local_tokens,
    }


def can_hand_over(target: Target) -> bool:
    """Whether workgroups can hand over through memory: on the CPU, and GPUs without clusters."""
    if target.device == "cpu" or torch.version.hip is not None or without_clusters.requested():
        return True
    return torch.cuda.get_device_capability(target.device)[0] < 9


def hands_over_unasked(target: Target) -> bool:
    """Whether workgroups may hand over without being asked to: on GPUs that can."""
    return target.device != "cpu" and can_hand_over(target)


def handed_over_slots(case: Case, target: Target, asked: bool = False) -> int:
    """The first slots that a fused launch of `case` may leave its selection in; `asked` to or not."""
    return case.num_tokens * case.topk if asked or hands_over_unasked(target) else 0


def run_fused(case: Case, target: Target, op: Op, hands_over: bool = False) -> tuple[Tensor, ...]:
    """Call ``op`` as ``fused_topk_moe_sorting_fwd`` and check everything; returns the outputs.

    `hands_over`: workgroups leave their selection in the first slots, which those in use need not
    cover; GPUs without clusters may do so unasked.
    """
    with reporting(case, target):
        inputs = make_inputs(case, target.device)
        frozen = FrozenInputs(inputs.named())
        outputs = SortedOutputs.allocate(case, target.device)
        arguments = fused_arguments(case, inputs, outputs)
        options = {name: arguments.pop(name) for name in ("local_expert_mask", "num_local_tokens")}
        with target.active():
            op(*arguments.values(), **options)
        target.synchronize()
        frozen.check()
        handed_over = handed_over_slots(case, target, hands_over)
        outputs.check(case, inputs, expected_sorted(case, inputs), handed_over=handed_over)
        return outputs.tensors


def run_topk_softmax(case: Case, target: Target, op: Op) -> tuple[Tensor, Tensor]:
    """Call ``op`` as ``topk_softmax`` and check everything; returns weights and ids."""
    with reporting(case, target):
        inputs = make_inputs(case, target.device)
        frozen = FrozenInputs({"gating_output": inputs.gating})
        shape = (case.num_tokens, case.topk)
        outputs = [
            GuardedBuffer("topk_weights", shape, torch.float32, target.device),
            GuardedBuffer("topk_indices", shape, torch.int32, target.device),
            GuardedBuffer("token_expert_indices", shape, torch.int32, target.device),
        ]
        weights, ids, source = (buffer.tensor for buffer in outputs)
        with target.active():
            op(weights, ids, source, inputs.gating, case.need_renorm)
        target.synchronize()
        frozen.check()
        for buffer in outputs:
            buffer.check_guards()
        want_weights, want_ids = reference.topk_softmax(
            inputs.gating.cpu(), case.topk, case.need_renorm
        )
        check_equal("topk_indices", ids, want_ids)
        check_weights("topk_weights", weights, want_weights)
        row = torch.arange(case.num_tokens, dtype=torch.int32)[:, None]
        slot = torch.arange(case.topk, dtype=torch.int32)[None, :]
        check_equal("token_expert_indices", source, slot * case.num_tokens + row)
        table = ids.cpu().long().numpy()
        check_distinct(table)
        check_selection(table, inputs.gating)
        if case.need_renorm:
            check_weight_sums(weights.cpu().numpy())
        return weights, ids


WORKSPACE_OFFSET = 16
"""The workspace starts 16 bytes past a 256-byte boundary, as a slice of an arena might."""


def run_moe_sorting(
    case: Case,
    target: Target,
    op: Op,
    policy: int,
    workspace_size: Callable[..., int],
    given_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Call ``op`` as ``moe_sorting_opus_fwd`` and check everything; returns the outputs.

    The ids come from the reference's selection unless ``given_ids`` [M, K] are there, which may be
    any; rows from ``n`` on hold garbage. The workspace has exactly the size that ``workspace_size``
    asks for, and poison for contents.
    """
    with reporting(f"policy {policy}, {case}", target):
        device = target.device
        inputs = make_inputs(case, device)
        weights, ids = reference.topk_softmax(inputs.gating.cpu(), case.topk, case.need_renorm)
        ids = ids if given_ids is None else given_ids.clone()
        ids[case.local_tokens :] = torch.iinfo(torch.int32).max
        weights[case.local_tokens :] = float("nan")
        ids, weights = ids.to(device), weights.to(device)
        frozen = FrozenInputs({**inputs.named(), "topk_ids": ids, "topk_weights": weights})
        outputs = SortedOutputs.allocate(case, device)
        with target.active():
            size = workspace_size(case.num_tokens, case.num_experts, case.topk, policy)
            workspace = GuardedBuffer("workspace", (size,), torch.uint8, device, WORKSPACE_OFFSET)
            op(
                ids,
                weights,
                *outputs.tensors,
                case.num_experts,
                case.block_size,
                local_expert_mask=inputs.mask,
                num_local_tokens=inputs.num_local_tokens,
                workspace=workspace.tensor if size else None,
                dispatch_policy=policy,
            )
        target.synchronize()
        frozen.check()
        workspace.check_guards()
        if given_ids is None:
            outputs.check(case, inputs, expected_sorted(case, inputs))
        else:
            outputs.check(case, inputs, expected_of_ids(case, inputs, ids, weights), given_ids)
        return outputs.tensors
