"""Is our launch in front of ROCm's own `fused_moe` equal to its own top-k and sort?

`python op_tests/integrations/rocm_wheel.py FOLDER` in an environment with amd-aiter and this package
under the name fused_moe_routing; `.ci/side_by_side` makes one. Everything of ROCm's Python runs as it
is, the choice of kernels and block sizes, its `moe_sorting`, its registered op, but for what needs a
GPU: its module of enums is made from its own header in FOLDER, the kernels of top-k and sort are this
package's and a plain reference, and both kinds of products are a plain sum that keeps what it was given.

Each call is made twice, by upstream alone and by ours. Whatever the sum was given is compared, to the
bit, and so is the output. Where upstream refuses a combination, ours has to do the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXPERTS, TOPK, WIDTH, INNER = 16, 4, 256, 128
TOKENS = (1, 5, 33)
ENUMS = """
import enum

class ActivationType(enum.IntEnum):
    "Members: from aiter_enum.h"
    {ActivationType}

class QuantType(enum.IntEnum):
    "Members: from aiter_enum.h"
    {QuantType}
"""

RESTRICTED = {"per_1x32": "fp4x2", "per_1x128": "fp8", "per_128x128": "fp8", "per_Tensor": "fp8"}
DTYPES = {"No": ("bf16", "fp16"), "per_Token": ("fp8", "i8", "u32")}


def prepare(folder: Path) -> None:
    """What ROCm's package needs to be imported without a GPU."""
    os.environ.update(
        AITER_JIT_DIR=str(folder), GPU_ARCHS="gfx942", CU_NUM="304", AITER_AOT_IMPORT="1"
    )
    spec = importlib.util.find_spec("aiter_meta")
    assert spec is not None and spec.submodule_search_locations
    header = Path(list(spec.submodule_search_locations)[0]) / "csrc" / "include" / "aiter_enum.h"
    members = {}
    for name, body in re.findall(r"enum class (\w+) : int\s*\{(.*?)\}", header.read_text(), re.S):
        value, lines = -1, []
        for entry in filter(None, (part.strip() for part in body.split(","))):
            label, _, number = entry.partition("=")
            value = int(number) if number else value + 1
            lines.append(f"{label.strip()} = {value}")
        members[name] = "\n    ".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "module_aiter_enum.py").write_text(ENUMS.format(**members))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).resolve())

import fused_moe_routing as ours  # noqa: E402
import torch  # noqa: E402
from fused_moe_routing import reference  # noqa: E402
from fused_moe_routing.fused_moe import last_path  # noqa: E402
from fused_moe_routing.integrations import rocm_aiter, rocm_sort  # noqa: E402
from torch import Tensor  # noqa: E402

import aiter  # noqa: E402
import aiter.fused_moe as upstream  # noqa: E402

SORTED = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf")
given: threading.local = threading.local()  # what the sum was given, by thread
own_sorts: Counter[str] = Counter()
paths: Counter[str] = Counter()


def plain_sort(
    topk_ids: Tensor, topk_weights: Tensor, sorted_ids: Tensor, sorted_weights: Tensor,
    sorted_expert_ids: Tensor, num_valid_ids: Tensor, moe_buf: Tensor, num_experts: int,
    block_size: int, expert_mask: Tensor | None = None, num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
) -> None:  # fmt: skip
    """In the place of the kernel of the sort."""
    own_sorts["calls"] += 1
    outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    rows = topk_ids.shape[0] if num_local_tokens is None else int(num_local_tokens)
    found = reference.moe_sorting(
        topk_ids, topk_weights, num_experts, moe_buf.shape[1], moe_buf.dtype, block_size,
        expert_mask, num_local_tokens,
    )  # fmt: skip
    for output, tensor in zip(outputs[:4], found[:4], strict=True):
        assert output.shape == tensor.shape
        output.copy_(tensor)
    moe_buf[:rows] = 0


