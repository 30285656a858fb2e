"""Which routing problems are tested? A :class:`Case` names one; :func:`make_inputs` builds it.

A case is small, printable and reproducible from its fields alone, so that a failure report is a
recipe. Inputs are drawn on the CPU and copied, so that every device sees the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

NAN = float("nan")
INF = float("inf")

# (E, K, D) of models that route with this op or could.
MODEL_SHAPES = {
    "gpt-oss-120b": (128, 4, 2880),
    "gpt-oss-20b": (32, 4, 2880),
    "Qwen3-235B": (128, 8, 4096),
    "Qwen3-30B": (128, 8, 2048),
    "Qwen3-Next": (512, 10, 2048),
    "Qwen3.5": (512, 10, 4096),
    "DeepSeek-V3": (256, 8, 7168),
    "Kimi-K2": (384, 8, 7168),
    "Kimi-K3": (896, 16, 3584),
    "GLM-4.x": (160, 8, 5120),
    "MiniMax-M2": (256, 8, 3072),
    "Mixtral": (8, 2, 4096),
    "Llama-4-Scout": (16, 1, 5120),
    "Llama-4-Maverick": (128, 1, 5120),
    "gpt-oss-120b+shared": (129, 5, 2880),
    "GLM-4.x+shared": (161, 9, 5120),
    "DeepSeek-V3+shared": (257, 9, 7168),
    "Kimi-K2+shared": (385, 9, 7168),
    "Qwen3.5+shared": (513, 11, 4096),
}

# (M, E, K) of decode batches that the fused launch must take on every device.
PARITY_SHAPES = (
    *((num_tokens, 128, 4) for num_tokens in (1, 7, 8, 32, 64)),
    *((num_tokens, 256, 8) for num_tokens in (1, 13, 16, 32, 60)),
)


@dataclass(frozen=True)
class Case:
    """One routing problem. ``logits``, ``layout`` and ``mask`` name entries of the tables below."""

    num_tokens: int
    num_experts: int
    topk: int
    dtype: torch.dtype = torch.float32
    need_renorm: bool = True
    block_size: int = 32
    model_dim: int = 5
    moebuf_dtype: torch.dtype = torch.bfloat16
    logits: str = "normal"
    layout: str = "dense"
    mask: str = "none"
    num_local: int | None = None
    moe_buf_offset: int = 0
    """Bytes from a 256-byte boundary to the start of ``moe_buf``."""
    slots_offset: int = 0
    """Bytes from a 256-byte boundary to the start of ``sorted_ids`` and ``sorted_weights``."""
    seed: int = 0

    @property
    def local_tokens(self) -> int:
        """``n``: the rows in use."""
        return self.num_tokens if self.num_local is None else self.num_local

    @property
    def capacity(self) -> int:
        """Length of ``sorted_ids`` and ``sorted_weights``."""
        return self.num_tokens * self.topk + self.num_experts * self.block_size - self.topk

    @property
    def max_blocks(self) -> int:
        """Length of ``sorted_expert_ids``."""
        return -(-self.capacity // self.block_size)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case on one device."""

    gating: Tensor
    mask: Tensor | None
    num_local_tokens: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The tensors that exist, under the ops' argument names."""
        tensors = {
            "gating_output": self.gating,
            "local_expert_mask": self.mask,
            "num_local_tokens": self.num_local_tokens,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def make_inputs(case: Case, device: str) -> Inputs:
    """Draw the logits, mask and local token count of ``case``."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    shape = (case.num_tokens, case.num_experts)
    logits = LOGITS[case.logits](shape, generator).to(case.dtype)
    if case.local_tokens < case.num_tokens:
        garbage = torch.tensor([NAN, INF, -INF, 1e4]).to(case.dtype)
        unused = logits[case.local_tokens :]
        unused.copy_(garbage[torch.randint(4, unused.shape, generator=generator)])
    mask = MASKS[case.mask](case.num_experts, generator)
    count = None if case.num_local is None else torch.tensor([case.num_local], dtype=torch.int32)
    return Inputs(
        LAYOUTS[case.layout](logits, device),
        None if mask is None else mask.to(device),
        None if count is None else count.to(device),
    )


Shape = tuple[int, int]


def _pick(values: list[float]) -> Callable[[Shape, torch.Generator], Tensor]:
    def draw(shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    return draw


def _normal(scale: float) -> Callable[[Shape, torch.Generator], Tensor]:
    return lambda shape, generator: torch.randn(shape, generator=generator) * scale


def _equal_rows(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn((shape[0], 1), generator=generator).repeat(1, shape[1])


def _few_finite(shape: Shape, generator: torch.Generator) -> Tensor:
    """Row r has r finite logits, modulo E, among NaN and -inf."""
    logits = _pick([NAN, -INF])(shape, generator)
    for row in range(shape[0]):
        chosen = torch.randperm(shape[1], generator=generator)[: row % shape[1]]
        logits[row, chosen] = torch.randn(len(chosen), generator=generator)
    return logits


def _infinite(shape: Shape, generator: torch.Generator) -> Tensor:
    """Row r has r entries of +inf, modulo E + 1, among finite ones, NaN and -inf."""
    logits = _pick([NAN, -INF, -1.0, 0.0, 2.5])(shape, generator)
    for row in range(shape[0]):
        logits[row, torch.randperm(shape[1], generator=generator)[: row % (shape[1] + 1)]] = INF
    return logits


def _every_kind(shape: Shape, generator: torch.Generator) -> Tensor:
    """Row r is of kind r modulo their number, so that rows that share a wave differ."""
    kinds = [draw for draw in LOGITS.values() if draw is not _every_kind]
    logits = torch.empty(shape)
    for first, draw in enumerate(kinds):
        rows = logits[first :: len(kinds)]
        rows.copy_(draw((len(rows), shape[1]), generator))
    return logits


LOGITS: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "normal": _normal(1.0),
    "wide": _normal(30.0),
    "ties": _pick([-2.0, -1.0, 0.0, 1.0, 2.0]),
    "equal": _equal_rows,
    "signed_zeros": _pick([0.0, -0.0]),
    "near_zero": _pick([0.0, -0.0, 1e-7, -1e-7]),
    "denormal": _normal(1e-39),
    "huge": _pick([3.3e38, -3.3e38, 3e38, 1e38, -1e38, 6e4, -6e4, 0.0]),
    "few_finite": _few_finite,
    "infinite": _infinite,
    "mixed": _pick([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0, -1.0, 88.0, -88.0, -104.0]),
    "unusable": _pick([NAN, -INF]),
    "all_nan": _pick([NAN]),
    "all_minus_inf": _pick([-INF]),
    "all_plus_inf": _pick([INF]),
    "every_kind": _every_kind,
}


def _dense(logits: Tensor, device: str) -> Tensor:
    return logits.to(device)


def _padded(logits: Tensor, device: str) -> Tensor:
    """Rows E + 3 apart from column 1 on; the gaps hold +inf, which would win if read."""
    num_tokens, num_experts = logits.shape
    base = torch.full((num_tokens, num_experts + 3), INF, dtype=logits.dtype)
    base[:, 1 : num_experts + 1] = logits
    return base.to(device)[:, 1 : num_experts + 1]


def _broadcast(logits: Tensor, device: str) -> Tensor:
    """All rows are the first one, at row stride 0."""
    return logits.to(device)[:1].expand(logits.shape)


def _sliding(logits: Tensor, device: str) -> Tensor:
    """Row r starts one element after row r - 1."""
    num_tokens, num_experts = logits.shape
    flat = logits.reshape(-1)[: num_tokens + num_experts - 1].to(device)
    if flat.numel() < num_tokens + num_experts - 1:
        return logits.to(device)
    return flat.as_strided((num_tokens, num_experts), (1, 1))


LAYOUTS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "dense": _dense,
    "padded": _padded,
    "broadcast": _broadcast,
    "sliding": _sliding,
}


def _mask_range(first: int, last: int) -> Callable[[int, torch.Generator], Tensor]:
    def draw(num_experts: int, generator: torch.Generator) -> Tensor:
        mask = torch.zeros(num_experts, dtype=torch.int32)
        mask[first % num_experts : last % num_experts + 1] = 1
        return mask

    return draw


MASKS: dict[str, Callable[[int, torch.Generator], Tensor | None]] = {
    "none": lambda num_experts, generator: None,
    "zeros": lambda num_experts, generator: torch.zeros(num_experts, dtype=torch.int32),
    "ones": lambda num_experts, generator: torch.ones(num_experts, dtype=torch.int32),
    "first": _mask_range(0, 0),
    "last": _mask_range(-1, -1),
    "all_but_first": _mask_range(1, -1),
    "random": lambda num_experts, generator: torch.randint(
        2, (num_experts,), generator=generator, dtype=torch.int32
    ),
}
