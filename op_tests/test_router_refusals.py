"""What does routing from hidden states refuse, and does it leave everything as it was?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from bad_input import Bad, check_refused, computed, constant, replaced, spread
from buffers import GuardedBuffer
from cases import Case
from router_calls import drawn, make_router
from runners import SortedOutputs
from targets import Target

from aiter import fused_moe
from aiter.ops.fused_router_sorting import fused_router_sorting_fwd

BASE = Case(5, 24, 4, torch.bfloat16, block_size=8)


def fwd_arguments(device: str) -> tuple[dict[str, Any], SortedOutputs, GuardedBuffer]:
    """Valid arguments by name, and the outputs among them."""
    case = replace(BASE, mask="ones", num_local=5)
    router = make_router(case, device)
    outputs = SortedOutputs.allocate(case, device)
    logits = GuardedBuffer("logits_out", (5, 24), torch.float32, device)
    arguments = {
        "hidden_states": router.hidden_states,
        "router_weight": router.weight,
        "logits_out": logits.tensor,
        **{buffer.name: buffer.tensor for buffer in outputs.buffers},
        "num_experts": 24,
        "topk": 4,
        "unit_size": 8,
        "router_bias": router.bias,
        "correction_bias": torch.zeros(24, device=device),
        "local_expert_mask": router.inputs.mask,
        "num_local_tokens": router.inputs.num_local_tokens,
    }
    return arguments, outputs, logits


MATRICES = ("hidden_states", "router_weight")
BAD = [
    *(Bad(f"{n} is a list", replaced(n, lambda t: t.tolist()), (n, "list"), TypeError)
      for n in (*MATRICES, "logits_out", "router_bias")),
    *(Bad(f"{n} is float64", replaced(n, lambda t: t.double()), (n, "float64"))
      for n in (*MATRICES, "logits_out", "router_bias")),
    *(Bad(f"{n} has three dimensions", replaced(n, lambda t: t[None]), (n,))
      for n in (*MATRICES, "logits_out")),
    *(Bad(f"{n} has inner stride 2", replaced(n, spread), (n, "inner stride 1", "2"))
      for n in (*MATRICES, "logits_out")),
    Bad("hidden_states without columns", lambda a: {n: a[n][:, :0] for n in MATRICES},
        ("hidden_states", "columns")),
    Bad("router_weight of another width", replaced("router_weight", lambda t: t[:, 1:]),
        ("router_weight", "136", "135")),
    Bad("router_weight of other experts", replaced("router_weight", lambda t: t[1:]),
        ("router_weight", "24", "23")),
    Bad("router_bias too short", replaced("router_bias", lambda t: t[1:]), ("router_bias", "23")),
    Bad("router_bias strided", replaced("router_bias", spread), ("router_bias", "contiguous")),
    Bad("logits_out of fewer rows", replaced("logits_out", lambda t: t[1:]), ("logits_out", "4")),
    Bad("logits_out whose rows overlap", replaced("logits_out", lambda t: t[:1].expand(5, 24)),
        ("logits_out", "do not overlap")),
    Bad("logits_out in hidden_states",
        computed("hidden_states", lambda a: a["logits_out"].view(torch.bfloat16)[:, :24]
                 .as_strided((5, 136), (1, 1))), ("logits_out", "hidden_states", "memory")),
    Bad("sorted_ids in the weight",
        computed("router_weight", lambda a: a["sorted_ids"].view(torch.bfloat16)
                 .as_strided((24, 136), (1, 1))), ("sorted_ids", "router_weight", "memory")),
    Bad("logits_out in the correction bias",
        computed("correction_bias", lambda a: a["logits_out"].view(-1)[:24]), ("memory",)),
    Bad("hidden_states on another device", replaced("hidden_states", lambda t: t.to("meta")),
        ("hidden_states|router_weight", "meta")),
    Bad("topk too large", constant("topk", 25), ("topk", "25")),
    Bad("num_experts of another width", constant("num_experts", 23), ("router_weight", "23")),
    Bad("no blocks", constant("unit_size", 0), ("unit_size", "0")),
    Bad("moe_buf of other rows", replaced("moe_buf", lambda t: t[1:]), ("moe_buf",)),
    Bad("a mask of another size", replaced("local_expert_mask", lambda t: t[1:]),
        ("local_expert_mask", "23")),
    Bad("no workgroup", constant("num_workgroups", 0), ("num_workgroups", "1 to 1024", "0")),
    Bad("too many workgroups", constant("num_workgroups", 1025), ("num_workgroups", "1025")),
    Bad("workgroups by name", constant("num_workgroups", "2"), ("num_workgroups", "str"), TypeError),
    Bad("an unknown format", constant("id_format", "block"), ("id_format", "block")),
    Bad("a rule by name", constant("rule", "softmax"), ("rule", "str"), TypeError),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_input(target: Target, bad: Bad) -> None:
    arguments, outputs, logits = fwd_arguments(target.device)
    check_refused(bad, fused_router_sorting_fwd, arguments, outputs, target)
    if "logits_out" not in bad.name:
        logits.check_untouched()


def test_rows_that_do_not_fit_are_refused(target: Target) -> None:
    rows = 100_000
    hidden, weight = torch.zeros(rows, 8), torch.zeros(16, 8)
    out = fused_moe.empty_sorted_buffers(rows, 8, 16, 1, torch.uint8, device=target.device)
    logits = torch.empty(rows, 16, device=target.device)
    with (
        target.active(),
        pytest.raises(ValueError, match=r"hidden_states: expected at most \d+ rows, .* got 100000"),
    ):
        fused_router_sorting_fwd(
            hidden.to(target.device), weight.to(target.device), logits, *out, 16, 8, 32
        )


CALLS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str, type[Exception]]] = {
    "no tensor": (lambda a: {"hidden_states": [1.0]}, "hidden_states: expected a tensor", TypeError),
    "three dimensions": (lambda a: {"hidden_states": a["hidden_states"][None]},
                         "hidden_states: expected a tensor of rank 2", ValueError),
    "no weight": (lambda a: {"router_weight": None}, "router_weight: expected a tensor", TypeError),
    "experts": (lambda a: {"num_experts": 25},
                r"router_weight: expected shape \[25, any\], .* got 24 rows", ValueError),
    "batch_invariant": (lambda a: {"batch_invariant": 1}, "batch_invariant: expected a bool",
                        TypeError),
    "logits_out": (lambda a: {"logits_out": 3}, "logits_out: expected a tensor", TypeError),
    "policy": (lambda a: {"dispatch_policy": 3}, "dispatch_policy: expected", ValueError),
    "out": (lambda a: {"out": (1, 2)}, "out: expected 5 tensors", TypeError),
    "mask": (lambda a: {"expert_mask": torch.ones(3, dtype=torch.int32)},
             "local_expert_mask: expected shape", ValueError),
    "gradient": (lambda a: {"router_weight": a["router_weight"].requires_grad_()},
                 "router_weight: expected a tensor that needs no gradient", ValueError),
    "gradient of logits": (lambda a: {"logits_out": torch.zeros(5, 24, requires_grad=True)},
                           "logits_out: expected a tensor that needs no gradient", ValueError),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_launch_nothing(name: str, tokens: int) -> None:
    """In one launch and in two: the product is not made for a routing that is refused."""
    change, words, kind = CALLS[name]
    hidden, weight = drawn(tokens, 24, 64)
    logits = torch.full((tokens, 24), 7.0)
    arguments = {
        "hidden_states": hidden, "router_weight": weight, "topk": 4, "num_experts": 24,
        "model_dim": 8, "moebuf_dtype": torch.float32, "logits_out": logits,
    }  # fmt: skip
    with pytest.raises(kind, match=words):
        fused_moe.router_topk_sorting(**{**arguments, **change(arguments)})
    assert torch.equal(logits, torch.full_like(logits, 7.0))
