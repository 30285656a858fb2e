"""Does the launch from hidden states route by the contract's logits, to the bit?

`reference.router_logits` is judged first: against float64, and its fused multiply-add against exact
fractions. Everything else is then compared with it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from bad_input import Bad, check_refused, computed, constant, replaced, spread
from buffers import GuardedBuffer
from cases import GATING_DTYPES, INF, MASKS, NAN, Case
from checks import check_same_bits
from router_calls import check_logits, make_router, run_router
from rule_cases import MODELS, check_routing, num_logits, random_bias
from runners import SortedOutputs
from script import parse_options, run_script
from targets import Target
from torch import Tensor

from aiter import fused_moe, reference
from aiter.ops.fused_router_sorting import fused_router_sorting_fwd, router_product
from aiter.reference import router as plain
from aiter.routing import dispatch

BASE = Case(5, 24, 4, torch.bfloat16, block_size=8)
CASES = (
    BASE,
    replace(BASE, num_tokens=1),
    replace(BASE, num_tokens=1, mask="random"),
    replace(BASE, num_tokens=0),
    replace(BASE, num_tokens=33, num_local=20),
    replace(BASE, num_local=0),
    replace(BASE, num_tokens=64, num_experts=128, block_size=32),
    replace(BASE, dtype=torch.float32, need_renorm=False, num_experts=7, topk=7, mask="random"),
    replace(BASE, dtype=torch.float16, num_experts=260, topk=9, num_tokens=3),
    replace(BASE, num_experts=1030, topk=40, num_tokens=2),
    replace(BASE, num_experts=1, topk=1, model_dim=7, moe_buf_offset=2),
    replace(BASE, layout="padded", logits="mixed", model_dim=300),
    replace(BASE, layout="broadcast", dtype=torch.float16),
    replace(BASE, layout="sliding", num_tokens=9),
)
WIDTHS = (1, 7, 8, 9, 136, 1023, 1024, 1031, 2880)
TOKENS = (1, 2, 3, 16, 17, 64, 200)


def drawn(
    tokens: int, experts: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Hidden states [tokens, width] of several magnitudes, and a weight [experts, width]."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(tokens, width, generator=generator))
    hidden = torch.randn(tokens, width, generator=generator) * scale
    weight = torch.randn(experts, width, generator=generator) / width**0.5
    return hidden.to(dtype), weight.to(dtype)


def route(target: Target, hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """`router_topk_sorting` with K = 4, blocks of 8 and 16 columns of moe_buf; then the logits."""
    hidden, weight = hidden.to(target.device), weight.to(target.device)
    logits = torch.empty(len(hidden), len(weight), device=target.device)
    with target.active():
        out = fused_moe.router_topk_sorting(
            hidden, weight, 4, len(weight), 16, torch.bfloat16, block_size=8, logits_out=logits,
            **options,
        )  # fmt: skip
    target.synchronize()
    return (*out, logits)


def exact(number: float) -> Fraction:
    return Fraction.from_float(number)


def nearest_f32(number: Fraction) -> float:
    """Rounded to float32, ties to even: from the two neighbours of what float64 makes of it."""
    guess = torch.tensor(float(number)).item()
    close = [guess]
    for direction in (INF, -INF):
        close.append(torch.nextafter(torch.tensor(guess), torch.tensor(direction)).item())
    least = min(abs(exact(x) - number) for x in close)
    best = [x for x in close if abs(exact(x) - number) == least]
    even = [x for x in best if torch.tensor(x).view(torch.int32).item() % 2 == 0]
    return (even or best)[0]


def test_the_multiply_add_of_the_reference_rounds_once() -> None:
    """Also where a sum in float64 is rounded to the middle between two float32."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 4000, generator=generator)
    z[::2] *= torch.exp2(torch.randint(-40, 40, (2000,), generator=generator).float())
    # Products of 2^-24 (1 - 2^-46) and 2^-24 (1 + 2^-36), and what they are a middle's distance from.
    x[:4] = 2.0**-24 * torch.tensor([1 + 2.0**-23, 1 + 2.0**-12, -1 - 2.0**-23, -1 - 2.0**-12])
    y[:4] = torch.tensor([1 - 2.0**-23, 1 - 4095 * 2.0**-24]).repeat(2)
    z[:4] = torch.tensor([1 + 2.0**-23, 1.0, -1 - 2.0**-23, -1.0])
    x[5:40] *= 2.0**-75  # subnormal results
    y[5:40] *= 2.0**-66
    z[5:40] *= 2.0**-140
    got = plain._fma(x.double(), y.double(), z)
    wanted = [
        nearest_f32(exact(a) * exact(b) + exact(c))
        for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    assert torch.equal(got, torch.tensor(wanted))
    twice = (x.double() * y.double() + z.double()).float()
    assert torch.all(twice[:4] != got[:4])  # or the numbers show nothing


@pytest.mark.parametrize("width", WIDTHS)
def test_the_reference_is_near_float64(width: int) -> None:
    """Within the bound of the sum: a rounding for each item of a partial sum, and of the tree."""
    hidden, weight = drawn(7, 5, width, torch.float32)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(1))
    got = reference.router_logits(hidden, weight, bias).double()
    wide = hidden.double() @ weight.double().T + bias.double()
    size = hidden.double().abs() @ weight.double().abs().T + bias.double().abs()
    roundings = 8 * -(-width // 1024) + 8
    assert torch.all((got - wide).abs() <= roundings * 2.0**-24 * 1.01 * size)


@pytest.mark.parametrize("workgroups", [None, 1, 3, 40, 1024])
def test_cases(target: Target, workgroups: int | None) -> None:
    for case in CASES:
        run_router(case, target, workgroups)


@pytest.mark.parametrize("dtype", GATING_DTYPES)
def test_widths(target: Target, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        run_router(replace(BASE, dtype=dtype, num_experts=9), target, 2, width)
        run_router(replace(BASE, dtype=dtype, num_tokens=1), target, 40, width)


def test_masks(target: Target) -> None:
    for mask in MASKS:
        run_router(replace(BASE, mask=mask, num_local=4), target, 5)


@pytest.mark.parametrize("hidden_dtype", GATING_DTYPES)
@pytest.mark.parametrize("weight_dtype", GATING_DTYPES)
def test_kinds(target: Target, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Any of three for each of hidden states, weight and bias; the same numbers, the same bits."""
    hidden, weight = drawn(6, 10, 1040, torch.bfloat16)
    hidden = hidden.clamp(-60, 60)
    for bias_dtype in GATING_DTYPES:
        bias = torch.randn(10, generator=torch.Generator().manual_seed(2)).to(bias_dtype)
        wanted = reference.router_logits(hidden.to(hidden_dtype), weight.to(weight_dtype), bias)
        *_, got = route(
            target, hidden.to(hidden_dtype), weight.to(weight_dtype),
            router_bias=bias.to(target.device),
        )  # fmt: skip
        check_logits("logits", got, wanted)


@pytest.mark.parametrize("dtype", GATING_DTYPES)
def test_rows_anywhere(target: Target, dtype: torch.dtype) -> None:
    """Row strides and addresses on no boundary, of hidden states, of the weight and of logits_out."""
    hidden, weight = drawn(5, 6, 1048, dtype)
    wanted = reference.router_logits(hidden, weight)
    for offset, gap in ((0, 8), (8, 0), (1, 7), (3, 0), (0, 1)):

        def moved(rows: Tensor, offset: int = offset, gap: int = gap) -> Tensor:
            room = torch.full((len(rows), rows.shape[1] + offset + gap), NAN, dtype=rows.dtype)
            room[:, offset : offset + rows.shape[1]] = rows
            return room.to(target.device)[:, offset : offset + rows.shape[1]]

        logits = torch.full((5, 9), NAN, device=target.device)
        with target.active():
            fused_moe.router_topk_sorting(
                moved(hidden), moved(weight), 2, 6, 4, dtype, logits_out=logits[:, 2:8]
            )
        target.synchronize()
        check_logits(f"logits at {offset} + {gap}", logits[:, 2:8], wanted)
        assert logits[:, [0, 1, 8]].isnan().all()


def test_bits_do_not_depend_on_the_number_of_rows(target: Target) -> None:
    """Nor on where among others a row stands, nor on whether it is routed in the same launch."""
    hidden, weight = drawn(max(TOKENS), 24, 1500)
    wanted = reference.router_logits(hidden, weight)
    for tokens in TOKENS:
        *sorted_buffers, logits = route(target, hidden[:tokens], weight, batch_invariant=True)
        path = fused_moe.last_path()
        assert path == ("router" if tokens <= dispatch.MOST_ROUTER_TOKENS else "fused")
        check_logits(f"logits of {tokens}", logits, wanted[:tokens])
        expected = reference.topk_routing_sorting(
            wanted[:tokens], 4, 24, 16, torch.bfloat16, block_size=8
        )
        slots = int(expected[3][0])
        assert torch.equal(sorted_buffers[0][:slots].cpu(), expected[0][:slots])
    *_, last = route(target, hidden[-3:], weight)
    check_logits("logits of the last rows", last, wanted[-3:])
    for policy in (1, 2):
        *_, chained = route(target, hidden[:17], weight, dispatch_policy=policy)
        assert fused_moe.last_path() == ("oneshot" if policy == 1 else "multiphase")
        check_logits(f"logits under policy {policy}", chained, wanted[:17])


def test_beyond_the_product_is_pytorchs(target: Target) -> None:
    hidden, weight = drawn(dispatch.MOST_ROUTER_TOKENS + 1, 24, 300, torch.float32)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3)).bfloat16()
    *sorted_buffers, logits = route(target, hidden, weight, router_bias=bias.to(target.device))
    assert fused_moe.last_path() == "fused"
    # NOTE: float32 on all sides, so this holds what PyTorch's float32 product holds.
    wide = hidden.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(logits.cpu().double(), wide, rtol=1e-4, atol=1e-4)
    expected = reference.topk_routing_sorting(logits.cpu(), 4, 24, 16, torch.bfloat16, block_size=8)
    slots = int(expected[3][0])
    assert torch.equal(sorted_buffers[0][:slots].cpu(), expected[0][:slots])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_row(target: Target, value: float) -> None:
    """A row with one is what its logits make it; its neighbours in a tile do not see it."""
    hidden, weight = drawn(9, 24, 1100)
    for at in (0, 700, 1099):
        spoilt = hidden.clone()
        spoilt[4, at] = value
        wanted = reference.router_logits(spoilt, weight)
        assert not wanted[4].isfinite().any()
        *sorted_buffers, logits = route(target, spoilt, weight)
        check_logits("logits", logits, wanted)
        clean = torch.arange(9) != 4
        check_logits(
            "other rows", logits.cpu()[clean], reference.router_logits(hidden[clean], weight)
        )
        expected = reference.topk_routing_sorting(wanted, 4, 24, 16, torch.bfloat16, block_size=8)
        slots = int(expected[3][0])
        assert torch.equal(sorted_buffers[0][:slots].cpu(), expected[0][:slots])


@pytest.mark.parametrize("model", MODELS)
def test_every_rule(target: Target, model: str) -> None:
    """Against the reference's choice, and to the bit against the routing of the same logits."""
    rule, experts, topk, has_bias = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    width = num_logits(rule, experts)
    hidden, weight = drawn(9, width, 264)
    hidden, weight = hidden.clamp(-4, 4).to(target.device), weight.to(target.device)
    bias = random_bias(experts + rule.num_zero_experts, generator) if has_bias else None
    bias = None if bias is None else bias.to(target.device)
    slots = topk + rule.num_shared_experts
    sizes = (topk, experts + rule.num_shared_experts, 16, torch.float16)
    logits = torch.empty(9, width, device=target.device)
    for id_format in ("slot", "flat"):
        chosen = []
        for _ in range(2):
            weights = torch.empty(9, slots + 1, device=target.device)[:, :slots]
            chosen.append((weights, torch.empty(9, slots, dtype=torch.int32, device=target.device)))
        options: dict[str, Any] = {"rule": rule, "correction_bias": bias, "id_format": id_format}
        with target.active():
            got = fused_moe.router_topk_sorting(
                hidden, weight, *sizes, logits_out=logits, topk_out=chosen[0], **options
            )
            assert fused_moe.last_path() == "router"
            wanted = fused_moe.topk_routing_sorting(logits, *sizes, topk_out=chosen[1], **options)
        target.synchronize()
        check_logits("logits", logits, reference.router_logits(hidden.cpu(), weight.cpu()))
        check_same_bits(got, wanted, 32)
        for one, other in zip(*chosen, strict=True):
            assert torch.equal(one, other)
        cpu = (chosen[0][0].cpu(), chosen[0][1].cpu())
        check_routing(cpu, logits.cpu(), rule, None if bias is None else bias.cpu())


def test_the_outputs_given_are_returned(target: Target) -> None:
    hidden, weight = drawn(6, 24, 64)
    hidden, weight = hidden.to(target.device), weight.to(target.device)
    sizes = (24, 16, torch.bfloat16, 8)
    out = fused_moe.empty_sorted_buffers(6, 4, *sizes, device=target.device)
    logits = torch.empty(6, 24, device=target.device)
    versions = [tensor._version for tensor in (*out, logits)]
    with target.active():
        got = fused_moe.router_topk_sorting(
            hidden, weight, 4, *sizes[:3], block_size=8, out=out, logits_out=logits
        )
    assert got is out
    assert [tensor._version for tensor in (*out, logits)] == [v + 1 for v in versions]


def test_dispatch() -> None:
    choose, automatic = dispatch.choose_router, dispatch.AUTOMATIC
    most = dispatch.MOST_ROUTER_TOKENS
    assert choose(most, automatic, 1000) and not choose(most + 1, automatic, 1000)
    assert choose(10, automatic, 10) and not choose(11, automatic, 10)
    assert not choose(1, dispatch.ONESHOT, 10) and not choose(1, dispatch.MULTIPHASE, 10)
    assert not choose(0, automatic, 0)
    assert choose(5, automatic, 10, 5) and not choose(6, automatic, 10, 5)
    assert choose(10, automatic, 10, dispatch.CAPACITY)


def test_threads_at_the_same_time(target: Target) -> None:
    """Calls of several threads share no ticket, on a GPU none but that of their stream."""
    hidden, weight = drawn(17, 24, 400)
    wanted = reference.router_logits(hidden, weight)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                *_, logits = route(target, hidden, weight)
                check_logits("logits", logits, wanted)
        except BaseException as error:
            failures.append(error)

    route(target, hidden, weight)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture
def gpu(target: Target) -> Target:
    """The target, if it is a GPU."""
    if not target.device.startswith("cuda"):
        pytest.skip("CUDA graphs and streams need a GPU")
    return target


def test_graphs_replayed_at_the_same_time(gpu: Target) -> None:
    """Each record has a ticket of its own; new hidden states are seen."""
    _, weight = drawn(17, 24, 400)
    weight = weight.to(gpu.device)
    static = [torch.zeros(17, 400, dtype=torch.bfloat16, device=gpu.device) for _ in range(2)]
    logits = [torch.empty(17, 24, device=gpu.device) for _ in static]
    fused_moe.router_topk_sorting(static[0], weight, 4, 24, 16, torch.bfloat16)
    torch.cuda.synchronize()
    graphs, outs = [], []
    for hidden, written in zip(static, logits, strict=True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append(
                fused_moe.router_topk_sorting(
                    hidden, weight, 4, 24, 16, torch.bfloat16, logits_out=written
                )
            )
    streams: list[Any] = [torch.cuda.Stream() for _ in graphs]  # type: ignore[no-untyped-call]
    for seed in range(20):
        inputs = [drawn(17, 24, 400, seed=2 * seed + side)[0] for side in range(2)]
        for hidden, new in zip(static, inputs, strict=True):
            hidden.copy_(new)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(10):
                    graph.replay()
        torch.cuda.synchronize()
        for new, written, out in zip(inputs, logits, outs, strict=True):
            wanted = reference.router_logits(new, weight.cpu())
            check_logits("logits", written, wanted)
            expected = reference.topk_routing_sorting(wanted, 4, 24, 16, torch.bfloat16)
            slots = int(expected[3][0])
            assert torch.equal(out[0][:slots].cpu(), expected[0][:slots])
            assert not out[4].view(torch.uint8).any()


def test_streams_and_no_synchronisation(gpu: Target) -> None:
    """Calls on two streams at the same time, none of which waits for the device."""
    hidden, weight = drawn(17, 24, 400)
    wanted = reference.router_logits(hidden, weight)
    hidden, weight = hidden.to(gpu.device), weight.to(gpu.device)
    fused_moe.router_topk_sorting(hidden, weight, 4, 24, 16, torch.bfloat16)
    streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    made = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            for stream in streams:
                with torch.cuda.stream(stream):
                    logits = torch.empty(17, 24, device=gpu.device)
                    fused_moe.router_topk_sorting(
                        hidden, weight, 4, 24, 16, torch.bfloat16, logits_out=logits
                    )
                    made.append(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for logits in made:
        check_logits("logits", logits, wanted)


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


def test_the_product_alone(target: Target) -> None:
    """Any number of rows, none among them; a bias or none."""
    for tokens in (0, 1, 9, 130):
        hidden, weight = drawn(tokens, 11, 520)
        for bias in (None, torch.randn(11)):
            logits = GuardedBuffer("logits", (tokens, 11), torch.float32, target.device)
            on_device = None if bias is None else bias.to(target.device)
            with target.active():
                router_product(
                    hidden.to(target.device), weight.to(target.device), logits.tensor,
                    router_bias=on_device,
                )  # fmt: skip
            target.synchronize()
            logits.check_guards()
            check_logits("logits", logits.tensor, reference.router_logits(hidden, weight, bias))


def verdicts(case: Case, target: Target) -> Iterator[str]:
    run_router(case, target, width=2880)
    yield "ok"


def main() -> int:
    options = parse_options(__doc__, [(m, 128, 4) for m in (1, 16, 64)])
    return run_script(options, ["router"], verdicts)


if __name__ == "__main__":
    sys.exit(main())
