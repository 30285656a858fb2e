"""How do sorted buffers become the output of the experts? Two grouped products, all on the device.

With (e, t, k) the expert, token and slot of a sorted entry of weight r:

    h = hidden_states[t] @ w1[e].T + bias1[e]        [N1]: gate and up, or one projection
    y = activation(h) @ w2[e].T + bias2[e]           [D]
    out[t] = sum over k of r * y                     in float32, then rounded once

Nothing is read back to the host, every shape follows from the arguments' shapes, and no float is
added atomically: each entry is written to its own row [k, t] of a float32 buffer that is then summed
over k. So a layer can be captured in a graph, and the same call gives the same bits.

A layer without mask is the routing, the two products and 13 small PyTorch operations, 21 with biases
and Swiglu; transformers' grouped path has 23 and 28 in all, its router included. They are PyTorch's
own, so that every device of PyTorch runs them, and traceable: torch.compile(fullgraph=True) makes 8
kernels of them, 5 with biases and Swiglu, and is the way to run decode where a step is short. (PyTorch
2.13, transformers 5.23, 2 cores of an AMD EPYC, counted by `python op_tests/bench_fused_moe.py
--small --launches --compile`, 2026-11-23.) Rejected: compiling these pieces here behind the caller's
back; a first call would take seconds, need a compiler of PyTorch's own, and recompile for new sizes.

Three backends for the products; `expert_backend` says which one a pair of weights gets:

- "triton": two grouped products over the sorted buffers, in kernels of our own (`triton_experts`),
  wherever there is a GPU and a Triton, but for activations that are functions. What is said above of
  operations and copies does not hold for it.
- "grouped_mm": `torch.nn.functional.grouped_mm` over the entries of all experts at once. The sort
  is asked for blocks of one slot, which leaves no padding between experts: M*K rows are multiplied,
  whatever the number of experts, and `sorted_expert_ids` is the expert of every row. With blocks of
  32, a step of 8 tokens over 128 experts would gather and activate up to 1024 rows instead of 64.
  float32 on the CPU has blocks of four: MKL sums the product of one row, and of rows that fill no
  four, in another order, so that a token's bits would depend on which other tokens take its experts.
  That is as much as can be done here and no promise: the order is the library's, and on another EPYC,
  with PyTorch 2.11, bits differed even so.
  That costs a tenth of the time with a few tokens and nothing with 64 (M = 8: 13.7 -> 14.9 ms for E =
  32, K = 4, D = inter = 720; one core of an AMD EPYC, PyTorch 2.13, 2026-11-26).
- "block_bmm": one batched product over the sort's blocks, each with a copy of its expert's weights.
  It takes any dtype, stride and device, at the cost of that copy: at most min(M*K, S / B) experts,
  in chunks (`layer.graph`).

Where PyTorch has a grouped product but would serve it by a host loop that waits for the device (on
GPUs, anything but bfloat16 on compute capability 9.x), "block_bmm" is chosen: waiting would break
graph capture. So it is under torch.compile for all but bfloat16, which PyTorch refuses to trace.
A product over all experts with M rows each was rejected: it reads every expert's weights for a single
token. `torch._grouped_mm`, the older name, was rejected too: PyTorch 2.8 has it for one GPU
generation only and without a CPU kernel.

Under a tracer nothing here depends on the number of tokens but shapes, so that one graph serves all
numbers: no Python loop, no comparison of sizes, and no slice whose bound a tracer cannot prove to lie
inside (rows of blocks of more than one slot are gathered instead, which torch.compile fuses away).
Autocast does not reach inside: products and activation are in the dtype of `hidden_states` always.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F

from ..routing.arguments import check_strided
from ..routing.buffers import TOKEN_BITS, TOKEN_MASK, SortedBuffers
from ..routing.tracing import traced, tracing_state, transformed
from . import triton_experts
from .graph import block_bmm
from .parts import SWIGLU_ALPHA, Activation, Experts
from .types import ActivationType

Backend = Literal["grouped_mm", "block_bmm", "triton"]
BACKENDS: tuple[Backend, ...] = ("grouped_mm", "block_bmm", "triton")

BLOCK_SIZES: dict[Backend, int] = {"grouped_mm": 1, "block_bmm": 16}
"""Slots per block; "triton" goes by M, and float32 on the CPU has CPU_FLOAT_BLOCK in "grouped_mm"."""

CPU_FLOAT_BLOCK = 4

SIGN_SLOT = 128  # the first slot number that sets the sign bit of a sorted id
ALIGNMENT = 16  # bytes; what grouped_mm wants of the distance between rows


def expert_backend(w1: Tensor, w2: Tensor, activation: Activation = ActivationType.Silu) -> Backend:
    """Which backend multiplies with these weights: "triton", "grouped_mm" or "block_bmm".

    Raises:
        TypeError, ValueError: a weight is no tensor [E, rows, columns] with memory, or the activation is
            neither an ActivationType nor a function.
    """
    for name, weight in (("w1", w1), ("w2", w2)):
        check_strided(name, weight)
        if weight.dim() != 3:
            raise ValueError(f"{name}: expected a tensor of rank 3, got shape {list(weight.shape)}")
    if not callable(activation) and not isinstance(activation, ActivationType):
        raise TypeError(
            f"activation: expected an ActivationType or a function, got {type(activation).__name__}"
        )
    return backend_of(w1, w2, activation)


def backend_of(w1: Tensor, w2: Tensor, activation: Activation) -> Backend:
    """As above, of weights that are checked."""
    if w1.device.type == "cuda" and triton_problem(w1.device, activation) is None:
        return "triton"
    if grouped_mm_problem(w1, w2) is not None:
        return "block_bmm"
    if w1.device.type == "cpu":
        return "grouped_mm"
    if w1.device.type != "cuda" or w1.dtype is not torch.bfloat16 or torch.version.hip is not None:
        return "block_bmm"
    major: int = torch.cuda.get_device_properties(w1.device).major
    return "grouped_mm" if major == 9 else "block_bmm"


def triton_problem(device: torch.device, activation: Activation) -> str | None:
    """Why "triton" cannot compute a layer on a device, in words; None where it can."""
    if not isinstance(activation, ActivationType):
        return "Triton's kernels have Silu, Gelu and Swiglu, and call no function"
    return triton_experts.why_not(device)


def grouped_mm_problem(w1: Tensor, w2: Tensor) -> str | None:
    """Why "grouped_mm" cannot multiply with these weights, in words; None where it can."""
    if not hasattr(F, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no torch.nn.functional.grouped_mm"
    for name, weight in (("w1", w1), ("w2", w2)):
        if not _rows_aligned(weight) or weight.shape[2] * weight.element_size() % ALIGNMENT:
            return (
                f"{name} {list(weight.shape)} has rows that do not start at multiples of"
                f" {ALIGNMENT} bytes"
            )
    if w1.dtype is not torch.bfloat16 and traced(w1):
        return f"PyTorch traces its grouped product for bfloat16 only, not for {w1.dtype}"
    return None


def default_block_size(
    backend: Backend, hidden_states: Tensor, experts: Experts, topk: int, num_experts: int
) -> int:
    """The block size that the sort is asked for, unless the caller names one."""
    if backend == "triton":
        device, tokens = hidden_states.device, hidden_states.shape[0]
        return triton_experts.block_size(device, tokens, topk, num_experts, experts.w1)
    on_cpu = hidden_states.device.type == "cpu"
    if backend == "grouped_mm" and on_cpu and hidden_states.dtype is torch.float32:
        return CPU_FLOAT_BLOCK
    return BLOCK_SIZES[backend]


def run_experts(
    hidden_states: Tensor,
    experts: Experts,
    buffers: SortedBuffers,
    topk: int,
    block_size: int,
    backend: Backend,
    *,
    all_routed: bool,
    weight_first: bool,
) -> Tensor:
    """Applies the experts to the sorted entries; returns the buffers' moe_buf [M, D].

    Args:
        hidden_states: [M, D].
        experts: the local experts.
        buffers: what a sort with `block_size` and `topk` slots per token returned.
        all_routed: every (token, slot) is known to have an entry: no mask, no `num_local_tokens`,
            and ids from our own top-k. Saves the launches that set absent entries apart.
        weight_first: multiply by the routing weight before bias1 and the activation, not at the end.
    """
    if backend == "triton":
        if experts.w1.shape[0] == 0:
            return buffers[4].zero_()
        if buffers[4].numel() == 0:
            return buffers[4]
        return triton_experts.run_triton(
            hidden_states, experts, buffers, topk, block_size,
            all_routed=all_routed, weight_first=weight_first,
        )  # fmt: skip
    kind = hidden_states.device.type
    arguments = (hidden_states, experts, buffers, topk, block_size, backend)
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _run_experts(*arguments, all_routed, weight_first)
    return _run_experts(*arguments, all_routed, weight_first)


def _run_experts(
    hidden_states: Tensor,
    experts: Experts,
    buffers: SortedBuffers,
    topk: int,
    block_size: int,
    backend: Backend,
    all_routed: bool,
    weight_first: bool,
) -> Tensor:
    sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = buffers
    tokens = hidden_states.shape[0]
    num_experts = experts.w1.shape[0]
    if num_experts == 0:
        return moe_buf.zero_()
    if not traced(sorted_ids) and tokens == 0:
        return moe_buf
    blocks = _most_blocks(sorted_ids, tokens * topk, block_size)
    rows = blocks * block_size
    complete = all_routed and block_size == 1
    entries = _first(sorted_ids, rows, block_size)
    token = entries & TOKEN_MASK
    slot = entries >> TOKEN_BITS
    if not complete or topk > SIGN_SLOT:
        slot = slot & 0xFF
    row_of_entry = torch.add(token, slot, alpha=tokens)
    block_experts = _first(sorted_expert_ids, blocks, block_size)
    if not complete:
        used = (torch.arange(rows, device=entries.device) < num_valid_ids[0]) & (slot < topk)
        token = torch.where(used, token, 0)
        row_of_entry = torch.where(used, row_of_entry, tokens * topk)
        block_used = used.view(blocks, block_size)[:, 0]
        block_experts = torch.where(block_used, block_experts, num_experts)
    weights = _first(sorted_weights, rows, block_size).unsqueeze(1)

    product = _Product(block_experts, block_size, num_experts, backend, complete)
    hidden = product(hidden_states.index_select(0, token), experts.w1)
    if weight_first:
        hidden = (hidden * weights).to(hidden_states.dtype)
    if experts.bias1 is not None:
        hidden = product.plus(hidden, experts.bias1)
    out = product(activate(hidden, experts), experts.w2)
    if experts.bias2 is not None:
        out = product.plus(out, experts.bias2)
    out = out.float() if weight_first else out * weights
    return _combine(out, row_of_entry, moe_buf, topk, complete)


def activate(hidden: Tensor, experts: Experts) -> Tensor:
    """The activation of hidden [R, N1], in its dtype; returns [R, inter]."""
    kind = experts.activation
    if not isinstance(kind, ActivationType):
        return _activated(kind(hidden), hidden, experts.w2.shape[2]).to(hidden.dtype)
    if hidden.shape[-1] == experts.w2.shape[2]:
        return F.silu(hidden) if kind == ActivationType.Silu else F.gelu(hidden)
    if experts.interleaved:
        gate, up = hidden[:, 0::2], hidden[:, 1::2]
    else:
        gate, up = hidden.chunk(2, dim=-1)
    if kind == ActivationType.Swiglu:
        gate = gate.clamp(max=experts.swiglu_limit)
        up = up.clamp(-experts.swiglu_limit, experts.swiglu_limit)
        gate = gate * torch.sigmoid(SWIGLU_ALPHA * gate)
        return torch.addcmul(gate, gate, up)
    return (F.silu(gate) if kind == ActivationType.Silu else F.gelu(gate)) * up


def _activated(made: Any, hidden: Tensor, inter: int) -> Tensor:
    """What the caller's activation made of the first product, if it can be multiplied by w2."""
    if not isinstance(made, Tensor):
        raise TypeError(
            f"activation: expected a function that returns a tensor, got {type(made).__name__}"
        )
    expected, got = (hidden.shape[0], inter), tuple(made.shape)
    if len(got) != 2 or got[1] != inter or (not traced(made) and got != expected):
        raise ValueError(
            f"activation: expected a function that makes {list(expected)} of"
            f" {list(hidden.shape)}, got {list(got)}"
        )
    return made


