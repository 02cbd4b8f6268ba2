# SPDX-License-Identifier: MIT
"""FLOP formulas: 2 * batch * heads * visible pairs * (D + D_v), with the exact number of visible (query, key) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from natten_ops.geometry.params import Box, NAParams
from natten_ops.geometry.tiles import visible_pairs


def forward_flops(
    query_shape: Sequence[Any],
    value_shape: Sequence[Any],
    params: NAParams,
    additional: Any = 0,
    box: Box | None = None,
) -> Any:
    """FLOPs of one forward: two products over every visible pair, additional tokens included."""
    return 2 * _head_pairs(query_shape, params, additional, box) * (query_shape[-1] + value_shape[-1])


def backward_flops(
    query_shape: Sequence[Any],
    value_shape: Sequence[Any],
    params: NAParams,
    needed: Sequence[bool],
    additional: Any = 0,
    box: Box | None = None,
) -> Any:
    """FLOPs of one backward: scores and their slopes once, and one product for each gradient that is needed.

    `needed` is (query, key, value, rpb, additional keys, additional values) as in the backward op; window and
    additional tokens are counted apart, because their keys and values can be frozen apart.
    """
    dim, value_dim = query_shape[-1], value_shape[-1]
    window, extra = (_head_pairs(query_shape, params, 0, box), _head_pairs(query_shape, params, additional, box))
    extra = extra - window
    query, key, value, _, additional_keys, additional_values = needed
    recompute = dim + value_dim
    of_window = window * (recompute + dim * query + dim * key + value_dim * value)
    of_extra = extra * (recompute + dim * query + dim * additional_keys + value_dim * additional_values)
    return 2 * (of_window + of_extra)


def _head_pairs(query_shape: Sequence[Any], params: NAParams, additional: Any, box: Box | None) -> Any:
    spatial = query_shape[1:-2]
    queries = 1
    for count in spatial:
        queries = queries * count
    return query_shape[0] * query_shape[-2] * (visible_pairs(params, spatial, box) + queries * additional)
