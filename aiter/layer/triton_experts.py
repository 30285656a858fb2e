"""How do sorted buffers become the output of the experts on a GPU with Triton? In three launches.

The routing, `first_product`, `second_product` and `sum_over_slots` are a layer; for one token routing
and two products (`triton_kernels` has what each does). Nothing of PyTorch runs between them but the
allocation of `middle` and `entry`, nothing is read back, weights are never copied and may have any
strides.

What a layer's tensors are like decides the tiles (`triton_configs`), the variants and the grids: a
`Plan`, found again by one lookup (`triton_plan`).

Under a tracer the whole call is one registered op, which looks at M when it runs: one graph serves
every number of tokens, each with blocks of its own size.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..routing.buffers import SortedBuffers, allocate, sorted_sizes
from . import triton_configs, triton_tuned
from .parts import Experts
from .triton_call import Call, Choice
from .triton_launch import ALIGNMENT, address, interpreted, itself
from .triton_plan import MOST_PLANS, Plan, family_for, make_plan
from .types import ActivationType

OLDEST_CAPABILITY = 8  # Triton's oldest, and the first with bfloat16
_native: Any = torch._C


NOT_INSTALLED = (
    "Triton is not installed, or older than 3.4; PyTorch's GPU builds bring it, from PyTorch 2.8 on"
)


def _installed() -> bool:
    """Whether there is a Triton with what `triton_kernels` imports; does not import it."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).with_name("language").joinpath("extra", "cuda", "gdc.py").is_file()


INSTALLED = _installed()  # asked here, as no tracer can ask


