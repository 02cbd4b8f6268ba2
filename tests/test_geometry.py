# SPDX-License-Identifier: MIT
"""The window formulas: C++ against Python bit for bit, tiles and masks against brute force, symbolic sizes."""

import itertools
import random

import pytest
import torch
from brute_force import inverse_window, window

from natten_ops.geometry.masks import dense_mask, mask_mod
from natten_ops.geometry.params import (
    INTEGERS,
    Box,
    axis_inverse_window,
    axis_keys_needed,
    axis_window,
    group_length,
    make_params,
)
from natten_ops.geometry.tiles import (
    Range,
    dilation_groups,
    key_tiles,
    query_tiles,
    seen_by_some_and_all,
    visible_pairs,
)
from natten_ops.reference import TENSORS


def axis_cases(count, seed, longest):
    """Random (index, length, kernel, stride, dilation, causal)."""
    rng = random.Random(seed)
    for _ in range(count):
        dilation = rng.randint(1, 5)
        kernel = rng.randint(1, max(1, longest // dilation))
        length = rng.randint(kernel * dilation, longest + kernel * dilation)
        yield rng.randrange(length), length, kernel, rng.randint(1, kernel), dilation, rng.random() < 0.5


def test_cpp_equals_python_bit_for_bit():
    small = [
        (index, length, kernel, stride, dilation, causal)
        for length in range(1, 13)
        for dilation in range(1, length + 1)
        for kernel in range(1, length // dilation + 1)
        for stride in range(1, kernel + 1)
        for causal in (False, True)
        for index in range(length)
    ]
    cases = [*small, *axis_cases(90_000, 0, 60), *axis_cases(5_000, 1, 10**6)]
    assert len(cases) > 100_000
    have = torch.ops.natten._windows(torch.tensor([[int(x) for x in case] for case in cases]))
    want = [(*axis_window(*case), *axis_inverse_window(*case)[1:]) for case in cases]
    assert torch.equal(have, torch.tensor(want))


def test_formulas_serve_tensors_alike():
    for index, *axis in axis_cases(200, 2, 40):
        length, causal = axis[0], axis[-1]
        rows = torch.arange(length)
        for formula in (axis_window, axis_inverse_window):
            have = [t[index].item() for t in formula(rows, *axis, ops=TENSORS)]
            assert have == list(formula(index, *axis, ops=INTEGERS)), (index, axis, causal)


@pytest.mark.parametrize("seed", range(3))
def test_windows_equal_brute_force(seed):
    for index, *axis in axis_cases(300, 10 + seed, 30):
        dilation = axis[3]
        group, start, end = axis_window(index, *axis)
        assert [group + dilation * t for t in range(start, end)] == window(index, *axis)
        group, first, last = axis_inverse_window(index, *axis)
        assert [group + dilation * i for i in range(first, last + 1)] == inverse_window(index, *axis)


def test_keys_needed_are_the_smallest_range():
    rng = random.Random(3)
    for _, *axis in axis_cases(300, 4, 24):
        length = axis[0]
        origin = rng.randrange(length)
        count = rng.randint(0, length - origin)
        seen = [key for index in range(origin, origin + count) for key in window(index, *axis)]
        first, stop = axis_keys_needed(origin, count, *axis)
        assert (first, stop) == ((min(seen), max(seen) + 1) if seen else (origin, origin))


GRIDS = [
    ((11,), (3,), (1,), (2,), (False,)),
    ((13,), (4,), (3,), (2,), (True,)),
    ((7, 9), (3, 4), (2, 1), (2, 1), (False, True)),
    ((6, 7), (6, 3), (1, 3), (1, 2), (False, False)),
    ((4, 5, 6), (2, 3, 3), (1, 2, 1), (2, 1, 2), (True, False, False)),
]


def brute_mask(extent, kernel, stride, dilation, causal):
    rows = []
    for query in itertools.product(*map(range, extent)):
        seen = set(itertools.product(*(window(*axis) for axis in zip(query, extent, kernel, stride, dilation, causal))))
        rows.append([key in seen for key in itertools.product(*map(range, extent))])
    return torch.tensor(rows)


@pytest.mark.parametrize("grid", GRIDS)
def test_masks_and_counts_equal_brute_force(grid):
    extent, *settings = grid
    params = make_params(len(extent), *settings)
    want = brute_mask(*grid)
    assert torch.equal(dense_mask(params, extent, extent), want)
    tokens = torch.arange(want.shape[0])
    flex = mask_mod(extent, *settings)(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None, :])
    assert torch.equal(flex, want)
    assert visible_pairs(params, extent) == want.sum().item()


def test_counts_and_masks_of_a_sub_box():
    params = make_params(2, (3, 4), (2, 1), (1, 2), (True, False))
    extent, origin, shape = (9, 12), (2, 5), (4, 6)
    box = Box(origin, (0, 0), extent)
    whole = dense_mask(params, extent, extent).view(*extent, *extent)
    part = whole[2:6, 5:11].reshape(24, -1)
    assert torch.equal(dense_mask(params, shape, extent, box), part)
    assert visible_pairs(params, shape, box) == part.sum().item()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tile", [1, 2, 3])
def test_tiles_cover_the_mask_exactly(grid, tile):
    """Every visible pair lies in a visited tile; every visited tile has one; a tile is full iff nothing is hidden."""
    extent, *settings = grid
    params = make_params(len(extent), *settings)
    mask = dense_mask(params, extent, extent).view(*extent, *extent)
    covered = torch.zeros_like(mask)
    sizes = (tile,) * params.rank
    for group in dilation_groups(params):
        for queries in query_tiles(params, extent, group, sizes):
            for keys in key_tiles(params, extent, group, queries, sizes):
                part = tuple(
                    slice(g + d * r.first, g + d * (r.stop - 1) + 1, d)
                    for ranges in (queries, keys.ranges)
                    for g, d, r in zip(group, params.dilation, ranges)
                )
                assert mask[part].any()
                assert mask[part].all() == keys.full
                covered[part] = True
    assert not (mask & ~covered).any()


def test_ranges_seen_by_some_and_all():
    for _, length, kernel, stride, dilation, causal in axis_cases(200, 5, 20):
        params = make_params(1, kernel, stride, dilation, causal)
        group = dilation - 1
        count = group_length(length, dilation, group)
        first = count // 3
        stop = first + (count - first + 1) // 2
        sets = [set(window(group + dilation * i, length, *params.axis(0))) for i in range(first, stop)]
        some, every = seen_by_some_and_all(params, 0, group, length, Range(first, stop))
        for want, have in ((set.union(*sets), some), (set.intersection(*sets), every)):
            assert want == {group + dilation * t for t in range(have.first, have.stop)}


def test_formulas_keep_symbolic_sizes():
    """No guard on a size: a SymInt goes through with torch.sym_min and torch.sym_max."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, StatelessSymbolicContext, DimDynamic  # noqa: I001
    from torch._subclasses import FakeTensorMode

    from natten_ops.geometry.params import Arithmetic

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    length = mode.from_tensor(torch.empty(20), symbolic_context=context).shape[0]
    symbolic = Arithmetic(torch.sym_min, torch.sym_max, torch.sym_ite)
    guards = len(environment.guards)
    group, start, end = axis_window(length - 1, length, 5, 2, 1, False, ops=symbolic)
    assert len(environment.guards) == guards
    assert isinstance(start, torch.SymInt) and (int(start), int(end)) == axis_window(19, 20, 5, 2, 1, False)[1:]
