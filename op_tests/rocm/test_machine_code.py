"""Does the machine code for AMD GPUs compute what the contract says, to the last bit?

The compiler's own output for each architecture is executed by the interpreter in `amdgcn`, on
emulated memory, and judged twice: by the same checks as every other target (the reference, the
invariants, guards around the outputs, inputs unchanged), and bit for bit, weights and untouched
tails included, against the CPU target at the same wave width. Waves run in a random order, register
and LDS contents start as noise, and v_rcp_f32 returns either neighbour of the exact value: the
results must depend on none of it.
"""

from __future__ import annotations

import itertools
import re
import zlib
from dataclasses import replace
from functools import partial
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from buffers import require
from cases import GATING_DTYPES, LOGITS, Case, make_inputs
from checks import check_same_bits
from runners import run_fused, run_moe_sorting, run_topk_softmax
from targets import Target
from torch import Tensor

import aiter

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

from amdgcn.assembly import KernelText  # noqa: E402
from archs import parameters  # noqa: E402
from choices import choose_rows  # noqa: E402
from launches import Counting, Device, kernels  # noqa: E402

ARCHS = ("gfx942", "gfx950", "gfx1100", "gfx1201", "gfx1250")
OLDEST = "gfx90a"
PRELOADING = ("gfx942", "gfx950")  # whose kernels get their first arguments in registers
MOST_BEFORE_LOGITS = 80  # instructions up to the first load of logits

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# (M, E, K, dtype): every register count per lane, both code paths for K above the wave, tails.
SHAPES = (
    (1, 1, 1, F32), (3, 7, 2, BF16), (9, 128, 4, BF16), (5, 161, 9, F16), (4, 257, 9, F32),
    (3, 385, 9, BF16), (3, 513, 11, F32), (2, 896, 16, BF16), (2, 1024, 3, F16), (2, 1500, 4, BF16),
    (2, 80, 70, F32), (2, 1100, 65, F16), (66, 40, 3, BF16),
)  # fmt: skip
# Where waves take several rows (group_topk.h, key_topk.h): every instance beside those of SHAPES;
# aligned rows and others; with all lanes' registers full and not; in one block per expert, and in more.
GROUPS = (
    (5, 30, 4, F16), (6, 64, 8, F16), (9, 100, 7, BF16), (5, 161, 8, F16), (9, 256, 8, BF16),
    (3, 385, 8, BF16), (2, 512, 6, F16), (5, 96, 4, F32), (5, 127, 3, F32), (6, 128, 7, F32),
    (5, 99, 8, F32), (5, 250, 8, F32), (6, 256, 5, F32), (3, 385, 8, F32), (3, 512, 4, F32),
    (3, 256, 10, F32), (3, 161, 9, F32), (2, 896, 16, F32), (3, 517, 13, F16), (2, 512, 22, F32),
    (2, 257, 32, F32),
)  # fmt: skip
# One token: sorted in registers up to K = 32 (one_token.h), in LDS beyond and with a mask; stores of
# four slots and of one; more padding than threads; with num_local_tokens and without.
ONE_TOKEN = (
    Case(1, 128, 4, BF16), Case(1, 128, 4, BF16, num_local=1), Case(1, 128, 4, BF16, num_local=0),
    Case(1, 128, 4, F16, slots_offset=4), Case(1, 96, 8, F32, block_size=7, num_local=1),
    Case(1, 257, 1, F32, False, block_size=1), Case(1, 8, 8, BF16, block_size=6, logits="ties"),
    Case(1, 33, 32, F16, False, block_size=64), Case(1, 32, 32, F32, block_size=2, num_local=0),
    Case(1, 300, 32, BF16, block_size=132, logits="mixed"), Case(1, 40, 33, F16, block_size=4),
    Case(1, 70, 64, F32, num_local=1), Case(1, 64, 8, BF16, mask="random"),
    Case(1, 1100, 5, F16, logits="all_nan", slots_offset=8),
)  # fmt: skip
# Workgroups that hand over through memory, and how many.
HANDOVER = (
    (Case(21, 128, 4, BF16, block_size=8), 3),
    (Case(12, 256, 8, BF16, block_size=16, mask="random", num_local=9), 2),
    (Case(7, 385, 9, F32, block_size=4, logits="ties"), 7),
    (Case(5, 896, 16, F32, False, num_local=3), 2),
    (Case(6, 80, 70, F32, block_size=4), 4),
    (Case(9, 16, 2, F16, num_local=0, mask="zeros"), 5),
    (Case(2, 1100, 5, BF16, logits="all_nan"), 2),
)
MANY_ROWS = (
    (513, 136, 2, BF16), (513, 131, 2, F16), (129, 132, 2, F32), (129, 131, 2, F32), (129, 160, 9, F16)
)  # fmt: skip
SPECIAL = tuple(
    Case(6, 37, 5, dtype, index % 2 == 0, 4, 3, logits=logits)
    for index, (logits, dtype) in enumerate(
        (logits, dtype) for logits in LOGITS if logits != "normal" for dtype in GATING_DTYPES
    )
)
SORTING = (
    Case(6, 16, 3, F32, mask="random", block_size=16, model_dim=33, moe_buf_offset=6),
    Case(8, 33, 4, BF16, num_local=5, block_size=33, model_dim=7, moebuf_dtype=torch.uint8,
         moe_buf_offset=3),
    Case(8, 33, 4, F16, False, num_local=0, mask="all_but_first", block_size=1),
    Case(4, 20, 2, BF16, mask="zeros", block_size=8),
    Case(7, 40, 8, F32, False, mask="last", num_local=7, layout="padded", logits="ties"),
    Case(40, 8, 2, BF16, layout="broadcast", model_dim=2000, moe_buf_offset=14, block_size=4),
)  # fmt: skip


