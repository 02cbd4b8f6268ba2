# SPDX-License-Identifier: MIT
"""An attention map looked at: the weights of one query's window brought back to the grid, and drawn over an image.

The map is what a module returns with `forward(x, return_attention=True)`: one slot for each key of each window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natten_ops.geometry.masks import checked_params
from natten_ops.geometry.params import integer
from natten_ops.tools.show import (
    QUERY_COLOUR,
    check_image,
    check_query,
    draw_veiled,
    frame,
    new_figure,
    set_title,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def attention_on_grid(
    attention_map: Tensor,
    query: Sequence[int],
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """grid[key of slot s] = weight of slot s, for one query: what it attends to, token by token.

    Args:
        attention_map: `[heads, *spatial, slots]` of one sample, slots row-major as in `natten_ops.na2d_qk`; additional
            tokens, which lie on no grid, are its last slots and are left out.
        query: coordinates of the query, in tokens, one an axis.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.

    Returns:
        `[heads, *spatial]`, 0 where the query sees nothing.

    Raises:
        ValueError, TypeError: settings that do not fit the map, or a query outside of it.

    Example:
        >>> import torch
        >>> from natten_ops.nn import NeighborhoodAttention1D
        >>> from natten_ops.tools import attention_on_grid
        >>> _, weights = NeighborhoodAttention1D(8, 2, kernel_size=3)(torch.randn(1, 6, 8), return_attention=True)
        >>> (attention_on_grid(weights[0], (4,), kernel_size=3)[0] > 0).int().tolist()
        [0, 0, 0, 1, 1, 1]
    """
    if not isinstance(attention_map, Tensor) or attention_map.is_nested:
        kind = "nested tensor" if isinstance(attention_map, Tensor) else type(attention_map).__name__
        raise TypeError(f"attention_map is a {kind}; give a tensor [heads, 1 to 3 spatial axes, slots] of one sample")
    if attention_map.dim() < 3 or len(attention_map) == 0:
        shape = list(attention_map.shape)
        raise ValueError(f"attention_map is {shape}; give a tensor [heads, 1 to 3 spatial axes, slots] of one sample")
    spatial_shape = attention_map.shape[1:-1]
    params = checked_params(spatial_shape, kernel_size, stride, dilation, is_causal)
    query = check_query(query, spatial_shape)
    slots = math.prod(params.kernel_size)
    if attention_map.shape[-1] < slots:
        raise ValueError(
            f"attention_map has {attention_map.shape[-1]} slots and kernel_size={params.kernel_size} {slots}; "
            "give the settings that it was made with"
        )
    weights = attention_map.detach().flatten(1, -2)[:, _place(query, spatial_shape)]
    grid = weights.new_zeros(attention_map.shape[:-1]).flatten(1)
    keys = []
    for axis, (position, length) in enumerate(zip(query, spatial_shape)):
        group, start, end = params.window(axis, position, length)
        seen = range(start, start + params.kernel_size[axis])
        keys.append([group + params.dilation[axis] * t if t < end else None for t in seen])
    for slot, key in enumerate(product(*keys)):
        if None not in key:
            grid[:, _place(key, spatial_shape)] = weights[:, slot]
    return grid.unflatten(1, spatial_shape)


def _place(token: Sequence[Any], spatial_shape: Sequence[int]) -> int:
    """The row-major number of a token."""
    number = 0
    for position, length in zip(token, spatial_shape):
        number = number * length + position
    return number


def draw_attention(
    image: Any,
    attention_map: Tensor,
    query: Sequence[int],
    head: int | None = None,
    axes: Axes | None = None,
    title: str | None = None,
    **geometry: Any,
) -> Any:
    """An image under the attention of one query: bright where its weights are large, the query in an orange frame.

    Args:
        image: `[height, width]` (grey) or `[height, width, 1, 3 or 4]`, floats in [0, 1] or bytes.
        attention_map: `[heads, y, x, slots]` of one sample; the image is divided evenly among its tokens.
        query: (y, x) of the query, in tokens.
        head: the head that is drawn; None draws the mean of all.
        axes: matplotlib axes to draw on; None makes a figure.
        title: above the picture; None names the geometry, the head and the largest weight.
        geometry: kernel_size, stride, dilation and is_causal, as in `natten_ops.na2d`.

    Returns:
        The matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError, TypeError: as `attention_on_grid`; a head that is not there, weights that are not finite, a grid
            that is not 2-D, or no image of those above.
        ImportError: matplotlib is missing.

    Example:
        >>> import torch
        >>> from natten_ops.nn import NeighborhoodAttention2D
        >>> from natten_ops.tools import draw_attention
        >>> layer, tokens = NeighborhoodAttention2D(8, 2, kernel_size=5), torch.randn(1, 12, 12, 8)
        >>> _, weights = layer(tokens, return_attention=True)
        >>> figure = draw_attention(torch.rand(48, 48, 3).numpy(), weights[0], (3, 4), kernel_size=5)
    """
    grids = attention_on_grid(attention_map, query, **geometry).double()
    spatial_shape = grids.shape[1:]
    check_image(image, spatial_shape)
    if head is not None and not 0 <= integer("head", head) < len(grids):
        raise ValueError(f"head={head} is not there; give 0 to {len(grids) - 1}, or None for the mean of all")
    weights = grids.mean(0) if head is None else grids[head]
    wrong = weights[~weights.isfinite()]
    if len(wrong):
        raise ValueError(
            f"attention_map gives query={tuple(query)} a weight of {wrong[0]}; give finite weights: "
            "a softmax has them if all logits are finite"
        )
    peak = weights.max().item()
    axes = axes if axes is not None else new_figure(width=4.2, height=3.6)[1][0]
    # Lighter inside of the window, and the less opaque the larger the weight; its root, for most weights are small.
    opacity = torch.where(weights > 0, 0.6 - 0.6 * (weights / max(peak, 1e-30)).sqrt(), 0.75)
    cell_y, cell_x = draw_veiled(axes, image, opacity)
    for colour, line in (("white", 2.6), (QUERY_COLOUR, 1.3)):  # a white rim, for images that are orange themselves
        frame(axes, query[1] * cell_x, query[0] * cell_y, cell_x, cell_y, colour, line)
    if title is None:
        who = "mean of heads" if head is None else f"head {head}"
        title = f"{title_of(spatial_shape, **geometry)}\n{who}, largest weight {peak:.3f}"
    set_title(axes, title)
    return axes.figure
