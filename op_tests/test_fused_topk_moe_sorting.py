"""Does the fused launch honour the contract at every shape, dtype, mask and layout?

Every run is judged by ``runners.run_fused``: exact ids against the reference, weights to 1e-6, the
invariants that need no reference, guards around all outputs, and untouched inputs. Sizes beyond
the fused launch must be refused, so no configuration of a grid passes by being skipped.

As a script it also compares with the separate chain under dispatch policies 1 and 2, and prints
the largest M of each (E, K).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import _checkout  # noqa: F401
import pytest
import torch
from buffers import FrozenInputs, Mismatch, require
from cases import (
    GATING_DTYPES,
    LAYOUTS,
    LOGITS,
    MASKS,
    MODEL_SHAPES,
    PARITY_SHAPES,
    Case,
    make_inputs,
)
from checks import check_equal, check_sorted
from route_calls import PATH_OF_POLICY, has_clusters, max_tokens, route
from runners import SortedOutputs, expected_sorted, fused_arguments, reporting, run_fused
from targets import Target
from torch import Tensor

import aiter
import aiter.fused_moe

FUSED = aiter.fused_topk_moe_sorting_fwd

EXPERT_COUNTS = (1, 2, 3, 7, 16, 33, 64, 65, 161, 257, 385, 513, 896, 1024, 1025, 2048, 3001)
TOPKS = (1, 2, 5, 9, 11, 16, 33, 64, 65)
BLOCK_SIZES = (1, 16, 32, 33, 64, 128)
TAILS = (1, 2, 3, 31, 63, 64, 65, 127, 128, 129)


def run_or_refuse(case: Case, target: Target) -> bool:
    """Run ``case`` if it fits the fused launch, else check that the op refuses it."""
    limit = max_tokens(case.num_experts, case.topk, target)
    if case.num_tokens <= limit:
        run_fused(case, target, FUSED)
        return True
    with reporting(case, target):
        outputs = SortedOutputs.allocate(case, target.device)
        arguments = fused_arguments(case, make_inputs(case, target.device), outputs)
        try:
            with target.active():
                FUSED(**arguments)
        except ValueError as error:
            require(
                str(limit) in str(error) and str(case.num_tokens) in str(error),
                f"expected an error with the limit {limit} and M = {case.num_tokens}, got: {error}",
            )
        else:
            raise Mismatch(f"expected ValueError beyond max_tokens = {limit}, got a result")
        target.synchronize()
        for buffer in outputs.buffers:
            buffer.check_untouched()
    return False


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("dtype", GATING_DTYPES, ids=str)
def test_parity(target: Target, dtype: torch.dtype, renorm: bool) -> None:
    """The decode shapes that every device must take, with distinct and with tied logits."""
    for shape in PARITY_SHAPES:
        for logits in ("normal", "ties"):
            run_fused(
                Case(*shape, dtype=dtype, need_renorm=renorm, logits=logits, model_dim=72),
                target,
                FUSED,
            )


@pytest.mark.parametrize("model", MODEL_SHAPES)
def test_model_shapes(target: Target, model: str) -> None:
    """Each model at its own model_dim for one token, and at a few batch sizes."""
    num_experts, topk, model_dim = MODEL_SHAPES[model]
    case = Case(1, num_experts, topk, torch.bfloat16, model_dim=model_dim)
    run_fused(case, target, FUSED)
    run_fused(replace(case, num_tokens=0), target, FUSED)
    fitted = [
        run_or_refuse(replace(case, num_tokens=count, model_dim=24), target)
        for count in (3, 8, 17, 32)
    ]
    assert fitted[0], f"{model}: expected a fused launch of 3 tokens"


@pytest.mark.parametrize(("num_experts", "topk"), [(128, 4), (256, 8), (32, 4), (8, 2)])
def test_token_tails(target: Target, num_experts: int, topk: int) -> None:
    for count in TAILS:
        run_or_refuse(Case(count, num_experts, topk, torch.bfloat16, logits="ties"), target)


@pytest.mark.parametrize(("num_experts", "topk"), [(128, 4), (256, 8), (512, 10), (896, 16)])
def test_max_tokens(target: Target, num_experts: int, topk: int) -> None:
    """The largest M works, one more is refused."""
    limit = max_tokens(num_experts, topk, target)
    assert 1 <= limit < 1 << 24
    assert run_or_refuse(Case(limit, num_experts, topk, torch.bfloat16), target)
    assert not run_or_refuse(Case(limit + 1, num_experts, topk, torch.bfloat16), target)


def cluster_cases(size: int) -> list[Case]:
    """Cases in which every workgroup has rows, some have, and none has.

    E is as large as 64 KiB of LDS allow that hold `size` counts of every expert, up to 1100.
    """
    most_experts = min(1100, 8800 // size)
    base = Case(8, 128, 4, torch.bfloat16)
    cases = [replace(base, num_tokens=count) for count in (0, 1, 3, 8, 33, 100, 257)]
    cases += [replace(case, mask="random", num_local=case.num_tokens // 3) for case in cases]
    return [
        *cases,
        replace(
            base, num_tokens=70, dtype=torch.float32, num_experts=min(896, most_experts), topk=16
        ),
        replace(base, num_tokens=70, block_size=33, need_renorm=False),
        replace(base, num_tokens=129, logits="ties", num_experts=300, topk=8, block_size=4),
        replace(base, num_tokens=40, num_experts=most_experts, topk=2),
        replace(base, num_tokens=37, num_experts=5, topk=3, block_size=3, slots_offset=4),
    ]


def defined_bits(case: Case, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The slots in use, weights as their bits."""
    ids, weights, experts, counts = (tensor.cpu() for tensor in outputs[:4])
    num_valid = int(counts[0]) if case.num_tokens else 0
    bits = weights[:num_valid].view(torch.int32)
    return [counts, ids[:num_valid], bits, experts[: num_valid // case.block_size]]


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_cluster_sizes(target: Target, size: int) -> None:
    """Workgroups that share the routing write what one writes; those that a device has not, it says."""
    clustered = partial(FUSED, cluster_size=size)
    most = largest_cluster(target)
    if size > most:
        words = f"cluster_size: expected a value from 1 to {most}, got {size}"
        with pytest.raises(Mismatch, match=words):
            run_fused(Case(8, 16, 2), target, clustered)
        return
    for case in cluster_cases(size):
        alone = defined_bits(case, run_fused(case, target, partial(FUSED, cluster_size=1)))
        shared = defined_bits(case, run_fused(case, target, clustered))
        for got, expected in zip(shared, alone, strict=True):
            check_equal(f"{size} workgroups, {case}", got, expected)


def test_largest_cluster(target: Target) -> None:
    """16 on the CPU, 1 where the hardware has no clusters; rows that do not fit are refused by it."""
    most = largest_cluster(target)
    assert most & (most - 1) == 0
    if target.device == "cpu":
        assert most == 16
    assert most == 1 or has_clusters(target)
    case = Case(100_000, 128, 16, torch.bfloat16)
    words = f"in each of {most} workgroups for num_experts 128" if most > 1 else "bytes of LDS for"
    with pytest.raises(Mismatch, match=f"gating_output: expected at most [1-9].* {words}"):
        run_fused(case, target, partial(FUSED, cluster_size=most))


def test_what_a_cluster_counts(target: Target) -> None:
    """A half of a word has an expert's tokens of all workgroups, whatever LDS has place for."""
    most = largest_cluster(target)
    if most == 1:
        pytest.skip("no clusters")
    words = "gating_output: expected at most 65535 rows, which is what a cluster counts, got 65536"
    with pytest.raises(Mismatch, match=words):
        run_fused(Case(65536, 8, 1), target, partial(FUSED, cluster_size=most))
    case = Case(1200, 8, 8)  # every token takes every expert
    calls = (partial(FUSED, cluster_size=size) for size in (most, 1))
    for got, expected in zip(
        *(defined_bits(case, run_fused(case, target, call)) for call in calls), strict=True
    ):
        check_equal(f"{most} workgroups, {case}", got, expected)


def largest_cluster(target: Target) -> int:
    """The most workgroups that the device lets share the routing, as it says when asked for more."""
    with pytest.raises(Mismatch) as refusal:
        run_fused(Case(1, 8, 2), target, partial(FUSED, cluster_size=1 << 20))
    found = re.search(r"cluster_size: expected a value from 1 to (\d+), got 1048576", str(refusal))
    assert found, refusal
    return int(found[1])


@pytest.mark.parametrize("size", [-1, 3, 17, "2"])
def test_bad_cluster_sizes(target: Target, size: int) -> None:
    case = Case(8, 16, 2)
    with pytest.raises((ValueError, TypeError), match="cluster_size: expected .*, got"):
        call = fused_arguments(
            case, make_inputs(case, target.device), SortedOutputs.allocate(case, target.device)
        )
        with target.active():
            FUSED(**call, cluster_size=size)


@pytest.mark.parametrize("num_experts", EXPERT_COUNTS)
def test_expert_counts(target: Target, num_experts: int) -> None:
    """Every expert count with every topk that it allows."""
    for topk in sorted({*TOPKS, min(num_experts, 255)}):
        if topk > num_experts:
            continue
        for count, logits, renorm in ((1, "normal", True), (5, "ties", False)):
            case = Case(count, num_experts, topk, logits=logits, need_renorm=renorm, block_size=16)
            run_or_refuse(case, target)
            run_or_refuse(replace(case, mask="random", num_local=count), target)


def test_slots_beyond_127(target: Target) -> None:
    """K = 255 sets the sign bit of an entry; the fused launch may refuse it, never truncate."""
    for topk in (127, 128, 129, 254, 255):
        for count in (1, 3):
            run_or_refuse(Case(count, 300, topk, block_size=4, logits="ties"), target)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(target: Target, block_size: int) -> None:
    for shape in ((1, 128, 4), (33, 128, 4), (16, 8, 2), (40, 3, 3), (29, 256, 8)):
        run_fused(Case(*shape, block_size=block_size, logits="ties"), target, FUSED)


@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("logits", LOGITS)
def test_selection_rules(target: Target, logits: str, renorm: bool) -> None:
    for dtype in GATING_DTYPES:
        for shape in ((20, 8, 3), (19, 16, 16), (12, 65, 7), (11, 128, 4), (5, 257, 9)):
            case = Case(*shape, dtype=dtype, logits=logits, need_renorm=renorm, block_size=16)
            run_fused(case, target, FUSED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gating_layouts(target: Target, layout: str) -> None:
    for dtype in GATING_DTYPES:
        for shape in ((1, 128, 4), (9, 128, 4), (13, 256, 8), (7, 161, 9), (6, 1, 1), (5, 33, 2)):
            run_fused(Case(*shape, dtype=dtype, layout=layout, logits="wide"), target, FUSED)


@pytest.mark.parametrize("mask", MASKS)
def test_expert_mask_and_local_tokens(target: Target, mask: str) -> None:
    """Every mask with every kind of n; rows from n on hold NaN and infinities."""
    for num_tokens, num_experts, topk in ((1, 128, 4), (21, 128, 4), (14, 257, 9), (9, 5, 5)):
        for num_local in sorted({0, 1, num_tokens - 1, num_tokens}):
            case = Case(num_tokens, num_experts, topk, mask=mask, num_local=num_local, seed=3)
            run_fused(case, target, FUSED)
        run_fused(Case(num_tokens, num_experts, topk, mask=mask, layout="padded"), target, FUSED)


@pytest.mark.parametrize("num_local", [-1, 8, 1000, 2**31 - 1, -(2**31)])
def test_local_tokens_out_of_range(target: Target, num_local: int) -> None:
    """A count on the device cannot be refused; it must still touch nothing outside the buffers."""
    case = Case(7, 128, 4, num_local=num_local)
    with reporting(case, target):
        inputs = replace(
            make_inputs(replace(case, num_local=None), target.device),
            num_local_tokens=torch.tensor([num_local], dtype=torch.int32, device=target.device),
        )
        frozen = FrozenInputs(inputs.named())
        outputs = SortedOutputs.allocate(case, target.device)
        with target.active():
            FUSED(**fused_arguments(case, inputs, outputs))
        target.synchronize()
        frozen.check()
        outputs.check_guards()


def test_strides_of_single_rows_do_not_matter(target: Target) -> None:
    """A dimension of size 1 has no stride: what PyTorch calls contiguous is accepted."""
    row, one_expert = Case(1, 128, 4, num_local=1), Case(6, 1, 1, mask="ones")
    for case in (row, one_expert):
        with reporting(case, target):
            inputs = make_inputs(case, target.device)
            outputs = SortedOutputs.allocate(case, target.device)
            arguments = fused_arguments(case, inputs, outputs)
            wide = torch.ones(8, 2 * case.model_dim, dtype=case.moebuf_dtype, device=target.device)
            if case is row:
                arguments["moe_buf"] = wide[:1, : case.model_dim]
                arguments["num_local_tokens"] = torch.ones_like(outputs.tensors[3])[::2]
            else:
                arguments["gating_output"] = inputs.gating.reshape(1, -1).t()
                arguments["local_expert_mask"] = torch.ones_like(outputs.tensors[3])[::2]
            with target.active():
                FUSED(**arguments)
            target.synchronize()
            outputs.check_guards()
            check_sorted(outputs.tensors, expected_sorted(case, inputs), case.block_size)
            if case is row:
                assert not wide[0, : case.model_dim].any()
                assert bool(wide[0, case.model_dim :].all())
                assert bool(wide[1:].all())


def moe_buf_cases() -> Iterator[Case]:
    """Row sizes that are no multiple of 16 bytes, and starts that are not aligned to them."""
    dtypes = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for dtype in (*dtypes, torch.float8_e4m3fn):
        for model_dim in (1, 3, 16, 37, 257):
            for step in (0, 1, 3):
                yield Case(
                    11,
                    16,
                    2,
                    model_dim=model_dim,
                    moebuf_dtype=dtype,
                    moe_buf_offset=step * dtype.itemsize,
                    num_local=9 if step == 1 else None,
                )


def test_moe_buf(target: Target) -> None:
    """Exactly the rows below n are zeroed, whatever the dtype, row size and alignment."""
    for case in moe_buf_cases():
        run_fused(case, target, FUSED)
    run_fused(Case(13, 128, 4, model_dim=7167, moe_buf_offset=2, num_local=12), target, FUSED)


@pytest.mark.parametrize("num_experts", [1, 8, 128, 513])
def test_no_tokens(target: Target, num_experts: int) -> None:
    """M == 0 writes (0, 0) to num_valid_ids and nothing else."""
    for num_local in (None, 0):
        for mask in ("none", "random"):
            run_fused(Case(0, num_experts, 1, mask=mask, num_local=num_local), target, FUSED)


def test_repeated_calls_agree(target: Target) -> None:
    """The same input gives the same bits, also after a call of another shape."""
    case = Case(23, 128, 4, torch.bfloat16, logits="ties")
    first = run_fused(case, target, FUSED)
    run_fused(Case(5, 257, 9, logits="mixed"), target, FUSED)
    again = run_fused(case, target, FUSED)
    num_valid = int(first[3][0])
    assert torch.equal(first[0][:num_valid], again[0][:num_valid])
    assert torch.equal(first[1][:num_valid], again[1][:num_valid])


def compare_with_chain(case: Case, target: Target, policy: int) -> tuple[Tensor, ...]:
    """The fused result of ``case`` equals the chain's under ``policy``."""
    fused = run_fused(case, target, FUSED)
    with reporting(f"fused against policy {policy}, {case}", target):
        chain = route(case, make_inputs(case, target.device), target, policy)
        path = aiter.fused_moe.last_path()
        require(
            path == PATH_OF_POLICY[policy],
            f"last_path(): expected {PATH_OF_POLICY[policy]!r}, got {path!r}",
        )
        check_sorted(fused, [tensor.cpu() for tensor in chain], case.block_size)
    return fused


@pytest.mark.parametrize("policy", PATH_OF_POLICY)
def test_fused_equals_chain(target: Target, policy: int) -> None:
    for shape in PARITY_SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            compare_with_chain(Case(*shape, dtype=dtype, logits="ties"), target, policy)


def main() -> int:
    """Compare fused, reference and chain; print the table and the largest M of each (E, K)."""
    from script import parse_options, run_script

    from aiter.cli.table import format_table

    models = sorted({(num_experts, topk) for num_experts, topk, _ in MODEL_SHAPES.values()})
    shapes = [*PARITY_SHAPES, *((8, *model) for model in models)]
    options = parse_options(__doc__ or "", shapes)

    def verdicts(case: Case, target: Target) -> list[str]:
        if not run_or_refuse(case, target):
            return ["refused", "-", "-"]
        for policy in PATH_OF_POLICY:
            compare_with_chain(case, target, policy)
        return ["ok", "equal", "equal"]

    status = run_script(options, ["reference", "oneshot", "multiphase"], verdicts)
    limits = [
        [str(target), str(num_experts), str(topk), str(max_tokens(num_experts, topk, target))]
        for target in options.targets
        for num_experts, topk in sorted({shape[1:] for shape in options.shapes})
    ]
    print()
    print(format_table(["target", "E", "K", "max_tokens"], limits))
    return status


if __name__ == "__main__":
    sys.exit(main())