def device_for(arch: str, case: Case) -> Device:
    """An emulated GPU whose noise, wave order, reciprocal error and firmware follow from the case."""
    seed = zlib.crc32(repr(case).encode())
    return Device(arch, seed, seed % 3 - 1, preloads=seed % 2 == 0)


def require_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], case: Case) -> None:
    """All bytes agree, those that neither wrote included."""
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        same = torch.equal(
            ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
        )
        require(same, f"output {index}: expected the bits of the CPU target, got others in {case}")


def check_fused(arch: str, case: Case) -> None:
    """The fused launch of `case` on `arch`, against contract and CPU."""
    device = device_for(arch, case)
    cpu = Target("cpu", device.wave_size)
    got = run_fused(case, cpu, device.fused_topk_moe_sorting_fwd)
    require(bool(device.statistics), f"{arch}: expected a launch, got none")
    require_same_bits(got, run_fused(case, cpu, aiter.fused_topk_moe_sorting_fwd), case)


def check_handover(arch: str, case: Case, size: int, seed: int) -> None:
    """The fused launch by `size` workgroups that take turns, against contract and one workgroup on the
    CPU, but for what a hand-over leaves behind the slots in use.
    """
    device = Device(arch, seed, seed % 3 - 1, preloads=seed % 2 == 0, takes_turns=seed % 4 != 0)
    cpu = Target("cpu", device.wave_size)
    op = partial(device.fused_topk_moe_sorting_fwd, handover_size=size)
    expected = run_fused(case, cpu, aiter.fused_topk_moe_sorting_fwd)
    check_same_bits(run_fused(case, cpu, op, hands_over=True), expected, case.block_size)


def check_topk(arch: str, case: Case) -> None:
    """The separate top-k of `case` on `arch`, against contract and CPU."""
    device = device_for(arch, case)
    cpu = Target("cpu", device.wave_size)
    got = run_topk_softmax(case, cpu, device.topk_softmax)
    require_same_bits(got, run_topk_softmax(case, cpu, aiter.topk_softmax), case)


def check_sorting(arch: str, case: Case, policy: int, given_ids: Tensor | None = None) -> None:
    """The separate sort of `case` on `arch`, against contract and CPU."""
    device = device_for(arch, case)
    cpu = Target("cpu", device.wave_size)
    size = aiter.moe_sorting_opus_get_workspace_size
    got = run_moe_sorting(case, cpu, device.moe_sorting_opus_fwd, policy, size, given_ids)
    names = ("oneshot",) if policy == 1 else ("count", "place<0>")
    require(
        set(device.statistics) == {f"moe_sorting_{name}" for name in names},
        f"{arch}, policy {policy}: expected {names}, got {list(device.statistics)}",
    )
    expected = run_moe_sorting(case, cpu, aiter.moe_sorting_opus_fwd, policy, size, given_ids)
    require_same_bits(got, expected, case)


