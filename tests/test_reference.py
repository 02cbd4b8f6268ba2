# SPDX-License-Identifier: MIT
"""The reference equals the brute force, full attention, blocked attention, and its own numerical derivatives."""

from __future__ import annotations

import itertools
import math
from typing import Any

import brute_force
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from natten_ops.geometry.params import axis_inverse_window, axis_window
from natten_ops.reference import neighborhood_attention_lse

Problem = tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...] | None]
AXES = [(n, k, s, d, c) for n in range(1, 15) for d in range(1, n + 1) for k in range(1, n // d + 1)
        for s in range(1, k + 1) for c in (False, True)]  # fmt: skip
REFERENCE: Any = neighborhood_attention_lse  # Any: its arguments come in bundles
BRUTE: Any = brute_force.neighborhood_attention_lse


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Equal within ``tolerance``, absolute and relative; infinities and shapes exactly."""
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def seeded(seed: int, *shape: int) -> torch.Tensor:
    """Normal float64 numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def backwards_in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the memory order of the dims reversed and every second element skipped."""
    order = tuple(reversed(range(tensor.ndim)))
    return torch.stack([tensor.permute(order), tensor.permute(order)], dim=-1)[..., 0].permute(order)


def heads_last(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """``[B, H, tokens, D]`` of a square grid of ``rank`` axes -> ``[B, *spatial, H, D]``."""
    side = round(tensor.shape[2] ** (1 / rank))
    return tensor.transpose(1, 2).unflatten(1, (side,) * rank)


@st.composite
def problems(draw: st.DrawFn, rank: int, longest: int) -> Problem:
    """Arguments of one call, its keyword arguments, and for a sub-box what finds it in the global problem."""
    kernel_size = [draw(st.sampled_from([3, 2, 4, 1])) for _ in range(rank)]  # the first, a telling case, is favoured
    dilation = [draw(st.sampled_from([d for d in (2, 1, 3) if kernel * d <= longest])) for kernel in kernel_size]
    extent = [longest - draw(st.integers(0, longest - k * d)) for k, d in zip(kernel_size, dilation, strict=True)]
    biased = draw(st.booleans())
    stride = [1 if biased else kernel - draw(st.integers(0, kernel - 1)) for kernel in kernel_size]
    is_causal = [draw(st.booleans()) for _ in range(rank)]
    batch, kv_heads, group = (draw(st.sampled_from(sizes)) for sizes in ([1, 1, 2, 1, 2, 0], [2, 1], [2, 1, 3]))
    head_dim, value_dim, tokens = (draw(st.sampled_from(sizes)) for sizes in ([3, 1, 4], [2, 1, 3, 0], [2, -1, 1, 0]))
    seed, options = draw(st.integers(0, 10**6)), {}
    query = seeded(seed, batch, *extent, kv_heads * group, head_dim)
    key = seeded(seed + 1, batch, *extent, kv_heads, head_dim)
    value = seeded(seed + 2, batch, *extent, kv_heads, value_dim)
    extra: list[torch.Tensor | None] = [None, None]
    if tokens >= 0:
        extra = [seeded(seed + 3 + i, batch, tokens, kv_heads, d) for i, d in enumerate((head_dim, value_dim))]
    if biased:
        options["rpb"] = seeded(seed + 5, kv_heads * group, *(2 * kernel - 1 for kernel in kernel_size))
    if draw(st.booleans()):
        share_removed = draw(st.sampled_from([0.3, 0.9, 1.0]))
        options["key_mask"] = seeded(seed + 6, batch, *extent).sigmoid() > share_removed
        for tensor in (key, value) if draw(st.booleans()) else ():
            tensor[~options["key_mask"]] = math.nan
    if draw(st.booleans()):
        query, key, value = map(backwards_in_memory, (query, key, value))
        extra = [None if tensor is None else backwards_in_memory(tensor) for tensor in extra]
    lists = (kernel_size, stride, dilation, is_causal)
    arguments = (query, key, value, *lists, draw(st.sampled_from([None, 0.37, 0.0, -1.2])), *extra)
    if draw(st.booleans()):
        return arguments, options, None
    q_box, kv_box = [], []
    for axis, length in enumerate(extent):
        first = draw(st.integers(0, length - 1))
        last = draw(st.integers(first, length - 1))
        windows = [brute_force.window(i, length, *(e[axis] for e in lists)) for i in range(first, last + 1)]
        low, high = min(map(min, windows)), max(map(max, windows))
        if draw(st.booleans()):
            low, high = draw(st.integers(0, low)), draw(st.integers(high, length - 1))
        q_box.append(slice(first, last + 1))
        kv_box.append(slice(low, high + 1))
    inside_q, inside_kv = (slice(None), *q_box), (slice(None), *kv_box)
    boxed = dict(options, q_origin=[s.start for s in q_box], kv_origin=[s.start for s in kv_box], extent=extent)
    if "key_mask" in options:
        boxed["key_mask"] = options["key_mask"][inside_kv]
    boxed_arguments = (query[inside_q], key[inside_kv], value[inside_kv], *arguments[3:])
    return boxed_arguments, boxed, (inside_q, arguments, options)


@pytest.mark.parametrize(("rank", "longest"), [(1, 14), (2, 7), (3, 5)])
@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data())
def test_reference_equals_brute_force(rank: int, longest: int, data: st.DataObject) -> None:
    arguments, options, whole = data.draw(problems(rank, longest))
    results = REFERENCE(*arguments, **options)
    assert [tensor.dtype for tensor in results] == [torch.float64] * 2
    list(map(close, results, BRUTE(*arguments, **options)))
    if whole is not None:  # a box is nothing but a piece of the global problem
        inside, global_arguments, global_options = whole
        list(map(close, results, (entire[inside] for entire in BRUTE(*global_arguments, **global_options))))


def test_axis_formulas_exhaustively() -> None:
    for length, *rest in AXES:
        dilation = rest[2]
        for i in range(length):
            group, start, end = axis_window(i, length, *rest)
            keys = [group + dilation * t for t in range(start, end)]
            assert keys == brute_force.window(i, length, *rest), (i, length, *rest)
            group, first, last = axis_inverse_window(i, length, *rest)
            queries = [group + dilation * t for t in range(first, last + 1)]
            assert queries == brute_force.inverse_window(i, length, *rest), (i, length, *rest)


@pytest.mark.parametrize(("axis", "index", "visible"), [
    ((7, 3, 1, 1, False), 0, [0, 1, 2]), ((7, 3, 1, 1, False), 3, [2, 3, 4]), ((7, 4, 1, 1, False), 3, [1, 2, 3, 4]),
    ((7, 3, 2, 1, False), 2, [2, 3, 4]), ((7, 3, 2, 1, False), 6, [4, 5, 6]), ((7, 3, 1, 2, False), 1, [1, 3, 5]),
    ((7, 3, 1, 1, True), 1, [0, 1]), ((7, 3, 2, 1, True), 4, [3, 4]), ((7, 3, 1, 2, True), 6, [2, 4, 6]),
])  # fmt: skip
def test_brute_force_windows_worked_by_hand(axis: tuple[Any, ...], index: int, visible: list[int]) -> None:
    assert brute_force.window(index, *axis) == visible
    assert all(index in brute_force.inverse_window(key, *axis) for key in visible)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_whole_grid_window_is_full_attention(rank: int, causal: bool) -> None:
    side, tokens = 3, 3**rank
    q, k, v = (seeded(i, 2, 4, tokens, 5) for i in range(3))
    spots = torch.tensor(list(itertools.product(range(side), repeat=rank)))
    past = (spots[None, :, :] <= spots[:, None, :]).all(-1)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=past if causal else None)
    if causal and rank == 1:
        close(expected, scaled_dot_product_attention(q, k, v, is_causal=True))
    inputs = [heads_last(tensor, rank) for tensor in (q, k, v)]
    logits = (q @ k.mT / 5**0.5).masked_fill(~(past | (not causal)), -math.inf)
    for attention in (REFERENCE, BRUTE):
        out, lse = attention(*inputs, [side] * rank, [1] * rank, [1] * rank, [causal] * rank)
        close(out, heads_last(expected, rank))
        close(lse, heads_last(logits.logsumexp(-1, keepdim=True), rank)[..., 0])


def test_grouped_heads_and_additional_tokens_join_full_attention() -> None:
    q, k, v = seeded(0, 2, 6, 9, 4), seeded(1, 2, 2, 11, 4), seeded(2, 2, 2, 11, 3)
    extra = [tensor[:, :, 9:].transpose(1, 2) for tensor in (k, v)]
    inputs = [heads_last(tensor[:, :, :9], 2) for tensor in (q, k, v)]
    for attention in (REFERENCE, BRUTE):
        out, _ = attention(*inputs, [3, 3], [1, 1], [1, 1], [False, False], None, *extra)
        close(out, heads_last(scaled_dot_product_attention(q, k, v, enable_gqa=True), 2))


@pytest.mark.parametrize("kernel", [2, 3])
def test_stride_equal_to_kernel_is_blocked_attention(kernel: int) -> None:
    inputs = [seeded(i, 2, 6, 6, 2, 3) for i in range(3)]
    blocks = [t.unflatten(2, (-1, kernel)).unflatten(1, (-1, kernel)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)
              for t in inputs]  # fmt: skip
    expected = scaled_dot_product_attention(*blocks).unflatten(4, (kernel, kernel)).permute(0, 1, 4, 2, 5, 3, 6)
    out, _ = REFERENCE(*inputs, [kernel] * 2, [kernel] * 2, [1, 1], [False, False])
    close(out, expected.reshape(2, 6, 6, 2, 3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_output_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    inputs = [seeded(i, 1, 5, 4, 2, 8).to(dtype) for i in range(3)]
    arguments = (*inputs, [3, 4], [2, 1], [1, 1], [False, True])
    out, lse = REFERENCE(*arguments)
    assert out.dtype == dtype and lse.dtype == torch.float32
    list(map(close, (out, lse), BRUTE(*arguments), (tolerance, 1e-6)))  # out is rounded once, at the end


def test_no_heads_and_no_batch() -> None:
    for shape in ((2, 5, 0, 3), (0, 5, 2, 3)):
        out, lse = REFERENCE(*[seeded(0, *shape)] * 3, [3], [1], [1], [False])
        assert out.shape == shape and lse.shape == shape[:-1]


def test_masked_keys_are_inert_whatever_they_hold() -> None:
    q, k, v = (seeded(i, 1, 6, 5, 2, 3) for i in range(3))
    mask = seeded(3, 1, 6, 5) > 0
    results = []
    for filler in (0.0, math.nan, math.inf):
        k[~mask], v[~mask] = filler, filler
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out, lse = REFERENCE(*leaves, [4, 3], [2, 1], [1, 1], [False, True], key_mask=mask)
        grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
        assert all((grad[~mask] == 0).all() for grad in grads[1:])
        results.append((out, lse, *grads))
    for other in results[1:]:
        list(map(close, other, results[0]))


@pytest.mark.parametrize(("causal", "hit"), [(False, [0, 1, 2]), (True, [1, 2, 3])])
def test_a_broken_key_reaches_only_the_rows_that_see_it(causal: bool, hit: list[int]) -> None:
    q, k, v = (seeded(i, 1, 8, 1, 3) for i in range(3))
    clean, _ = REFERENCE(q, k, v, [3], [1], [1], [causal])
    k[0, 1] = math.nan  # causal: in no window of row 0, though in its first K keys
    out, _ = REFERENCE(q.requires_grad_(), k, v, [3], [1], [1], [causal])
    for tensor in (out, *torch.autograd.grad(out.sum(), q)):
        assert [i for i in range(8) if tensor[0, i].isnan().any()] == hit
    close(torch.where(out.isnan(), clean, out), clean)


@pytest.mark.parametrize("cause", ["mask", "bias"])
def test_dead_rows_are_zero_and_pass_no_gradient(cause: str) -> None:
    leaves = [*(seeded(i, 1, 9, 2, 3) for i in range(3)), seeded(3, 2, 5)]
    mask, dead = torch.ones(1, 9, dtype=torch.bool), torch.zeros(1, 9, 2, dtype=torch.bool)
    if cause == "mask":
        mask[:, :5], dead[:, :4] = False, True  # query 3 sees keys 2..4, query 4 sees key 5
    else:
        leaves[3][1], dead[:, :, 1] = -math.inf, True
    q, k, v, table = (leaf.requires_grad_() for leaf in leaves)
    out, lse = REFERENCE(q, k, v, [3], [1], [1], [False], rpb=table, key_mask=mask)
    assert (out[dead] == 0).all() and (lse[dead] == -math.inf).all() and lse[~dead].isfinite().all()
    weight, weight_lse = seeded(4, *out.shape), seeded(5, *lse.shape)
    grads = torch.autograd.grad([out, lse], leaves, [weight, weight_lse], retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads) and (grads[0][dead] == 0).all()
    weight[dead], weight_lse[dead] = 0, 0
    list(map(close, grads, torch.autograd.grad([out, lse], leaves, [weight, weight_lse])))


@pytest.mark.parametrize(("shape", "lists", "biased", "boxed"), [
    ((4,), ([3], [1], [1], [True]), True, False),
    ((5, 3), ([2, 3], [1, 1], [2, 1], [False, True]), True, False),
    ((5, 4), ([3, 2], [2, 2], [1, 2], [True, False]), False, True),
    ((2, 2, 3), ([2, 1, 2], [1, 1, 1], [1, 2, 1], [False, False, True]), True, False),
])  # fmt: skip
def test_gradients(shape: tuple[int, ...], lists: tuple[Any, ...], biased: bool, boxed: bool) -> None:
    sizes = [(1, *shape, 2, 2), (1, *shape, 1, 2), (1, *shape, 1, 1), (1, 2, 1, 2), (1, 2, 1, 1)]
    sizes += [(2, *(2 * kernel - 1 for kernel in lists[0]))] if biased else []
    leaves = [seeded(i, *size) for i, size in enumerate(sizes)]
    options: dict[str, Any] = {"key_mask": seeded(9, 1, *shape) > -0.5}  # additional tokens: no row is dead
    if boxed:
        leaves[0], options["q_origin"] = leaves[0][:, 1:2], [1, 0]
        options |= {"kv_origin": [0, 0], "extent": list(shape)}

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bias = tensors[5] if biased else None
        return REFERENCE(*tensors[:3], *lists, None, *tensors[3:5], rpb=bias, **options)

    assert torch.autograd.gradcheck(attend, [leaf.detach().requires_grad_() for leaf in leaves])
