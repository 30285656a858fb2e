"""Which path does a shape take, and why?"""

from __future__ import annotations

import argparse

from aiter import dispatch
from aiter.cli.table import format_table
from aiter.ops.device import current_device
from aiter.ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from aiter.ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--tokens", type=int, required=True, help="rows of router logits (M)")
    parser.add_argument("--experts", type=int, required=True, help="experts (E)")
    parser.add_argument("--topk", type=int, required=True, help="experts per token (K)")
    parser.add_argument("--block-size", type=int, default=32, help="slots per block (B)")
    parser.add_argument("--policy", type=int, default=0, help="dispatch_policy: 0, 1 or 2")
    parser.add_argument("--device", help="cpu or cuda[:index]; the GPU if there is one, else cpu")


def run(options: argparse.Namespace) -> int:
    """Prints the choice, its reason and the sizes of the buffers; raises ValueError on bad ones."""
    dispatch.check_policy(options.policy)
    device = current_device(options.device)
    shape = (options.tokens, options.experts, options.topk)
    most = fused_topk_moe_sorting_max_tokens(options.experts, options.topk, device=device)
    workspace = moe_sorting_opus_get_workspace_size(*shape, options.policy, device=device)
    path, reason = dispatch.explain(options.policy, options.tokens, most, workspace)
    slots = options.tokens * options.topk + options.experts * options.block_size - options.topk
    rows = [
        ("path", path),
        ("why", reason),
        ("device", str(device)),
        ("largest M of the fused launch", str(most)),
        ("workspace", "0 bytes" if path == "fused" else f"{workspace} bytes"),
        ("sorted_ids, sorted_weights", f"{slots} slots"),
        ("sorted_expert_ids", f"{-(-slots // options.block_size)} blocks"),
    ]
    m, e, k = shape
    print(
        format_table(
            (f"M={m} E={e} K={k} B={options.block_size}", "policy " + str(options.policy)), rows
        )
    )
    return 0
