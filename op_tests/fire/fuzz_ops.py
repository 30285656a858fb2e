"""Which calls does the fuzzer make of the ops, and what may come of them?

Each call starts from valid arguments. Up to two of them are then replaced by something else: another
type, dtype, shape, stride, device or memory, an int from the edge of what ints are. There is no
model of which changes an op must refuse. An accepted call, changed or not, must give what
`aiter.reference` gives for the very arguments; a refused one must raise a ValueError or TypeError
that says what was expected and what came, and leave every output as it was; an unchanged one must
be accepted. Guards around all outputs must survive in any case.

Where the contract leaves a result open (a mask of other numbers than 0 and 1), the arguments are
`Unjudged` and only the guards are looked at.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from buffers import POISON, require
from cases import GATING_DTYPES, INF, LOGITS
from fuzz_changes import INTS, Arguments, changed
from fuzz_results import (
    FUSED_OUTPUTS,
    OPUS_OUTPUTS,
    Unjudged,
    check_fused,
    check_fused_topk,
    check_load,
    check_opus,
    check_routing,
    check_size,
    check_topk,
)
from targets import CPU_WAVES, Target
from torch import Tensor

import aiter
from aiter import fused_moe
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
POOL = 1 << 15


@dataclass
class Call:
    """One call of an op.

    Attributes:
        op: what is called.
        arguments: by name.
        check: compares the outputs with the reference, given the arguments and what was returned.
        raw: every output with the guards around it.
        changed: the arguments that were replaced.
    """

    op: Callable[..., Any]
    arguments: Arguments
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
                call.arguments[name] = changed(rng, given, name)
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

    # The ops.

    def _topk_softmax(self, rng: random.Random) -> Call:
        tokens, experts, topk, _ = _shape(rng)
        call = Call(aiter.topk_softmax, {}, check_topk)
        self._output(call, "topk_weights", (tokens, topk), torch.float32)
        self._output(call, "topk_indices", (tokens, topk), torch.int32)
        self._output(call, "token_expert_indices", (tokens, topk), torch.int32)
        call.arguments["gating_output"] = self._gating(rng, tokens, experts)
        call.arguments["need_renorm"] = rng.random() < 0.5
        return call

    def _fused(self, rng: random.Random) -> Call:
        tokens, experts, topk, block = shape = _shape(rng)
        call = Call(aiter.fused_topk_moe_sorting_fwd, {}, check_fused)
        call.arguments["gating_output"] = self._gating(rng, tokens, experts)
        self._sorted_outputs(call, FUSED_OUTPUTS, shape, rng)
        call.arguments.update(
            num_experts=experts,
            topk=topk,
            unit_size=block,
            need_renorm=rng.random() < 0.5,
            local_expert_mask=self._mask(rng, experts),
            num_local_tokens=self._count(rng, tokens),
        )
        return call

    def _moe_sorting_opus(self, rng: random.Random) -> Call:
        tokens, experts, topk, block = shape = _shape(rng)
        call = Call(aiter.moe_sorting_opus_fwd, {}, check_opus)
        kind = rng.choice(("distinct", "distinct", "any", "outside"))
        outside = (-1, experts, 2**31 - 1, -(2**31)) if kind == "outside" else ()
        choices = (*range(experts), *outside)
        rows = [
            rng.sample(choices, topk) if kind == "distinct" else rng.choices(choices, k=topk)
            for _ in range(tokens)
        ]
        ids = torch.tensor(rows, dtype=torch.int32).reshape(tokens, topk)
        weights = torch.tensor(
            [rng.random() for _ in range(tokens * topk)], dtype=torch.float32
        ).reshape(tokens, topk)
        call.arguments.update(topk_ids=ids.to(self.device), topk_weights=weights.to(self.device))
        self._sorted_outputs(call, OPUS_OUTPUTS, shape, rng)
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

    def _routing(self, rng: random.Random) -> Call:
        """The functions that allocate their outputs."""
        tokens, experts, topk, block = _shape(rng)
        gating = self._gating(rng, tokens, experts)
        if rng.random() < 0.3:
            call = Call(fused_moe.fused_topk, {}, check_fused_topk)
            call.arguments.update(
                hidden_states=torch.zeros(tokens, 3, device=self.device),
                gating_output=gating,
                topk=topk,
                renormalize=rng.random() < 0.5,
            )
            return call
        call = Call(fused_moe.topk_softmax_sorting, {}, check_routing)
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
        call = Call(expert_load, {}, check_load)
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
            call = Call(aiter.fused_topk_moe_sorting_max_tokens, {}, check_size)
            call.arguments.update(num_experts=rng.choice(numbers), topk=rng.choice(numbers))
        else:
            call = Call(aiter.moe_sorting_opus_get_workspace_size, {}, check_size)
            call.arguments.update(
                tokens=rng.choice(numbers),
                num_experts=rng.choice(numbers),
                topk=rng.choice(numbers),
                dispatch_policy=rng.choice((0, 1, 2, 3, -1)),
            )
        call.changed.update(call.arguments)  # any of them may be out of range
        call.arguments["device"] = self.device
        return call


def _shape(rng: random.Random) -> tuple[int, int, int, int]:
    """(M, E, K, B), mostly small."""
    tokens = rng.choice((0, 1, 1, 2, 3, 5, 8, 13, 31, 33, 65)[: rng.choice((4, 7, 9, 11))])
    experts = rng.choice(EXPERTS[: rng.choice((5, 9, 14, 17))])
    return tokens, experts, rng.randint(1, min(experts, 10)), rng.choice(BLOCKS)
