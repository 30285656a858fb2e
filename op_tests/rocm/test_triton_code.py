"""What does Triton's AMD back end make of the layer's kernels? Compiled here, without an AMD GPU.

Every variant that a gpt-oss or a Qwen3 layer takes on an architecture, in the layer's own dtype and in
float32: the products are matrix instructions, nothing is spilled, no scratch is used, LDS and
registers are within what leaves two waves for each SIMD.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch

pytest.importorskip("triton", reason="PyTorch's GPU builds bring Triton; here: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from aiter.layer import triton_configs, triton_plan  # noqa: E402
from aiter.layer.triton_launch import Kernel, compile_for, interpreted  # noqa: E402
from aiter.layer.triton_plan import Call  # noqa: E402

if interpreted():
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

ARCHS = {"gfx942": (64, "v_mfma", 64 << 10), "gfx950": (64, "v_mfma", 160 << 10),
         "gfx1201": (32, "v_wmma", 64 << 10)}  # fmt: skip
MOST_REGISTERS = 256  # of a lane: two waves for each SIMD of 512 registers
LAYERS = ("gpt-oss", "qwen3")
DEVICE = torch.device("cuda:0")


def call_of(layer: str, tokens: int, block: int, dtype: torch.dtype) -> Call:
    """A layer of full size; nothing of it is allocated."""
    experts, topk, width, inter = (32, 4, 2880, 2880) if layer == "gpt-oss" else (128, 8, 2048, 768)
    slots = tokens * topk + experts * block - topk
    shapes = ((experts, 2 * inter, width), (experts, width, inter), (width, 1))
    if layer == "gpt-oss":
        return Call(
            DEVICE, dtype, dtype, tokens, topk, slots, block, *shapes,
            (2 * inter * width, 1, 2 * inter), (inter * width, 1, width),
            (dtype, (2 * inter, 1)), (dtype, (width, 1)), 2, True, 7.0, False, True, True,
        )  # fmt: skip
    return Call(
        DEVICE, dtype, dtype, tokens, topk, slots, block, *shapes,
        (2 * inter * width, width, 1), (inter * width, inter, 1), None, None, 0, False, 7.0, False,
        False, True,
    )  # fmt: skip


def kernels_of(layer: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """Every kernel that the layer may launch on an architecture."""
    found: list[Kernel] = []
    monkeypatch.setattr(triton_plan, "overlaps", lambda device: False)
    monkeypatch.setattr(triton_plan, "arch_of", lambda device: arch)
    monkeypatch.setattr(triton_plan.triton_tuned, "families", lambda device: {})
    monkeypatch.setattr(triton_plan, "make_launch", lambda kernel, *_: found.append(kernel))
    layout: triton_configs.Layout = "columns" if layer == "gpt-oss" else "inner"
    experts = 32 if layer == "gpt-oss" else 128
    for row in triton_configs.family_of(arch, layout).rows:
        tokens = int(min(row.entries, 1000) * experts / (4 if layer == "gpt-oss" else 8))
        triton_plan.make_plan.__wrapped__(call_of(layer, tokens, row.block, torch.bfloat16))
    triton_plan.make_plan.__wrapped__(call_of(layer, 1, 1, torch.bfloat16))
    triton_plan.make_plan.__wrapped__(call_of(layer, 16, 16, torch.float32))
    return iter(dict.fromkeys(found))


def figure(assembly: str, name: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert match, name
    return int(match[1])


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wave, instruction, lds = ARCHS[arch]
    names = set()
    for kernel in kernels_of(layer, arch, monkeypatch):
        compiled: Any = compile_for(kernel, GPUTarget("hip", arch, wave))
        assembly = compiled.asm["amdgcn"]
        constants = dict(kernel.constants)
        what = f"{kernel.name} {constants.get('BM')}x{constants['BN']}x{constants.get('BK')}"
        assert figure(assembly, "private_segment_fixed_size") == 0, what
        assert figure(assembly, "vgpr_spill_count") == figure(assembly, "sgpr_spill_count") == 0
        assert "scratch_" not in assembly.replace("scratch_en", ""), what
        assert figure(assembly, "vgpr_count") <= MOST_REGISTERS, what
        assert compiled.metadata.shared <= lds, what
        if kernel.name.endswith("_product") and "fp32" not in kernel.types[0]:
            assert instruction in assembly, what
        assert "atomic" not in assembly, what
        names.add(kernel.name)
    assert names == {
        "first_product", "second_product", "sum_over_slots", "first_vector", "second_vector"
    }  # fmt: skip


def test_a_spill_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that is too large for the registers fails what is asserted above."""
    monkeypatch.setattr(triton_plan, "overlaps", lambda device: False)
    call = call_of("qwen3", 1000, 256, torch.bfloat16)
    kernel, _ = triton_plan.second_kernel(call, triton_configs.Tile(256, 256, 32, 4, 2))
    assembly = compile_for(kernel, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
    assert figure(assembly, "vgpr_count") > MOST_REGISTERS or figure(assembly, "vgpr_spill_count")
