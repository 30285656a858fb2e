"""Is whatever a careless caller passes refused in a sentence? Every argument of every function.

`careless_calls.py` has the calls and the mistakes; `test_bad_input.py` the words of single ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from careless_calls import CALLS, D, E, K, M, buffers, chosen, ids, layer, logits, mistakes

import aiter
from aiter import RoutingRule, fused_moe, parallel, reference
from aiter.jit import TargetError

REFUSALS = (TypeError, ValueError, TargetError)


def public(module: Any) -> set[Callable[..., Any]]:
    return {getattr(module, name) for name in module.__all__ if callable(getattr(module, name))}


def test_every_function_has_a_call() -> None:
    takes_none = {fused_moe.last_path}
    by_call = {reference.router_topk_sorting, parallel.fused_moe_expert_parallel}  # pass all on
    found = public(aiter) | public(fused_moe) | public(reference) | public(parallel)
    functions = {each for each in found if not isinstance(each, type)} - takes_none - by_call
    functions -= {fused_moe.SortedBuffers}
    assert functions <= CALLS.keys()


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_mistakes_are_refused(function: Callable[..., Any]) -> None:
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    make = CALLS[function]
    function(**make())
    wrong = []
    for name, value in mistakes(make()):
        try:
            function(**{**make(), name: value})
        except REFUSALS as error:
            if "expected" not in str(error) or "got" not in str(error):
                wrong.append(f"{name} = {value!r}: {error!r}")
        except Exception as error:
            wrong.append(f"{name} = {value!r}: {error!r}")
        else:
            wrong.append(f"{name} = {value!r}: taken")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("device", ["cuda:99", "cuda:-1", "", "gfx942", -1, 2**70, True, 1.5, b"x"])
def test_what_is_no_device_is_refused(device: Any) -> None:
    for call in (
        lambda: aiter.fused_topk_moe_sorting_max_tokens(8, 2, device=device),
        lambda: fused_moe.empty_sorted_buffers(1, 2, 8, 4, torch.float32, device=device),
        lambda: parallel.expert_shard(8, 0, 2, device),
        lambda: aiter.warmup(devices=[device], modules=["module_topk_softmax"]),
    ):
        with pytest.raises(REFUSALS, match="device: expected .*, got "):
            call()


def test_a_device_that_nothing_is_made_on_is_refused() -> None:
    for call in (
        lambda: fused_moe.empty_sorted_buffers(1, 2, 8, 4, torch.float32, device="mps"),
        lambda: parallel.expert_shard(8, 0, 2, "mps"),
    ):
        with pytest.raises(
            ValueError, match="device: expected a cpu, cuda or meta device, got 'mps'"
        ):
            call()


def test_a_value_that_equals_one_of_before_is_checked_all_the_same() -> None:
    """Rules are kept by their values, and 2 == 2.0, 1 == True."""
    valid = CALLS[aiter.grouped_topk]()
    aiter.grouped_topk(**{**valid, "topk_group": 2})
    for value in (2.0, True, [2]):
        with pytest.raises(TypeError, match="topk_group: expected an int, got"):
            aiter.grouped_topk(**{**valid, "topk_group": value})


def test_more_than_a_row_has_is_refused_before_it_is_allocated() -> None:
    logits_of_rows = torch.randn(1 << 12, 8)
    for more in ({}, {"topk_ids": torch.zeros(1 << 12, 8, dtype=torch.int32)}):
        with pytest.raises(ValueError, match="topk: expected 1 to 8 for 8 experts, got 1073741824"):
            fused_moe.fused_topk(logits_of_rows, logits_of_rows, 1 << 30, True, **more)


def test_what_the_sort_writes_beside_is_apart() -> None:
    """Indices that share memory with the sorted ids would be read after they were written over."""
    tensors = buffers("sorted_token_ids")
    arguments = {
        "topk_ids": ids(), "topk_weights": torch.rand(M, K), **tensors, "num_experts": E, "unit_size": 32
    }  # fmt: skip
    sorted_ids = tensors["sorted_token_ids"]
    with pytest.raises(ValueError, match="m_indices: expected .*, got .* sorted_token_ids shares"):
        aiter.moe_sorting_opus_fwd(**arguments, m_indices=sorted_ids)
    shared = torch.zeros(2 * M * K, dtype=torch.int32)
    local, reverse = shared[: M * K].view(M, K), shared[M * K - 1 : -1]
    with pytest.raises(ValueError, match="reverse_sorted: expected .* that local_topk_ids shares"):
        aiter.moe_sorting_opus_fwd(**arguments, local_topk_ids=local, reverse_sorted=reverse)
    aiter.moe_sorting_opus_fwd(**arguments, local_topk_ids=local, reverse_sorted=shared[M * K :])


def test_logits_are_not_written_over_weights() -> None:
    arguments = layer()
    arguments["w2"] = torch.randn(E, D, 8)
    over = arguments["w2"].view(-1)[: M * E].view(M, E)
    with pytest.raises(
        ValueError, match="logits_out: expected memory of its own, got .* w2 shares"
    ):
        fused_moe.fused_moe_from_hidden(
            router_weight=torch.randn(E, D), topk=K, logits_out=over, **arguments
        )


def test_an_activation_that_returns_something_else_is_refused() -> None:
    arguments = {**layer(), **logits(), "topk": K, "backend": "block_bmm"}
    for activation, got in ((lambda x: x, r"\[\d+, 16\]"), (lambda x: None, "NoneType")):
        with pytest.raises(
            (TypeError, ValueError), match=f"activation: expected a function .*{got}"
        ):
            fused_moe.fused_moe_from_logits(**{**arguments, "activation": activation})


def test_weights_that_are_negated_when_read_are_refused() -> None:
    """Triton's kernels would read the numbers that are in memory."""
    arguments = {**layer(), **logits(), "topk": K}
    arguments["w1"] = torch.complex(arguments["w1"], arguments["w1"]).conj().imag
    with pytest.raises(ValueError, match="w1: expected .* call resolve_neg"):
        fused_moe.fused_moe_from_logits(**arguments)


