"""How does the layer's own loop take part in torch.compile and torch.export?

"block_bmm" multiplies in as many chunks as its copies of weights need, a number that depends on the
number of tokens: a tracer that looked inside would make a graph per number. So the product is a
registered op, `torch.ops.aiter.block_bmm`, with a fake that says its shape; what lies around it stays
visible, for torch.compile to fuse. Rejected: one product without chunks under a tracer, which copies up
to M*K experts' weights at once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..routing.autograd import refusing
from ..routing.tracing import NAMESPACE, registered, traced

CHUNK_BYTES = 256 << 20
"""How much of the experts' weights "block_bmm" copies at once."""


def block_bmm(rows: Tensor, weight: Tensor, experts: Tensor, block_size: int) -> Tensor:
    """rows [R, X] in blocks of `block_size`, each times weight [E, Y, X] of its expert, transposed.

    Args:
        experts: int32 [R / block_size], below E.

    Returns:
        [R, Y], contiguous.
    """
    if traced(rows):
        # NOTE: the layer has refused what needs a gradient, if not now then when its graph runs.
        op = registered("block_bmm")
        out: Tensor = op(rows.detach(), weight.detach(), experts, block_size)
        return out
    return _in_chunks(rows, weight, experts, block_size)


def _in_chunks(rows: Tensor, weight: Tensor, experts: Tensor, block_size: int) -> Tensor:
    num_blocks, width, inner = experts.shape[0], weight.shape[1], weight.shape[2]
    if num_blocks == 0:
        return rows.new_empty((0, width))
    blocks = rows.reshape(num_blocks, block_size, inner)
    step = max(1, CHUNK_BYTES // max(1, width * inner * weight.element_size()))
    parts = [
        torch.bmm(
            blocks[first : first + step],
            weight.index_select(0, experts[first : first + step]).transpose(1, 2),
        )
        for first in range(0, num_blocks, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(rows.shape[0], width)


def _fake(rows: Tensor, weight: Tensor, experts: Tensor, block_size: int) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _register() -> Any:
    library: Any = cast(Any, torch.library.Library)(NAMESPACE, "FRAGMENT")
    library.define(
        "block_bmm(Tensor rows, Tensor weight, Tensor experts, int block_size) -> Tensor"
    )
    library.impl("block_bmm", _in_chunks, "CompositeExplicitAutograd")
    library.impl("block_bmm", _fake, "Meta")
    library.impl("block_bmm", refusing(registered("block_bmm").default), "Autograd")
    return library


_library = _register()  # NOTE: the registration lives as long as this object does.
