"""Does the launch from hidden states route by the contract's logits, to the bit?

`reference.router_logits` is judged first: against float64, and its fused multiply-add against exact
fractions. Everything else is then compared with it.

Long because the kernel, the call and its dispatch are judged by the same logits.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from buffers import GuardedBuffer
from cases import GATING_DTYPES, INF, LAYOUTS, MASKS, NAN, Case
from checks import check_same_bits
from router_calls import check_logits, drawn, make_router, run_router
from rule_cases import MODELS, check_routing, num_logits, random_bias
from script import parse_options, run_script
from targets import Target
from torch import Tensor

from aiter import fused_moe, reference
from aiter.jit.load import default_loader
from aiter.ops.fused_router_sorting import router_product
from aiter.routing import basis, dispatch, known

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


@pytest.mark.parametrize("workgroups", [None, 1, 3, 40, 1024])
def test_cases(target: Target, workgroups: int | None) -> None:
    for case in CASES:
        run_router(case, target, workgroups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_those_asked_for_on_every_device(layout: str) -> None:
    """Without a GPU, "meta" shows what a copy to one does to strides."""
    case = replace(BASE, layout=layout, num_tokens=9)
    strides = {make_router(case, device).hidden_states.stride() for device in ("cpu", "meta")}
    assert strides == {{"dense": (136, 1), "padded": (139, 1), "broadcast": (0, 1),
                        "sliding": (1, 1)}[layout]}  # fmt: skip


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


def chosen(
    tokens: int, max_tokens: int, *options: Any, policy: int = 0, invariant: bool = False
) -> str:
    problem = dispatch.Problem(tokens, 128, 4, 2880, policy, "f32")
    return dispatch.choose_router(problem, max_tokens, *options, batch_invariant=invariant).path


def row(fused_tokens: int, experts: int = 128, width: int = 2880) -> dispatch.RouterCrossover:
    return dispatch.RouterCrossover(width, experts, 4, fused_tokens, "a test", "2026-11-26", "none")


def test_dispatch() -> None:
    most = dispatch.MOST_ROUTER_TOKENS
    assert chosen(most, 1000) == "fused" and chosen(most + 1, 1000) == "linear"
    assert chosen(most + 1, 1000, invariant=True) == "product"
    assert chosen(10, 10) == "fused" and chosen(11, 10) == "product"
    for policy in (dispatch.ONESHOT, dispatch.MULTIPHASE):
        assert chosen(1, 10, policy=policy) == "product"
        assert chosen(most + 1, 10, policy=policy) == "linear"
    assert chosen(0, 0) == "product"
    assert chosen(5, 10, (), 5) == "fused" and chosen(6, 10, (), 5) == "product"
    assert chosen(10, 10, (), dispatch.CAPACITY) == "fused"


def test_dispatch_goes_by_rows() -> None:
    """Measured ones that are close before the model's nearest; an override before both."""
    assert chosen(4, 99, [row(4)]) == "fused" and chosen(5, 99, [row(4)]) == "product"
    assert chosen(1, 99, [row(0)]) == "product" and chosen(1, 99, [row(0)], 8) == "fused"
    assert chosen(1, 99, [row(0)], dispatch.CAPACITY) == "fused"
    assert chosen(64, 20, [row(64)]) == "product", "more than LDS can hold"
    assert chosen(65, 99, [row(128)]) == "linear"
    assert chosen(9, 99, [row(4), row(16, width=3000)]) == "product", "the closest D'"
    far = row(0, experts=512)
    assert chosen(9, 99, [far]) == "fused", "too far to speak for it"
    assert chosen(9, 99, [far], None, [row(4)]) == "product"
    assert chosen(9, 99, (), None, [far]) == "product", "the model's nearest always speaks"


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx950", "gfx1201", "cpu"])
def test_rows_of_architectures(arch: str) -> None:
    measured, modelled = dispatch.router_rows_of(arch), dispatch.router_modelled_of(arch)
    assert bool(measured) == arch.startswith("sm_9") and bool(modelled) == arch.startswith("gfx")
    for each in (*measured, *modelled):
        assert 0 <= each.fused_tokens <= dispatch.MOST_ROUTER_TOKENS, each


