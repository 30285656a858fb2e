"""Which path does a shape take, and why? And what do the sorted buffers look like?

explain --tokens 64 --experts 128 --topk 4     the choice, its reason, the sizes
explain ... --hidden 2880                      the same from hidden states of that width
explain --draw                                 a small example, slot by slot
explain --table                                what was measured, and where
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch

from .. import fused_moe
from ..jit import envs
from ..ops.device import current_device
from ..ops.fused_router_sorting import fused_router_sorting_max_tokens
from ..ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from ..ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size
from ..routing import dispatch
from ..routing.basis import basis_of, choose, choose_router
from ..routing.buffers import TOKEN_BITS, TOKEN_MASK, sorted_sizes
from .options import (
    MOST_TOKENS,
    MOST_TOPK,
    PROGRAM,
    Parser,
    add_device,
    check_memory,
    check_topk,
    whole,
)
from .table import format_table

_DTYPES: dict[str, dispatch.Logits] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
_SMALL = {"tokens": 6, "experts": 5, "topk": 2, "block_size": 4}  # what --draw draws unasked
_MOST_DRAWN = 512  # slots
_COLOURS = (36, 33, 35, 32, 34, 31)  # of tokens, in turn
_DIM = 90


def main(argv: Sequence[str]) -> int:
    """Prints the choice, its reason and the sizes of the buffers; ends with 2 where there are none."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.table:
        print(_table(current_device(options.device)))
        return 0
    for name, small in _SMALL.items():
        if getattr(options, name) is None:
            default = 32 if name == "block_size" and not options.draw else small
            if not options.draw and name != "block_size":
                parser.error(f"expected --{name}, or --draw for a small example")
            setattr(options, name, default)
    check_topk(parser, options.topk, options.experts)
    if options.draw:
        moe_buf = 4 * options.tokens * options.model_dim
        check_memory(parser, moe_buf, current_device(options.device))
    try:
        print(_explain(options))
        if options.draw:
            print("\n" + _draw(options))
    except ValueError as error:
        parser.error(str(error))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        f"{PROGRAM} explain",
        description=__doc__,
    )
    parser.add_argument("--tokens", type=whole(1, MOST_TOKENS), help="rows of router logits (M)")
    parser.add_argument("--experts", type=whole(1), help="experts (E)")
    parser.add_argument("--topk", type=whole(1, MOST_TOPK), help="experts per token (K)")
    parser.add_argument("--model-dim", type=whole(0), default=4096, help="width of moe_buf (D)")
    parser.add_argument(
        "--hidden", type=whole(1), help="width of hidden states (D'), to start from these"
    )
    parser.add_argument(
        "--block-size",
        type=whole(1),
        help="slots per block (B); 32, or 4 with --draw",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the logits")
    parser.add_argument(
        "--policy", type=int, choices=(0, 1, 2), default=0, help="dispatch_policy: 0, 1 or 2"
    )
    add_device(parser)
    parser.add_argument(
        "--draw", action="store_true", help="route random logits and draw the result"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the measurements that decide, and their origin"
    )
    return parser


def _explain(options: argparse.Namespace) -> str:
    device = current_device(options.device)
    m, e, k, b = options.tokens, options.experts, options.topk, options.block_size
    head = (f"M={m} E={e} K={k} B={b}", f"policy {options.policy}")
    router = [] if options.hidden is None else _router_rows(options, device)
    if router and router[0][1] == "router":
        slots, blocks = sorted_sizes(m, k, e, b)
        return format_table(head, [*router, ("device", str(device)), *_sizes(slots, blocks)])
    most = fused_topk_moe_sorting_max_tokens(e, k, device=device)
    dtype: dispatch.Logits = _DTYPES[options.dtype] if options.hidden is None else "f32"
    problem = dispatch.Problem(m, e, k, options.model_dim, options.policy, dtype)
    choice = choose(problem, most, device)
    workspace = 0
    if choice.path != "fused":
        sort_policy = dispatch.POLICY_OF_CHAIN[choice.path]
        workspace = moe_sorting_opus_get_workspace_size(m, e, k, sort_policy, device=device)
    slots, blocks = sorted_sizes(m, k, e, b)
    rows = [
        *router,
        ("path", choice.path),
        ("why", dispatch.explain(problem, choice, most)),
        ("rule", choice.rule),
        ("decided by", _origin(choice, device)),
        ("device", str(device)),
        ("largest M of the fused launch", str(most)),
        ("workspace", f"{workspace} bytes"),
        *_sizes(slots, blocks),
    ]
    return format_table(head, rows)


def _sizes(slots: int, blocks: int) -> list[tuple[str, str]]:
    return [
        ("sorted_ids, sorted_weights", f"{slots} slots"), ("sorted_expert_ids", f"{blocks} blocks")
    ]  # fmt: skip


def _router_rows(options: argparse.Namespace, device: torch.device) -> list[tuple[str, str]]:
    """How the router's product is made, and why: the path "router", or a launch of its own."""
    m, e, k = options.tokens, options.experts, options.topk
    most = 0
    if options.policy == dispatch.AUTOMATIC:  # NOTE: as in a call, which builds no module unasked.
        most = fused_router_sorting_max_tokens(e, k, device=device)
    problem = dispatch.Problem(m, e, k, options.hidden, options.policy, "f32")
    choice = choose_router(problem, most, device)
    why = [
        ("why", dispatch.explain_router(problem, choice, most)),
        ("rule", choice.rule),
        ("decided by", _origin(choice, device)),
    ]
    if choice.path == "fused":
        return [("path", "router"), *why]
    by = "a launch of ours" if choice.path == "product" else "PyTorch's linear"
    return [("router's product", f"{by}, before the path below"), *why]


def _origin(choice: dispatch.Choice | dispatch.RouterChoice, device: torch.device) -> str:
    """Where a choice comes from: the caller, the environment, a file or the built-in table."""
    if choice.rule == "policy":
        return "the caller's dispatch_policy"
    row, basis = choice.row, basis_of(device)
    origin = basis.origin
    if isinstance(choice, dispatch.RouterChoice):
        origin = basis.router_origin(choice.row)
    return f"{origin}: {row.source}, {row.date}, `{row.command}`" if row else origin


def _entries(
    where: str, by_dtype: Mapping[dispatch.Logits, tuple[dispatch.Crossover, ...]]
) -> list[tuple[str, dispatch.Crossover]]:
    return [(f"{where}, {logits} logits", row) for logits, rows in by_dtype.items() for row in rows]


def _table(device: torch.device) -> str:
    """What counts on this device, and the built-in table of every architecture."""
    basis = basis_of(device)
    entries = [(str(device), row) for row in basis.rows]
    for by_dtype in (basis.rows_by_dtype, basis.modelled):
        entries += _entries(str(device), by_dtype)
    for name, family in dispatch.MEASURED.items():
        entries += [(name, row) for row in family]
        entries += _entries(name, dispatch.rows_by_dtype_of(name))
    rows: list[tuple[object, ...]] = [
        (where, row.num_experts, row.topk, row.model_dim, row.fused_tokens, row.oneshot_tokens,
         row.source, row.date, row.command)
        for where, row in entries
    ]  # fmt: skip
    rows += [
        (
            name,
            "-",
            "-",
            "-",
            dispatch.estimate_of(name)
            or ("by shape" if dispatch.modelled_of(name) else "capacity"),
            "-",
            "modelled" if dispatch.modelled_of(name) else "not measured",
            "-",
            f"{PROGRAM} tune",
        )
        for name, family in dispatch.MEASURED.items()
        if not family
    ]
    speaking = (*basis.router_rows, *basis.router_modelled)
    router = [
        (where, row.width, row.num_experts, row.topk, row.fused_tokens, row.source, row.date,
         row.command)
        for where, family in (
            (str(device), speaking),
            *((name, dispatch.router_rows_of(name)) for name in dispatch.ROUTER_TIMES),
        )
        for row in family
    ]  # fmt: skip
    router_headers = ("where", "D'", "E", "K", "one launch up to", "source", "date", "command")
    headers = ("where", "E", "K", "D", "fused up to", "oneshot up to", "source", "date", "command")
    return (
        f"{device}: decided by {basis.origin}\n\n{format_table(headers, rows)}"
        f"\n\nfrom hidden states: decided by {basis.router_origin(next(iter(speaking), None))}"
        f"\n\n{format_table(router_headers, router)}"
    )


def _draw(options: argparse.Namespace) -> str:
    """Routes random logits and shows who went where."""
    m, e, k, b = options.tokens, options.experts, options.topk, options.block_size
    capacity, _ = sorted_sizes(m, k, e, b)
    if capacity > _MOST_DRAWN:
        raise ValueError(f"--draw: expected at most {_MOST_DRAWN} slots, got {capacity}")
    logits = torch.randn(m, e, generator=torch.Generator().manual_seed(0))
    device = current_device(options.device)
    sorted_ids, weights, expert_ids, num_valid_ids, _ = (
        buffer.cpu()
        for buffer in fused_moe.topk_softmax_sorting(
            logits.to(device), k, e, 1, torch.float32, block_size=b, dispatch_policy=options.policy
        )
    )
    slots, num_local = num_valid_ids.tolist()
    lines = [f"num_valid_ids = [{slots}, {num_local}]: {slots} slots in use, {num_local} tokens"]
    for block in range(slots // b):
        cells = []
        for slot in range(block * b, (block + 1) * b):
            token = int(sorted_ids[slot]) & TOKEN_MASK
            choice = int(sorted_ids[slot]) >> TOKEN_BITS & 0xFF
            if token == num_local:
                cells.append(_paint(f"{'padding':^14}", _DIM))
            else:
                text = f"t{token} slot {choice} {float(weights[slot]):.2f}"
                cells.append(_paint(f"{text:^14}", _COLOURS[token % len(_COLOURS)]))
        lines.append(f"block {block:<2} expert {int(expert_ids[block]):<3} |{'|'.join(cells)}|")
    unhit = sorted(set(range(e)) - set(expert_ids[: slots // b].tolist()))
    if unhit:
        lines.append(f"no block: expert {', '.join(map(str, unhit))} (chosen by no token)")
    return "\n".join(lines)


def _paint(text: str, colour: int) -> str:
    """The text in colour, on a terminal and unless NO_COLOR is set."""
    if not sys.stdout.isatty() or envs.NO_COLOR.get():
        return text
    return f"\033[{colour}m{text}\033[0m"
