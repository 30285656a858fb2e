"""Which calls does the fuzzer make of the ops, and what may come of them?

Each call starts from valid arguments. Up to two of them are then replaced by something else: another
type, dtype, shape, stride, device or memory, an int from the edge of what ints are. There is no
model of which changes an op must refuse. An accepted call, changed or not, must give what
`aiter.reference` gives for the very arguments; a refused one must raise a ValueError or TypeError
that says what was expected and what came, and leave every output as it was; an unchanged one must
be accepted. Guards around all outputs must survive in any case.

Where the contract leaves a result open (ids that repeat in a row, a mask of other numbers than 0
and 1), the arguments are `Unjudged` and only the guards are looked at.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from buffers import POISON, require
from cases import GATING_DTYPES, INF, LOGITS
from checks import check_equal, check_sorted, check_weights
from targets import CPU_WAVES, Target
from torch import Tensor

import aiter
from aiter import fused_moe, reference
from aiter.jit.errors import TargetError
from aiter.ops.expert_load import expert_load

MODULES = (
    "module_fused_topk_moe_sorting",
    "module_topk_softmax",
    "module_moe_sorting_opus",
    "module_expert_load",
)

GUARD = 128
EXPERTS = (1, 2, 3, 4, 8, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 257)
BLOCKS = (1, 2, 3, 4, 7, 16, 32, 64)
DIMS = (0, 1, 2, 3, 5, 7, 8, 17, 64)
BUF_DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.float64, torch.complex64)
INTS = (0, -1, 1, 2, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30)
NOT_INTS = (None, 1.5, "4", [3], True, float("nan"), b"1", object())
NOT_TENSORS = (None, 0, 1.0, "tensor", [1, 2], (3,), object(), torch.float32, bytearray(64))
POOL = 1 << 15

Arguments = dict[str, Any]


class Unjudged(Exception):
    """The contract says nothing about the result for these arguments."""


@dataclass
class Call:
    """One call of an op.

    Attributes:
        op: what is called.
        arguments: by name.
        outputs: the names of those that the op writes.
        check: compares the outputs with the reference, given the arguments and what was returned.
        raw: every output with the guards around it.
        changed: the arguments that were replaced.
    """

    op: Callable[..., Any]
    arguments: Arguments
    outputs: tuple[str, ...]
    check: Callable[[Arguments, Any], None]
    raw: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


class Ops:
    """Draws calls and judges them.

    Args:
        device: where the tensors are.
        exact: whether outputs are allocated one by one, for a sanitizer, in place of guarded ones.
    """

    def __init__(self, device: str, exact: bool) -> None:
        torch.set_num_threads(1)  # small tensors, and the speed is stated for one core
        self.device = device
        self.exact = exact
        self.targets = [Target("cpu", wave) for wave in CPU_WAVES]
        if device != "cpu":
            self.targets = [Target(device)]
        generator = torch.Generator().manual_seed(0)
        self.logits = [draw((POOL, 1), generator).reshape(-1) for draw in LOGITS.values()]

    def judge(self, kind: str) -> Callable[[random.Random], str]:
        """The judge of an op, by its name."""
        make = {
            "sizes": self._sizes,
            "expert_load": self._expert_load,
            "topk_softmax": self._topk_softmax,
            "moe_sorting_opus": self._moe_sorting_opus,
            "fused_topk_moe_sorting": self._fused,
            "routing": self._routing,
        }[kind]

        def judge(rng: random.Random) -> str:
            call = make(rng)
            # What is no device, torch.device refuses in its own words.
            names = [name for name in call.arguments if name != "device"]
            chosen = rng.sample(names, min(len(names), rng.choice((0, 0, 0, 1, 1, 1, 1, 2))))
            call.changed.update(chosen)
            given = dict(call.arguments)
            for name in chosen:
                call.arguments[name] = _changed(rng, given, name)
            return self._run(call, rng.choice(self.targets))

        return judge

    def _run(self, call: Call, target: Target) -> str:
        try:
            with target.active():
                returned = call.op(**call.arguments)
            target.synchronize()
        except (ValueError, TypeError, TargetError) as error:
            text = str(error)
            require("expected" in text and "got" in text, f"not a sentence with values: {text}")
            require(bool(call.changed), f"a valid call was refused: {text}")
            for name, raw in call.raw.items():
                require(
                    bool((raw == POISON).all()), f"{name} was written by a refused call: {text}"
                )
            return type(error).__name__
        for name, raw in call.raw.items():
            guards = raw if self.exact else torch.cat((raw[:GUARD], raw[-GUARD:]))
            require(self.exact or bool((guards == POISON).all()), f"written outside of {name}")
        if "moe_buf" in call.changed:  # its other rows hold what they held
            call.arguments["moe_buf_was_poison"] = False
        try:
            call.check(call.arguments, returned)
        except Unjudged:
            return "accepted, unjudged"
        return "accepted"

    # Arguments.

    def _output(self, call: Call, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Adds a poisoned output to the call, between guards."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        guard = 0 if self.exact else GUARD
        raw = torch.full((size + 2 * guard,), POISON, dtype=torch.uint8, device=self.device)
        call.raw[name] = raw
        call.arguments[name] = raw[guard : guard + size].view(dtype).view(tuple(shape))

    def _gating(self, rng: random.Random, tokens: int, experts: int) -> Tensor:
        """Logits of any kind, dtype and layout."""
        count = tokens * experts
        start = rng.randrange(POOL - count)
        dtype = rng.choice(GATING_DTYPES)
        logits = rng.choice(self.logits)[start : start + count].reshape(tokens, experts).to(dtype)
        if rng.random() < 0.3:
            wide = torch.full((tokens, experts + 3), INF, dtype=dtype)
            wide[:, 1 : experts + 1] = logits
            return wide.to(self.device)[:, 1 : experts + 1]
        if rng.random() < 0.1 and tokens:
            return logits[:1].to(self.device).expand(tokens, experts)
        return logits.to(self.device, copy=True)

    def _mask(self, rng: random.Random, experts: int) -> Tensor | None:
        if rng.random() < 0.6:
            return None
        values = rng.choices((0, 1), k=experts)
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _count(self, rng: random.Random, tokens: int) -> Tensor | None:
        if rng.random() < 0.6:
            return None
        return torch.tensor([rng.randint(0, tokens)], dtype=torch.int32, device=self.device)

    def _sorted_outputs(
        self, call: Call, names: Sequence[str], shape: tuple[int, int, int, int], rng: random.Random
    ) -> None:
        """Adds the five outputs of a sort for (M, E, K, B)."""
        tokens, experts, topk, block = shape
        slots = tokens * topk + experts * block - topk
        spare = rng.choice((0, 0, 0, 5))
        self._output(call, names[0], (slots + spare,), torch.int32)
        self._output(call, names[1], (slots + spare,), torch.float32)
        self._output(call, names[2], (-(-slots // block) + spare,), torch.int32)
        self._output(call, names[3], (2,), torch.int32)
        self._output(call, names[4], (tokens, rng.choice(DIMS)), rng.choice(BUF_DTYPES))
        call.outputs = tuple(names)

    # The ops.

    def _topk_softmax(self, rng: random.Random) -> Call:
        tokens, experts, topk, _ = _shape(rng)
        call = Call(aiter.topk_softmax, {}, (), self._check_topk)
        self._output(call, "topk_weights", (tokens, topk), torch.float32)
        self._output(call, "topk_indices", (tokens, topk), torch.int32)
        self._output(call, "token_expert_indices", (tokens, topk), torch.int32)
        call.arguments["gating_output"] = self._gating(rng, tokens, experts)
        call.arguments["need_renorm"] = rng.random() < 0.5
        return call

    def _check_topk(self, arguments: Arguments, returned: object) -> None:
        require(returned is None, f"returned {returned!r}")
        ids, gating = arguments["topk_indices"].cpu(), arguments["gating_output"].detach().cpu()
        want_weights, want_ids = reference.topk_softmax(
            gating, ids.shape[1], arguments["need_renorm"]
        )
        check_equal("topk_indices", ids, want_ids)
        check_weights("topk_weights", arguments["topk_weights"], want_weights)
        rows = torch.arange(ids.shape[0], dtype=torch.int32)[:, None]
        slots = torch.arange(ids.shape[1], dtype=torch.int32)[None, :]
        check_equal(
            "token_expert_indices", arguments["token_expert_indices"], slots * ids.shape[0] + rows
        )

    def _fused(self, rng: random.Random) -> Call:
        tokens, experts, topk, block = shape = _shape(rng)
        call = Call(aiter.fused_topk_moe_sorting_fwd, {}, (), lambda a, r: self._check_fused(a, r))
        call.arguments["gating_output"] = self._gating(rng, tokens, experts)
        self._sorted_outputs(call, _FUSED_OUTPUTS, shape, rng)
        call.arguments.update(
            num_experts=experts,
            topk=topk,
            unit_size=block,
            need_renorm=rng.random() < 0.5,
            local_expert_mask=self._mask(rng, experts),
            num_local_tokens=self._count(rng, tokens),
        )
        return call

    def _check_fused(self, arguments: Arguments, returned: object) -> None:
        require(returned is None, f"returned {returned!r}")
        gating = arguments["gating_output"].detach().cpu()
        topk = operator.index(arguments["topk"])
        weights, ids = reference.topk_softmax(gating, topk, arguments["need_renorm"])
        outputs = [arguments[name] for name in _FUSED_OUTPUTS]
        _check_sort(outputs, ids, weights, arguments)

    def _moe_sorting_opus(self, rng: random.Random) -> Call:
        tokens, experts, topk, block = shape = _shape(rng)
        call = Call(aiter.moe_sorting_opus_fwd, {}, (), self._check_opus)
        rows = [rng.sample(range(experts), topk) for _ in range(tokens)]
        ids = torch.tensor(rows, dtype=torch.int32).reshape(tokens, topk)
        weights = torch.tensor(
            [rng.random() for _ in range(tokens * topk)], dtype=torch.float32
        ).reshape(tokens, topk)
        call.arguments.update(topk_ids=ids.to(self.device), topk_weights=weights.to(self.device))
        self._sorted_outputs(call, _OPUS_OUTPUTS, shape, rng)
        policy = rng.choice((0, 1, 2))
        size = aiter.moe_sorting_opus_get_workspace_size(tokens, experts, topk, policy)
        if size or rng.random() < 0.1:
            self._output(call, "workspace", (size + rng.choice((0, 0, 4)),), torch.uint8)
        call.arguments.update(
            num_experts=experts,
            unit_size=block,
            local_expert_mask=self._mask(rng, experts),
            num_local_tokens=self._count(rng, tokens),
            dispatch_policy=policy,
        )
        return call

    def _check_opus(self, arguments: Arguments, returned: object) -> None:
        require(returned is None, f"returned {returned!r}")
        ids, weights = arguments["topk_ids"].cpu(), arguments["topk_weights"].detach().cpu()
        outputs = [arguments[name] for name in _OPUS_OUTPUTS]
        _check_sort(outputs, ids, weights, arguments)

    def _routing(self, rng: random.Random) -> Call:
        """The functions that allocate their outputs."""
        tokens, experts, topk, block = _shape(rng)
        gating = self._gating(rng, tokens, experts)
        if rng.random() < 0.3:
            call = Call(fused_moe.fused_topk, {}, (), _check_fused_topk)
            call.arguments.update(
                hidden_states=torch.zeros(tokens, 3, device=self.device),
                gating_output=gating,
                topk=topk,
                renormalize=rng.random() < 0.5,
            )
            return call
        call = Call(fused_moe.topk_softmax_sorting, {}, (), _check_routing)
        call.arguments.update(
            gating_output=gating,
            topk=topk,
            num_experts=experts,
            model_dim=rng.choice(DIMS),
            moebuf_dtype=rng.choice(BUF_DTYPES),
            need_renorm=rng.random() < 0.5,
            block_size=block,
            expert_mask=self._mask(rng, experts),
            num_local_tokens=self._count(rng, tokens),
            dispatch_policy=rng.choice((0, 1, 2)),
        )
        return call

    def _expert_load(self, rng: random.Random) -> Call:
        tokens, experts, topk, _ = _shape(rng)
        call = Call(expert_load, {}, (), _check_load)
        values = rng.choices((*range(experts), -1, experts, 2**31 - 1, -(2**31)), k=tokens * topk)
        ids = torch.tensor(values, dtype=torch.int32).reshape(tokens, topk)
        call.arguments["topk_ids"] = ids.to(self.device)
        self._output(call, "load", (experts,), torch.int32)
        return call

    def _sizes(self, rng: random.Random) -> Call:
        """The questions about sizes, with ints from anywhere."""
        numbers = (1, 2, 7, 64, 128, 255, 256, 4096)
        if rng.random() < 0.5:
            numbers += (0, 65535, 65536, *INTS)
        if rng.random() < 0.5:
            call = Call(aiter.fused_topk_moe_sorting_max_tokens, {}, (), _check_size)
            call.arguments.update(num_experts=rng.choice(numbers), topk=rng.choice(numbers))
        else:
            call = Call(aiter.moe_sorting_opus_get_workspace_size, {}, (), _check_size)
            call.arguments.update(
                tokens=rng.choice(numbers),
                num_experts=rng.choice(numbers),
                topk=rng.choice(numbers),
                dispatch_policy=rng.choice((0, 1, 2, 3, -1)),
            )
        call.changed.update(call.arguments)  # any of them may be out of range
        call.arguments["device"] = self.device
        return call


_FUSED_OUTPUTS = (
    "sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf",
)  # fmt: skip
_OPUS_OUTPUTS = ("sorted_token_ids", *_FUSED_OUTPUTS[1:])


def _shape(rng: random.Random) -> tuple[int, int, int, int]:
    """(M, E, K, B), mostly small."""
    tokens = rng.choice((0, 1, 1, 2, 3, 5, 8, 13, 31, 33, 65)[: rng.choice((4, 7, 9, 11))])
    experts = rng.choice(EXPERTS[: rng.choice((5, 9, 14, 17))])
    return tokens, experts, rng.randint(1, min(experts, 10)), rng.choice(BLOCKS)


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
    used = ids[:local]
    ordered = used.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any() | (used < 0).any() | (used >= experts).any()):
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


def _check_routing(arguments: Arguments, returned: Any) -> None:
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


def _check_fused_topk(arguments: Arguments, returned: Any) -> None:
    gating = arguments["gating_output"].detach().cpu()
    topk = operator.index(arguments["topk"])
    want_weights, want_ids = reference.topk_softmax(gating, topk, arguments["renormalize"])
    check_weights("weights", returned[0], want_weights)
    check_equal("ids", returned[1], want_ids)


def _check_load(arguments: Arguments, returned: object) -> None:
    require(returned is None, f"returned {returned!r}")
    ids, load = arguments["topk_ids"].cpu().reshape(-1), arguments["load"].cpu()
    inside = ids[(ids >= 0) & (ids < len(load))].long()
    check_equal("load", load, torch.bincount(inside, minlength=len(load)).to(torch.int32))


def _check_size(arguments: Arguments, returned: object) -> None:
    require(
        type(returned) is int and 0 <= returned < 2**40,
        f"expected a size in bytes, got {returned!r}",
    )


def _changed(rng: random.Random, arguments: Arguments, name: str) -> Any:
    """Something else in place of an argument."""
    value = arguments[name]
    if isinstance(value, bool):
        return rng.choice((None, 0, 1, "yes", 1.0, not value, torch.tensor(True)))
    if isinstance(value, int):
        if rng.random() < 0.3:
            return rng.choice(NOT_INTS)
        return rng.choice(
            (value + 1, value - 1, -value, torch.tensor(min(value, 9)), *_edges(name))
        )
    if isinstance(value, Tensor):
        if rng.random() < 0.15:
            return rng.choice(NOT_TENSORS)
        return rng.choice(_TENSOR_CHANGES)(rng, value, arguments)
    if isinstance(value, torch.dtype):
        return rng.choice((None, "float32", 4, torch.float16, torch.int8))
    if value is None:
        return rng.choice((0, "none", [], torch.zeros(3, dtype=torch.int32), torch.zeros(1)))
    raise TypeError(f"no change for {name} = {value!r}")


def _edges(name: str) -> tuple[int, ...]:
    # NOTE: where the op allocates what an int asks for, it is not asked for gigabytes.
    return tuple(i for i in INTS if i < 8 or i >= 2**31) if name in _ALLOCATING else INTS


_ALLOCATING = ("block_size", "model_dim", "topk", "num_experts")


def _other_device(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    return tensor.to("meta")


def _other_dtype(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    dtypes = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16,
              torch.bool, torch.complex64, torch.uint8, torch.bfloat16)  # fmt: skip
    return tensor.to(rng.choice(dtypes))


def _same_bits(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """The same memory under another dtype of the same size."""
    kinds = {4: (torch.int32, torch.float32), 2: (torch.float16, torch.bfloat16, torch.int16)}
    return tensor.view(rng.choice(kinds.get(tensor.dtype.itemsize, (tensor.dtype,))))


def _other_rank(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    which = rng.randrange(4)
    if which == 0:
        return tensor[None]
    if which == 1:
        return tensor.reshape(-1)
    if which == 2:
        return tensor.reshape((1,) * rng.choice((9, 30)) + tuple(tensor.shape))
    return tensor.reshape(-1)[:1].reshape(()) if tensor.numel() else tensor[None]


def _other_size(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        return tensor.new_zeros((3,))
    which = rng.randrange(4)
    if which == 0:
        return tensor[..., :-1]
    if which == 1:
        return tensor[:-1] if tensor.shape[0] else tensor
    if which == 2:
        return torch.cat((tensor, tensor))
    return tensor[..., :0]


def _spread(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """The same shape over other memory, with gaps or with the axes' order changed."""
    if rng.random() < 0.5 or tensor.dim() < 2:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.t().contiguous().t()


