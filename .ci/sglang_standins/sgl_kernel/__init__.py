"""Stands in for SGLang's compiled kernels, which there are none of for a CPU without AMX.

Every name imports, as SGLang imports many that it then never calls; a call is an error.
"""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"sgl_kernel.{name}: expected no call on this CPU")

    return missing