def why_not(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, in words; None if they can."""
    if not INSTALLED:
        return NOT_INSTALLED
    if device.type == "meta":
        return None  # NOTE: nothing is launched; the op says what would come back.
    if device.type == "cpu":
        # NOTE: under a tracer this is left to the op, whose eager call asks again.
        if is_dynamo_compiling() or interpreted():
            return None
        return "Triton has no CPU (TRITON_INTERPRET=1 runs its kernels in the interpreter)"
    if device.type != "cuda":
        return f"Triton's kernels are for GPUs, not for {device.type}"
    if torch.version.hip is None:
        major = torch.cuda.get_device_capability(device)[0]
        if major < OLDEST_CAPABILITY:
            return f"Triton needs compute capability {OLDEST_CAPABILITY}.0, {device} has {major}.x"
    return None


class Fixed(NamedTuple):
    """The arguments for the weights and biases of a layer; they stay from call to call."""

    w1: Any
    w2: Any
    bias1: Any
    bias2: Any


def block_size(
    device: torch.device,
    tokens: int,
    topk: int,
    num_experts: int,
    weight: Tensor,
) -> int:
    """The slots per block that a layer of `tokens` tokens with weights w1 [E', N1, D] is sorted into."""
    if tokens == 1:
        return 1
    return _block_size(
        device, tokens * topk / num_experts, weight.shape, weight.stride(), weight.itemsize
    )


@lru_cache(MOST_PLANS)
def _block_size(
    device: torch.device,
    entries: float,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
) -> int:
    family = family_for(device, shape, strides)
    return triton_configs.row_for(family, entries, None, itemsize).block


def forget() -> None:
    """Drops plans and what is known of devices; `triton_known` calls it and drops calls as well."""
    _block_size.cache_clear()
    make_plan.cache_clear()
    triton_tuned.families.cache_clear()


def run_triton(
    hidden_states: Tensor,
    experts: Experts,
    buffers: SortedBuffers,
    topk: int,
    block: int,
    *,
    all_routed: bool,
    weight_first: bool,
    choice: Choice | None = None,
) -> Tensor:
    """Applies the experts to the sorted entries; returns the buffers' moe_buf [M, D].

    Arguments as of `experts.run_experts`, for at least one token; `choice`: tiles to take instead of
    the known ones.
    """
    plan = plan_of(
        hidden_states, experts, buffers, topk, block, all_routed, weight_first, choice
    )  # fmt: skip
    return run_plan(plan, fixed_of(plan, experts), hidden_states, buffers)


def plan_of(
    hidden_states: Tensor,
    experts: Experts,
    buffers: SortedBuffers,
    topk: int,
    block: int,
    all_routed: bool,
    weight_first: bool,
    choice: Choice | None = None,
) -> Plan:
    """The plan of a call; arguments as above."""
    w1, w2, bias1, bias2, activation, interleaved, limit = experts
    sorted_ids, *_, out = buffers
    aligned = not (hidden_states.data_ptr() | w1.data_ptr() | w2.data_ptr()) % ALIGNMENT
    return make_plan(
        Call(
            hidden_states.device, hidden_states.dtype, out.dtype, hidden_states.shape[0], topk,
            sorted_ids.shape[0], block, w1.shape, w2.shape, hidden_states.stride(), w1.stride(),
            w2.stride(),
            None if bias1 is None else (bias1.dtype, bias1.stride()),
            None if bias2 is None else (bias2.dtype, bias2.stride()),
            _number(activation), interleaved, float(limit), weight_first, all_routed, aligned, choice,
        )
    )  # fmt: skip


def _number(activation: object) -> int:
    """What the kernels call an activation."""
    if not isinstance(activation, ActivationType):
        raise TypeError(
            f"activation: expected an ActivationType for Triton's kernels, got"
            f" {type(activation).__name__}"
        )
    return int(activation)


def fixed_of(plan: Plan, experts: Experts) -> Fixed:
    """The arguments for these weights. No kernel looks at a bias that is not there."""
    w1, w2, bias1, bias2, *_ = experts
    as_argument = address if plan.views is None else itself
    return Fixed(
        plan.describe1(w1),
        plan.describe2(w2),
        as_argument(w1 if bias1 is None else bias1),
        as_argument(w2 if bias2 is None else bias2),
    )


def run_plan(plan: Plan, fixed: Fixed, hidden_states: Tensor, buffers: SortedBuffers) -> Tensor:
    """Makes the launches of a plan for these hidden states and sorted buffers; returns moe_buf."""
    device = hidden_states.device
    if plan.views is not None:
        return _interpret(plan, plan.views, fixed, hidden_states, buffers)
    if _native._cuda_getDevice() != device.index:
        with torch.cuda.device(device):
            return run_plan(plan, fixed, hidden_states, buffers)
    first, second, last, scratch, entry_at, place_at, entries, *_ = plan
    w1, w2, bias1, bias2 = fixed
    ids, weights, experts, num_valid, out = buffers
    stream = _native._cuda_getCurrentRawStream(device.index)
    # NOTE: held until the launches are made; the allocator gives it to later work of this stream alone.
    memory = allocate(scratch, device)[0]
    middle = memory.data_ptr()
    entry, place = middle + entry_at, middle + place_at
    at_weights, at_experts = weights.data_ptr(), experts.data_ptr()
    at_valid = num_valid.data_ptr()
    if last is None:
        first(
            stream, hidden_states.data_ptr(), w1, bias1, at_weights, at_experts, at_valid, middle,
            place,
        )  # fmt: skip
        second(
            stream, middle, w2, bias2, at_weights, at_experts, at_valid, entry, place,
            out.data_ptr(),
        )  # fmt: skip
        return out
    at_ids = ids.data_ptr()
    first(
        stream, hidden_states.data_ptr(), w1, bias1, at_ids, at_weights, at_experts, at_valid,
        middle, place, entries,
    )  # fmt: skip
    second(stream, middle, w2, bias2, at_ids, at_experts, at_valid, entry, place)
    last(stream, entry, place, at_weights, out.data_ptr())
    return out


def _interpret(
    plan: Plan,
    views: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    fixed: Fixed,
    hidden_states: Tensor,
    buffers: SortedBuffers,
) -> Tensor:
    """As `run_plan`, with tensors."""
    ids, weights, experts, num_valid, out = buffers
    middle, entry, place = (torch.empty(shape, dtype=dtype) for shape, dtype in views)
    if plan.last is None:
        plan.first(
            0, hidden_states, fixed.w1, fixed.bias1, weights, experts, num_valid, middle, place
        )
        plan.second(
            0, middle, fixed.w2, fixed.bias2, weights, experts, num_valid, entry, place, out
        )
        return out
    plan.first(
        0, hidden_states, fixed.w1, fixed.bias1, ids, weights, experts, num_valid, middle, place,
        plan.entries,
    )  # fmt: skip
    plan.second(0, middle, fixed.w2, fixed.bias2, ids, experts, num_valid, entry, place)
    plan.last(0, entry, place, weights, out)
    return out


def compile_ahead(
    experts: Experts,
    topk: int,
    num_experts: int,
    most_tokens: int,
    out_dtype: torch.dtype,
    all_routed: bool,
    weight_first: bool,
) -> None:
    """Compiles and loads what layers of 1 to `most_tokens` dense rows launch; launches nothing."""
    w1, w2, bias1, bias2, activation, interleaved, limit = experts
    sizes = [1 << power for power in range((most_tokens - 1).bit_length())]
    for tokens in (*sizes, most_tokens):
        block = block_size(w1.device, tokens, topk, num_experts, w1)
        slots, _ = sorted_sizes(tokens, topk, num_experts, block)
        make_plan(
            Call(
                w1.device, w1.dtype, out_dtype, tokens, topk, slots, block, w1.shape, w2.shape,
                (w1.shape[2], 1), w1.stride(), w2.stride(),
                None if bias1 is None else (bias1.dtype, bias1.stride()),
                None if bias2 is None else (bias2.dtype, bias2.stride()),
                _number(activation), interleaved, float(limit), weight_first, all_routed,
                not (w1.data_ptr() | w2.data_ptr()) % ALIGNMENT,
            )
        )  # fmt: skip
