"""Is a gradient that routing would lose refused at every entry, and is every write counted?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _checkout  # noqa: F401
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import aiter
from aiter._pytorch import VERSION
from aiter.fused_moe import (
    empty_sorted_buffers,
    fused_moe,
    fused_moe_from_logits,
    fused_topk,
    moe_sorting,
    router_topk_sorting,
    topk_softmax_sorting,
)
from aiter.routing.autograd import refuse_gradients, wrote

M, E, K, D = 5, 8, 2, 16
Call = Callable[[dict[str, Tensor]], Any]


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits = draw(M, E)
    weights, ids = fused_topk(logits, logits, K, True)
    return {
        "hidden_states": draw(M, D), "w1": draw(E, 24, D), "w2": draw(E, D, 12),
        "bias1": draw(E, 24), "bias2": draw(E, D), "gating_output": logits,
        "topk_weight": weights, "topk_weights": weights.clone(), "topk_ids": ids,
        "router_weight": draw(E, D), "router_bias": draw(E), "logits_out": torch.empty(M, E),
        "sorted_weights": torch.empty(M * K + E * 32 - K), "moe_buf": torch.empty(M, D),
    }  # fmt: skip


def buffers(t: dict[str, Tensor]) -> list[Tensor]:
    ids, _, experts, counts, _ = empty_sorted_buffers(M, K, E, D, torch.float32, device="cpu")
    return [ids, t["sorted_weights"], experts, counts, t["moe_buf"]]


def softmax(t: dict[str, Tensor], **named: Any) -> Tensor:
    weights, ids = torch.empty(M, K), torch.empty(M, K, dtype=torch.int32)
    aiter.topk_softmax(weights, ids, ids.clone(), t["gating_output"], True)
    return weights


def layer(t: dict[str, Tensor]) -> Tensor:
    return fused_moe_from_logits(
        t["hidden_states"], t["w1"], t["w2"], t["gating_output"], K, bias1=t["bias1"],
        bias2=t["bias2"],
    )  # fmt: skip


def layer_of_ids(t: dict[str, Tensor]) -> Tensor:
    return fused_moe(
        t["hidden_states"], t["w1"], t["w2"], t["topk_weight"], t["topk_ids"], bias1=t["bias1"],
        bias2=t["bias2"],
    )  # fmt: skip


def from_hidden(t: dict[str, Tensor], **named: Any) -> Any:
    return router_topk_sorting(
        t["hidden_states"], t["router_weight"], K, E, D, torch.float32,
        router_bias=t["router_bias"], logits_out=t["logits_out"], out=tuple(buffers(t)), **named,
    )  # fmt: skip


LAYER = ("hidden_states", "w1", "w2", "bias1", "bias2")
SORT = (E, D, torch.float32)
OUTPUTS = ("sorted_weights", "moe_buf")
# The entries, and the arguments that each must look at.
ENTRIES: dict[str, tuple[Call, tuple[str, ...]]] = {
    "fused_moe_from_logits": (layer, (*LAYER, "gating_output")),
    "fused_moe": (layer_of_ids, (*LAYER, "topk_weight")),
    "fused_topk": (lambda t: fused_topk(t["gating_output"], t["gating_output"], K, True),
                   ("gating_output",)),
    "topk_softmax_sorting": (lambda t: topk_softmax_sorting(t["gating_output"], K, *SORT),
                             ("gating_output",)),
    "topk_softmax_sorting, chain": (
        lambda t: topk_softmax_sorting(t["gating_output"], K, *SORT, dispatch_policy=2),
        ("gating_output",)),
    "topk_softmax_sorting, out": (
        lambda t: topk_softmax_sorting(t["gating_output"], K, *SORT, out=tuple(buffers(t))),
        ("gating_output", *OUTPUTS)),
    "moe_sorting": (lambda t: moe_sorting(t["topk_ids"], t["topk_weights"], *SORT),
                    ("topk_weights",)),
    "moe_sorting, out": (
        lambda t: moe_sorting(t["topk_ids"], t["topk_weights"], *SORT, out=tuple(buffers(t))),
        ("topk_weights", *OUTPUTS)),
    "topk_softmax": (softmax, ("gating_output",)),
    "moe_sorting_opus_fwd": (
        lambda t: aiter.moe_sorting_opus_fwd(t["topk_ids"], t["topk_weights"], *buffers(t), E, 32),
        ("topk_weights", *OUTPUTS)),
    "fused_topk_moe_sorting_fwd": (
        lambda t: aiter.fused_topk_moe_sorting_fwd(t["gating_output"], *buffers(t), E, K, 32, True),
        ("gating_output", *OUTPUTS)),
    "router_topk_sorting": (
        from_hidden, ("hidden_states", "router_weight", "router_bias", "logits_out", *OUTPUTS)),
    "router_topk_sorting, chain": (
        lambda t: from_hidden(t, dispatch_policy=1),
        ("hidden_states", "router_weight", "router_bias", "logits_out", *OUTPUTS)),
    "by name": (
        lambda t: aiter.fused_topk_moe_sorting_fwd(
            moe_buf=t["moe_buf"], need_renorm=True, unit_size=32, topk=K, num_experts=E,
            gating_output=t["gating_output"],
            **dict(zip(("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids"),
                       buffers(t)[:4], strict=True))),
        ("gating_output", *OUTPUTS)),
    "torch.ops": (
        lambda t: torch.ops.aiter.topk_softmax_sorting(t["gating_output"], K, *SORT),
        ("gating_output",)),
    "torch.ops, written": (
        lambda t: torch.ops.aiter.moe_sorting_opus_fwd(
            t["topk_ids"], t["topk_weights"], *buffers(t), E, 32),
        ("topk_weights", *OUTPUTS)),
}  # fmt: skip
PAIRS = [(entry, name) for entry, (_, names) in ENTRIES.items() for name in names]
SENTENCE = (
    "{}: expected a tensor that needs no gradient, as routing has no backward, got one that {}"
)


@pytest.mark.parametrize(("entry", "name"), PAIRS)
@pytest.mark.parametrize("twice", [False, True], ids=["first", "known"])
def test_a_lost_gradient_is_refused(entry: str, name: str, twice: bool) -> None:
    """Also where the same call has been made without one, and is known."""
    call, tensors = ENTRIES[entry][0], inputs()
    if twice:
        call(tensors)
        call(tensors)
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=SENTENCE.format(name, "requires grad")):
        call(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(tensor.detach().nan_to_num(), before[key].nan_to_num()), key
    with torch.no_grad():
        call(tensors)
    with torch.inference_mode():
        call(tensors)


@pytest.mark.parametrize(("entry", "name"), PAIRS)
def test_a_lost_tangent_is_refused(entry: str, name: str) -> None:
    call, tensors = ENTRIES[entry][0], inputs()
    with forward_ad.dual_level():
        call(tensors)
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(ValueError, match=SENTENCE.format(name, "has a tangent")):
            call(tensors)


COMPILED = [(entry, ENTRIES[entry][1][-1]) for entry in ENTRIES if not entry.endswith("written")]
COMPILED += [("fused_moe_from_logits", "w1"), ("fused_moe", "bias2")]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("entry", "name"), COMPILED)
def test_a_compiled_call_refuses(entry: str, name: str, backend: str) -> None:
    """The error is ours, not one of torch.compile's; without gradients the same function runs."""
    torch._dynamo.reset()
    call, tensors = ENTRIES[entry][0], inputs()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    compiled(tensors)
    # NOTE: another tensor, as guards of PyTorch 2.11 miss requires_grad_() on one that they have seen in
    # a dict or a module; what is lost then is lost for every operation of PyTorch's own as well.
    tensors[name] = tensors[name].clone().requires_grad_()
    kinds: tuple[type[Exception], ...] = (ValueError,)
    if name in OUTPUTS or entry == "torch.ops":
        # NOTE: what is called by its registered name, or writes to a leaf, is refused while traced.
        kinds = (ValueError, torch._dynamo.exc.TorchRuntimeError, RuntimeError)
    with pytest.raises(kinds) as caught:
        compiled(tensors)
    if caught.type is ValueError:
        assert SENTENCE.format(name, "requires grad") in str(caught.value)
    with torch.no_grad():
        compiled(tensors)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_call_refuses(strict: bool) -> None:
    class Layer(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            out: Tensor = topk_softmax_sorting(logits, K, *SORT)[3]
            return out

    logits = inputs()["gating_output"]
    program = torch.export.export(Layer(), (logits,), strict=strict).module()
    assert program(logits).tolist()[1] == M
    needs = logits.clone().requires_grad_()
    refusal = "gating_output: expected a tensor that needs no gradient"
    with pytest.raises(ValueError, match=refusal):
        program(needs)
    with torch.no_grad():
        program(needs)
    if strict and VERSION < (2, 7):  # which does not tell that it exports: the program refuses
        program = torch.export.export(Layer(), (needs,), strict=strict).module()
        with pytest.raises(ValueError, match=refusal):
            program(needs)
        return
    with pytest.raises(
        Exception, match="Observed exception" if strict and VERSION < (2, 9) else refusal
    ):
        torch.export.export(Layer(), (needs,), strict=strict)


def versions(tensors: list[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_given_outputs_are_counted(policy: int) -> None:
    tensors = inputs()
    for sort in (
        lambda out: topk_softmax_sorting(
            tensors["gating_output"], K, *SORT, dispatch_policy=policy, out=out),
        lambda out: moe_sorting(
            tensors["topk_ids"], tensors["topk_weights"], *SORT, dispatch_policy=policy, out=out),
    ):  # fmt: skip
        out = tuple(buffers(tensors))
        for _ in range(3):
            before = versions(list(out))
            sort(out)
            assert all(now > old for now, old in zip(versions(list(out)), before, strict=True))
        given = [tensors[name] for name in ("gating_output", "topk_ids", "topk_weights")]
        before = versions(given)
        sort(out)
        assert versions(given) == before


def test_ops_count_what_they_write_and_nothing_else() -> None:
    tensors = inputs()
    out = buffers(tensors)
    weights, ids, source = torch.empty(M, K), *torch.empty(2, M, K, dtype=torch.int32)
    workspace = torch.empty(
        aiter.moe_sorting_opus_get_workspace_size(M, E, K, 2), dtype=torch.uint8
    )
    gating, given_ids, given = (tensors[n] for n in ("gating_output", "topk_ids", "topk_weights"))
    calls: list[tuple[Callable[[], Any], list[Tensor], list[Tensor]]] = [
        (lambda: aiter.topk_softmax(weights, ids, source, gating, True), [weights, ids, source],
         [gating]),
        (lambda: aiter.topk_softmax(weights, ids, token_expert_indices=source, gating_output=gating,
                                    need_renorm=True), [weights, ids, source], [gating]),
        (lambda: aiter.fused_topk_moe_sorting_fwd(gating, *out, E, K, 32, True), out, [gating]),
        (lambda: aiter.moe_sorting_opus_fwd(given_ids, given, *out, E, 32), out,
         [given_ids, given]),
        (lambda: aiter.moe_sorting_opus_fwd(
            given_ids, given, *out, E, 32, workspace=workspace, dispatch_policy=2),
         [*out, workspace], [given_ids, given]),
        (lambda: aiter.moe_sorting_opus_fwd(
            given_ids, given, *out, E, 32, None, None, workspace, 2),
         [*out, workspace], [given_ids, given]),
        (lambda: torch.ops.aiter.fused_topk_moe_sorting_fwd(gating, *out, E, K, 32, True), out,
         [gating]),
        (lambda: torch.ops.aiter.topk_softmax(weights, ids, source, gating, True),
         [weights, ids, source], [gating]),
    ]  # fmt: skip
    for call, written, read in calls:
        before, kept = versions(written), versions(read)
        call()
        assert all(now > old for now, old in zip(versions(written), before, strict=True))
        assert versions(read) == kept
        with torch.inference_mode():
            call()


def test_a_backward_notices_the_write() -> None:
    """What another operation saved for its backward is found to be modified, as by `zero_()`."""
    tensors = inputs()
    out = buffers(tensors)
    factor = torch.ones(M, D, requires_grad=True)
    product = (factor * tensors["moe_buf"]).sum()
    topk_softmax_sorting(tensors["gating_output"], K, *SORT, out=tuple(out))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_refused_call_counts_nothing() -> None:
    tensors = inputs()
    out = buffers(tensors)
    before = versions(out)
    with pytest.raises(ValueError, match="topk"):
        aiter.fused_topk_moe_sorting_fwd(tensors["gating_output"], *out, E, E + 1, 32, True)
    assert versions(out) == before


def test_the_functions_by_themselves() -> None:
    plain, needs = torch.ones(2), torch.ones(2, requires_grad=True)
    refuse_gradients(a=plain, b=None, c="text", d=needs.detach())
    with pytest.raises(ValueError, match="^b: expected .* got one that requires grad; call under"):
        refuse_gradients(a=plain, b=needs)
    with torch.no_grad():
        refuse_gradients(a=needs)
    before = plain._version
    wrote((plain,))
    assert plain._version == before + 1
