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
from .dispatch import Crossover


@dataclass(frozen=True)
class Basis:
    """What `dispatch` goes by on a device, and where that comes from, in words."""

    rows: tuple[Crossover, ...]
    override: int | None
    estimate: int | None
    origin: str
    modelled: Mapping[dispatch.Logits, tuple[Crossover, ...]] = field(default_factory=dict)


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
    if found.rows:
        estimate, modelled = dispatch.estimate_of(arch), dispatch.modelled_of(arch)
        return Basis(found.rows, None, estimate, f"{found.path}", modelled)
    name, rows = dispatch.rows_of(arch)
    family = f"the built-in table, {name or arch}"
    tuned_reason = "" if found.reason == "not measured" else f" (tuned: {found.reason})"
    origin = family + ("" if rows else ": not measured") + tuned_reason
    return Basis(rows, None, dispatch.estimate_of(arch), origin, dispatch.modelled_of(arch))


def override_of(device: torch.device) -> int | None:
    """What AITER_DISPATCH says, for a device that there is a target for; raises as `basis_of`."""
    return basis_of(device).override


def choose(problem: dispatch.Problem, max_tokens: int, device: torch.device) -> dispatch.Choice:
    """The path of a problem on a device; arguments as of `dispatch.choose`."""
    if problem.dispatch_policy != dispatch.AUTOMATIC:
        return dispatch.choose(problem, max_tokens, ())
    basis = basis_of(device)
    modelled = basis.modelled.get(problem.logits, ())
    return dispatch.choose(
        problem, max_tokens, basis.rows, basis.override, basis.estimate, modelled
    )
