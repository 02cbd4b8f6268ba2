# SPDX-License-Identifier: MIT
"""What a query sees, as text and as pictures: the window of one query, or of every query of an axis.

Every window here comes from `natten_ops.geometry`; nothing computes one anew. Pictures need matplotlib, imported only
when one is drawn. Colours are of the Okabe-Ito palette, and the query also has a shape of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natten_ops.geometry.masks import axis_mask, checked_params
from natten_ops.geometry.params import AXIS_NAMES, integer
from natten_ops.tools.why import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUERY, VISIBLE, OTHER = "Q", "#", "."
QUERY_COLOUR, VISIBLE_COLOUR, OTHER_COLOUR = "#d55e00", "#56b4e9", "#ececec"
TITLE_POINTS = 9
TITLE_MARGIN = 0.48  # inches: numbers at the left move the middle of a picture, and letters are wider in coarse dots
TITLE_BREAK = r" (?!\(|\d|[\w, ]{0,20}\))"  # neither between a name and its number nor within the numbers of a tuple


def visible_keys(
    spatial_shape: Sequence[int],
    query: Sequence[int],
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """The window of one query as a mask: the product over the axes of the keys that it sees on each.

    Args:
        spatial_shape: tokens of each axis, 1 to 3 of them.
        query: coordinates of the query, in tokens, one an axis.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.

    Returns:
        bool `[*spatial_shape]`, True where the key is visible.

    Raises:
        ValueError, TypeError: settings that do not fit the grid, or a query outside of it.

    Example:
        >>> from natten_ops.tools import visible_keys
        >>> visible_keys((6,), (0,), kernel_size=3).int().tolist()
        [1, 1, 1, 0, 0, 0]
    """
    params = checked_params(spatial_shape, kernel_size, stride, dilation, is_causal)
    query = check_query(query, spatial_shape)
    window = torch.ones((), dtype=torch.bool)
    for axis, (position, length) in enumerate(zip(query, spatial_shape)):
        window = window[..., None] & axis_mask(params, axis, length, length)[position]
    return window


def check_query(query: Any, spatial_shape: Sequence[int]) -> tuple[int, ...]:
    """The query's coordinates; TypeError or ValueError unless it is a token of the grid."""
    given = query.tolist() if hasattr(query, "tolist") else query  # an array or a tensor serves as well
    rank = len(spatial_shape)
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        kind = type(query).__name__
        raise TypeError(f"query={query!r} is a {kind}; give one int for each of the {rank} axes, in a tuple")
    if len(given) != rank:
        raise ValueError(f"query={tuple(given)} has {len(given)} coordinates for {rank} spatial axes; give {rank}")
    found = tuple(integer(f"query[{axis}]", position) for axis, position in enumerate(given))
    for axis, (position, length) in enumerate(zip(found, spatial_shape)):
        if not 0 <= position < length:
            raise ValueError(f"query[{axis}]={position} is outside of the grid; give 0 to {length - 1}")
    return found


def show(spatial_shape: Sequence[int], query: Sequence[int], **geometry: Any) -> str:
    """The window of one query as text: `Q` the query, `#` a key that it sees, `.` any other token.

    Args:
        spatial_shape, query: as in `visible_keys`.
        geometry: kernel_size, stride, dilation and is_causal, as in `visible_keys`.

    Returns:
        A heading and the grid; of a 3-D grid the slices in which something is visible.

    Raises:
        ValueError, TypeError: as `visible_keys`.

    Example:
        >>> from natten_ops.tools import show
        >>> print(show((12,), (5,), kernel_size=3, dilation=2))
        12 tokens, kernel_size 3, dilation 2: query 5 sees 3 keys
            012345678901
            ...#.Q.#....
    """
    window = visible_keys(spatial_shape, query, **geometry)
    query = check_query(query, spatial_shape)
    where = str(query[0]) if len(query) == 1 else str(query)
    lines = [f"{title_of(spatial_shape, **geometry)}: query {where} sees {int(window.sum())} keys"]
    if len(spatial_shape) < 3:
        return "\n".join(lines + _grid_lines(window, query))
    for z, window_yx in enumerate(window):
        if window_yx.any():
            lines.append(f"z = {z}")
            lines += _grid_lines(window_yx, query[1:] if z == query[0] else None)
    return "\n".join(lines)


def _grid_lines(window: Tensor, query: Sequence[int] | None) -> list[str]:
    """A ruler of column numbers (last digits) and one line for each row, numbered if there are several."""
    rows = window.reshape(-1, window.shape[-1])
    lines = ["    " + "".join(str(x % 10) for x in range(rows.shape[1]))]
    for y, row in enumerate(rows.tolist()):
        cells = [VISIBLE if seen else OTHER for seen in row]
        if query is not None and (len(query) == 1 or query[0] == y):
            cells[query[-1]] = QUERY
        number = "" if window.dim() == 1 else str(y)
        lines.append(f"{number:>3} {''.join(cells)}")
    return lines


