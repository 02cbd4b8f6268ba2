# SPDX-License-Identifier: MIT
"""Neighborhood attention by counting on fingers: the oracle that the reference itself is held against.

Plain Python loops in float64. Nothing here is taken from ``natten_ops``: windows are found by listing the members
of a dilation group and picking among them, never by the package's formulas. Shape legend: B batch, X query box,
Y key box, H query heads, G key/value heads, D head dim, V value head dim, T additional tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy
import torch


def window(index: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The key coordinates, ascending, that the query at ``index`` sees on one axis of ``length`` positions."""
    assert 0 <= index < length and kernel >= 1 and kernel * dilation <= length and 1 <= stride <= kernel
    group = [position for position in range(length) if position % dilation == index % dilation]
    place = group.index(index)
    # Queries are taken `stride` at a time; all of them follow one leader (the last block may be cut short).
    block = [other for other in range(len(group)) if other // stride == place // stride]
    first_of_block = block[0]
    last_of_group = len(group) - 1
    if causal:
        # The leader is the block's last query; its K most recent keys, but never one in this query's own future.
        leader = min(first_of_block + stride - 1, last_of_group)
        return [group[t] for t in range(len(group)) if leader - kernel < t <= place]
    # The leader is the block's (upper) middle. Of all runs of K keys that fit, take the one nearest to the run that
    # begins K // 2 keys left of the leader: at the borders the window is pushed inside, it never shrinks.
    leader = min(first_of_block + stride // 2, last_of_group)
    runs = [group[t : t + kernel] for t in range(len(group)) if t + kernel <= len(group)]
    start = min(range(len(runs)), key=lambda t: abs(t - (leader - kernel // 2)))
    return runs[start]


def inverse_window(key: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[int]:
    """The query coordinates, ascending, that see the key at ``key``: every query is asked."""
    return [i for i in range(length) if key in window(i, length, kernel, stride, dilation, causal)]


def softmax_average(logits: list[float], rows: list[numpy.ndarray], width: int) -> tuple[numpy.ndarray, float]:
    """The softmax-weighted mean of ``rows`` and the log-sum-exp; zeros and -inf when there is nothing to average."""
    if all(logit == -math.inf for logit in logits):
        return numpy.zeros(width), -math.inf
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = sum(weights)
    mean = numpy.zeros(width)
    for weight, row in zip(weights, rows, strict=True):
        mean = mean + (weight / total) * row
    return mean, largest + math.log(total)


def _array(tensor: torch.Tensor | None) -> numpy.ndarray | None:
    """A float64 copy (bool for bool) of any tensor, whatever its dtype, device and strides."""
    if tensor is None:
        return None
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype == torch.bool else tensor.to(torch.float64)).contiguous().numpy()


def neighborhood_attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float | None = None,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
    *,
    rpb: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    q_origin: Sequence[int] = (),
    kv_origin: Sequence[int] = (),
    extent: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = softmax(scale * <q, k> + bias over the visible keys and the additional tokens) . v, and its log-sum-exp.

    Args:
        query: ``[B, *X, H, D]``, any float dtype, any strides.
        key: ``[B, *Y, G, D]`` with ``H % G == 0``; query head h reads key/value head ``h // (H / G)``.
        value: ``[B, *Y, G, V]``.
        kernel_size, stride, dilation, is_causal: one entry per spatial axis.
        scale: factor of the dot products; None means ``D ** -0.5``.
        additional_keys, additional_values: ``[B, T, G, D]`` and ``[B, T, G, V]``; seen by every query, never biased.
        rpb: ``[H, 2 * K0 - 1, ...]``, added to the logits after the scale; strides must be 1.
        key_mask: bool ``[B, *Y]``, True where a key may be attended; other keys are never read.
        q_origin, kv_origin, extent: where the boxes lie in the global grid; empty means the origin and the key box.

    Returns:
        float64 ``out [B, *X, H, V]`` and ``lse [B, *X, H]``.
    """
    q, k, v = _array(query), _array(key), _array(value)
    extra_k, extra_v, bias, mask = _array(additional_keys), _array(additional_values), _array(rpb), _array(key_mask)
    assert q is not None and k is not None and v is not None
    rank = q.ndim - 3
    batch, q_box, heads, head_dim = q.shape[0], q.shape[1:-2], q.shape[-2], q.shape[-1]
    kv_box, kv_heads, value_dim = k.shape[1:-2], k.shape[-2], v.shape[-1]
    q_corner, kv_corner = tuple(q_origin) or (0,) * rank, tuple(kv_origin) or (0,) * rank
    grid = tuple(extent) or kv_box
    axes = list(zip(grid, kernel_size, stride, dilation, is_causal, strict=True))
    assert len(axes) == rank and v.shape[:-1] == k.shape[:-1] and k.shape[-1] == head_dim
    assert bias is None or (set(stride) == {1} and bias.shape == (heads, *(2 * size - 1 for size in kernel_size)))
    assert mask is None or mask.shape == (batch, *kv_box)
    factor = head_dim**-0.5 if scale is None else scale

    out = numpy.zeros((batch, *q_box, heads, value_dim))
    lse = numpy.zeros((batch, *q_box, heads))
    for b, head in itertools.product(range(batch), range(heads)):
        kv_head = head // (heads // kv_heads)
        for row in itertools.product(*map(range, q_box)):
            here = [row[axis] + q_corner[axis] for axis in range(rank)]
            logits: list[float] = []
            rows: list[numpy.ndarray] = []
            for there in itertools.product(*(window(here[axis], *axes[axis]) for axis in range(rank))):
                local = tuple(there[axis] - kv_corner[axis] for axis in range(rank))
                assert all(0 <= local[axis] < kv_box[axis] for axis in range(rank)), "the key box cuts a window"
                if mask is not None and not mask[(b, *local)]:
                    continue
                logit = factor * float(numpy.dot(q[(b, *row, head)], k[(b, *local, kv_head)]))
                if bias is not None:
                    # Places within the dilation group, not coordinates: neighbours in a group are one step apart.
                    steps = [there[axis] // dilation[axis] - here[axis] // dilation[axis] for axis in range(rank)]
                    slots = tuple(kernel_size[axis] - 1 + steps[axis] for axis in range(rank))
                    assert all(0 <= slots[axis] <= 2 * kernel_size[axis] - 2 for axis in range(rank))
                    logit += float(bias[(head, *slots)])
                logits.append(logit)
                rows.append(v[(b, *local, kv_head)])
            if extra_k is not None and extra_v is not None:
                for token in range(extra_k.shape[1]):
                    logits.append(factor * float(numpy.dot(q[(b, *row, head)], extra_k[b, token, kv_head])))
                    rows.append(extra_v[b, token, kv_head])
            out[(b, *row, head)], lse[(b, *row, head)] = softmax_average(logits, rows, value_dim)
    return torch.from_numpy(out), torch.from_numpy(lse)
