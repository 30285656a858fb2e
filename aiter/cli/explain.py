"""Which path does a shape take, and why?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from aiter import dispatch
from aiter.cli.table import format_table
from aiter.ops.device import current_device
from aiter.ops.fused_topk_moe_sorting import fused_topk_moe_sorting_max_tokens
from aiter.ops.moe_sorting_opus import moe_sorting_opus_get_workspace_size


def main(argv: Sequence[str]) -> int:
    """Prints the choice, its reason and the sizes of the buffers; 1 if there is no such problem."""
    parser = argparse.ArgumentParser("python -m aiter explain", description=__doc__)
    parser.add_argument("--tokens", type=int, required=True, help="rows of router logits (M)")
    parser.add_argument("--experts", type=int, required=True, help="experts (E)")
    parser.add_argument("--topk", type=int, required=True, help="experts per token (K)")
    parser.add_argument("--block-size", type=int, default=32, help="slots per block (B)")
    parser.add_argument("--policy", type=int, default=0, help="dispatch_policy: 0, 1 or 2")
    parser.add_argument("--device", help="cpu or cuda[:index]; the GPU if there is one, else cpu")
    try:
        print(_explain(parser.parse_args(argv)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(options: argparse.Namespace) -> str:
    dispatch.check_policy(options.policy)
    device = current_device(options.device)
    m, e, k, b = options.tokens, options.experts, options.topk, options.block_size
    most = fused_topk_moe_sorting_max_tokens(e, k, device=device)
    workspace = moe_sorting_opus_get_workspace_size(m, e, k, options.policy, device=device)
    path, reason = dispatch.explain(options.policy, m, most, workspace)
    slots = m * k + e * b - k
    rows = [
        ("path", path),
        ("why", reason),
        ("device", str(device)),
        ("largest M of the fused launch", str(most)),
        ("workspace", "0 bytes" if path == "fused" else f"{workspace} bytes"),
        ("sorted_ids, sorted_weights", f"{slots} slots"),
        ("sorted_expert_ids", f"{-(-slots // b)} blocks"),
    ]
    return format_table((f"M={m} E={e} K={k} B={b}", f"policy {options.policy}"), rows)