def title_of(
    spatial_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> str:
    return describe(spatial_shape, checked_params(spatial_shape, kernel_size, stride, dilation, is_causal))


# ---- pictures ------------------------------------------------------------------------------------------------------


def new_figure(columns: int = 1, rows: int = 1, width: float = 3.2, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure of `rows * columns` pictures, each width x height inches, and their axes, row-major.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.

    Example:
        >>> from natten_ops.tools.show import new_figure
        >>> figure, axes = new_figure(columns=3)
        >>> len(axes)
        3
    """
    try:
        from matplotlib.figure import Figure

        from natten_ops.tools._layout import Layout
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'natten-ops[demo]'") from error
    # No pyplot: a figure of one's own needs no display, no global state and no closing.
    figure = Figure(figsize=(width * columns, height * rows), layout=Layout())
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_window(
    spatial_shape: Sequence[int],
    query: Sequence[int],
    axes: Axes | None = None,
    title: str | None = None,
    **geometry: Any,
) -> Any:
    """The window of one query as coloured cells: orange the query, blue the keys that it sees, grey the rest.

    Args:
        spatial_shape, query: as in `visible_keys`; 1-D is one row, of 3-D the slice of the query is drawn.
        axes: matplotlib axes to draw on; None makes a figure.
        title: above the picture; None names the geometry.
        geometry: kernel_size, stride, dilation and is_causal, as in `visible_keys`.

    Returns:
        The matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError, TypeError, ImportError: as `visible_keys`; matplotlib is missing.

    Example:
        >>> from natten_ops.tools import draw_window
        >>> figure = draw_window((12, 12), (3, 3), kernel_size=5, dilation=2)
    """
    window = visible_keys(spatial_shape, query, **geometry)
    if title is None:
        title = title_of(spatial_shape, **geometry).replace(" tokens, ", " tokens\n")
        title += f"\nslice z = {query[0]}" if len(spatial_shape) == 3 else ""
    if len(spatial_shape) == 3:
        window = window[query[0]]
    cells = window.reshape(-1, window.shape[-1])
    axes = axes if axes is not None else new_figure()[1][0]
    _draw_cells(axes, cells, title)
    _mark(axes, query[-1] + 0.5, query[-2] + 0.5 if len(query) > 1 else 0.5, 1.0)
    _tick(axes, cells.shape, len(spatial_shape))
    return axes.figure


def draw_all_windows(length: int, axes: Axes | None = None, title: str | None = None, **geometry: Any) -> Any:
    """Every window of one axis: row i is query i, blue the keys that it sees, orange the query itself.

    Args:
        length: tokens of the axis.
        axes, title, geometry: as in `draw_window`.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError, TypeError, ImportError: as `draw_window`.

    Example:
        >>> from natten_ops.tools import draw_all_windows
        >>> figure = draw_all_windows(12, kernel_size=5, is_causal=True)
    """
    length = integer("length", length)
    described = title_of((length,), **geometry)  # checks the settings too, also for a length of 0
    rows = torch.stack([visible_keys((length,), (i,), **geometry) for i in range(length)])
    axes = axes if axes is not None else new_figure()[1][0]
    _draw_cells(axes, rows, title if title is not None else described)
    for i in range(length):
        _mark(axes, i + 0.5, i + 0.5, 1.0)
    _tick(axes, rows.shape, 2)
    axes.set(xlabel="key", ylabel="query")
    return axes.figure


def draw_on_image(
    image: Any,
    spatial_shape: Sequence[int],
    query: Sequence[int],
    axes: Axes | None = None,
    title: str | None = None,
    **geometry: Any,
) -> Any:
    """An image cut into tokens: bright where the query sees, dim elsewhere, the query in an orange frame.

    Args:
        image: `[height, width]` (grey) or `[height, width, 1, 3 or 4]`, floats in [0, 1] or bytes.
        spatial_shape: tokens of the two axes; the image is divided evenly among them.
        query: (y, x) of the query, in tokens.
        axes, title, geometry: as in `draw_window`.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError, TypeError, ImportError: as `draw_window`; a grid that is not 2-D, or no image of those above.

    Example:
        >>> import torch
        >>> from natten_ops.tools import draw_on_image
        >>> figure = draw_on_image(torch.rand(64, 64, 3).numpy(), (8, 8), (0, 3), kernel_size=3)
    """
    window = visible_keys(spatial_shape, query, **geometry)
    check_image(image, spatial_shape)
    axes = axes if axes is not None else new_figure(width=4.2, height=3.4)[1][0]
    cell_y, cell_x = draw_veiled(axes, image, (~window) * 0.62)
    for y, x in window.nonzero().tolist():
        frame(axes, x * cell_x, y * cell_y, cell_x, cell_y, "white", 0.8)
    for colour, line in (("white", 5.0), (QUERY_COLOUR, 2.5)):  # a white rim, for images that are orange themselves
        frame(axes, query[1] * cell_x, query[0] * cell_y, cell_x, cell_y, colour, line)
    set_title(axes, title if title is not None else title_of(spatial_shape, **geometry))
    return axes.figure


def check_image(image: Any, spatial_shape: Sequence[int]) -> None:
    """Raise ValueError unless the image can be drawn and divided among the tokens of the grid."""
    if len(spatial_shape) != 2:
        raise ValueError(f"an image has 2 spatial axes, and spatial_shape={tuple(spatial_shape)} has another number")
    shape = tuple(getattr(image, "shape", ()))
    if len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (1,), (3,), (4,)):
        what = f"has shape {list(shape)}" if hasattr(image, "shape") else f"is a {type(image).__name__}"
        raise ValueError(f"image {what}; give an array [height, width] or [height, width, 1, 3 or 4], channels last")
    if isinstance(image, Tensor) and (image.requires_grad or image.dtype == torch.bfloat16):
        raise ValueError(
            f"image is a tensor of {image.dtype} with requires_grad={image.requires_grad}; give "
            "image.detach().float(), or an array"
        )
    if not re.search("float|bool|int", str(image.dtype)):
        raise ValueError(f"image has dtype {image.dtype}; give floats in [0, 1] or bytes in [0, 255]")
    low, high = float(image.min()), float(image.max())
    if not (low >= -0.001 and high <= _white(image) + 0.001):  # so much is rounding; not finite is refused too
        raise ValueError(f"image has values from {low:.4g} to {high:.4g}; give floats in [0, 1] or bytes in [0, 255]")


def _white(image: Any) -> int:
    """The value of white: numpy and torch both name their types of numbers float32, uint8, .."""
    return 1 if re.search("float|bool", str(image.dtype)) else 255


def draw_veiled(axes: Axes, image: Any, opacity: Tensor) -> tuple[float, float]:
    """Draw an image and over each token black of this opacity `[y, x]`; the height and width of a token."""
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    # Of greys matplotlib would make the darkest black and the lightest white; colours it takes as they are.
    axes.imshow(image, cmap="gray", vmin=0, vmax=_white(image), extent=extent)
    veil = torch.zeros(*opacity.shape, 4)
    veil[..., 3] = opacity
    axes.imshow(veil.numpy(), extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    return height / opacity.shape[0], width / opacity.shape[1]


def set_title(axes: Axes, title: str) -> None:
    """Write the title above the picture, in lines as wide as its column of the figure."""
    from matplotlib.textpath import TextPath

    figure, place = axes.figure, axes.get_subplotspec()
    assert figure is not None
    share = axes.get_position().width if place is None else len(place.colspan) / place.get_gridspec().ncols
    room = 72 * (share * figure.bbox.width / figure.dpi - TITLE_MARGIN)  # in points
    lines = []
    for text in title.splitlines():
        line, *words = re.split(TITLE_BREAK, text)
        for word in words:
            longer = f"{line} {word}"
            if TextPath((0, 0), longer, size=TITLE_POINTS).get_extents().width > room:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    axes.set_title("\n".join(lines), fontsize=TITLE_POINTS)


def _draw_cells(axes: Axes, cells: Tensor, title: str) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([OTHER_COLOUR, VISIBLE_COLOUR])
    axes.pcolormesh(cells.int().numpy(), cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    axes.set(xlim=(0, cells.shape[1]), ylim=(cells.shape[0], 0), aspect="equal")
    set_title(axes, title)


def _mark(axes: Axes, x: float, y: float, size: float) -> None:
    from matplotlib.patches import Circle, Rectangle

    corner = (x - size / 2, y - size / 2)
    axes.add_patch(Rectangle(corner, size, size, facecolor=QUERY_COLOUR, edgecolor="white", linewidth=0.8))
    axes.add_patch(Circle((x, y), size * 0.16, facecolor="white", edgecolor="none"))


def frame(axes: Axes, x: float, y: float, width: float, height: float, colour: str, line: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line))


def _tick(axes: Axes, shape: Sequence[int], rank: int) -> None:
    """Numbers at the centres of cells, about six an axis."""
    steps = [max(1, round(count / 6)) for count in shape]
    axes.set_xticks([x + 0.5 for x in range(0, shape[1], steps[1])], [str(x) for x in range(0, shape[1], steps[1])])
    rows = range(0, shape[0], steps[0]) if rank > 1 else range(0)
    axes.set_yticks([y + 0.5 for y in rows], [str(y) for y in rows])
    axes.tick_params(length=0, labelsize=7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if rank > 1:
        names = AXIS_NAMES[rank][-2:]
        axes.set_ylabel(names[0], fontsize=8)
    axes.set_xlabel("x", fontsize=8)
