"""How far does each kernel's memory traffic reach: its own workgroup, or the whole device?

A workgroup that takes what another one of the same launch wrote needs an order on both sides: the
writer's caches written back, the reader's invalidated, and the flag between them an atomic of the
device's scope. What that is differs by architecture (ORDERS, held against code compiled for the
purpose). Kernels that talk across workgroups must have it; what a kernel boundary orders, as between
the three launches of the multi-phase sort, needs none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import _checkout  # noqa: F401
import pytest

pytest.importorskip("ziglang", reason="the cross-compiler: pip install ziglang")

from archs import parameters  # noqa: E402
from launches import kernels  # noqa: E402
from primitives import primitives  # noqa: E402

from aiter.jit.device_kernels import ARCHS  # noqa: E402

MODULES = ("module_fused_topk_moe_sorting", "module_fused_router_sorting", "module_topk_softmax",
           "module_moe_sorting_opus", "module_expert_load")  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What orders memory across workgroups on one architecture, as instructions begin.

    Attributes:
        release: before the flag is set; empty where waiting for the stores is enough.
        acquire: after the flag was read.
        atomic: what every atomic on global memory ends in.
    """

    release: tuple[str, ...]
    acquire: tuple[str, ...]
    atomic: str = ""


_MI300 = Order(("buffer_wbl2 sc1",), ("buffer_inv sc1",))
ORDERS = {
    "gfx90a": Order((), ("buffer_wbinvl1_vol",)),
    "gfx942": _MI300,
    "gfx950": _MI300,
    "gfx1100": Order((), ("buffer_gl1_inv", "buffer_gl0_inv")),
    "gfx1201": Order((), ("global_inv scope:SCOPE_DEV",), "scope:SCOPE_DEV"),
    "gfx1250": Order(
        ("global_wb scope:SCOPE_DEV",), ("global_inv scope:SCOPE_DEV",), "scope:SCOPE_DEV"
    ),
}


def reaches_device(text: str) -> bool:
    """Whether an instruction is meant for other workgroups than its own."""
    if text.startswith("global_atomic") or "SCOPE_DEV" in text or "SCOPE_SYS" in text:
        return True
    return text.startswith(("buffer_wbl2", "buffer_inv sc1", "buffer_wbinvl1", "buffer_gl1_inv"))


def problems(code: Sequence[str], order: Order) -> list[str]:
    """What code that talks across workgroups lacks, as sentences; nothing for other code."""
    if not any(map(reaches_device, code)):
        return []
    found = []
    for kind, wanted in (("release", order.release), ("acquire", order.acquire)):
        missing = [word for word in wanted if not any(text.startswith(word) for text in code)]
        found += [f"{kind}: expected `{word}`, got none" for word in missing]
    atomics = [text for text in code if text.startswith("global_atomic")]
    bad = [text for text in atomics if not text.endswith(order.atomic)]
    found += [f"`{text}`: expected it to end in {order.atomic}" for text in bad]
    system = [text for text in code if "SCOPE_SYS" in text or re.search(r"\bsc0 sc1\b", text)]
    return found + [f"`{text}`: expected the device's scope, got the system's" for text in system]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_kernels_that_talk_are_ordered(arch: str, module: str) -> None:
    found = kernels(module, arch)
    for name in found:
        assert problems(found.lines(name), ORDERS[arch]) == [], name


@pytest.mark.parametrize("arch", parameters(ARCHS))
def test_fused_kernels_hand_over(arch: str) -> None:
    """Each that routes talks, by one atomic, behind a release and before an acquisition."""
    order = ORDERS[arch]
    found = kernels("module_fused_topk_moe_sorting", arch)
    for name in found:
        code = found.lines(name)
        if not any(text.startswith("ds_") for text in code):
            continue  # compiled empty but for zeroing
        (atomic,) = (i for i, text in enumerate(code) if text.startswith("global_atomic"))
        for kind, words, part in (
            ("release", order.release, code[:atomic]), ("acquire", order.acquire, code[atomic:])
        ):  # fmt: skip
            for word in words:
                assert any(text.startswith(word) for text in part), (name, kind, word)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_order_is_what_the_compiler_makes_of_it(arch: str) -> None:
    code = primitives(arch).lines("count_arrivals_in_order")
    order = ORDERS[arch]
    assert problems(code, order) == []
    reaching = [text for text in code if reaches_device(text)]
    atomic = next(i for i, text in enumerate(reaching) if text.startswith("global_atomic"))
    assert len(reaching[:atomic]) == len(order.release)
    # NOTE: gfx1100's invalidation of the nearer cache serves workgroups too.
    assert len(reaching[atomic + 1 :]) == len(order.acquire) - (arch == "gfx1100")


@pytest.mark.parametrize("arch", ARCHS)
def test_a_missing_order_is_noticed(arch: str) -> None:
    """An atomic of a workgroup's scope, and a release without its write-back."""
    code = primitives(arch).lines("count_arrivals_in_a_workgroup")
    assert any(text.startswith("global_atomic") for text in code)
    assert any("acquire: expected" in problem for problem in problems(code, ORDERS[arch]))
    whole = primitives(arch).lines("count_arrivals_in_order")
    for word in (*ORDERS[arch].release, *ORDERS[arch].acquire):
        rest = [text for text in whole if not text.startswith(word)]
        assert any(f"expected `{word}`" in problem for problem in problems(rest, ORDERS[arch]))
    assert problems([*whole, "global_load_dword v0, v1, s[0:1] sc0 sc1"], ORDERS[arch]) != []
