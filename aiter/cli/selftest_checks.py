"""What does the self-test ask of an installation, beside the routing under every policy?

CHECKS maps the name of a check to a function of a device that returns what is wrong, empty if
nothing is, and raises `Skipped` where the device cannot show it. What they compare with is
`aiter.reference`, on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import fused_moe, reference
from ..ops.expert_load import expert_load
from ..ops.fused_router_sorting import fused_router_sorting_fwd, router_product
from ..ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from ..ops.rule import RoutingRule
from ..ops.topk_softmax import topk_softmax
from ..reference import layer as reference_moe

WEIGHT_TOLERANCE = 1e-6  # relative: the reference's exp may round differently
SMALLEST_NORMAL = 2.0**-126  # absolute: a device may flush subnormal weights
LAYER_TOLERANCE = 2e-2  # absolute, of values around 1: bfloat16 products of 64 terms
BLOCK_SIZE = 32
POLICY_NAMES = {0: "automatic", 1: "oneshot", 2: "multiphase"}

Check = Callable[[torch.device], str]


class Skipped(Exception):
    """The device cannot show what the check is about; the text says why."""


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """How five sorted buffers differ from the reference's; empty if they do not."""
    slots, num_local = expected[3].tolist()
    if got[3].tolist() != [slots, num_local]:
        return f"num_valid_ids: expected {[slots, num_local]}, got {got[3].tolist()}"
    for index, name, size in (
        (0, "sorted_ids", slots),
        (2, "sorted_expert_ids", slots // BLOCK_SIZE),
    ):
        if not torch.equal(got[index][:size], expected[index][:size]):
            at = int((got[index][:size] != expected[index][:size]).nonzero()[0])
            return f"{name}[{at}]: expected {int(expected[index][at])}, got {int(got[index][at])}"
    wrong = weight_difference("sorted_weights", got[1][:slots], expected[1][:slots])
    if wrong:
        return wrong
    if bool(got[4][:num_local].view(torch.uint8).any()):
        return f"moe_buf: expected {num_local} rows of zeros, got others"
    return ""


def weight_difference(name: str, got: Tensor, expected: Tensor) -> str:
    """How weights differ by more than the tolerance; empty if they do not."""
    error = (got - expected).abs()
    if bool((error <= WEIGHT_TOLERANCE * expected + SMALLEST_NORMAL).all()):
        return ""
    return f"{name}: expected within {WEIGHT_TOLERANCE}, got {float(error.max())} off"


def logits_of(device: torch.device, m: int, e: int, seed: int = 0) -> Tensor:
    """Random bfloat16 logits [m, e], with ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, e, generator=generator).to(torch.bfloat16).to(device)


def route(logits: Tensor, topk: int = 4, policy: int = 0) -> fused_moe.SortedBuffers:
    """One routing with rows of 74 bytes, which is no multiple of 16."""
    e = logits.shape[1]
    return fused_moe.topk_softmax_sorting(
        logits, topk, e, 37, torch.bfloat16, block_size=BLOCK_SIZE, dispatch_policy=policy
    )


def expected_route(logits: Tensor, topk: int = 4) -> tuple[Tensor, ...]:
    """What `route` has to give."""
    return reference.topk_softmax_sorting(
        logits, topk, logits.shape[1], 37, torch.bfloat16, True, BLOCK_SIZE
    )


def _topk_softmax(device: torch.device) -> str:
    for m, e, k in ((1, 128, 4), (33, 161, 9), (5, 896, 16), (3, 1500, 8), (2, 80, 70)):
        logits = logits_of(device, m, e)
        weights = torch.empty(m, k, device=device)
        ids = torch.empty(m, k, dtype=torch.int32, device=device)
        source = torch.empty_like(ids)
        topk_softmax(weights, ids, source, logits, True)
        expected_weights, expected_ids = reference.topk_softmax(logits, k, True)
        if not torch.equal(ids, expected_ids):
            return f"topk_indices of M={m} E={e} K={k}: expected the reference's, got others"
        wrong = weight_difference("topk_weights", weights, expected_weights)
        rows = torch.arange(m, dtype=torch.int32, device=device)[:, None]
        slots = torch.arange(k, dtype=torch.int32, device=device)[None, :]
        if wrong or not torch.equal(source, slots * m + rows):
            return wrong or "token_expert_indices: expected k * M + row, got others"
    return ""


def _rules(device: torch.device, policy: int) -> str:
    """By rules of models, in both formats; logits whose scores are exact, so that ids are as well."""
    generator = torch.Generator().manual_seed(0)
    for rule, e, k in (
        (RoutingRule("sigmoid", 8, 4, routed_scaling_factor=2.5), 256, 8),
        (RoutingRule("sigmoid"), 896, 16),
        (RoutingRule("sqrtsoftplus", routed_scaling_factor=1.5), 256, 6),
    ):
        steps = torch.randint(0, 3, (33, e), generator=generator)
        values = (-200.0, 0.0, 20.0) if rule.scoring_func == "sigmoid" else (25.0, 36.0, 49.0)
        exact = torch.tensor(values)
        bias = torch.randint(-4, 5, (e,), generator=generator) / 4
        for id_format in ("slot", "flat"):
            options: dict[str, Any] = {
                "rule": rule,
                "correction_bias": bias.to(device),
                "id_format": id_format,
            }
            arguments = (exact[steps].to(device), k, e, 37, torch.bfloat16)
            got = fused_moe.topk_routing_sorting(
                *arguments, dispatch_policy=policy, block_size=BLOCK_SIZE, **options
            )
            expected = reference.topk_routing_sorting(*arguments, block_size=BLOCK_SIZE, **options)
            wrong = difference(got, expected)
            if wrong:
                return f"{rule.scoring_func} E={e} K={k} {id_format}: {wrong}"
    return ""


def _router_problems() -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    """Name, (hidden states, weight) and options: tails of D', every dtype, a bias, a rule."""
    generator = torch.Generator().manual_seed(0)
    for dtype, m, width, e, k, with_bias in (
        (torch.bfloat16, 1, 2880, 128, 4, True),
        (torch.bfloat16, 16, 520, 160, 8, False),
        (torch.float16, 33, 141, 96, 4, True),
        (torch.float32, 64, 264, 40, 10, False),
    ):
        hidden = torch.randn(m, width, generator=generator).to(dtype)
        weight = (torch.randn(e, width, generator=generator) / width**0.5).to(dtype)
        bias = torch.randn(e, generator=generator).to(dtype) if with_bias else None
        name = f"M={m} D'={width} E={e} K={k} {dtype}{', a bias' if with_bias else ''}"
        yield name, (hidden, weight), {"topk": k, "router_bias": bias}
    # NOTE: a row of hidden states picks a column of the weight, so that scores are exact, as in _rules.
    steps = torch.randint(0, 3, (256, 33), generator=generator)
    weight = torch.tensor((-200.0, 0.0, 20.0))[steps]
    options = {
        "topk": 8,
        "router_bias": None,
        "rule": RoutingRule("sigmoid", 8, 4, routed_scaling_factor=2.5),
        "correction_bias": torch.randint(-4, 5, (256,), generator=generator) / 4,
    }
    yield "M=33 D'=33 E=256 K=8, sigmoid", (torch.eye(33), weight), options


def _router(device: torch.device, way: str) -> str:
    """Logits to the bit and what is made of them, in one launch, in two, or as dispatch has it."""
    for name, inputs, options in _router_problems():
        hidden, weight = (tensor.to(device) for tensor in inputs)
        on_device: dict[str, Any] = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in options.items()
        }
        m, e, k = len(hidden), len(weight), options["topk"]
        sizes: dict[str, Any] = {"num_experts": e, "model_dim": 37, "moebuf_dtype": torch.bfloat16}
        expected = reference.router_topk_sorting(hidden, weight, **sizes, **on_device)
        expected_logits = reference.router_logits(hidden, weight, on_device["router_bias"])
        logits = torch.full((m, e), float("nan"), device=device)
        if way == "automatic":
            got = fused_moe.router_topk_sorting(
                hidden, weight, logits_out=logits, **sizes, **on_device
            )
        elif way == "one launch":
            got = fused_moe.empty_sorted_buffers(m, k, e, 37, torch.bfloat16, device=device)
            fused_router_sorting_fwd(
                hidden, weight, logits, *got, e, unit_size=BLOCK_SIZE, **on_device
            )
        else:
            router_product(hidden, weight, logits, router_bias=on_device.pop("router_bias"))
            got = fused_moe.topk_routing_sorting(logits, **sizes, **on_device)
        if not torch.equal(logits, expected_logits):
            return f"{name}: logits: expected the bits of the reference, got others"
        wrong = difference(got, expected)
        if wrong:
            return f"{name}: {wrong}"
    return ""


