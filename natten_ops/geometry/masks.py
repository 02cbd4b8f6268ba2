# SPDX-License-Identifier: MIT
"""The same geometry as masks: a dense tensor for looking and testing, and the functions that FlexAttention takes.

This file, `blocks` and `block_masks` are the geometry files with torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natten_ops.geometry.params import Arithmetic, Box, NAParams, axis_window, check_integer, make_params

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TENSORS = Arithmetic(torch.minimum, torch.maximum, torch.where)


def axis_mask(params: NAParams, axis: int, q_count: int, kv_count: int, box: Box | None = None) -> Tensor:
    """bool [q_count, kv_count]: which keys each query of one axis sees."""
    q_origin, kv_origin, length = (
        (box.q_origin[axis], box.kv_origin[axis], box.extent[axis]) if box else (0, 0, q_count)
    )
    query, key = torch.arange(q_count) + q_origin, torch.arange(kv_count) + kv_origin
    return axis_visible(params, axis, length, query[:, None], key)


def dense_mask(params: NAParams, q_shape: Sequence[int], kv_shape: Sequence[int], box: Box | None = None) -> Tensor:
    """bool [prod(q_shape), prod(kv_shape)]: True where the query sees the key; axes flattened row-major.

    For looking and testing: it costs tokens squared.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in range(params.rank):
        inner = axis_mask(params, axis, q_shape[axis], kv_shape[axis], box)
        mask = (mask[:, None, :, None] & inner[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return mask


def mask_mod(
    spatial_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> MaskMod:
    """visible(query, key) = for every axis, key in window(query): a `mask_mod(batch, head, query, key)` of FlexAttention.

    Args:
        spatial_shape: tokens of each axis, 1 to 3 of them; query and key are row-major numbers of tokens of this grid.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.

    Returns:
        A function of four integer tensors that broadcast; it returns a bool tensor and ignores batch and head.

    Raises:
        ValueError, TypeError: a geometry that the ops refuse, with the way out.

    Example:
        >>> import torch, natten_ops
        >>> visible = natten_ops.mask_mod((3, 4), kernel_size=3)
        >>> visible(None, None, torch.tensor(0), torch.arange(12)).view(3, 4).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 0]], dtype=torch.int32)
    """
    params = checked_params(spatial_shape, kernel_size, stride, dilation, is_causal)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query == query
        for axis in reversed(range(params.rank)):
            length = spatial_shape[axis]
            seen = seen & axis_visible(params, axis, length, query % length, key % length)
            query, key = query // length, key // length
        return seen

    return visible


def tiled_mask_mod(params: NAParams, spatial_shape: Sequence[int], tile: Sequence[int]) -> MaskMod:
    """The same for tokens in the order of `tile_coordinates`; padded queries see what the last query sees."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query == query
        places = zip(tile_coordinates(query, spatial_shape, tile), tile_coordinates(key, spatial_shape, tile))
        for axis, (i, j) in enumerate(places):
            length = spatial_shape[axis]
            seen = seen & axis_visible(params, axis, length, i.clamp(max=length - 1), j) & (j < length)
        return seen

    return visible


def score_mod(
    params: NAParams, spatial_shape: Sequence[Any], rpb: Tensor | None, key_mask: Tensor | None
) -> ScoreMod | None:
    """A FlexAttention `score_mod` that adds the bias table and hides masked keys; None where there is neither.

    Args:
        rpb: `[heads, 2 * kernel_size - 1 an axis]`.
        key_mask: bool `[batch, *spatial]`.
    """
    if rpb is None and key_mask is None:
        return None
    allowed = None if key_mask is None else key_mask.flatten(1)

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if rpb is not None:
            score = score + rpb[_bias_entry(params, spatial_shape, head, query, key)].to(score.dtype)
        return score if allowed is None else torch.where(allowed[batch, key], score, -math.inf)

    return modified


def _bias_entry(
    params: NAParams, spatial_shape: Sequence[Any], head: Tensor, query: Tensor, key: Tensor
) -> tuple[Tensor, ...]:
    offsets: list[Tensor] = []
    for axis in reversed(range(params.rank)):
        length, (kernel, _, dilation, _) = spatial_shape[axis], params.axis(axis)
        offset = kernel - 1 + key % length // dilation - query % length // dilation
        # Hidden pairs of a partial block get a bias before they are masked: any entry will do, but one of the table.
        offsets.insert(0, offset.clamp(0, 2 * kernel - 2))
        query, key = query // length, key // length
    return head, *offsets


def axis_visible(params: NAParams, axis: int, length: Any, query: Tensor, key: Tensor) -> Tensor:
    """bool: whether the queries at these places of one axis see these keys."""
    dilation = params.dilation[axis]
    group, start, end = axis_window(query, length, *params.axis(axis), ops=TENSORS)
    position = key // dilation
    return (key % dilation == group) & (position >= start) & (position < end)


def tile_coordinates(place: Tensor, spatial_shape: Sequence[Any], tile: Sequence[int]) -> list[Tensor]:
    """The place on each axis of tokens in tile order: tiles row-major over the padded grid, row-major inside of each."""
    number, inside = place // math.prod(tile), place % math.prod(tile)
    coordinates: list[Tensor] = []
    for length, size in zip(reversed(spatial_shape), reversed(tile)):
        count = (length + size - 1) // size
        coordinates.insert(0, number % count * size + inside % size)
        number, inside = number // count, inside // size
    return coordinates


def checked_params(
    spatial_shape: Sequence[Any],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> NAParams:
    """The settings as a record that fits the grid; raises ValueError or TypeError with the way out."""
    if isinstance(spatial_shape, (str, bytes)) or not isinstance(spatial_shape, Sequence):
        kind = type(spatial_shape).__name__
        raise TypeError(f"spatial_shape={spatial_shape!r} is a {kind}; give the tokens of each axis, like (30, 48, 80)")
    rank = len(spatial_shape)
    if rank not in (1, 2, 3):
        raise ValueError(f"spatial_shape={tuple(spatial_shape)} has {rank} axes; give 1, 2 or 3")
    for axis, length in enumerate(spatial_shape):
        check_integer(f"spatial_shape[{axis}]", length)
    params = make_params(rank, kernel_size, stride, dilation, is_causal)
    params.check_extent(spatial_shape)
    return params
