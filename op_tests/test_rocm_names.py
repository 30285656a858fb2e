"""Do the functions with names of ROCm's aiter take its arguments, as docs/rocm_aiter_names.md says?

The page's table is the data: a line per function, with all of its arguments and what differs here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from torch import Tensor

import aiter
from aiter import ActivationType, QuantType
from aiter import fused_moe as layer

PAGE = Path(__file__).parents[1] / "docs" / "rocm_aiter_names.md"
LINE = re.compile(r"^\| `aiter\.([\w.]+)` \| `([^`]+)` \| (.+) \|$", re.MULTILINE)
ROWS = {name: (arguments, here) for name, arguments, here in LINE.findall(PAGE.read_text())}
NOT_HERE = "not here"


def function_of(name: str) -> Callable[..., Any] | None:
    found: Any = aiter
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if callable(found) else None


def marked(here: str, mark: str) -> list[str]:
    """The arguments that a cell names behind `mark:`."""
    found = re.search(rf"{mark}: ([\w, ]+)", here)
    return [] if found is None else found[1].split(", ")


def shown(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return parameter.name
    if isinstance(default, (ActivationType, QuantType)):
        return f"{parameter.name}={type(default).__name__}.{default.name}"
    text = f'"{default}"' if isinstance(default, str) else repr(default)
    return f"{parameter.name}={text}"


def test_the_table_is_whole() -> None:
    assert re.search(r"commit `[0-9a-f]{40}`", PAGE.read_text())
    assert len(ROWS) == PAGE.read_text().count("\n| `aiter.") == 13
    for name in ("topk_softmax", "moe_sorting_fwd", "fused_moe.fused_moe", "moe_fused_gate"):
        assert name in ROWS


@pytest.mark.parametrize("name", ROWS)
def test_signature(name: str) -> None:
    arguments, here = ROWS[name]
    function = function_of(name)
    if function is None:
        assert here == NOT_HERE, f"aiter.{name} does not exist"
        return
    wanted = arguments.split(", ")
    missing = marked(here, "missing")
    parameters = inspect.signature(function).parameters.values()
    ours = [shown(p) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    # NOTE: what has come to exist is no error of the code's, but the page must then say so.
    kept = [text for text in wanted if text.partition("=")[0] not in missing]
    assert ours in (kept, wanted)
    for extra in parameters:
        assert extra.kind in (extra.POSITIONAL_OR_KEYWORD, extra.KEYWORD_ONLY)
        assert extra.kind is not extra.KEYWORD_ONLY or extra.default is not extra.empty
    names = {text.partition("=")[0] for text in wanted}
    assert set(missing) <= names and set(marked(here, "refused")) <= names


M, E, K, D, INTER = 5, 8, 2, 16, 12


def chosen() -> tuple[Tensor, Tensor]:
    logits = torch.randn(M, E, generator=torch.Generator().manual_seed(0))
    return layer.fused_topk(logits, logits, K, True)


def call_layer(**changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden, w1, w2 = (
        torch.randn(shape, generator=generator)
        for shape in ((M, D), (E, 2 * INTER, D), (E, D, INTER))
    )
    return layer.fused_moe(hidden, w1, w2, *chosen(), **changes)


ODD: dict[str, Any] = {
    "quant_type": QuantType.per_Token, "hidden_pad": 1, "intermediate_pad": 1, "beta": 4.0,
    "linear_beta": 25.0, "shared_expert_id": 3, "stage2_scatter": object(),
}  # fmt: skip
REFUSED = marked(ROWS["fused_moe.fused_moe"][1], "refused")


@pytest.mark.parametrize("argument", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        call_layer(**{argument: ODD.get(argument, torch.ones(2))})


def test_other_arguments_of_the_layer() -> None:
    plain = call_layer()
    for same in (
        {"splitk": 4},
        {"gate_mode": "separated"},
        {"gate_mode": None},
        {"block_size_M": 0},
    ):
        assert torch.equal(call_layer(**same), plain)
    assert torch.equal(call_layer(gate_mode="interleave"), call_layer(gate_up_interleaved=True))
    assert not torch.equal(call_layer(gate_mode="interleave"), plain)
    swiglu = {"activation": ActivationType.Swiglu}
    assert torch.equal(call_layer(swiglu_limit=7.0, **swiglu), call_layer(**swiglu))
    assert not torch.equal(call_layer(swiglu_limit=0.5, **swiglu), call_layer(**swiglu))
    for words, kind, wrong in (
        ("gate_mode: expected one of", ValueError, {"gate_mode": "both"}),
        ("swiglu_limit: expected None, or", ValueError, {"swiglu_limit": 7.0}),
        ("swiglu_limit: expected None, or", ValueError, {"swiglu_limit": -1.0, **swiglu}),
        ("splitk: expected an int", TypeError, {"splitk": None}),
        ("activation: expected .* got Situv2", ValueError, {"activation": ActivationType.Situv2}),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            call_layer(**wrong)


SORT: tuple[Any, ...] = (E, D, torch.float32, 4)


@pytest.mark.parametrize("policy", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_sort_can_tell_besides(policy: int, masked: bool) -> None:
    """Against a loop over the sorted slots; ids repeat, one is no expert's, the last row is left out."""
    weights, ids = chosen()
    ids[1] = 3
    ids[2, 0] = E
    mask = torch.tensor([0, 1, 1, 1, 0, 1, 1, 0], dtype=torch.int32) if masked else None
    count = torch.tensor([M - 1], dtype=torch.int32)
    sorting = (ids, weights, *SORT, mask, count, policy)
    five = layer.moe_sorting(*sorting)
    *out, tokens, reverse = layer.moe_sorting(*sorting, output_aux=True)
    *_, local = layer.moe_sorting(*sorting, return_local_topk_ids=True)
    used = int(five[3][0])
    slots = {}
    for position, word in enumerate(five[0][:used].tolist()):
        token, slot = word & 0xFFFFFF, word >> 24 & 0xFF
        assert tokens[position] == token
        if slot < K:
            slots[token, slot] = position
    assert torch.equal(out[0][:used], five[0][:used])
    here = [True] * E if mask is None else mask.bool().tolist()
    for token in range(M):
        for slot in range(K):
            at = slots.get((token, slot))
            expert = int(ids[token, slot])
            inside = 0 <= expert < E and here[expert]
            assert int(local[token, slot]) == (sum(here[:expert]) if inside else -1)
            assert (at is not None) == (inside and token < M - 1)
            assert int(reverse[token * K + slot]) == (-1 if at is None else at)
            if at is not None:
                assert int(five[2][at // 4]) == int(local[token, slot])
    filled = [torch.empty_like(t) for t in (local, tokens, reverse)]
    size = aiter.moe_sorting_opus_get_workspace_size(M, E, K, policy)
    workspace = torch.empty(size, dtype=torch.uint8) if size else None
    aiter.moe_sorting_opus_fwd(ids, weights, *five, E, 4, mask, count, workspace, policy, *filled)
    assert torch.equal(filled[0], local) and torch.equal(filled[2], reverse)
    assert torch.equal(filled[1][:used], tokens[:used])
    other = layer.empty_sorted_buffers(M, K, *SORT, device="cpu")
    aiter.moe_sorting_fwd(ids, weights, *other, E, 4, mask, count, policy)
    assert torch.equal(other[3], five[3]) and torch.equal(other[0][:used], five[0][:used])


def test_other_arguments_of_the_sort() -> None:
    weights, ids = chosen()
    mask = torch.ones(E, dtype=torch.int32)
    assert layer.moe_sorting(ids, weights, *SORT, accumulate=False)[4].shape == (0, 0)
    assert layer.moe_sorting(ids, weights, *SORT, mask, accumulate=False)[4].shape == (M, D)
    with pytest.raises(ValueError, match="^flat: expected False, .* got True"):
        layer.moe_sorting(ids, weights, *SORT, flat=True)
    out = layer.empty_sorted_buffers(M, K, *SORT, device="cpu")
    with pytest.raises(ValueError, match="^accumulate: expected True"):
        layer.moe_sorting(ids, weights, *SORT, accumulate=False, out=out)
    for position, name in enumerate(("local_topk_ids", "m_indices", "reverse_sorted")):
        extra: list[Any] = [None] * 3
        for wrong, kind in ((torch.empty(1, dtype=torch.int32), ValueError), ([], TypeError)):
            extra[position] = wrong
            before = [tensor.clone() for tensor in out]
            with pytest.raises(kind, match=f"^{name}: expected"):
                aiter.moe_sorting_opus_fwd(ids, weights, *out, E, 4, None, None, None, 0, *extra)
            for now, old in zip(out, before, strict=True):
                assert torch.equal(now.view(torch.uint8), old.view(torch.uint8))


def test_given_outputs_of_the_top_k() -> None:
    logits = torch.randn(M, E)
    want = layer.fused_topk(logits, logits, K, False)
    ids, weights = torch.empty(M + 3, K, dtype=torch.int32), torch.empty(M + 3, K)
    ids.fill_(77)
    for given in ({"topk_ids": ids}, {"topk_weights": weights},
                  {"topk_ids": ids, "topk_weights": weights}):  # fmt: skip
        got = layer.fused_topk(logits, logits, K, False, **given)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[0].data_ptr() == weights.data_ptr() and got[1].data_ptr() == ids.data_ptr()
    assert ids[M:].eq(77).all()
    for name, wrong, kind in (
        ("topk_ids", torch.empty(M - 1, K, dtype=torch.int32), ValueError),
        ("topk_ids", torch.empty(M, K), ValueError),
        ("topk_weights", torch.empty(M, K + 1), ValueError),
        ("topk_weights", [], TypeError),
    ):  # fmt: skip
        with pytest.raises(kind, match=f"^{name}: expected"):
            layer.fused_topk(logits, logits, K, False, **{name: wrong})


def test_enums() -> None:
    assert [(a.name, int(a)) for a in ActivationType] == [
        ("No", -1), ("Silu", 0), ("Gelu", 1), ("Swiglu", 2), ("Situv2", 3)]  # fmt: skip
    assert [(q.name, int(q)) for q in QuantType] == list(zip(
        ("No", "per_Tensor", "per_Token", "per_1x32", "per_1x128", "per_128x128", "per_256x128",
         "per_1024x128"), range(8), strict=True))  # fmt: skip
