# SPDX-License-Identifier: MIT
"""What tests of nested tensors share: samples of different sizes, and the same attention sample after sample."""

import pytest
import torch

import natten_ops
from natten_ops import reference

SIZES = {2: [(5, 6), (7, 4), (6, 6)], 3: [(3, 4, 5), (4, 3, 3)]}


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def lines(values, offsets):
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets)


def values_of(lengths, dtype=torch.float64, heads=2, group=1, dim=8, value_dim=8, additional=None, rpb=0):
    """query, key, value, additional keys and values (or None), bias table (or None); `rpb` is the kernel size of it."""
    tokens, heads_kv = sum(lengths), heads // group
    found = [draw(tokens, heads, dim, dtype=dtype), draw(tokens, heads_kv, dim, dtype=dtype, seed=1)]
    found += [draw(tokens, heads_kv, value_dim, dtype=dtype, seed=2), None, None, None]
    if additional is not None:
        found[3] = draw(len(lengths), additional, heads_kv, dim, dtype=dtype, seed=3)
        found[4] = draw(len(lengths), additional, heads_kv, value_dim, dtype=dtype, seed=4)
    if rpb:
        found[5] = draw(heads, 2 * rpb - 1, dtype=dtype, seed=5)
    return found


def by_reference(tensors, lengths, windows):
    """out and lse of each sample alone, in float64."""
    query, key, value, keys, values, rpb = tensors
    ends, results = offsets_of(lengths).tolist(), []
    for i, (a, b) in enumerate(zip(ends, ends[1:])):
        extras = [None if t is None else t[i : i + 1] for t in (keys, values)]
        sample = (t[None, a:b] for t in (query, key, value))
        results.append(reference.neighborhood_attention_lse(*sample, *windows, None, *extras, rpb=rpb))
    return [torch.cat([part[0] for part in parts]) for parts in zip(*results)]


def by_op(tensors, lengths, windows):
    """The same through jagged tensors and the public function."""
    offsets = offsets_of(lengths)
    query, key, value = (lines(t, offsets) for t in tensors[:3])
    settings = dict(zip(("kernel_size", "stride", "dilation", "is_causal"), (w[0] for w in windows)))
    more = {"additional_keys": tensors[3], "additional_values": tensors[4], "rpb": tensors[5]}
    out, lse = natten_ops.na1d(query, key, value, **settings, **more, return_lse=True)
    assert out.layout == lse.layout == torch.jagged and out.shape[1] == lse.shape[1] == query.shape[1]
    return [out.values(), lse.values()]


def gradients(function, tensors, *rest):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, lse = function(leaves, *rest)
    return torch.autograd.grad(
        out.double().sin().sum() + lse.double().cos().sum(), [t for t in leaves if t is not None]
    )


def sentence(function, *args, **kwargs):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def grids(rank, *rest, front=(), seed=0):
    tensors = [draw(*front, *size, *rest, seed=seed + i) for i, size in enumerate(SIZES[rank])]
    return torch.nested.nested_tensor(tensors, requires_grad=True)
