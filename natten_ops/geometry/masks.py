# SPDX-License-Identifier: MIT
"""The same geometry as masks: a dense tensor, and a `mask_mod` for FlexAttention. (The only geometry file with torch.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten_ops.geometry.params import Arithmetic, Box, NAParams, axis_window

TENSORS = Arithmetic(torch.minimum, torch.maximum, torch.where)


def axis_mask(params: NAParams, axis: int, q_count: int, kv_count: int, box: Box | None = None) -> Tensor:
    """bool [q_count, kv_count]: which keys each query of one axis sees."""
    q_origin, kv_origin, length = (
        (box.q_origin[axis], box.kv_origin[axis], box.extent[axis]) if box else (0, 0, q_count)
    )
    dilation = params.dilation[axis]
    query, key = torch.arange(q_count) + q_origin, torch.arange(kv_count) + kv_origin
    group, start, end = (t[:, None] for t in axis_window(query, length, *params.axis(axis), ops=TENSORS))
    position = key // dilation
    return (key % dilation == group) & (position >= start) & (position < end)


def dense_mask(params: NAParams, q_shape: Sequence[int], kv_shape: Sequence[int], box: Box | None = None) -> Tensor:
    """bool [prod(q_shape), prod(kv_shape)]: True where the query sees the key; axes flattened row-major.

    For looking and testing: it costs tokens squared.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in range(params.rank):
        inner = axis_mask(params, axis, q_shape[axis], kv_shape[axis], box)
        mask = (mask[:, None, :, None] & inner[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return mask


def mask_mod(params: NAParams, spatial_shape: Sequence[int]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A FlexAttention `mask_mod(batch, head, query, key)` over row-major flattened tokens of one whole grid."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query == query
        for axis in reversed(range(params.rank)):
            length, dilation = spatial_shape[axis], params.dilation[axis]
            group, start, end = axis_window(query % length, length, *params.axis(axis), ops=TENSORS)
            position, residue = key % length // dilation, key % length % dilation
            seen = seen & (residue == group) & (position >= start) & (position < end)
            query, key = query // length, key // length
        return seen

    return visible