def _moe_sorting(device: torch.device, policy: int) -> str:
    for m, e, k in ((1, 8, 2), (70, 128, 4), (600, 896, 2)):
        weights, ids = reference.topk_softmax(logits_of(device, m, e), k, True)
        arguments = (ids, weights, e, 37, torch.bfloat16, BLOCK_SIZE)
        got = fused_moe.moe_sorting(*arguments, dispatch_policy=policy)
        wrong = difference(got, reference.moe_sorting(*arguments))
        if wrong:
            return f"M={m} E={e} K={k}: {wrong}"
    return ""


def _expert_load(device: torch.device) -> str:
    ids = torch.randint(0, 128, (300, 4), dtype=torch.int32).to(device)
    load = torch.empty(128, dtype=torch.int32, device=device)
    expert_load(ids, load)
    expected = torch.bincount(ids.reshape(-1).long(), minlength=128).to(torch.int32)
    return "" if torch.equal(load, expected) else "load: expected the counts of the ids, got others"


def _layer(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    m, e, d, inter, topk = 7, 8, 64, 48, 2

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16).to(device)

    hidden = draw(m, d, scale=1.0)
    w1, w2 = draw(e, 2 * inter, d, scale=0.1), draw(e, d, inter, scale=0.1)
    logits = logits_of(device, m, e)
    got = fused_moe.fused_moe_from_logits(hidden, w1, w2, logits, topk)
    weights, ids = reference.topk_softmax(logits, topk, True)
    expected = reference_moe.moe_layer(hidden, w1, w2, weights, ids)
    error = float((got.double() - expected).abs().max())
    if error <= LAYER_TOLERANCE:
        return ""
    return f"output: expected within {LAYER_TOLERANCE}, got {error} off"