class _Product:
    """rows [R, X] of sorted entries times weight [E, Y, X] of each row's expert, transposed.

    `block_experts` int32 [blocks] ascends; rows of blocks with expert E come out undefined, and
    there are none if `complete`.
    """

    def __init__(
        self,
        block_experts: Tensor,
        block_size: int,
        num_experts: int,
        backend: Backend,
        complete: bool,
    ) -> None:
        self.backend = backend
        self.block_size = block_size
        self.known_experts = block_experts if complete else block_experts.clamp(max=num_experts - 1)
        if backend == "grouped_mm":
            every = torch.arange(num_experts, dtype=torch.int32, device=block_experts.device)
            ends = torch.searchsorted(block_experts, every, right=True, out_int32=True)
            self.ends = ends * block_size if block_size > 1 else ends

    def __call__(self, rows: Tensor, weight: Tensor) -> Tensor:
        if self.backend == "grouped_mm":
            # NOTE: rows behind the last end are left as they were allocated; nothing reads them.
            return F.grouped_mm(rows, weight.transpose(1, 2), offs=self.ends)
        return block_bmm(rows, weight, self.known_experts, self.block_size)

    def plus(self, values: Tensor, bias: Tensor) -> Tensor:
        """values [R, Y] + bias [E, Y] of each row's expert, in values' dtype; in place if it can."""
        picked = bias.index_select(0, self.known_experts).to(values.dtype)
        if self.block_size == 1:
            return values + picked if transformed() else values.add_(picked)
        blocks = values.view(picked.shape[0], self.block_size, picked.shape[1])
        sums = blocks + picked.unsqueeze(1) if transformed() else blocks.add_(picked.unsqueeze(1))
        return sums.view(values.shape[0], picked.shape[1])


