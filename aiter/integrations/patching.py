"""How does a forward get onto a module of someone else's, and off it again?

A `Mark`, a plain attribute of the module, says that its forward is ours. The class's forward is replaced
once, for good, by one that looks for a mark on the module that it is called on and calls ours or the
class's own. So a forward never holds a module:

- a copy, an averaged model, a replica of DataParallel or an unpickled model has the mark among its
  attributes, and its forward is called on itself;
- taking the mark off is all there is to undo, whoever has wrapped the forward since: hooks of accelerate
  keep the class's forward as the one they wrap, with a mark or without;
- an unmarked module of the class pays for one attribute.

Rejected: a forward on the instance, closure or bound method, which a replica shares with the original
and which hooks keep and bring back; another class for the instance, which does not pickle and is no
longer the class that transformers looks for by name; forward hooks, which run beside the class's
forward, not in its place.

`del module.forward` takes the mark off: it would take off a forward that is set on an instance.
"""

from __future__ import annotations

import functools
import threading
from types import MethodType
from typing import Any

from torch import nn

from ..routing.dispatch import Path
from .forwards import FORWARDS

_NAME = "_aiter_mark"
_installed: dict[type, Any] = {}  # the forward that looks for a mark, by class
_lock = threading.Lock()


class Mark:
    """Says which forward of ours a module uses.

    Attributes:
        role: of `FORWARDS`: "router", "hidden" or "experts".
        kind: the class that the module had when it was marked, by name. Wrappers change the class.
        path: the routing path of the module's last eager call; None before the first.
        returned: of a router, how many tensors its own forward returns, and which one the ids are.
    """

    def __init__(self, role: str, owner: type, returned: tuple[int, int] = (3, 2)) -> None:
        self.role = role
        self.kind = owner.__name__
        self.owner = owner
        self.returned = returned
        self.path: Path | None = None

    def __reduce__(self) -> tuple[object, ...]:
        # NOTE: a process that loads a marked module has to look for marks.
        return (_mark_for, (self.role, self.owner, self.returned))


def mark_of(module: nn.Module) -> Mark | None:
    """The module's own mark."""
    mark: Mark | None = vars(module).get(_NAME)
    return mark


def put_mark(module: nn.Module, role: str, returned: tuple[int, int] = (3, 2)) -> Mark:
    """Makes the forward of a module ours; the module was `replaceable`."""
    mark = _mark_for(role, type(module), returned)
    kept = vars(module).get("_old_forward")
    if kept is not None:
        # NOTE: accelerate's hooks call the forward that they found; it may be from before the class's
        # forward looked for marks.
        vars(module)["_old_forward"] = MethodType(_installed[type(module)], module)
    setattr(module, _NAME, mark)
    return mark


def take_mark(module: nn.Module, mark: Mark | None = None) -> None:
    """Gives a module its own forward back, if its mark is still this one, or whichever for None."""
    found = mark_of(module)
    if found is not None and mark in (None, found):
        delattr(module, _NAME)


def replaceable(module: nn.Module) -> bool:
    """Whether a call of the module ends in its class's forward: no mark, no forward set on it.

    Hooks of accelerate set a forward that calls the class's.
    """
    if mark_of(module) is not None:
        return False
    if "forward" not in vars(module):
        return True
    kept = vars(module).get("_old_forward")
    own = (vars(type(module)).get("forward"), _own(type(module)))
    return (
        "_hf_hook" in vars(module)
        and isinstance(kept, MethodType)
        and kept.__self__ is module
        and kept.__func__ in own
    )


def _mark_for(role: str, owner: type, returned: tuple[int, int]) -> Mark:
    with _lock:
        if vars(owner).get("forward") is not _installed.get(owner, ()):
            _install(owner)
    return Mark(role, owner, returned)


def _own(owner: type) -> Any:
    """The class's own forward below ours."""
    return getattr(_installed.get(owner), "__wrapped__", None)


def _install(owner: Any) -> None:
    own, delete = owner.forward, owner.__delattr__

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark = self._aiter_mark
        if mark is None:
            return own(self, *args, **kwargs)
        return FORWARDS[mark.role](self, mark, *args, **kwargs)

    @functools.wraps(delete)
    def delete_attribute(self: Any, name: str) -> None:
        if name == "forward" and name not in vars(self) and _NAME in vars(self):
            name = _NAME
        delete(self, name)

    owner._aiter_mark = None
    owner.forward = forward
    owner.__delattr__ = delete_attribute
    _installed[owner] = forward