def _largest(device: torch.device) -> str:
    """As many rows as LDS holds: on gfx950 that is more than on other AMD GPUs."""
    m = fused_topk_moe_sorting_max_tokens(128, 4, device=device)
    logits = logits_of(device, min(m, 4096), 128)
    wrong = difference(route(logits), expected_route(logits))
    return f"M={len(logits)}: {wrong}" if wrong else ""


def _bad_argument(device: torch.device) -> str:
    logits = logits_of(device, 2, 8)
    try:
        route(logits, topk=9)
    except ValueError:
        return difference(route(logits), expected_route(logits))
    return "topk 9 of 8 experts: expected ValueError, got none"


def _need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("needs a GPU")


def _graph(device: torch.device, policy: int) -> str:
    _need_gpu(device)
    logits = logits_of(device, 32, 128)
    route(logits, policy=policy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffers = route(logits, policy=policy)
    for seed in range(1, 4):
        logits.copy_(logits_of(device, 32, 128, seed))
        graph.replay()
        wrong = difference(buffers, expected_route(logits))
        if wrong:
            return f"replay {seed}: {wrong}"
    return ""


def _router_graph(device: torch.device) -> str:
    """What workgroups hand over from hidden states has to be as it was before every replay."""
    _need_gpu(device)
    hidden = logits_of(device, 16, 520)
    weight = logits_of(device, 128, 520, 9)
    logits = torch.empty(16, 128, device=device)
    buffers = fused_moe.empty_sorted_buffers(16, 4, 128, 37, torch.bfloat16, device=device)

    def call() -> None:
        fused_router_sorting_fwd(hidden, weight, logits, *buffers, 128, 4, BLOCK_SIZE)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(1, 4):
        hidden.copy_(logits_of(device, 16, 520, seed))
        graph.replay()
        if not torch.equal(logits, reference.router_logits(hidden, weight)):
            return f"replay {seed}: logits: expected the bits of the reference, got others"
        wrong = difference(buffers, expected_route(logits))
        if wrong:
            return f"replay {seed}: {wrong}"
    return ""


def _side_stream(device: torch.device) -> str:
    """A call belongs to the current stream: behind what that holds, and before nothing else."""
    _need_gpu(device)
    logits = logits_of(device, 32, 128)
    fresh = logits_of(device, 32, 128, 1)
    route(logits)
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        logits.copy_(fresh, non_blocking=True)
        buffers = route(logits)
    stream.synchronize()
    return difference(buffers, expected_route(fresh))


def _two_streams(device: torch.device) -> str:
    """Two launches at a time have nothing to do with each other."""
    _need_gpu(device)
    problems = [logits_of(device, 64, 128, seed) for seed in range(2)]
    route(problems[0])
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in problems]  # type: ignore[no-untyped-call]
    buffers = []
    for _ in range(20):
        for logits, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                buffers.append(route(logits))
    torch.cuda.synchronize(device)
    expected = [expected_route(logits) for logits in problems]
    found = (difference(got, expected[i % 2]) for i, got in enumerate(buffers))
    return next((wrong for wrong in found if wrong), "")


def _other_device(device: torch.device) -> str:
    """Tensors decide where a call runs, not the current device."""
    _need_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skipped("needs two GPUs")
    current = torch.cuda.current_device()
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    logits = logits_of(other, 32, 128)
    wrong = difference(route(logits), expected_route(logits))
    if torch.cuda.current_device() != current:
        return f"current device: expected {current}, got {torch.cuda.current_device()}"
    return wrong


CHECKS: dict[str, Check] = {
    "topk_softmax": _topk_softmax,
    "moe_sorting, oneshot": partial(_moe_sorting, policy=1),
    "moe_sorting, multiphase": partial(_moe_sorting, policy=2),
    **{f"routing rules, {name}": partial(_rules, policy=policy)
       for policy, name in POLICY_NAMES.items()},
    **{f"hidden states, {way}": partial(_router, way=way)
       for way in ("automatic", "one launch", "two launches")},
    "expert_load": _expert_load,
    "fused_moe_from_logits": _layer,
    "largest M of the fused launch": _largest,
    "error, then a right call": _bad_argument,
    **{f"graph replay, {name}": partial(_graph, policy=policy)
       for policy, name in POLICY_NAMES.items()},
    "graph replay, hidden states": _router_graph,
    "side stream": _side_stream,
    "two streams at once": _two_streams,
    "a device that is not current": _other_device,
}  # fmt: skip
