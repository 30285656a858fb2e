"""Does `fused_moe` refuse what it does not compute, in a sentence with the values?"""

from __future__ import annotations

from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from moe_layers import BASE, make_layer

from aiter import ActivationType, QuantType
from aiter import fused_moe as layer


def refused(words: str, kind: type[Exception] = ValueError, **changes: Any) -> None:
    inputs = make_layer(BASE, "cpu")
    weights, ids = torch.ones(9, 3), torch.arange(3, dtype=torch.int32).repeat(9, 1)
    arguments: dict[str, Any] = {
        "hidden_states": inputs.hidden,
        "w1": inputs.w1,
        "w2": inputs.w2,
        "topk_weight": weights,
        "topk_ids": ids,
    }
    with pytest.raises(kind, match=words):
        layer.fused_moe(**(arguments | changes))


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "quant_type": (r"expected QuantType.No.*got.*4", {"quant_type": QuantType.per_1x128}),
    "w1_scale": (r"expected None.*got a tensor of shape \[1\]", {"w1_scale": torch.ones(1)}),
    "w2_scale": (r"expected None", {"w2_scale": torch.ones(1)}),
    "a1_scale": (r"expected None", {"a1_scale": torch.ones(1)}),
    "a2_scale": (r"expected None", {"a2_scale": torch.ones(1)}),
    "hidden_pad": (r"expected 0.*got 64", {"hidden_pad": 64}),
    "intermediate_pad": (r"expected 0.*got 192", {"intermediate_pad": 192}),
    "activation": (r"expected Silu, Gelu or Swiglu, got No", {"activation": ActivationType.No}),
    "dtype": (r"expected float32.*got torch.int8", {"dtype": torch.int8}),
    "block_size_M": (r"expected at least 1.*got -1", {"block_size_M": -1}),
    "backend": (r"expected one of.*got 'cutlass'", {"backend": "cutlass"}),
    "moe_sorting_dispatch_policy": ("got 3", {"moe_sorting_dispatch_policy": 3}),
}


@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_what_is_not_supported_is_refused(argument: str) -> None:
    words, changes = UNSUPPORTED[argument]
    name = argument.removeprefix("moe_sorting_")
    refused(f"{name}: {words}" if name == argument else f"{name}.*{words}", **changes)


def test_tensors_that_do_not_fit_are_refused() -> None:
    inputs = make_layer(BASE, "cpu")
    refused(r"hidden_states: expected 64 columns.*\[9, 60\]", hidden_states=torch.ones(9, 60))
    refused(r"hidden_states: expected dtype", hidden_states=torch.ones(9, 64, dtype=torch.int8))
    refused(r"w1: expected torch.float32.*float8", w1=inputs.w1.to(torch.float8_e4m3fn))
    refused(r"w1: expected a tensor of rank 3, got shape \[96, 64\]", w1=inputs.w1[0])
    refused(r"w1: expected 96 rows.*or 48", w1=torch.ones(8, 64, 64))
    refused(r"w2: expected shape \[8, 64, inter\].*\[7, 64, 48\]", w2=inputs.w2[1:])
    refused(r"w2: expected torch.float32", w2=inputs.w2.half())
    refused(r"bias1: expected shape \[8, 96\], got \[8, 64\]", bias1=torch.ones(8, 64))
    refused(r"bias2: expected dtype", bias2=torch.ones(8, 64, dtype=torch.int32))
    refused(r"topk_ids: expected a tensor of rank 2 with 9 rows", topk_ids=torch.ones(8, 3))
    refused(r"topk_ids", topk_ids=torch.ones(9, 3, dtype=torch.int64))
    refused("w1: expected a tensor, got list", TypeError, w1=[])
    refused("expert_mask: expected a tensor, got list", TypeError, expert_mask=[1] * 8)
    refused(
        "activation: expected an ActivationType or a function, got str",
        TypeError,
        activation="silu",
    )
    refused("quant_type: expected a QuantType", TypeError, quant_type=0)
    refused("block_size_M: expected an int", TypeError, block_size_M=1.5)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.int32)
    refused("w1: expected 4 experts, the ones in expert_mask, got 8", expert_mask=mask)
    flat = {"w1": inputs.w1[:, :48]}
    refused("activation: expected Silu or Gelu", activation=ActivationType.Swiglu, **flat)
    refused("gate_up_interleaved: expected False", gate_up_interleaved=True, **flat)


def test_logits_that_do_not_fit_are_refused() -> None:
    inputs = make_layer(BASE, "cpu")
    arguments = (inputs.hidden, inputs.w1, inputs.w2)
    with pytest.raises(ValueError, match="w1: expected 9 experts, the width of gating_output"):
        layer.fused_moe_from_logits(*arguments, torch.ones(9, 9), 3)
    with pytest.raises(ValueError, match=r"gating_output: expected .* 9 rows.*\[4, 8\]"):
        layer.fused_moe_from_logits(*arguments, torch.ones(4, 8), 3)
    with pytest.raises(ValueError, match="topk"):
        layer.fused_moe_from_logits(*arguments, inputs.logits, 9)


def test_gradients_are_refused() -> None:
    inputs = make_layer(BASE, "cpu")
    inputs.w1.requires_grad_()
    arguments = (inputs.hidden, inputs.w1, inputs.w2, inputs.logits, 3)
    with pytest.raises(ValueError, match="w1: expected a tensor that needs no gradient"):
        layer.fused_moe_from_logits(*arguments)
    with torch.no_grad():
        plain = layer.fused_moe_from_logits(*arguments)
    with torch.inference_mode():
        assert torch.equal(layer.fused_moe_from_logits(*arguments), plain)
