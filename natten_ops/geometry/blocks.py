# SPDX-License-Identifier: MIT
"""Which blocks of tokens see which, by counting: the index tables of FlexAttention without a mask over tokens.

The visible pairs of one axis among the queries before i and the keys before j have a closed form (`axis_counts`). On a
grid "before" means before in row-major order: an earlier place on some axis and equal places on the axes above it. So
the count for two tokens of a grid is a sum of products of counts on axes, that for two blocks of consecutive tokens a
difference of four such, and a block pair is visited if its count is positive and full if it is that of all its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from natten_ops.geometry.masks import TENSORS, axis_visible
from natten_ops.geometry.params import (
    NAParams,
    axis_inverse_window,
    axis_keys_needed,
    axis_window,
    group_length,
)

# Axes of at most so many tokens get one table for all chunks; 3 x 256 took 3 ms, and the table of 1024 alone 16 ms.
SHORT_AXIS = 256
# Block pairs counted at once. 900 x 900 of them took 11 ms so, 14 ms in chunks of 30000 and 18 ms of 15000; with two
# threads on a machine that does other things too, 36, 298 and 318 ms: every operation of many waits for the other core.
CHUNK_PAIRS = 1 << 17


class Table(NamedTuple):
    """A list of block numbers a row: the first `counts[r]` entries of `indices[r]`, ascending; the rest is 0."""

    counts: Tensor  # int32 [rows]
    indices: Tensor  # int32 [rows, columns]


class Tables(NamedTuple):
    """Partial and full key blocks of each query block, partial and full query blocks of each key block."""

    keys: Table
    full_keys: Table
    queries: Table
    full_queries: Table


class Ordering(Protocol):
    """Tokens in some order, cut into blocks of equal size, the last one perhaps cut short."""

    blocks: tuple[Any, Any]  # numbers of query blocks and of key blocks
    all_keys: Tensor  # the numbers of all key blocks

    def candidates(self, first: int, stop: int) -> Tensor:
        """Key blocks, ascending, that hold every key that some query block in [first, stop) sees."""

    def count(self, rows: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, columns] visible pairs of each query block with each of the candidate key blocks, and those it has."""


# ---- one axis ------------------------------------------------------------------------------------------------------


class WindowSums(NamedTuple):
    """Prefix sums over the windows of one axis: of a long dilation group, then of a short one."""

    longest: Any  # members of a long group
    starts: Tensor  # int64 [2, longest + 1]
    ends: Tensor


def window_sums(params: NAParams, axis: int, length: Any, device: Any) -> WindowSums:
    """The part of `axis_pairs_before` that depends on the axis alone; its time goes with the tokens of the axis."""
    dilation = params.dilation[axis]
    longest = _ceil(length, dilation)
    members = dilation * torch.arange(longest, device=device)
    members = torch.stack([members, (members + dilation - 1).clamp(max=length - 1)])
    _, start, end = axis_window(members, length, *params.axis(axis), ops=TENSORS)
    return WindowSums(longest, *(pad(t.cumsum(1), (1, 0)) for t in (start, end)))


def axis_counts(params: NAParams, axis: int, length: Any, query: Tensor, key: Tensor, sums: WindowSums) -> Tensor:
    """int64 [4, m, n] for places `query` [m] and `key` [n] from 0 to length: visible pairs of one axis among

    (query, key) itself; query and the keys before; the queries before and key; the queries before and the keys before.
    The length is a place but no token: there the first, and one of the next two, mean nothing.
    """
    dilation, settings = params.dilation[axis], (length, *params.axis(axis))
    i, j = query.clamp(max=length - 1)[:, None], key.clamp(max=length - 1)[None, :]
    group, start, end = axis_window(i, *settings, ops=TENSORS)
    key_group, first, last = axis_inverse_window(j, *settings, ops=TENSORS)
    visible = axis_visible(params, axis, length, i, j)
    keys = group_length(key[None, :], dilation, group).clamp(start, end) - start
    queries = group_length(query[:, None], dilation, key_group).clamp(first, last + 1) - first
    return torch.stack(
        [visible.to(torch.int64), keys, queries, axis_pairs_before(params, axis, length, query, key, sums)]
    )


