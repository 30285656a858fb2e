"""Are tensors refused that the fuzzer showed to crash, or to work by luck?"""

from __future__ import annotations

import random

import pytest
import torch
from buffers import POISON
from fuzz_changes import emptied, misaligned
from torch import Tensor

import aiter
import aiter.fused_moe

NAMES = ("topk_weights", "topk_indices", "token_expert_indices", "gating_output")


def arguments() -> dict[str, Tensor]:
    """Tensors that `topk_softmax` takes, outputs poisoned."""
    poison = torch.full((3, 2 * 4), POISON, dtype=torch.uint8)
    return {
        "topk_weights": poison.clone().view(torch.float32),
        "topk_indices": poison.clone().view(torch.int32),
        "token_expert_indices": poison.clone().view(torch.int32),
        "gating_output": torch.randn(3, 8),
    }


def refuse(changed: dict[str, object], match: str) -> None:
    """The call raises a sentence, and writes nothing to the outputs that are as they were."""
    given = {**arguments(), **changed}
    with pytest.raises(ValueError, match=match):
        aiter.topk_softmax(**given, need_renorm=True)
    for name in set(NAMES[:3]) - set(changed):
        assert bool((given[name].view(torch.uint8) == POISON).all()), name


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_without_memory_is_refused(name: str) -> None:
    tensor = emptied(random.Random(0), arguments()[name], {})
    refuse({name: tensor}, rf"^{name}: expected a tensor with memory, got shape \[3, \d\] without")


@pytest.mark.parametrize("name", NAMES)
def test_a_misaligned_tensor_is_refused(name: str) -> None:
    tensor = misaligned(random.Random(0), arguments()[name], {})
    assert tensor.data_ptr() % 4 != 0
    refuse({name: tensor}, rf"^{name}: expected memory aligned to the 4 bytes of \w+, got address")


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_tensor_is_refused(name: str) -> None:
    tensor = arguments()[name].to_sparse()
    refuse({name: tensor}, f"^{name}: expected a tensor with strides, got torch.sparse_coo")


def test_a_negated_tensor_is_refused() -> None:
    logits = torch._neg_view(arguments()["gating_output"])
    refuse(
        {"gating_output": logits}, "^gating_output: expected a tensor with its numbers in memory"
    )


def test_a_flat_hidden_states_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^hidden_states: expected 3 rows, as gating_output, got"):
        aiter.fused_moe.fused_topk(torch.tensor(1.0), torch.randn(3, 8), 2, True)
