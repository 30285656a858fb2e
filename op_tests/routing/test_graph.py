"""Are the ops good citizens of PyTorch: schemas, fakes, tracers, compiled and fake calls?

`torch.library.opcheck` judges schema, mutation and fake of every op. It compares whole outputs, so
the sorted buffers here have no undefined tail: blocks of one slot, as many slots as experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
import torch._inductor.config
from targets import Target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import aiter
from aiter import fused_moe
from aiter.ops.rule import RoutingRule
from aiter.routing import graph as torch_ops
from aiter.routing.buffers import empty_topk
from aiter.routing.calls import BUFFER_NAMES

M, E, K, D = 6, 4, 4, 16
LAUNCHERS = (
    "topk_softmax",
    "topk_routing",
    "moe_sorting_opus_fwd",
    "fused_topk_moe_sorting_fwd",
    "topk_softmax_sorting_out",
    "topk_routing_sorting_out",
    "moe_sorting_out",
    "router_topk_sorting_out",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing that another process or another version of the ops left in PyTorch's caches."""
    torch.compiler.reset()
    # NOTE: the name of PyTorch 2.6, which later ones have beside `torch.compiler.config`.
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def buffers(device: str) -> tuple[Tensor, ...]:
    """The five outputs of a sort, zeroed."""
    like = torch.empty(M, E, device=device)
    return tuple(t.zero_() for t in torch_ops._empty_sorted(like, K, E, D, torch.bfloat16, 1))


def arguments_of(name: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the registered op `name` that define every element of its outputs."""
    logits = torch.randn(M, E, generator=torch.Generator().manual_seed(0)).to(device)
    weights, ids = empty_topk(logits.shape[0], K, logits.device)
    weights.uniform_()
    ids.copy_(torch.stack([torch.randperm(E) for _ in range(M)])[:, :K])
    mask = torch.ones(E, dtype=torch.int32, device=device)
    count = torch.tensor([M], dtype=torch.int32, device=device)
    hidden, router_weight, bias = torch.randn(M, D), torch.randn(E, D), torch.randn(E)
    hidden, router_weight, bias = (t.to(device) for t in (hidden, router_weight, bias))
    routing = (E, D, torch.bfloat16)
    rule = [float(number) for number in RoutingRule(need_renorm=False).packed]
    out = dict(zip(BUFFER_NAMES, buffers(device), strict=True))
    by_name: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "topk_softmax": ((weights, ids, torch.empty_like(ids), logits, True), {}),
        "topk_routing": ((weights, ids, logits), {"rule": rule}),
        "moe_sorting_opus_fwd": (
            (ids, weights, *buffers(device), E, 1, mask, count, None, 1),
            {},
        ),
        "fused_topk_moe_sorting_fwd": (
            (logits, *buffers(device), E, K, 1, True),
            {"local_expert_mask": mask, "num_local_tokens": count},
        ),
        "topk_softmax_sorting": ((logits, K, *routing, True, 1, mask, count), {}),
        "topk_softmax_sorting_out": ((logits, K, *routing, True, 1, mask, count), out),
        "topk_routing_sorting": ((logits, K, *routing, rule, None, 1, mask, count), {}),
        "topk_routing_sorting_out": ((logits, K, *routing, rule, None, 1, mask, count), out),
        "router_topk_sorting": (
            (hidden, router_weight, K, *routing, rule, bias, None, 1, mask, count),
            {},
        ),
        "router_topk_sorting_out": (
            (hidden, router_weight, K, *routing, rule, bias, None, 1, mask, count),
            {**out, "logits_out": torch.zeros_like(logits)},
        ),
        "moe_sorting": ((ids, weights, *routing, 1, mask, count, 2), {}),
        "moe_sorting_out": ((ids, weights, *routing, 1, mask, count, 2), out),
        "fused_topk": ((logits, logits, K, False), {}),
    }
    return by_name[name]


def test_every_schema_is_covered() -> None:
    for name in torch_ops.SCHEMAS:
        arguments_of(name, "cpu")
        assert hasattr(torch.ops.aiter, name)


@pytest.mark.parametrize("name", torch_ops.SCHEMAS)
def test_opcheck(target: Target, name: str) -> None:
    op = getattr(torch.ops.aiter, name).default
    arguments, options = arguments_of(name, target.device)
    with target.active():
        torch.library.opcheck(op, arguments, options)


@pytest.mark.parametrize("written", [1, 2])
def test_opcheck_can_fail(written: int) -> None:
    """A schema that leaves out what is written is noticed."""
    library = torch.library.Library("aiter_op_tests", "FRAGMENT")
    outputs = ", ".join(f"Tensor{'(a!)' if i != written else ''} t{i}" for i in range(3))
    outputs = outputs.replace("(a!)", "(a!)", 1).replace("(a!) t2", "(b!) t2")
    library.define(f"planted{written}({outputs}, Tensor gating, bool renorm) -> ()")
    library.impl(f"planted{written}", aiter.topk_softmax, "CompositeExplicitAutograd")
    op = getattr(torch.ops.aiter_op_tests, f"planted{written}").default
    arguments, _ = arguments_of("topk_softmax", "cpu")
    with pytest.raises(Exception, match="mutated|mutable"):
        torch.library.opcheck(op, arguments, test_utils="test_schema")


@pytest.mark.parametrize("name", LAUNCHERS[:4])
def test_a_schema_has_every_parameter(name: str) -> None:
    """A tracer takes what an eager call takes, by the same names."""
    schema = getattr(torch.ops.aiter, name).default._schema
    parameters = inspect.signature(getattr(torch_ops, name)).parameters
    names = [argument.name for argument in schema.arguments]
    if "topk_out" in parameters:  # a schema has no optional pair of tensors
        first = names.index("topk_weights")
        names[first : first + 2] = ["topk_out"]
    assert names == list(parameters)


@pytest.mark.parametrize("name", torch_ops.SCHEMAS)
def test_fake_tells_the_shapes(name: str) -> None:
    """Fake tensors run nothing and come back with the real outputs' shapes, dtypes and devices."""
    op = getattr(torch.ops.aiter, name)
    arguments, options = arguments_of(name, "cpu")
    real = op(*arguments, **options)
    with FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        made = op(*map(fake, arguments), **{k: fake(v) for k, v in options.items()})
    if name in LAUNCHERS:
        assert made is None and real is None
        return
    for got, want in zip(made, real, strict=True):
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)


