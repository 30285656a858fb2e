"""Does the machine code of the launch from hidden states make the contract's logits, and route by them?

Executed instruction by instruction, workgroups by turns; judged as every target's, and equal to the
CPU target's bits.
"""

from __future__ import annotations

import zlib

import _checkout  # noqa: F401
import pytest

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

import torch  # noqa: E402
from archs import parameters  # noqa: E402
from buffers import require  # noqa: E402
from cases import Case  # noqa: E402
from launches import Device  # noqa: E402
from router_calls import check_logits, drawn, run_router  # noqa: E402
from router_launches import BF16 as BF16_CHUNKS  # noqa: E402
from router_launches import (  # noqa: E402
    CHUNKS,
    ITEMS,
    TILES_ALONE,
    WIDE,
    choose_tile,
    op_of,
    router_product,
)
from targets import Target  # noqa: E402
from write_router import GPUS, Gpu, _of_one_unit  # noqa: E402

from aiter import reference  # noqa: E402
from aiter.jit.device_kernels import ARCHS  # noqa: E402
from aiter.routing import modelled_router  # noqa: E402

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# The case, D' and the number of workgroups: every tile and every way to read rows.
CASES = {
    "one token, 1 x 1": (Case(1, 8, 2, BF16, block_size=4), 1040, 3),
    "4 x 1": (Case(3, 8, 2, BF16, block_size=4, mask="random"), 264, 9),
    "4 x 4": (Case(9, 8, 2, BF16, block_size=4, num_local=7), 136, 8),
    "8 x 4": (Case(16, 8, 2, BF16, block_size=4), 1048, 2),
    "f16, 4 x 1": (Case(4, 8, 2, F16, block_size=4), 136, 5),
    "f32, 1 x 1": (Case(2, 8, 2, F32, block_size=4), 140, 20),
    "item by item": (Case(2, 5, 2, BF16, block_size=4, layout="padded"), 43, 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_machine_code(arch: str, name: str) -> None:
    case, width, workgroups = CASES[name]
    seed = zlib.crc32(repr((case, width)).encode())
    device = Device(arch, seed, seed % 3 - 1, preloads=seed % 2 == 0, takes_turns=seed % 4 != 0)
    cpu = Target("cpu", device.wave_size)
    got = run_router(case, cpu, workgroups, width, op_of(device))
    require(bool(device.statistics), f"{arch}: expected a launch, got none")
    expected = run_router(case, cpu, workgroups, width)
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        same = torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        require(same, f"output {index}: expected the bits of the CPU target, got others")


# Tile and way to read: rows, experts, D', dtype. By chunks, more rounds than are held; the last one is
# not of all lanes, but for 1 x 2.
PRODUCTS = {
    (8, 8, BF16_CHUNKS): (9, 12, 2200, BF16), (8, 4, BF16_CHUNKS): (9, 4, 3096, BF16),
    (4, 4, BF16_CHUNKS): (3, 4, 4120, BF16), (4, 2, BF16_CHUNKS): (3, 2, 4123, BF16),
    (4, 1, BF16_CHUNKS): (3, 1, 5144, BF16), (2, 2, BF16_CHUNKS): (2, 3, 5144, BF16),
    (1, 2, BF16_CHUNKS): (1, 3, 6144, BF16), (1, 1, BF16_CHUNKS): (1, 1, 5145, BF16),
    (4, 1, WIDE): (3, 2, 3080, F32), (1, 1, WIDE): (1, 2, 5132, F16), (1, 1, ITEMS): (1, 2, 43, BF16),
}  # fmt: skip


@pytest.mark.parametrize("tile", PRODUCTS)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_machine_code_of_the_product(arch: str, tile: tuple[int, int, int]) -> None:
    """In a launch of its own; all of its kernels."""
    tokens, experts, width, dtype = PRODUCTS[tile]
    assert choose_tile(tokens, experts, 1, tile[2], TILES_ALONE) == tile[:2]
    # Rows on 16-byte boundaries, or not.
    first, between = (3, width + 3) if tile[2] == ITEMS else (0, -(-width // 8) * 8)
    hidden, weight = (
        torch.cat([rows, rows], dim=1)[:, : first + between].contiguous()[:, first : first + width]
        for rows in drawn(tokens, experts, width, dtype)
    )
    logits = torch.full((tokens, experts), 7.0)
    device = Device(arch, seed=width)
    bias = torch.randn(experts).to(dtype)
    router_product(device, hidden, weight, logits, router_bias=bias, compute_units=1)
    assert [name.split("<")[1].split(", ")[:2] for name in device.statistics] == [
        list(map(str, tile[:2]))
    ]
    assert CHUNKS[tile[2]] in next(iter(device.statistics))
    check_logits(f"logits of {tile}", logits, reference.router_logits(hidden, weight, bias))


def test_every_kernel_of_the_product_is_run() -> None:
    assert {tile[:2] for tile in PRODUCTS} == {tile[:2] for tile in TILES_ALONE}
    assert len(PRODUCTS) == sum(len(of) for of in TILES_ALONE.values())


def test_tiles_are_those_of_the_names() -> None:
    """By choose_tile() of the launcher, which this mirrors."""
    bf16, wide = 0, 1
    assert [choose_tile(1, 8, 3, bf16), choose_tile(3, 8, 9, bf16)] == [(1, 1), (4, 1)]
    assert [choose_tile(9, 8, 8, bf16), choose_tile(16, 8, 2, bf16)] == [(4, 4), (8, 4)]
    assert [choose_tile(4, 8, 5, wide), choose_tile(2, 8, 20, wide)] == [(4, 1), (1, 1)]


def test_a_unit_gets_its_share_of_the_product() -> None:
    """Of eight tiles of 8 x 4 or four of 8 x 8; all units together get every tile once."""
    hidden, weight = torch.zeros(16, 8), torch.zeros(16, 8)
    assert _of_one_unit(hidden, weight, Gpu("a test", 8, 1.0)) == (0,)
    assert _of_one_unit(hidden, weight, Gpu("a test", 4, 1.0)) == (0, 4)
    assert _of_one_unit(hidden, weight, Gpu("a test", 2, 1.0)) == (0, 2)
    assert set(GPUS) == set(modelled_router.ROWS)
    for rows in modelled_router.ROWS.values():
        assert all(most in (0, 1, 4, 16, 64) for *_, most in rows)
