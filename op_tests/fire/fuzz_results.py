"""Did an accepted call of the fuzzer give what the reference gives for its arguments?

One function per op. Each takes the arguments, outputs among them, and what the call returned.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from buffers import POISON, require
from checks import check_equal, check_sorted, check_weights
from fuzz_changes import Arguments
from torch import Tensor

from aiter import reference


class Unjudged(Exception):
    """The contract says nothing about the result for these arguments."""


FUSED_OUTPUTS = (
    "sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf",
)  # fmt: skip
OPUS_OUTPUTS = ("sorted_token_ids", *FUSED_OUTPUTS[1:])


def check_topk(arguments: Arguments, returned: object) -> None:
    require(returned is None, f"returned {returned!r}")
    ids, gating = arguments["topk_indices"].cpu(), arguments["gating_output"].detach().cpu()
    want_weights, want_ids = reference.topk_softmax(gating, ids.shape[1], arguments["need_renorm"])
    check_equal("topk_indices", ids, want_ids)
    check_weights("topk_weights", arguments["topk_weights"], want_weights)
    rows = torch.arange(ids.shape[0], dtype=torch.int32)[:, None]
    slots = torch.arange(ids.shape[1], dtype=torch.int32)[None, :]
    check_equal(
        "token_expert_indices", arguments["token_expert_indices"], slots * ids.shape[0] + rows
    )


def check_fused(arguments: Arguments, returned: object) -> None:
    require(returned is None, f"returned {returned!r}")
    gating = arguments["gating_output"].detach().cpu()
    topk = operator.index(arguments["topk"])
    weights, ids = reference.topk_softmax(gating, topk, arguments["need_renorm"])
    outputs = [arguments[name] for name in FUSED_OUTPUTS]
    _check_sort(outputs, ids, weights, arguments)


def check_opus(arguments: Arguments, returned: object) -> None:
    require(returned is None, f"returned {returned!r}")
    ids, weights = arguments["topk_ids"].cpu(), arguments["topk_weights"].detach().cpu()
    outputs = [arguments[name] for name in OPUS_OUTPUTS]
    _check_sort(outputs, ids, weights, arguments)


def _check_sort(outputs: list[Tensor], ids: Tensor, weights: Tensor, arguments: Arguments) -> None:
    """The five outputs are the reference's for these ids and weights."""
    experts, block = (operator.index(arguments[name]) for name in ("num_experts", "unit_size"))
    mask, count = arguments["local_expert_mask"], arguments["num_local_tokens"]
    mask, count = (None if value is None else value.cpu() for value in (mask, count))
    tokens = ids.shape[0]
    if mask is not None and bool(((mask != 0) & (mask != 1)).any()):
        raise Unjudged
    local = tokens if count is None else int(count)
    if not 0 <= local <= tokens:
        raise Unjudged
    buf = outputs[4].detach().cpu()
    expected = reference.moe_sorting(
        ids.contiguous(), weights.contiguous(), experts, buf.shape[1], buf.dtype, block, mask, count
    )
    if tokens == 0:
        check_equal("num_valid_ids", outputs[3], expected[3])
        return
    got = [output[: len(want)] for output, want in zip(outputs[:4], expected, strict=False)]
    check_sorted(got, expected, block)
    rows = buf.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    rows = rows.reshape(tokens, -1) if buf.numel() else torch.empty(tokens, 0)
    require(not bool(rows[:local].any()), f"moe_buf: expected zero bytes in {local} rows")
    if arguments.get("moe_buf_was_poison", True):
        require(bool((rows[local:] == POISON).all()), f"moe_buf: rows from {local} on were written")


def check_routing(arguments: Arguments, returned: Any) -> None:
    gating = arguments["gating_output"].detach().cpu()
    topk = operator.index(arguments["topk"])
    weights, ids = reference.topk_softmax(gating, topk, arguments["need_renorm"])
    renamed = {
        **arguments,
        "unit_size": arguments["block_size"],
        "local_expert_mask": arguments["expert_mask"],
    }
    shape = (gating.shape[0], arguments["model_dim"])
    require(tuple(returned[4].shape) == shape, f"moe_buf: shape {list(returned[4].shape)}")
    require(returned[4].dtype == arguments["moebuf_dtype"], f"moe_buf: {returned[4].dtype}")
    # NOTE: fresh memory holds anything behind the local rows.
    count = arguments["num_local_tokens"]
    local = gating.shape[0] if count is None else int(count.cpu())
    if 0 <= local < gating.shape[0]:
        returned[4][local:].view(torch.uint8).fill_(POISON) if returned[4].numel() else None
    _check_sort(list(returned), ids, weights, renamed)


def check_fused_topk(arguments: Arguments, returned: Any) -> None:
    gating = arguments["gating_output"].detach().cpu()
    topk = operator.index(arguments["topk"])
    want_weights, want_ids = reference.topk_softmax(gating, topk, arguments["renormalize"])
    check_weights("weights", returned[0], want_weights)
    check_equal("ids", returned[1], want_ids)


def check_load(arguments: Arguments, returned: object) -> None:
    require(returned is None, f"returned {returned!r}")
    ids, load = arguments["topk_ids"].cpu().reshape(-1), arguments["load"].cpu()
    inside = ids[(ids >= 0) & (ids < len(load))].long()
    check_equal("load", load, torch.bincount(inside, minlength=len(load)).to(torch.int32))


def check_size(arguments: Arguments, returned: object) -> None:
    require(
        type(returned) is int and 0 <= returned < 2**40,
        f"expected a size in bytes, got {returned!r}",
    )