def _most_blocks(sorted_ids: Tensor, entries: int, block_size: int) -> int:
    """The most blocks that M*K = `entries` can be in; no expert without an entry has one."""
    if block_size == 1:
        return entries  # NOTE: S is M*K + E - K then, and K is at most E.
    capacity = sorted_ids.shape[0] // block_size
    if not is_dynamo_compiling() and tracing_state() is not None:
        return capacity  # NOTE: torch.jit.trace would keep the smaller one of the call that it saw.
    if not traced(sorted_ids) or (type(capacity) is int and type(entries) is int):
        return min(capacity, entries)
    least: Any = torch.sym_min
    return cast(int, least(capacity, entries))


def _first(values: Tensor, count: int, block_size: int) -> Tensor:
    """values[:count]; see above for tracers."""
    if block_size == 1 or not traced(values):
        return values[:count]
    return values.index_select(0, torch.arange(count, device=values.device))


def _combine(
    out: Tensor, row_of_entry: Tensor, moe_buf: Tensor, topk: int, complete: bool
) -> Tensor:
    """Sums the entries of every token in float32 into moe_buf; absent entries count as 0.

    Args:
        out: float32 [R, D], weighted.
        row_of_entry: int32 [R], slot * M + token; K * M for rows that are no entry.
        complete: every one of the K * M rows has an entry.
    """
    tokens, model_dim = moe_buf.shape
    if complete:
        entries = out.new_empty((topk * tokens, model_dim))
    else:
        entries = out.new_zeros((topk * tokens + 1, model_dim))
    entries.index_copy_(0, row_of_entry.long(), out)
    total = entries[: topk * tokens].view(topk, tokens, model_dim).sum(dim=0)
    return total.to(moe_buf.dtype) if transformed() else moe_buf.copy_(total)


def _rows_aligned(weight: Tensor) -> bool:
    """One of the two inner dimensions is dense, and rows of the other start at multiples of 16 bytes.

    Under a tracer, an allocation is taken to start at one: there is no address yet.
    """
    size = weight.element_size()
    if not traced(weight) and weight.data_ptr() % ALIGNMENT:
        return False
    _, second, third = weight.stride()
    if third == 1:
        return second * size % ALIGNMENT == 0 and second >= weight.shape[2]
    return second == 1 and third * size % ALIGNMENT == 0 and third >= weight.shape[1]