def _expanded(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """One item or row for all, or for very many."""
    if tensor.numel() == 0:
        return tensor
    if rng.random() < 0.5 or tensor.dim() != 2:
        return tensor.reshape(-1)[:1].expand(tensor.numel()).reshape(tensor.shape)
    return tensor[:1].expand(rng.choice((2**24, 2**31, 2**40)), tensor.shape[1])


def _overlapping(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Another argument's memory, or rows that overlap each other."""
    others = [t for t in arguments.values() if isinstance(t, Tensor) and t.numel()]
    if rng.random() < 0.3 and tensor.dim() == 2 and tensor.is_contiguous():
        return tensor.as_strided(tensor.shape, (1, 1), tensor.storage_offset())
    other = rng.choice(others) if others else tensor
    shift = rng.choice((0, 0, 1))
    if other.dtype == tensor.dtype and other.numel() >= tensor.numel() + shift:
        return other.reshape(-1)[shift : shift + tensor.numel()].reshape(tensor.shape)
    return other


def _misaligned(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """The same values, one byte past where they may lie."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or not tensor.is_contiguous():
        return tensor
    memory = torch.zeros(tensor.numel() * tensor.dtype.itemsize + 1, dtype=torch.uint8)
    moved = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1, count=tensor.numel())
    return moved.reshape(tensor.shape).copy_(tensor)


def _emptied(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """A tensor whose memory was given back, as sharding does with parameters."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def _odd_kind(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Any:
    """Things that are nearly tensors."""
    which = rng.randrange(3)
    if which == 0:
        return tensor.cpu().float().numpy()
    if which == 1 and tensor.is_floating_point():
        return torch.nn.Parameter(tensor)
    return tensor.to_sparse() if tensor.dim() else tensor


def _other_values(rng: random.Random, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Values from anywhere, where the op has to read them."""
    if tensor.dtype == torch.int32:
        values = rng.choices((0, 1, 2, -1, 5, 2**31 - 1, -(2**31)), k=tensor.numel())
        return torch.tensor(values, dtype=torch.int32, device=tensor.device).reshape(tensor.shape)
    return tensor


_TENSOR_CHANGES = (
    _other_device, _other_dtype, _same_bits, _other_rank, _other_size, _spread, _expanded,
    _overlapping, _misaligned, _emptied, _odd_kind, _other_values,
)  # fmt: skip
