"""What is remembered of earlier routing calls, and how is it forgotten?

Three things, from the quickest to the slowest:

1. `again`, of the compiled module that was called last, knows the calls that took the fused launch by
   their `Request` and by what their tensors are like (csrc/include/known_calls.h). It launches without
   a lookup or a check. `router_again` does the same for those from hidden states.
2. Plans, one per device, sizes and `Request`, in an LRU memo that tells types apart: `True` is not
   `1`, so a bool for an int is refused every time. A lookup takes 0.3 us.
3. What a device is fastest at (`basis`).

`forget` drops all three, and has those forget who asked for it by `on_forget`. A call that is under way
then is not remembered: the compiled table counts how often it was emptied, and the memos of plans are
new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..ops.fused_router_sorting import RouterAgain, fused_router_sorting_forget
from ..ops.fused_topk_moe_sorting import FusedAgain, fused_topk_moe_sorting_forget
from . import dispatch, plan
from .basis import basis_of
from .plan import Plan

MOST_PLANS = 4096  # a plan takes about 1 KiB; decode and prefill sizes of a few layers are hundreds

_Memo = Callable[..., Plan]


class _Last(threading.local):
    path: dispatch.Path | None = None


def _never(*arguments: object) -> None:
    return None


last = _Last()
again: FusedAgain = _never  # of the module that was called last
router_again: RouterAgain = _never
_memos: dict[str, _Memo] = {}
_others: list[Callable[[], None]] = []


def last_path() -> dispatch.Path | None:
    """Which path this thread's last routing took: "fused", "oneshot", "multiphase"; None for none."""
    return last.path


def plan_of(make: str, sizes: tuple[Any, ...]) -> Plan:
    """What the function `make` of `plan` makes of `sizes`, from the memo if it was asked before."""
    memo = _memos.get(make)
    if memo is None:
        memo = _memos.setdefault(make, lru_cache(MOST_PLANS, typed=True)(getattr(plan, make)))
    try:
        return memo(*sizes)
    except TypeError:
        pass
    # NOTE: an argument of the wrong type, or one that no memo can look up, such as a list: made
    # without the memo, the plan says which.
    made: Plan = getattr(plan, make)(*sizes)
    return made


def on_forget(forget_too: Callable[[], None]) -> None:
    """Has `forget` call a function, which drops what a caller of the routing remembers of its own."""
    _others.append(forget_too)


def forget() -> None:
    """Drops plans, remembered calls and what is known of devices: the next call looks again."""
    global again, router_again
    again = router_again = _never
    _memos.clear()
    fused_topk_moe_sorting_forget()
    fused_router_sorting_forget()
    basis_of.cache_clear()
    for forget_too in _others:
        forget_too()
