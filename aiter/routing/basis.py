"""What is known about the speed of the paths on a device, and where does that come from?

Read once per device and process: the environment, a file of `tune`, the built-in table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from ..jit import envs
from . import dispatch
from .dispatch import Crossover, RouterCrossover


@dataclass(frozen=True)
class Basis:
    """What `dispatch` goes by on a device, and where that comes from, in words.

    `rows_by_dtype` speak instead of `rows` for logits of a dtype that has some. `router_rows` and
    `router_modelled` are those from hidden states; `tune` measures none of them.
    """

    rows: tuple[Crossover, ...]
    override: int | None
    estimate: int | None
    origin: str
    modelled: Mapping[dispatch.Logits, tuple[Crossover, ...]] = field(default_factory=dict)
    router_rows: tuple[RouterCrossover, ...] = ()
    router_modelled: tuple[RouterCrossover, ...] = ()
    rows_by_dtype: Mapping[dispatch.Logits, tuple[Crossover, ...]] = field(default_factory=dict)


@cache
def basis_of(device: torch.device) -> Basis:
    """What is known about `device`: AITER_DISPATCH, else the tuned file, else the built-in table.

    Raises:
        TargetError: there is no target for the device.
        EnvError: AITER_DISPATCH is set to what it cannot be.
        CacheError: others may write to the tuned file.
    """
    # NOTE: imported late, as importing the package should not pay for what a first call needs.
    from ..jit.target import device_arch, target_for
    from . import tuned

    target_for(device)
    override = envs.AITER_DISPATCH.get()
    if override is not None:
        return Basis((), override, None, f"AITER_DISPATCH={envs.AITER_DISPATCH.text()}")
    arch = "cpu" if device.type == "cpu" else device_arch(device)
    found = tuned.find(device)
    router = dispatch.router_rows_of(arch), dispatch.router_modelled_of(arch)
    if found.rows:
        estimate, modelled = dispatch.estimate_of(arch), dispatch.modelled_of(arch)
        return Basis(found.rows, None, estimate, f"{found.path}", modelled, *router)
    name, rows = dispatch.rows_of(arch)
    family = f"the built-in table, {name or arch}"
    tuned_reason = "" if found.reason == "not measured" else f" (tuned: {found.reason})"
    origin = family + ("" if rows else ": not measured") + tuned_reason
    estimate, modelled = dispatch.estimate_of(arch), dispatch.modelled_of(arch)
    by_dtype = dispatch.rows_by_dtype_of(arch)
    return Basis(rows, None, estimate, origin, modelled, *router, by_dtype)


def choose(problem: dispatch.Problem, max_tokens: int, device: torch.device) -> dispatch.Choice:
    """The path of a problem on a device; arguments as of `dispatch.choose`."""
    if problem.dispatch_policy != dispatch.AUTOMATIC:
        return dispatch.choose(problem, max_tokens, ())
    basis = basis_of(device)
    modelled = basis.modelled.get(problem.logits, ())
    rows = basis.rows_by_dtype.get(problem.logits, basis.rows)
    return dispatch.choose(problem, max_tokens, rows, basis.override, basis.estimate, modelled)


def choose_router(
    problem: dispatch.Problem, max_tokens: int, device: torch.device, batch_invariant: bool = False
) -> dispatch.RouterChoice:
    """How the product is made on a device; arguments as of `dispatch.choose_router`."""
    basis = basis_of(device)
    return dispatch.choose_router(
        problem, max_tokens, basis.router_rows, basis.override, basis.router_modelled,
        batch_invariant,
    )  # fmt: skip
