"""What is known about the speed of the paths on a device, and where does that come from?

Read once per device and process: the environment, the files of `tune`, the built-in table.

From logits, a file of `tune` takes the place of the built-in rows, as unasked it measures all shapes.
From hidden states its rows stand before those: it measures the shapes that it is given, and the
nearest row speaks, which a file has if it has the problem's own shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..jit import envs
from . import dispatch
from .dispatch import Crossover, RouterCrossover

if TYPE_CHECKING:
    from . import tuned


@dataclass(frozen=True)
class Basis:
    """What `dispatch` goes by on a device, and where that comes from, in words.

    `rows_by_dtype` speak instead of `rows` for logits of a dtype that has some. `router_rows` and
    `router_modelled` are those from hidden states, `router_found` what `tune` has to do with them.
    """

    rows: tuple[Crossover, ...]
    override: int | None
    estimate: int | None
    origin: str
    modelled: Mapping[dispatch.Logits, tuple[Crossover, ...]] = field(default_factory=dict)
    router_rows: tuple[RouterCrossover, ...] = ()
    router_modelled: tuple[RouterCrossover, ...] = ()
    rows_by_dtype: Mapping[dispatch.Logits, tuple[Crossover, ...]] = field(default_factory=dict)
    router_found: tuned.Found[RouterCrossover] | None = None

    def router_origin(self, row: RouterCrossover | None) -> str:
        """Where a row from hidden states comes from, or that there is none, in words."""
        found = self.router_found
        if found is None:
            return self.origin
        if row in found.rows:
            return str(found.path)
        reason = "" if found.reason in ("measured", "not measured") else f" (tuned: {found.reason})"
        return "the built-in table" + ("" if row else ": not measured") + reason


@cache
def basis_of(device: torch.device) -> Basis:
    """What is known about `device`: AITER_DISPATCH, else the tuned files, else the built-in table.

    Raises:
        TargetError: there is no target for the device.
        EnvError: AITER_DISPATCH is set to what it cannot be.
        CacheError: others may write to a tuned file.
    """
    # NOTE: imported late, as importing the package should not pay for what a first call needs.
    from ..jit.target import device_arch, target_for
    from . import tuned

    target_for(device)
    override = envs.AITER_DISPATCH.get()
    if override is not None:
        return Basis((), override, None, f"AITER_DISPATCH={envs.AITER_DISPATCH.text()}")
    arch = "cpu" if device.type == "cpu" else device_arch(device)
    found, router_found = tuned.find(device, tuned.LOGITS), tuned.find(device, tuned.ROUTER)
    router_rows = (*router_found.rows, *dispatch.router_rows_of(arch))
    router = router_rows, dispatch.router_modelled_of(arch)
    estimate, modelled = dispatch.estimate_of(arch), dispatch.modelled_of(arch)
    if found.rows:
        origin = f"{found.path}"
        return Basis(found.rows, None, estimate, origin, modelled, *router, {}, router_found)
    name, rows = dispatch.rows_of(arch)
    family = f"the built-in table, {name or arch}"
    tuned_reason = "" if found.reason == "not measured" else f" (tuned: {found.reason})"
    origin = family + ("" if rows else ": not measured") + tuned_reason
    by_dtype = dispatch.rows_by_dtype_of(arch)
    return Basis(rows, None, estimate, origin, modelled, *router, by_dtype, router_found)


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