def no_module(*args: object, **kwargs: object) -> None:
    raise AssertionError("the compiled module was called while tracing")


def layer_inputs(device: str, tokens: int = M) -> tuple[Tensor, ...]:
    """hidden, logits, w1, w2."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, D), (tokens, E), (E, 2 * 8, D), (E, D, 8))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    scaled = [*tensors[:2], tensors[2] / D**0.5, tensors[3] / 8**0.5]
    return tuple(tensor.to(device, torch.bfloat16) for tensor in scaled)


def whole_layer(hidden: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return fused_moe.fused_moe_from_logits(hidden, w1, w2, logits, 2)


def chain_layer(hidden: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    weights, ids = fused_moe.fused_topk(hidden, logits, 2, True)
    return fused_moe.fused_moe(hidden, w1, w2, weights, ids, backend="block_bmm")


def raw_ops(hidden: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    outputs = torch_ops._empty_sorted(logits, K, E, D, torch.float32, 1)
    aiter.fused_topk_moe_sorting_fwd(logits, *outputs, E, K, 1, True)
    weights, ids = empty_topk(logits.shape[0], K, logits.device)
    aiter.topk_softmax(weights, ids, torch.empty_like(ids), logits, True)
    again = torch_ops._empty_sorted(logits, K, E, D, torch.float32, 1)
    aiter.moe_sorting_opus_fwd(ids, weights, *again, E, 1, dispatch_policy=1)
    return outputs[1] + again[1] + outputs[0] - again[0]


def given_outputs(hidden: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out = torch_ops._empty_sorted(logits, K, E, D, torch.float32, 1)
    again = torch_ops._empty_sorted(logits, K, E, D, torch.float32, 1)
    fused_moe.topk_softmax_sorting(logits, K, E, D, torch.float32, block_size=1, out=out)
    weights, ids = fused_moe.fused_topk(hidden, logits, K, True)
    fused_moe.moe_sorting(ids, weights, E, D, torch.float32, block_size=1, out=again)
    return out[1] + out[0] - again[0]


def from_hidden(hidden: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    weight = w1[:, :E].reshape(-1, D)[: 2 * E]
    sizes = (K, 2 * E, D, torch.float32)
    first = fused_moe.router_topk_sorting(hidden, weight, *sizes, block_size=1)
    out = tuple(torch.empty_like(tensor) for tensor in first)
    written = torch.empty(hidden.shape[0], 2 * E, device=hidden.device)
    weights, ids = empty_topk(hidden.shape[0], K, hidden.device)
    fused_moe.router_topk_sorting(
        hidden, weight, *sizes, block_size=1, out=out, logits_out=written, topk_out=(weights, ids)
    )
    used = hidden.shape[0] * K  # slots of blocks of one
    return (out[1] + out[0] - first[0])[:used].sum() + written.sum() + weights.sum() + ids.sum()


GRAPHS: list[Callable[..., Tensor]] = [
    whole_layer, chain_layer, raw_ops, given_outputs, from_hidden
]  # fmt: skip
# Inductor computes a fused chain of bfloat16 steps in float32 and rounds once.
COMPILED_TOLERANCE = 3e-2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", GRAPHS)
def test_compile_without_a_break(
    target: Target, function: Callable[..., Tensor], dynamic: bool
) -> None:
    """Traced, with mutations made functional, in one graph; on a GPU also through Triton.

    NOTE: on the CPU the default compiler would build C++ with PyTorch's headers, 34 s and a
    precompiled header in a folder that all processes of a user share: not a test of these ops.
    """
    backend = "aot_eager" if target.device == "cpu" else "inductor"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (M, M, 9) if dynamic else (M,):
        inputs = layer_inputs(target.device, tokens)
        with target.active(), torch.no_grad():
            torch.testing.assert_close(
                compiled(*inputs), function(*inputs), rtol=0, atol=COMPILED_TOLERANCE
            )


def test_inductor_keeps_the_ops(target: Target) -> None:
    """The default compiler schedules the ops by their schemas; nothing here needs its C++ or Triton."""

    def sort_twice(
        logits: Tensor, outputs: tuple[Tensor, ...], again: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        aiter.fused_topk_moe_sorting_fwd(logits, *outputs, E, K, 1, True)
        weights, ids = fused_moe.fused_topk(logits, logits, K, True)
        aiter.moe_sorting_opus_fwd(ids, weights, *again, E, 1, dispatch_policy=1)
        return fused_moe.topk_softmax_sorting(logits, K, E, D, torch.bfloat16, block_size=1)

    logits = layer_inputs(target.device)[1]
    outputs, again = buffers(target.device), buffers(target.device)
    with target.active():
        returned = torch.compile(sort_twice, fullgraph=True)(logits, outputs, again)
        want = fused_moe.topk_softmax_sorting(logits, K, E, D, torch.bfloat16, block_size=1)
    for got in (outputs, again, returned):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


def test_a_compiled_layer_contains_the_routing_op() -> None:
    """The tracer records one routing node, and the experts' products around it."""
    seen: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    torch.compile(whole_layer, fullgraph=True, backend=capture)(*layer_inputs("cpu"))
    targets = [str(node.target) for node in seen[0].graph.nodes if node.op == "call_function"]
    assert len(seen) == 1 and sum("aiter.topk_softmax_sorting" in t for t in targets) == 1
    if fused_moe.expert_backend(*layer_inputs("cpu")[2:]) == "grouped_mm":
        assert sum("grouped_mm" in t for t in targets) == 2


