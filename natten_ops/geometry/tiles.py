# SPDX-License-Identifier: MIT
"""Tiles of queries and keys without evaluating a mask, and exact counts of visible pairs.

Starts and ends of windows grow with the query inside one dilation group. So for the queries [q0, q1] of a group the
keys that *some* of them see are exactly [start(q0), end(q1)) and the keys that *all* of them see [start(q1), end(q0)).
Source: docs/semantics.md, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from natten_ops.geometry.params import Box, NAParams, axis_window, group_length


class Range(NamedTuple):
    """In-group positions [first, stop)."""

    first: Any
    stop: Any


class KeyTile(NamedTuple):
    """One visited key tile: its position range on each axis; `full` means that every query sees every key of it."""

    ranges: tuple[Range, ...]
    full: bool


def dilation_groups(params: NAParams) -> Iterator[tuple[int, ...]]:
    """Every dilation group, one residue an axis, row-major; groups do not see each other."""
    return product(*(range(dilation) for dilation in params.dilation))


def seen_by_some_and_all(params: NAParams, axis: int, group: int, length: Any, queries: Range) -> tuple[Range, Range]:
    """Keys that some, and keys that all, of the in-group `queries` of one axis see (the second may be empty)."""
    dilation = params.dilation[axis]
    _, start0, end0 = params.window(axis, group + dilation * queries.first, length)
    _, start1, end1 = params.window(axis, group + dilation * (queries.stop - 1), length)
    return Range(start0, end1), Range(start1, end0)


def query_tiles(
    params: NAParams, extent: Sequence[int], group: Sequence[int], tile: Sequence[int]
) -> Iterator[tuple[Range, ...]]:
    """The queries of one dilation group, cut into tiles of at most `tile` positions an axis, row-major."""
    cuts = []
    for axis, length in enumerate(extent):
        count = group_length(length, params.dilation[axis], group[axis])
        cuts.append([Range(q, min(q + tile[axis], count)) for q in range(0, count, tile[axis])])
    return product(*cuts)


def key_tiles(
    params: NAParams,
    extent: Sequence[int],
    group: Sequence[int],
    queries: Sequence[Range],
    tile: Sequence[int],
) -> Iterator[KeyTile]:
    """The key tiles (a grid of `tile` positions an axis, from 0) that the query tile visits, row-major."""
    per_axis = []
    for axis, length in enumerate(extent):
        count = group_length(length, params.dilation[axis], group[axis])
        some, every = seen_by_some_and_all(params, axis, group[axis], length, queries[axis])
        cuts = []
        for k in range(some.first // tile[axis] * tile[axis], some.stop, tile[axis]):
            keys = Range(k, min(k + tile[axis], count))
            cuts.append((keys, every.first <= keys.first and keys.stop <= every.stop))
        per_axis.append(cuts)
    for choice in product(*per_axis):
        yield KeyTile(tuple(keys for keys, _ in choice), all(full for _, full in choice))


def visible_pairs(params: NAParams, q_shape: Sequence[Any], box: Box | None = None) -> Any:
    """Number of (query, visible key) pairs over the whole query grid, additional tokens not counted.

    Exact for ints. A causal axis of symbolic size is counted as if it were not causal: the sum over its queries would
    make the size concrete.
    """
    pairs = 1
    for axis, count in enumerate(q_shape):
        origin, length = (box.q_origin[axis], box.extent[axis]) if box else (0, count)
        kernel, stride, dilation, causal = params.axis(axis)
        if causal and all(isinstance(size, int) for size in (origin, count, length)):
            pairs = pairs * _causal_pairs(origin, count, length, kernel, stride, dilation)
        else:
            pairs = pairs * (kernel * count)
    return pairs


@lru_cache(maxsize=256)
def _causal_pairs(origin: int, count: int, length: int, kernel: int, stride: int, dilation: int) -> int:
    windows = (axis_window(origin + i, length, kernel, stride, dilation, True) for i in range(count))
    return sum(end - start for _, start, end in windows)
