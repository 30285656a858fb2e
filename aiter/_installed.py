"""Is what lies in the package's folder ours alone?

Other distributions have the import name `aiter` as well: ROCm's (amd-aiter), and on PyPI a library of
asynchronous iterators. pip writes the later one over the earlier without a word, and removes the files
of both with either. Which of the two states that leaves decides what is said:

- Ours came last. Every file of ours is whole and works, so the package's `__init__` warns
  (RuntimeWarning) and goes on: an error would take away the only one of the two that still works,
  and `env` with it. What is broken is the other one.
- Ours came first, and another `__init__` runs. What is ours lies among files that it cannot work with,
  so its ways in that others have no file for, the command line and the engines' plugins, raise
  ImportError. From `import` itself nothing can be said then, as nothing of ours runs.

Both are noticed by a file that the other one has and we never had: 2 stats, 7 us of an import that takes
12 to 19 ms (AMD EPYC, 2026-11-26). Rejected: `importlib.metadata`, 20 ms and more for the installed
distributions (`env` asks it); a `.pth` file that looks at every start of Python; a listing of the
folder against the files that we ship, which a user's file would upset.
"""

from __future__ import annotations

import os
import sys
import warnings

NAME = __name__.partition(".")[0]
FOLDER = os.path.dirname(os.path.abspath(__file__))
OTHERS = {
    "amd-aiter": "tuned_gemm.py",
    "aiter": "push_aiter.py",
}  # distribution: a file of it alone
_REMEDY = (
    "uninstall both and install one again, or this one under a name of its own, with"
    " AITER_IMPORT_NAME=fused_moe_routing (docs/with_rocm_aiter.md)"
)

initialised = False  # whether the `__init__` that runs is ours


def others() -> list[str]:
    """The other distributions that have files in the package's folder."""
    return [name for name, file in OTHERS.items() if os.path.exists(os.path.join(FOLDER, file))]


def state() -> str | None:
    """What is wrong with the package's folder, in a sentence; None if nothing is."""
    if not initialised:
        package = sys.modules.get(NAME)
        file = getattr(package, "__file__", None)
        got = f"that of {' and '.join(others()) or 'somebody else'}" if file else "none"
        return (
            f"{NAME}: expected this package's own __init__.py in {FOLDER}, got {got}, since another"
            f" package of this name was installed or removed there; {_REMEDY}"
        )
    found = others()
    if not found:
        return None
    return (
        f"{NAME}: expected {FOLDER} to be this package's alone, got files of {' and '.join(found)} as"
        f" well, which does not work any more; {_REMEDY}"
    )


def begin() -> None:
    """For the package's `__init__`: warns where files of others lie in its folder."""
    global initialised
    initialised = True
    if others():
        warnings.warn(str(state()), RuntimeWarning, stacklevel=3)


def require() -> None:
    """For ways in that others have no file for: raises ImportError where another `__init__` runs."""
    if not initialised:
        raise ImportError(str(state()))