def test_make_fx_records_the_op() -> None:
    """Tracing with real tensors goes through the dispatcher, too."""
    graph = make_fx(whole_layer)(*layer_inputs("cpu"))
    assert "torch.ops.aiter.topk_softmax_sorting" in graph.code
    inputs = layer_inputs("cpu")
    assert torch.equal(graph(*inputs), whole_layer(*inputs))


def test_export_and_load(tmp_path: Any) -> None:
    class Layer(torch.nn.Module):
        def forward(self, hidden: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            return whole_layer(hidden, logits, w1, w2)

    inputs = layer_inputs("cpu")
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(Layer(), inputs), path)
    loaded = torch.export.load(path).module()
    assert torch.equal(loaded(*inputs), whole_layer(*inputs))


def test_eager_calls_pass_the_dispatcher_by() -> None:
    """The registered op is not called outside a tracer, and the module not inside one."""
    logits = layer_inputs("cpu")[1]
    weights, ids = empty_topk(logits.shape[0], 2, logits.device)
    on_the_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_the_cpu) as profile:
        aiter.topk_softmax(weights, ids, torch.empty_like(ids), logits, True)
    assert not any("aiter::" in event.key for event in profile.key_averages())
    with torch.profiler.profile(activities=on_the_cpu) as profile:
        torch.ops.aiter.topk_softmax(weights, ids, torch.empty_like(ids), logits, True)
    assert any("aiter::topk_softmax" in event.key for event in profile.key_averages())
    traced = torch_ops.graph_op(named("topk_softmax"))
    real = (weights, ids, torch.empty_like(ids), logits)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in real]
        traced(*fakes, True)
    traced(*fakes, True)  # outside the mode, the tensors' type tells
    with pytest.raises(AssertionError, match="while tracing"):
        traced(*real, True)


