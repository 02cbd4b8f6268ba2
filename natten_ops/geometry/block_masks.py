# SPDX-License-Identifier: MIT
"""Block masks for FlexAttention, of row-major tokens and of tokens in tiles, and the way from one order to the other.

Importing FlexAttention costs as much as torch itself, so it is imported where a mask is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natten_ops.geometry.blocks import Boxes, Ordering, RowMajor, Table, build_tables, eager
from natten_ops.geometry.masks import MaskMod, checked_params, mask_mod, tile_coordinates, tiled_mask_mod
from natten_ops.geometry.params import integer

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def block_mask(
    spatial_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    block_size: int | Sequence[int] = 128,
    device: torch.device | str | None = None,
) -> BlockMask:
    """torch's `BlockMask` of a window: a block pair is listed if sum(visible) > 0, and full if every pair is visible.

    Made by counting visible pairs, never from a mask over tokens: time and memory go with the listed block pairs and
    torch's tables. Traceable with sizes that change, by one pass over all block pairs.

    Args:
        spatial_shape: tokens of each axis, 1 to 3 of them; tokens are in row-major order.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.
        block_size: tokens of a block, or (of a query block, of a key block).
        device: where the tables shall be; None means torch's default device.

    Returns:
        A `BlockMask` of shape (1, 1, tokens, tokens) with int32 tables, forward and backward ones. A ragged last block
        is full if all tokens that it has see each other, where torch's `create_block_mask` calls it partial.

    Raises:
        ValueError, TypeError: a geometry that the ops refuse or a block size below 1, with the way out.

    Example:
        >>> import natten_ops
        >>> mask = natten_ops.block_mask((32, 32), kernel_size=7, block_size=64, device="cpu")
        >>> mask.shape, mask.kv_num_blocks.tolist()[0][0][:4], mask.kv_indices[0, 0, 3, :5].tolist()
        ((1, 1, 1024, 1024), [4, 4, 5, 5], [1, 2, 3, 4, 5])
    """
    params = checked_params(spatial_shape, kernel_size, stride, dilation, is_causal)
    sizes = _pair("block_size", block_size)
    tokens = math.prod(spatial_shape)
    order = RowMajor(params, spatial_shape, sizes, _workplace(device))
    return _as_block_mask(order, (tokens, tokens), sizes, mask_mod(spatial_shape, *params), device)


def tiled_block_mask(
    spatial_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    tile: Sequence[int] = (8, 16),
    device: torch.device | str | None = None,
) -> tuple[BlockMask, Tensor]:
    """The block mask of tokens ordered tile by tile, block = tile, and that order: permutation[place] = token or -1.

    A window meets fewer tiles than blocks of row-major tokens. The grid is padded to whole tiles; padded keys are never
    visible, padded queries see what their neighbours see (their rows are to be dropped).

    Args:
        spatial_shape: tokens of each axis, 1 to 3 of them.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.
        tile: tokens of a tile on each axis; their product is the block size.
        device: where tables and permutation shall be; None means torch's default device.

    Returns:
        (mask, permutation): a `BlockMask` of shape (1, 1, padded tokens, padded tokens), and int64 `[padded tokens]`
        for `natten_ops.tile_permute`: the row-major token of each place, -1 for padding.

    Raises:
        ValueError, TypeError: a geometry that the ops refuse or a tile that is not one, with the way out.

    Example:
        >>> import torch, natten_ops
        >>> mask, permutation = natten_ops.tiled_block_mask((3, 4), kernel_size=3, tile=(2, 2), device="cpu")
        >>> permutation.tolist()
        [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, -1, -1, 10, 11, -1, -1]
    """
    params = checked_params(spatial_shape, kernel_size, stride, dilation, is_causal)
    if isinstance(tile, (str, bytes)) or not isinstance(tile, Sequence):
        raise TypeError(f"tile={tile!r} is a {type(tile).__name__}; give the tokens of a tile on each axis")
    if len(tile) != params.rank:
        raise ValueError(
            f"tile={tuple(tile)} has {len(tile)} entries for {params.rank} spatial axes; give {params.rank}"
        )
    sizes = tuple(_positive(f"tile[{axis}]", size) for axis, size in enumerate(tile))
    order = Boxes(params, spatial_shape, sizes, _workplace(device))
    block = math.prod(sizes)
    padded = order.blocks[0] * block
    visible = tiled_mask_mod(params, spatial_shape, sizes)
    mask = _as_block_mask(order, (padded, padded), (block, block), visible, device)
    token: Any = 0
    inside: Any = True
    for place, length in zip(
        tile_coordinates(torch.arange(padded, device=device), spatial_shape, sizes), spatial_shape
    ):
        token, inside = token * length + place, inside & (place < length)
    return mask, torch.where(inside, token, -1)


def tile_permute(x: Tensor, permutation: Tensor, dim: int = 1) -> Tensor:
    """out[.., place, ..] = x[.., permutation[place], ..], and 0 where the permutation is -1.

    Args:
        x: `[batch, tokens, ...]` with row-major tokens, any dtype (or with the tokens on another `dim`).
        permutation: int64 `[padded tokens]` from `natten_ops.tiled_block_mask`.
        dim: the dimension of the tokens.

    Returns:
        `[batch, padded tokens, ...]`, the tokens tile by tile. An index op, which compilers fuse with its neighbours.

    Example:
        >>> import torch, natten_ops
        >>> _, permutation = natten_ops.tiled_block_mask((2, 3), kernel_size=2, tile=(2, 2), device="cpu")
        >>> natten_ops.tile_permute(torch.tensor([[10, 11, 12, 13, 14, 15]]), permutation)
        tensor([[10, 11, 13, 14, 12,  0, 15,  0]])
    """
    tokens = x.index_select(dim, permutation.clamp(min=0))
    shape = [1] * x.dim()
    shape[dim] = -1
    # Zero, not any token: a NaN of that token would reach rows that do not see it.
    return tokens.masked_fill((permutation < 0).view(shape), 0)


def tile_unpermute(x: Tensor, permutation: Tensor, spatial_shape: Sequence[int], dim: int = 1) -> Tensor:
    """out[.., permutation[place], ..] = x[.., place, ..]: the inverse of `tile_permute`; padded queries are dropped.

    Args:
        x: `[batch, padded tokens, ...]` in the order of the permutation (or with the tokens on another `dim`).
        permutation: int64 `[padded tokens]` from `natten_ops.tiled_block_mask`.
        spatial_shape: tokens of each axis, the same as there.
        dim: the dimension of the tokens.

    Returns:
        `[batch, tokens, ...]`, the tokens in row-major order. An index op, which compilers fuse with its neighbours.

    Example:
        >>> import torch, natten_ops
        >>> _, permutation = natten_ops.tiled_block_mask((2, 3), kernel_size=2, tile=(2, 2), device="cpu")
        >>> natten_ops.tile_unpermute(torch.tensor([[10, 11, 13, 14, 12, 0, 15, 0]]), permutation, (2, 3))
        tensor([[10, 11, 12, 13, 14, 15]])
    """
    tokens = math.prod(spatial_shape)
    places = torch.arange(permutation.shape[0], device=permutation.device)
    target = torch.where(permutation < 0, tokens, permutation)  # padding meets in one place too many
    return x.index_select(dim, places.new_zeros(tokens + 1).scatter(0, target, places)[:-1])


def _workplace(device: torch.device | str | None) -> torch.device | str | None:
    """Lists are made on the CPU, which needs no synchronisation for their lengths; a traced pass has none."""
    return "cpu" if eager() else device


def _as_block_mask(
    order: Ordering,
    lengths: tuple[Any, Any],
    sizes: tuple[int, int],
    visible: MaskMod,
    device: torch.device | str | None,
) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    place = torch.empty(0, device=device).device

    def with_batch_and_head(table: Table) -> tuple[Tensor, Tensor]:
        return table.counts[None, None].to(place), table.indices[None, None].to(place)

    tables = build_tables(order)
    keys, full_keys, queries, full_queries = (with_batch_and_head(table) for table in tables)
    return BlockMask(lengths, *keys, *full_keys, *queries, *full_queries, BLOCK_SIZE=sizes, mask_mod=visible)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        size = _positive(name, value)
        return size, size
    if len(value) != 2:
        raise ValueError(
            f"{name}={tuple(value)} has {len(value)} entries; give one int, or two: of queries and of keys"
        )
    return _positive(f"{name}[0]", value[0]), _positive(f"{name}[1]", value[1])


def _positive(name: str, value: Any) -> int:
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name}={number} must be at least 1")
    return number