def axis_pairs_before(params: NAParams, axis: int, length: Any, query: Tensor, key: Tensor, sums: WindowSums) -> Tensor:
    """int64 [m, n]: visible pairs of one axis among the queries before `query` [m] and the keys before `key` [n]."""
    dilation, settings = params.dilation[axis], (length, *params.axis(axis))
    q, k = query[:, None], key[None, :]
    group, weight = _dilation_groups(dilation, length, q, k)
    i, j, count = (group_length(place, dilation, group) for place in (q, k, length))
    # Queries below `passed` see no key from j on; those from `beyond` on see no key before it.
    here, before = (group + dilation * j).clamp(max=length - 1), (group + dilation * (j - 1)).clamp(min=0)
    passed = torch.where(j < count, axis_inverse_window(here, *settings, ops=TENSORS)[1], count)
    beyond = torch.where(j > 0, axis_inverse_window(before, *settings, ops=TENSORS)[2] + 1, 0)
    passed, beyond = torch.minimum(passed, i), torch.minimum(beyond, i)
    longest, starts, ends = sums
    kind = (count < longest).to(torch.int64)
    seen = ends[kind, passed] + j * (beyond - passed) - starts[kind, beyond]
    return (seen * weight).sum(0)


def _dilation_groups(dilation: int, length: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (first dim) of which each stands for `weight` groups with the same counts.

    Groups differ only in whether they have a member more before the query, the key and the end of the axis: three
    residues cut many groups into four classes.
    """
    if dilation <= 4:
        group = torch.arange(dilation, device=query.device)[:, None, None]
        return group, torch.ones_like(group)
    residues = torch.broadcast_tensors(query % dilation, key % dilation, torch.full_like(query, length % dilation))
    cuts = torch.stack(residues).sort(0).values
    cuts = torch.cat([torch.zeros_like(cuts[:1]), cuts, torch.full_like(cuts[:1], dilation)])
    return cuts[:-1].clamp(max=dilation - 1), cuts[1:] - cuts[:-1]


# ---- the two orders of tokens --------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One axis of a row-major grid at the boundaries of all blocks; `pairs` are visible pairs of it and the axes inside."""

    query: Tensor  # places of the query blocks' boundaries on this axis
    key: Tensor
    table: tuple[Tensor, ...] | None  # of a short axis: [place, key boundary], what `_terms` gives for all its places
    query_pairs: Tensor  # of the queries before each boundary with any key
    key_pairs: Tensor  # of any query with the keys before each boundary
    pairs: Tensor  # of all queries with all keys
    sums: WindowSums


class RowMajor:
    """Row-major tokens of a grid in blocks of `block_size` = (queries, keys)."""

    def __init__(
        self, params: NAParams, spatial_shape: Sequence[Any], block_size: tuple[int, int], device: Any
    ) -> None:
        self.params, self.spatial_shape, self.block_size = params, tuple(spatial_shape), block_size
        tokens = math.prod(spatial_shape)
        self.blocks = _ceil(tokens, block_size[0]), _ceil(tokens, block_size[1])
        self._query, self._key = (_edges(tokens, size, device) for size in block_size)
        self.all_keys = torch.arange(self.blocks[1], device=device)
        self._axes: list[_Axis] = []  # innermost first
        # No count exceeds the pairs of all queries and window slots; 32 bits take a third of the time of 64.
        slots = math.prod(params.kernel_size) * tokens
        dtype = torch.int32 if eager() and slots < 2**31 else torch.int64
        below = 1
        for axis in reversed(range(params.rank)):
            length = self.spatial_shape[axis]
            # The end of the grid is the place `length` of the first axis; on the others places begin again.
            query, key = (t // below if axis == 0 else t // below % length for t in (self._query, self._key))
            self._axes.append(self._count_all(axis, query, key, dtype))
            below = below * length

    def _count_all(self, axis: int, query: Tensor, key: Tensor, dtype: torch.dtype) -> _Axis:
        length = self.spatial_shape[axis]
        short = eager() and length <= SHORT_AXIS
        sums = window_sums(self.params, axis, length, query.device)
        if short:
            places = torch.arange(length + 1, device=query.device)
            counts = axis_counts(self.params, axis, length, places, places, sums).to(dtype)
            of_query, of_key, pairs = counts[:, query, length], counts[:, length, key], counts[3, length, length]
        else:
            end = self._query[-1:] // (math.prod(self.spatial_shape) // length)  # the length, from a sum as in `_edges`
            of_query = axis_counts(self.params, axis, length, query, end, sums)[:, :, 0].to(dtype)
            of_key = axis_counts(self.params, axis, length, end, key, sums)[:, 0].to(dtype)
            pairs = axis_pairs_before(self.params, axis, length, end, end, sums)[0, 0].to(dtype)
        query_pairs, key_pairs = of_query[3], of_key[3]
        if self._axes:
            inside = self._axes[-1]
            query_pairs = query_pairs * inside.pairs + of_query[1] * inside.query_pairs
            key_pairs = key_pairs * inside.pairs + of_key[2] * inside.key_pairs
            pairs = pairs * inside.pairs
        table = self._terms(len(self._axes), counts.index_select(2, key), slice(None)) if short else None
        return _Axis(query, key, table, query_pairs, key_pairs, pairs, sums)

    def _terms(self, depth: int, counts: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """What multiplies the pairs of the axes inside: both before, the queries before with any key; and the rest."""
        visible, keys, queries, both = counts
        if depth > 0:
            inside = self._axes[depth - 1]
            both = both * inside.pairs + queries * inside.key_pairs[columns]
        return visible, keys, both

    def _pairs_before(self, rows: slice, columns: Tensor | slice) -> Tensor:
        """[m, n] visible pairs among the queries before the query boundaries and the keys before the key boundaries."""
        found: Any = None
        for depth, record in enumerate(self._axes):
            axis = self.params.rank - 1 - depth
            if record.table is not None:
                query = record.query[rows]
                visible, keys, rest = (term[:, columns].index_select(0, query) for term in record.table)
            else:
                places = record.query[rows], record.key[columns]
                counts = axis_counts(self.params, axis, self.spatial_shape[axis], *places, record.sums)
                visible, keys, rest = self._terms(depth, counts, columns)
            if depth > 0:
                rest = rest + visible * found + keys * self._axes[depth - 1].query_pairs[rows, None]
            found = rest
        return found

    def count(self, rows: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See Ordering. Blocks that are no candidates see nothing, so a candidate is counted up to the next one."""
        edges: Tensor | slice = torch.cat([columns, columns[-1:] + 1])
        if eager() and columns[-1] - columns[0] == columns.shape[0] - 1:  # without gaps, which is faster
            edges = slice(int(columns[0]), int(columns[-1]) + 2)
        before = self._pairs_before(slice(rows.start, rows.stop + 1), edges)
        by_query = before[1:] - before[:-1]
        tokens = self._query.diff()[rows, None] * self._key.diff()[columns]
        return by_query[:, 1:] - by_query[:, :-1], tokens

    def candidates(self, first: int, stop: int) -> Tensor:
        """See Ordering."""
        queries = _enclosing_box(first * self.block_size[0], stop * self.block_size[0], self.spatial_shape)
        keys = _keys_needed(self.params, self.spatial_shape, queries)
        return _blocks_of_box(keys, self.spatial_shape, self.block_size[1])


class Boxes:
    """Tokens of a grid, padded to whole tiles, tile by tile: one tile is one block."""

    def __init__(self, params: NAParams, spatial_shape: Sequence[Any], tile: Sequence[int], device: Any) -> None:
        self.params, self.spatial_shape, self.tile = params, tuple(spatial_shape), tuple(tile)
        self.grid = tuple(_ceil(length, size) for length, size in zip(spatial_shape, tile))
        self.blocks = math.prod(self.grid), math.prod(self.grid)
        self.all_keys = torch.arange(self.blocks[1], device=device)
        self._pairs, self._tokens = [], []
        for axis, (length, size) in enumerate(zip(spatial_shape, tile)):
            edges = _edges(length, size, device)
            sums = window_sums(params, axis, length, device)
            self._pairs.append(axis_pairs_before(params, axis, length, edges, edges, sums).diff(dim=0).diff(dim=1))
            self._tokens.append(edges.diff())

    def count(self, rows: slice, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See Ordering. Padded queries see what the last query sees, padded keys are never seen."""
        numbers = torch.arange(rows.start, rows.stop, device=columns.device)
        pairs: Any = 1
        tokens: Any = math.prod(self.tile)
        below = 1
        for axis in reversed(range(self.params.rank)):
            query, key = (t // below % self.grid[axis] for t in (numbers, columns))
            pairs = pairs * self._pairs[axis][query].index_select(1, key)
            tokens = tokens * self._tokens[axis][query][:, None]
            below = below * self.grid[axis]
        return pairs, tokens

    def candidates(self, first: int, stop: int) -> Tensor:
        """See Ordering."""
        tiles = _enclosing_box(first, stop, self.grid)
        box = [(a * t, min(b * t, n)) for (a, b), t, n in zip(tiles, self.tile, self.spatial_shape)]
        keys = _keys_needed(self.params, self.spatial_shape, box)
        return _blocks_of_box([(a // t, _ceil(b, t)) for (a, b), t in zip(keys, self.tile)], self.grid, 1)


def _ceil(count: Any, size: int) -> Any:
    return (count + size - 1) // size


def _edges(length: Any, size: int, device: Any) -> Tensor:
    """int64 [blocks + 1]: where blocks of `size` begin, and the end of the last."""
    # A sum of their lengths: Inductor of torch 2.13 would carry the formula of a range into all that is computed from it,
    # and fails to simplify that ("vr must not be None").
    sizes = (length - size * torch.arange(_ceil(length, size), device=device)).clamp(max=size)
    return pad(sizes.cumsum(0), (1, 0))


Ranges = Sequence[tuple[int, int]]


def _enclosing_box(first: int, stop: int, grid: Sequence[int]) -> Ranges:
    """The smallest box, [first, stop) an axis, around the row-major tokens [first, stop) of the grid."""
    final = min(stop, math.prod(grid)) - 1
    ranges = []
    below = math.prod(grid)
    for length in grid:
        below //= length
        low, high = first // below, final // below
        same = low // length == high // length  # as far as the axes above go
        ranges.append((low % length, high % length + 1) if same else (0, length))
    return ranges


def _keys_needed(params: NAParams, spatial_shape: Sequence[int], queries: Ranges) -> Ranges:
    """The box of keys that a box of queries sees."""
    return [
        axis_keys_needed(first, stop - first, spatial_shape[axis], *params.axis(axis))
        for axis, (first, stop) in enumerate(queries)
    ]


def _blocks_of_box(box: Ranges, grid: Sequence[int], block: int) -> Tensor:
    """The blocks of row-major tokens of the grid, ascending, that have a token of the box."""
    # Axes that the box covers whole make one run of tokens with the first axis above them that it does not.
    inner = max((axis for axis, ends in enumerate(box) if ends != (0, grid[axis])), default=0)
    below = math.prod(grid[inner + 1 :])
    starts = torch.zeros(1, dtype=torch.int64, device="cpu")
    for length, (first, stop) in zip(grid[:inner], box):
        starts = (starts[:, None] * length + torch.arange(first, stop, device="cpu")).flatten()
    first, stop = box[inner]
    starts = (starts * grid[inner] + first) * below
    edges = torch.zeros(_ceil(math.prod(grid), block) + 1, dtype=torch.int32, device="cpu")
    edges.index_add_(0, starts // block, edges.new_ones(starts.shape))
    edges.index_add_(0, (starts + (stop - first) * below - 1) // block + 1, edges.new_full(starts.shape, -1))
    return edges.cumsum(0)[:-1].nonzero().flatten()


# ---- the tables ----------------------------------------------------------------------------------------------------


def eager() -> bool:
    """Whether numbers may be looked at. While a compiler traces, lengths of lists must not depend on them."""
    return not torch.compiler.is_compiling()


def build_tables(order: Ordering) -> Tables:
    """The index tables of all block pairs: in eager mode from the candidates alone, on the CPU; traced in one pass."""
    rows, columns = order.blocks
    if not eager():
        some, every = _classify(*order.count(slice(0, rows), order.all_keys))
        return Tables(*(_dense_table(visited) for visited in (some, every, some.T, every.T)))
    by_query, by_key = ([_empty_table(*shape), _empty_table(*shape)] for shape in ((rows, columns), (columns, rows)))
    first, height = 0, 1
    while first < rows:
        stop = min(first + height, rows)
        keys = order.candidates(first, stop)
        fitting = CHUNK_PAIRS // keys.shape[0]
        if height > max(fitting, 1):
            height = max(fitting, 1)
            continue
        height = max(fitting, 1)
        queries = torch.arange(first, stop, device="cpu")
        for kind, visited in enumerate(_classify(*order.count(slice(first, stop), keys))):
            if visited.any():  # most chunks have no full blocks
                _append(by_query[kind], visited, queries, keys)
                _append(by_key[kind], visited.T.contiguous(), keys, queries)
        first = stop
    return Tables(*by_query, *by_key)


def _classify(pairs: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    every = pairs == most
    return (pairs > 0) & ~every, every


def _empty_table(rows: int, columns: int) -> Table:
    counts = torch.zeros(rows, dtype=torch.int32, device="cpu")
    return Table(counts, counts.new_zeros(rows, columns))


def _append(table: Table, visited: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Append to each of the rows of the table the columns that it visits; `visited` is bool [rows, columns]."""
    row, column = visited.nonzero().unbind(1)
    more = visited.sum(1)
    # Entry e of the flat list is the (e - entries of the rows before)-th of its row.
    offset = rows * table.indices.shape[1] + table.counts[rows] - (more.cumsum(0) - more)
    places = torch.arange(row.shape[0], device="cpu") + offset.index_select(0, row)
    table.indices.view(-1).scatter_(0, places, columns.to(torch.int32).index_select(0, column))
    table.counts[rows] += more.to(torch.int32)


def _dense_table(visited: Tensor) -> Table:
    """The same of whole rows by a permutation of the columns: visited ones first, as torch's own tables have it."""
    column = torch.arange(visited.shape[1], device=visited.device)
    before = visited.cumsum(1)
    counts = before[:, -1:]
    place = torch.where(visited, before - 1, counts + column - before)
    indices = torch.zeros_like(place).scatter(1, place, column.expand(place.shape))
    return Table(counts[:, 0].to(torch.int32), indices.to(torch.int32))