def named(name: str) -> Callable[..., None]:
    """`no_module` under an op's name."""

    def stub(*args: object, **kwargs: object) -> None:
        no_module(*args, **kwargs)

    stub.__name__ = name
    return stub


class Named(Tensor):
    """A subclass that leaves the work to its base class."""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: 3.0}, "rule: expected a whole number from 0 to 2 for scoring_func, got 3.0"),
        ({0: float("nan")}, "rule: expected a whole number from 0 to 2 for scoring_func, got nan"),
        ({0: 0.5}, "rule: expected a whole number from 0 to 2 for scoring_func, got 0.5"),
        ({1: 2.5}, "rule: expected a whole number from 1 to 65535 for num_expert_group, got 2.5"),
        ({3: -2.0}, "rule: expected a whole number from -1 to 1 for group_score, got -2.0"),
        ({4: 2.0}, "rule: expected a whole number from 0 to 1 for need_renorm, got 2.0"),
        ({8: -1.0}, "rule: expected a whole number from 0 to 1 for select_on, got -1.0"),
        (
            {14: float("inf")},
            "rule: expected a whole number from 0 to 65535 for num_zero_experts, got inf",
        ),
        ({15: 0.0}, r"rule: expected the 15 numbers of RoutingRule.packed, got 16"),
    ],
    ids=str,
)
def test_the_numbers_of_a_rule_are_checked(changes: dict[int, float], words: str) -> None:
    """Ops get a rule as `RoutingRule.packed`."""
    numbers = dict(enumerate(RoutingRule("sigmoid", routed_scaling_factor=1.25).packed)) | changes
    rule = [float(number) for number in numbers.values()]
    with pytest.raises(ValueError, match=words):
        torch.ops.aiter.topk_routing_sorting(torch.zeros(2, 8), 2, 8, 4, torch.bfloat16, rule)


def test_a_subclass_that_does_not_dispatch_is_a_tensor(target: Target) -> None:
    """It is routed as its base class is, first and repeated, and under its own type in `out`."""
    logits = torch.randn(M, E, generator=torch.Generator().manual_seed(0)).to(target.device)
    sizes = (K, E, D, torch.bfloat16, True, 1)
    with target.active():
        want = fused_moe.topk_softmax_sorting(logits, *sizes)
        out = buffers(target.device)
        for _ in range(2):
            got = fused_moe.topk_softmax_sorting(logits.as_subclass(Named), *sizes, out=out)
            assert all(map(torch.equal, got, want))
        named_out = tuple(t.zero_().as_subclass(Named) for t in out)
        fused_moe.topk_softmax_sorting(logits, *sizes, out=named_out)
        assert all(map(torch.equal, out, want))


def test_inference_mode(target: Target) -> None:
    inputs = layer_inputs(target.device)
    with target.active():
        plain = [function(*inputs) for function in GRAPHS]
        with torch.inference_mode():
            for function, want in zip(GRAPHS, plain, strict=True):
                got = function(*inputs)
                assert got.is_inference() and torch.equal(got, want)


def test_compiled_layer_in_a_graph(target: Target) -> None:
    """`reduce-overhead` captures the layer and replays it with new logits."""
    if not target.device.startswith("cuda"):
        pytest.skip("CUDA graphs need a GPU")
    compiled = torch.compile(whole_layer, fullgraph=True, mode="reduce-overhead")
    for shift in range(5):
        hidden, logits, w1, w2 = layer_inputs(target.device)
        inputs = (hidden, logits.roll(shift, 1), w1, w2)
        with torch.no_grad():
            got = compiled(*inputs).clone()
            torch.testing.assert_close(got, whole_layer(*inputs), rtol=0, atol=COMPILED_TOLERANCE)