def plain_products(
    hidden_states: Tensor, w1: Tensor, w2: Tensor, topk: int, *positional: Any, **named: Any
) -> Tensor:
    """In the place of both kinds of products: a sum over the sorted slots, in float32."""
    buffers = dict(zip(SORTED, positional, strict=False))
    ids, weights, experts, counts, moe_buf = positional[:5]
    block = positional[6]
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    numbers = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
    given.last = {**kept, "topk": topk, "block": block, "others": repr(sorted(numbers.items()))}
    scale = 1 + experts_of(w1).mean(1) + experts_of(w2).mean(1)
    if isinstance(named.get("w1_scale"), Tensor):
        scale = scale * (1 + named["w1_scale"].float().mean())
    slots = torch.arange(int(counts[0]))
    slots = slots[(ids[slots] >> 24 & 0xFF) < topk]
    tokens = ids[slots] & 0xFFFFFF
    factors = weights[slots] * scale[experts[slots // block].long()]
    products = factors[:, None] * hidden_states[tokens].float()
    return moe_buf.copy_(moe_buf.float().index_add_(0, tokens, products))


def experts_of(weight: Tensor) -> Tensor:
    """A row per expert, of bytes where the numbers are packed."""
    plain = weight.dtype in (torch.bfloat16, torch.float16, torch.int8)
    return (weight if plain else weight.view(torch.uint8)).flatten(1).float()


def replace_kernels() -> None:
    def topk_softmax(*tensors: Any) -> None:
        ours.topk_softmax(*tensors)

    aiter.moe_sorting_fwd = plain_sort
    aiter.topk_softmax = aiter.topk_softmax_asm = topk_softmax
    upstream.fused_moe_1stage = upstream.fused_moe_2stages = plain_products


def weights_of(kind: str, dtype: str, gated: bool, local: int) -> dict[str, Any]:
    """w1 and w2 of a type, with scales where the type has some."""
    dt = {"fp4x2": aiter.dtypes.fp4x2, "fp8": aiter.dtypes.fp8, "u32": torch.uint32}
    chosen = dt.get(dtype) or getattr(aiter.dtypes, dtype)
    packed = {"fp4x2": 2, "u32": 8}.get(dtype, 1)
    rows = 2 * INNER if gated else INNER
    found: dict[str, Any] = {}
    for name, shape in (
        ("w1", (local, rows, WIDTH // packed)),
        ("w2", (local, WIDTH, INNER // packed)),
    ):
        if chosen in (torch.bfloat16, torch.float16):
            found[name] = torch.randn(shape).to(chosen)
        else:
            size = torch.empty((), dtype=chosen).element_size()
            raw = torch.randint(0, 100, (*shape[:2], shape[2] * size), dtype=torch.uint8)
            found[name] = raw.view(chosen)
        if kind != "No":
            found[f"{name}_scale"] = torch.rand(local, shape[1], 1)
    return found


def calls() -> Iterator[dict[str, Any]]:
    """Every combination that reaches the sort: types by masks and rows, then the sort's own."""
    types = [
        (kind, dtype)
        for kind in aiter.QuantType.__members__
        for dtype in DTYPES.get(kind, (RESTRICTED.get(kind, ""),))
        if dtype
    ]
    cycle = itertools.cycle(itertools.product((None, 32, 64), (0, 1, 2), (None, "fp16"), TOKENS))
    activations = [name for name in aiter.ActivationType.__members__ if name != "No"]
    for (kind, dtype), activation, first, gated, mask, local in itertools.product(
        types, activations, (False, True), (True, False), ("none", "half", "longer"), (False, True)
    ):
        block, policy, out, tokens = next(cycle)
        yield dict(
            kind=kind, dtype=dtype, activation=activation, first=first, gated=gated, mask=mask,
            local=local, block=block, policy=policy, out=out, tokens=tokens,
        )  # fmt: skip
    for block, policy, out, tokens, mask, local in itertools.product(
        (None, 16, 32, 64, 128), (0, 1, 2), (None, "fp16"), TOKENS, ("none", "half", "longer"),
        (False, True),
    ):  # fmt: skip
        yield dict(
            kind="No", dtype="bf16", activation="Silu", first=False, gated=True, mask=mask,
            local=local, block=block, policy=policy, out=out, tokens=tokens,
        )  # fmt: skip


def arguments(call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Tensors that both take, upstream's keywords, and the logits."""
    keywords: dict[str, Any] = {
        "activation": aiter.ActivationType[call["activation"]],
        "quant_type": aiter.QuantType[call["kind"]],
        "doweight_stage1": call["first"],
        "block_size_M": call["block"],
        "moe_sorting_dispatch_policy": call["policy"],
        "dtype": None if call["out"] is None else aiter.dtypes.fp16,
    }
    experts = EXPERTS
    if call["mask"] != "none":
        mask = torch.arange(EXPERTS, dtype=torch.int32) % 2
        experts = int(mask.sum())
        if call["mask"] == "longer":
            mask = torch.cat((mask, mask.new_zeros(1)))
        keywords["expert_mask"] = mask
    if call["local"]:
        keywords["num_local_tokens"] = torch.tensor([(call["tokens"] + 1) // 2], dtype=torch.int32)
    found = weights_of(call["kind"], call["dtype"], call["gated"], experts)
    tensors = {name: found.pop(name) for name in ("w1", "w2")}
    logits = torch.randn(call["tokens"], EXPERTS)
    logits[:, 3] = logits[:, 5]  # NOTE: equal logits, as bf16 has many.
    tensors["hidden_states"] = torch.randn(call["tokens"], WIDTH).bfloat16()
    return tensors, {**keywords, **found}, logits.bfloat16()


def attempt(function: Any, *args: Any, **keywords: Any) -> tuple[Any, dict[str, Any] | None]:
    """The result, or the type of the error, and what the sum was given."""
    given.last = None
    try:
        result = function(*args, **keywords)
    except Exception as error:
        return type(error), given.last
    return result, given.last


def compare(call: dict[str, Any]) -> str:
    """Both calls, and what they were: "equal" or "refused"."""
    tensors, keywords, logits = arguments(call)
    weights, ids = upstream.fused_topk(tensors["hidden_states"], logits, TOPK, True)
    _, plain_ids = reference.topk_softmax(logits, TOPK, True)
    assert torch.equal(ids, plain_ids), call
    rocm_aiter.restore()
    want, want_given = attempt(
        upstream.fused_moe, **tensors, topk_weight=weights, topk_ids=ids, **keywords
    )
    before = own_sorts["calls"]
    topk_out = (torch.zeros_like(weights), torch.zeros_like(ids))
    got, got_given = attempt(
        rocm_aiter.fused_moe_from_logits,
        **tensors, gating_output=logits, topk=TOPK, topk_out=topk_out,
        dispatch_policy=call["policy"], **keywords,
    )  # fmt: skip
    if isinstance(want, type):
        assert got is want, (call, got, want)
        return "refused by both"
    assert isinstance(got, Tensor) and got_given and want_given, (call, got)
    assert own_sorts["calls"] == before, f"{call}: upstream's own sort ran"
    paths[last_path()] += 1
    rows = int(keywords.get("num_local_tokens", call["tokens"]))
    slots = int(want_given["num_valid_ids"][0])
    filled = {
        "sorted_ids": slots, "sorted_weights": slots, "num_valid_ids": 2, "moe_buf": rows,
        "sorted_expert_ids": slots // want_given["block"],
    }  # fmt: skip
    for name, length in filled.items():
        assert torch.equal(got_given[name][:length], want_given[name][:length]), (call, name)
        if call["mask"] != "longer":
            assert got_given[name].shape == want_given[name].shape, (call, name)
    for name in ("topk", "block", "others"):
        assert got_given[name] == want_given[name], (call, name)
    assert torch.equal(got[:rows], want[:rows]) and got.dtype == want.dtype, call
    assert torch.equal(topk_out[1][:rows], ids[:rows]), call
    assert torch.equal(topk_out[0][:rows], weights[:rows]), call
    return "equal"


USUAL = {
    "kind": "No", "dtype": "bf16", "activation": "Silu", "first": False, "gated": True,
    "mask": "none", "local": False, "block": None, "policy": 0, "out": None, "tokens": 5,
}  # fmt: skip


def check_threads() -> None:
    """Ours and upstream's own calls at once, each with what belongs to it."""
    jobs = [arguments({**USUAL, "tokens": tokens}) for tokens in (3, 4, 5, 6)]
    start, wrong = threading.Barrier(2 * len(jobs)), []

    def work(index: int) -> None:
        tensors, keywords, logits = jobs[index // 2]
        weights, ids = upstream.fused_topk(tensors["hidden_states"], logits, TOPK, True)
        start.wait()
        for _ in range(5):
            if index % 2:
                upstream.fused_moe(**tensors, topk_weight=weights, topk_ids=ids, **keywords)
            else:
                rocm_aiter.fused_moe_from_logits(
                    **tensors, gating_output=logits, topk=TOPK, **keywords
                )
            slots = int(given.last["num_valid_ids"][0])
            entries = int((given.last["sorted_ids"][:slots] >> 24 < TOPK).sum())
            if entries != TOPK * logits.shape[0]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2 * len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def check_compiled() -> None:
    """One op of ours in a graph, which calls upstream's op."""
    tensors, keywords, logits = arguments(USUAL)

    def step(hidden: Tensor, logits: Tensor) -> Tensor:
        return rocm_aiter.fused_moe_from_logits(
            hidden * 2, tensors["w1"], tensors["w2"], logits + 1, TOPK, **keywords
        )

    with torch.no_grad():
        want = step(tensors["hidden_states"], logits)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tensors["hidden_states"], logits), want)


def check_rules() -> None:
    """Rules beyond softmax, with a bias and a shared expert, against ids by our top-k."""
    grouped = ours.RoutingRule("sigmoid", num_expert_group=4, topk_group=2)
    for rule in (grouped, ours.RoutingRule("sigmoid", num_shared_experts=1)):
        tensors, keywords, logits = arguments(USUAL)
        shared = rule.num_shared_experts
        w1, w2 = (torch.cat((tensors[w], tensors[w][:shared])) for w in ("w1", "w2"))
        bias, shape = torch.randn(EXPERTS), (logits.shape[0], TOPK + shared)
        weights, ids = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
        ours.topk_routing(weights, ids, logits, rule=rule, correction_bias=bias)
        hidden = tensors["hidden_states"]
        want = upstream.fused_moe(hidden, w1, w2, weights, ids, **keywords)
        got = rocm_aiter.fused_moe_from_logits(
            hidden, w1, w2, logits, TOPK, rule=rule, correction_bias=bias, **keywords
        )
        assert torch.equal(got, want), rule


def main() -> int:
    torch.manual_seed(0)
    own = upstream.moe_sorting
    assert not rocm_sort._found, "imported before it was asked for"
    assert rocm_aiter.available() is None, rocm_aiter.available()
    replace_kernels()
    outcomes = Counter(map(compare, calls()))
    assert outcomes["equal"] > 300, outcomes
    check_rules()
    check_threads()
    check_compiled()
    assert rocm_aiter.restore() and upstream.moe_sorting is own
    print(
        f"{rocm_sort._version()}: {dict(outcomes)}, our paths {dict(paths)}; rules, threads,"
        " torch.compile and putting the sort back: as expected"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