@pytest.mark.parametrize("need_renorm", [True, False], ids=["renorm", "softmax"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_fused_shapes(
    arch: str, shape: tuple[int, int, int, torch.dtype], need_renorm: bool
) -> None:
    check_fused(arch, Case(*shape, need_renorm=need_renorm, block_size=8))


def check_groups(arch: str, shape: tuple[int, int, int, torch.dtype]) -> None:
    """Both ops whose rows go in groups of lanes."""
    check_fused(arch, Case(*shape, block_size=8))
    check_topk(arch, Case(*shape))


@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_groups_of_lanes(arch: str, shape: tuple[int, int, int, torch.dtype]) -> None:
    check_groups(arch, shape)


@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_groups_of_lanes_with_many_rows(
    arch: str, shape: tuple[int, int, int, torch.dtype]
) -> None:
    check_groups(arch, shape)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_all_groups_of_lanes_are_covered(arch: str) -> None:
    """Every instance is executed, on rows that are loaded 16 bytes at a time and on others."""
    wide, names = {False: set(), True: set()}, set()
    for num_tokens, num_experts, topk, dtype in (*SHAPES, *GROUPS, *MANY_ROWS):
        rows = choose_rows(torch.empty(num_tokens, num_experts, dtype=dtype), topk, True,
                           Device(arch).wave_size)  # fmt: skip
        wide[rows.wide].add(rows.name.partition(", ")[2])
        names.add(rows.name)
    compiled = {name.partition("<")[2].removesuffix(">")
                for name in kernels("module_topk_softmax", arch)
                if "GroupRows" in name or "KeyRows" in name}  # fmt: skip
    assert len(compiled) == 18 and compiled - names == set()
    assert {name.partition(", ")[2] for name in compiled} <= wide[False] & wide[True]


@pytest.mark.parametrize("arch", parameters([OLDEST, *ARCHS]))
def test_one_token(arch: str) -> None:
    """Every case on an architecture of either wave width, and every second one on the others."""
    first = [OLDEST, *ARCHS].index(arch) % 2
    for case in ONE_TOKEN if arch in ("gfx942", "gfx1201") else ONE_TOKEN[first::2]:
        check_fused(arch, case)


@pytest.mark.parametrize("case", SORTING, ids=str)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_fused_sorting(arch: str, case: Case) -> None:
    check_fused(arch, case)


@pytest.mark.parametrize("arch", parameters([OLDEST, *ARCHS]))
def test_handover(arch: str) -> None:
    for seed, (case, size) in enumerate(HANDOVER):
        check_handover(arch, case, size, seed)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_who_comes_last_does_not_matter(arch: str) -> None:
    for seed in range(8):
        check_handover(arch, Case(9, 33, 4, F32, block_size=4, model_dim=3), 3, seed)


@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_fused_special_logits(arch: str) -> None:
    first = ARCHS.index(arch) % 2
    for case in SPECIAL[first::2]:
        check_fused(arch, case)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_topk_softmax(arch: str, shape: tuple[int, int, int, torch.dtype]) -> None:
    case = Case(*shape, layout="padded")
    check_topk(arch, case)
    check_topk(arch, replace(case, need_renorm=False, logits="mixed"))


@pytest.mark.parametrize("policy", [1, 2])
@pytest.mark.parametrize("case", SORTING, ids=str)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_moe_sorting(arch: str, case: Case, policy: int) -> None:
    check_sorting(arch, case, policy)


def check_chain(arch: str, case: Case) -> None:
    """The chain's two launches, of which the first counts and zeroes, against the contract."""
    device = device_for(arch, case)

    def chain(ids: Tensor, weights: Tensor, *rest: Any, **named: Any) -> None:
        """As `moe_sorting_opus_fwd`, for what the first launch selects."""
        logits = make_inputs(case, "cpu").gating
        selected = torch.empty_like(weights), torch.empty_like(ids)
        counting = Counting(named["workspace"], rest[4], rest[5], named["num_local_tokens"])
        device.topk_softmax(*selected, None, logits, case.need_renorm, counting)
        device.moe_sorting_opus_fwd(*selected[::-1], *rest, **named, counted=True)

    size = aiter.moe_sorting_opus_get_workspace_size
    run_moe_sorting(case, Target("cpu", device.wave_size), chain, 2, size)
    assert [name.partition("<")[0] for name in device.statistics] == [
        "topk_softmax", "moe_sorting_place",
    ]  # fmt: skip


CHAINS = (
    Case(9, 33, 4, F32, block_size=4, model_dim=3),
    Case(40, 512, 10, BF16, block_size=8, mask="random", num_local=33),
    Case(100, 128, 4, BF16, block_size=16, model_dim=37, num_local=70),
    Case(70, 896, 16, F32, block_size=4),
)


@pytest.mark.parametrize("case", CHAINS, ids=str)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_chain_that_counts(arch: str, case: Case) -> None:
    check_chain(arch, case)


@pytest.mark.parametrize("policy", [1, 2])
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_moe_sorting_several_tiles(arch: str, policy: int) -> None:
    """Under policy 1, the one workgroup has at most 15 bitmask words at a time for 896 experts."""
    check_sorting(arch, Case(500, 896, 1, BF16, block_size=2), policy)


@pytest.mark.parametrize("policy", [1, 2])
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_moe_sorting_repeated_ids(arch: str, policy: int) -> None:
    """Repeats and ids that are no experts'; several parts per tile (entries above 32 per word)."""
    generator = torch.Generator().manual_seed(0)
    for case in (Case(40, 12, 4, mask="random", num_local=37, block_size=8), Case(3, 5, 5)):
        shape = (case.num_tokens, case.topk)
        ids = torch.randint(-1, case.num_experts + 1, shape, generator=generator, dtype=torch.int32)
        check_sorting(arch, case, policy, ids)


@pytest.mark.thorough
def test_oldest_arch() -> None:
    for case in (*SORTING, *SPECIAL[::4]):
        check_fused(OLDEST, case)
        check_topk(OLDEST, case)
    for policy in (1, 2):
        check_sorting(OLDEST, SORTING[0], policy)


def code_before_logits(kernel: KernelText, entry: int) -> list[str]:
    """The instructions of a kernel from `entry` up to the first load from a buffer."""
    texts = [instruction.text for instruction in kernel.instructions[entry:]]
    return list(itertools.takewhile(lambda text: not text.startswith("global_load"), texts))


@pytest.mark.parametrize("arch", parameters([OLDEST, *ARCHS]))
def test_arguments_take_one_round_trip(arch: str) -> None:
    """Logits wait for one scalar load of arguments, or for none where these are preloaded."""
    for name, kernel in kernels("module_fused_topk_moe_sorting", arch).items():
        # NOTE: rows of V = 0 stay in memory, of V = 32 a wave of 64 has no use, and those by rules
        # load their rule first.
        if re.search(r"WaveRow<\w+, (0|32)>|_rules<", name):
            continue
        is_preloaded = kernel.preloaded_entry != 0
        assert is_preloaded == (arch in PRELOADING), name
        for entry in {0, kernel.preloaded_entry}:
            code = code_before_logits(kernel, entry)
            waits = [text for text in code if text.startswith(("s_waitcnt", "s_wait_kmcnt"))]
            # NOTE: rows by keys have too few scalar registers, and may load an argument again.
            most = int(entry == 0) + ("KeyRows" in name)
            assert int(entry == 0) <= len(waits) <= most, (name, entry)
            assert len(code) < MOST_BEFORE_LOGITS, (name, entry)


@pytest.mark.parametrize("preloads", [True, False])
@pytest.mark.parametrize("arch", parameters(PRELOADING))
def test_both_entries(arch: str, preloads: bool) -> None:
    """Firmware that fills registers enters behind the loads that do it for older firmware."""
    for case in (ONE_TOKEN[1], *SORTING[::2], Case(9, 256, 8, BF16, block_size=8)):
        device = Device(arch, preloads=preloads)
        cpu = Target("cpu", device.wave_size)
        got = run_fused(case, cpu, device.fused_topk_moe_sorting_fwd)
        (statistics,) = device.statistics.values()
        assert (statistics.executed()[0] == 0) == preloads
        require_same_bits(got, run_fused(case, cpu, aiter.fused_topk_moe_sorting_fwd), case)


@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_order_and_reciprocal_do_not_matter(arch: str) -> None:
    case = Case(5, 48, 6, F32, logits="ties", block_size=4)
    cpu = Target("cpu", Device(arch).wave_size)
    expected = run_fused(case, cpu, aiter.fused_topk_moe_sorting_fwd)
    for seed in range(6):
        device = Device(arch, seed, seed % 3 - 1)
        require_same_bits(run_fused(case, cpu, device.fused_topk_moe_sorting_fwd), expected, case)
