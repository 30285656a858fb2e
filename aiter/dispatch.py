"""Which path routes a problem, and why?

A pure function of the shapes and of what the device can hold, so that it can be printed
(`python -m aiter explain`), tested without a GPU, and does not cost a launch anything.

Paths: "fused" is the single launch; "oneshot" and "multiphase" are the separate chain, top-k in
one launch and the sort in one or three more. The chain's own choice is its kernels' (workspace
needed or not), so that a direct call of `moe_sorting_opus_fwd` and one through `fused_moe` cannot
differ.
"""

from __future__ import annotations

from typing import Literal

Path = Literal["fused", "oneshot", "multiphase"]

AUTOMATIC, ONESHOT, MULTIPHASE = 0, 1, 2
POLICIES = (AUTOMATIC, ONESHOT, MULTIPHASE)


def takes_fused(dispatch_policy: int, tokens: int, max_tokens: int) -> bool:
    """Whether the fused launch routes `tokens` rows.

    Args:
        dispatch_policy: 0 automatic; 1 and 2 force the chain.
        tokens: M.
        max_tokens: what `fused_topk_moe_sorting_max_tokens` says for the problem's E and K.
    """
    return dispatch_policy == AUTOMATIC and tokens <= max_tokens


def chain_path(workspace_bytes: int) -> Path:
    """Which sort the chain runs, from the workspace that it wants."""
    return "multiphase" if workspace_bytes else "oneshot"


def explain(
    dispatch_policy: int, tokens: int, max_tokens: int, workspace_bytes: int
) -> tuple[Path, str]:
    """The path and the reason for it, in words. Arguments as above."""
    if takes_fused(dispatch_policy, tokens, max_tokens):
        return "fused", f"M = {tokens} fits in the LDS of one workgroup (at most {max_tokens})"
    path = chain_path(workspace_bytes)
    if dispatch_policy != AUTOMATIC:
        return path, f"dispatch_policy {dispatch_policy} forces the separate chain"
    return path, f"M = {tokens} is more than the {max_tokens} that one workgroup's LDS can hold"


def check_policy(dispatch_policy: int) -> None:
    """Raises TypeError for what is not an int, and ValueError for anything but 0, 1 and 2."""
    if not isinstance(dispatch_policy, int) or isinstance(dispatch_policy, bool):
        raise TypeError(f"dispatch_policy: expected an int, got {type(dispatch_policy).__name__}")
    if dispatch_policy not in POLICIES:
        raise ValueError(
            "dispatch_policy: expected 0 (automatic), 1 (oneshot chain) or 2 (multi-phase chain),"
            f" got {dispatch_policy!r}"
        )
