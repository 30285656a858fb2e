"""Is a call to be run, or is somebody recording it?

Nothing here knows the ops; `graph` registers them under `NAMESPACE`, and who is to be recorded asks
for them by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

NAMESPACE = __name__.partition(".")[0]  # of the registered ops: the package's own name


def recording() -> bool:
    """Whether torch.compile, torch.export or a dispatch mode (fake tensors, make_fx) sees this call."""
    return is_dynamo_compiling() or _len_torch_dispatch_stack() != 0


def traced(tensor: object) -> bool:
    """Whether a call with this argument is being recorded or simulated, not run.

    True where `recording()`, for a tensor subclass that dispatches by itself, such as a fake tensor
    outside its mode, and for a tensor on the meta device.
    """
    if recording():
        return True
    if not isinstance(tensor, Tensor):
        return False
    if tensor.is_meta:
        return True
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def registered(name: str) -> Any:
    """The registered op of that name."""
    return getattr(getattr(torch.ops, NAMESPACE), name)