def test_a_shard_says_which_experts() -> None:
    shard = parallel.expert_shard(E, 0, 1, "cpu")
    given = (torch.randn(M, D), torch.randn(E, 16, D), torch.randn(E, D, 8), torch.randn(M, E), K)
    call = parallel.fused_moe_expert_parallel
    with pytest.raises(TypeError, match="shard: expected an ExpertShard, got int"):
        call(*given, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expert_mask: expected not to be given"):
        call(*given, shard, expert_mask=shard.mask)
    with pytest.raises(TypeError, match="w1: expected a tensor, got list"):
        call(given[0], [], *given[2:], shard)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        shard.of([])  # type: ignore[arg-type]


RULE = RoutingRule().packed
NO_RULES = {
    "of none": (),
    "short": RULE[:-1],
    "long": (*RULE, 0.0),
    "of NaN": (float("nan"),) * len(RULE),
    "infinite": (float("inf"),) * len(RULE),
    "counting from the end": (-1.0, *RULE[1:]),
    "not whole": (0.5, *RULE[1:]),
    "of too many": (3.0, *RULE[1:]),
}


@pytest.mark.parametrize("numbers", NO_RULES.values(), ids=NO_RULES)
def test_numbers_that_are_no_rule_are_refused(numbers: tuple[float, ...]) -> None:
    op = torch.ops.aiter.topk_routing_sorting
    with pytest.raises(ValueError, match="rule: expected .*, got "):
        op(torch.randn(M, E), K, E, D, torch.bfloat16, list(map(float, numbers)))


def test_registered_ops_refuse_a_meta_tensor_beside_others() -> None:
    """PyTorch would ask their fakes, and nothing would be written."""
    ops = torch.ops.aiter
    outputs = {**buffers(), "sorted_ids": buffers()["sorted_ids"].to("meta")}
    weights, indices = chosen().values()
    with pytest.raises(
        ValueError, match="sorted_ids: expected a tensor on cpu, .*, got one on meta"
    ):
        ops.topk_softmax_sorting_out(torch.randn(M, E), K, E, D, torch.bfloat16, **outputs)
    with pytest.raises(ValueError, match="topk_weights: expected a tensor on cpu"):
        ops.topk_routing(weights.to("meta"), indices, torch.randn(M, E))
    ops.topk_routing(weights.to("meta"), indices.to("meta"), torch.randn(M, E, device="meta"))