def test_both_products_have_the_same_bits(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dispatch goes by changes the path, and not a bit of any output."""
    for tokens in (1, 7, 64):
        hidden, weight = drawn(tokens, 128, 328)
        got = []
        for fused_tokens, path in ((64, "router"), (0, "fused")):
            rows = (row(fused_tokens, width=328),)
            there = basis.Basis((), None, None, "a test", {}, rows)
            monkeypatch.setattr(basis, "basis_of", lambda device, there=there: there)
            known.forget()
            got.append(route(target, hidden, weight))
            assert fused_moe.last_path() == path
        known.forget()
        (*one, one_logits), (*other, other_logits) = got
        assert torch.equal(one_logits, other_logits)
        check_same_bits(one, other, 8)


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


WARM = """
import os
import aiter
print(*(ready.module for ready in aiter.warmup(devices=["cpu"])))
os.environ["AITER_NO_BUILD"] = "1"
import torch
from aiter.fused_moe import last_path, router_topk_sorting
for tokens, policy, rule in ((4, 0, None), (70, 0, None), (4, 1, "sigmoid"), (4, 2, None)):
    router_topk_sorting(
        torch.ones(tokens, 24), torch.ones(16, 24), 2, 16, 8, torch.bfloat16,
        router_bias=torch.zeros(16), rule=rule and aiter.RoutingRule(rule), dispatch_policy=policy,
        batch_invariant=tokens > 64,
    )
    print(last_path())
"""


def test_a_warm_server_builds_nothing() -> None:
    """In a process of its own, where what is loaded was loaded by `warmup`."""
    done = subprocess.run(
        [sys.executable, "-c", WARM],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "AITER_DISPATCH": "capacity"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules, *paths = done.stdout.splitlines()
    assert modules.split() == default_loader().modules()
    assert paths == ["router", "fused", "oneshot", "multiphase"]


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


# Few rows and many, and as many experts as half a tile or more: of every tile on the CPU and on up to
# 132 compute units.
@pytest.mark.parametrize("experts", [1, 2, 3, 11, 150])
@pytest.mark.parametrize("dtype", GATING_DTYPES)
def test_the_product_alone(target: Target, dtype: torch.dtype, experts: int) -> None:
    """Any number of rows, none among them; of whole rounds of chunks, and of others."""
    widths = (5, 8, 520, 1024, 1043) if experts < 150 else (1032, 3072)
    counts = (0, 1, 2, 3, 9, 34) if target.device == "cpu" or experts < 150 else (9, 34, 200)
    most = [(130, 520)] if experts == 11 else []
    for tokens, width in [*itertools.product(counts, widths), *most]:
        hidden, weight = drawn(tokens, experts, width, dtype)
        for bias, boundary in ((None, 1), (torch.randn(experts), 8)):
            check_the_product_alone(target, hidden, weight, bias, boundary)


@pytest.mark.parametrize("dtype", GATING_DTYPES)
def test_negative_zero_stays(target: Target, dtype: torch.dtype) -> None:
    """All sums underflow to -0, in lanes as well that have fewer chunks than others."""
    is_half = dtype is torch.float16
    tiny, least = (2.0**-24, 2.0**-130) if is_half else (2.0**-100, 2.0**-100)
    for tokens, width in itertools.product((1, 2, 9), (1032, 1048, 3072)):
        hidden = torch.full((tokens, width), -tiny, dtype=dtype)
        weight = torch.full((12, width), least, dtype=torch.float32 if is_half else dtype)
        logits = check_the_product_alone(target, hidden, weight, None)
        assert torch.equal(logits, torch.zeros_like(logits)) and bool(logits.signbit().all())


def check_the_product_alone(
    target: Target, hidden: Tensor, weight: Tensor, bias: Tensor | None, boundary: int = 1
) -> Tensor:
    """The logits, which are the reference's, of rows that begin on multiples of `boundary` items."""
    width = hidden.shape[1]
    lies = [
        torch.nn.functional.pad(rows.to(target.device), (0, -width % boundary))[:, :width]
        for rows in (hidden, weight)
    ]
    logits = GuardedBuffer("logits", (len(hidden), len(weight)), torch.float32, target.device)
    on_device = None if bias is None else bias.to(target.device)
    with target.active():
        router_product(*lies, logits.tensor, router_bias=on_device)
    target.synchronize()
    logits.check_guards()
    check_logits("logits", logits.tensor, reference.router_logits(hidden, weight, bias))
    return logits.tensor.cpu()


def verdicts(case: Case, target: Target) -> Iterator[str]:
    run_router(case, target, width=2880)
    yield "ok"


def main() -> int:
    options = parse_options(__doc__, [(m, 128, 4) for m in (1, 16, 64)])
    return run_script(options, ["router"], verdicts)


if __name__ == "__main__":
    sys.exit(main())
