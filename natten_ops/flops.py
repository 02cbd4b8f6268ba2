# SPDX-License-Identifier: MIT
"""FLOP formulas: 2 * batch * heads * visible pairs * dims multiplied, with the exact number of (query, key) pairs.

A multiply-add is two FLOPs, everywhere in this file; softmax, biases and masks are not counted. The same formulas serve

* `torch.utils.flop_counter.FlopCounterMode`, which knows the ops, that of jagged tensors too, once natten_ops is imported;
* shapes: `fna_flop_count`, `na_qk_flop_count`, `na_av_flop_count`;
* fvcore: `get_flops`, `add_natten_handle`; not for the op of jagged tensors, which `torch.jit.trace` cannot take.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natten_ops.geometry.params import Box, NAParams, integer, make_box, make_params
from natten_ops.geometry.tiles import visible_pairs

# ---- formulas on checked arguments: what the ops register ----------------------------------------------------------


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
    window, extra = _window_and_extra(query_shape, params, additional, box)
    query, key, value, _, additional_keys, additional_values = needed
    recompute = dim + value_dim
    of_window = window * (recompute + dim * query + dim * key + value_dim * value)
    of_extra = extra * (recompute + dim * query + dim * additional_keys + value_dim * additional_values)
    return 2 * (of_window + of_extra)


def qk_flops(query_shape: Sequence[Any], params: NAParams, additional: Any = 0) -> Any:
    """FLOPs of unfused `na_qk`: one product over every visible pair; `query_shape` is heads first."""
    return 2 * _head_pairs(_heads_last(query_shape), params, additional, None) * query_shape[-1]


def av_flops(value_shape: Sequence[Any], params: NAParams, additional: Any = 0) -> Any:
    """FLOPs of unfused `na_av`: as many as of `na_qk` with value's head dim; `value_shape` is heads first."""
    return qk_flops(value_shape, params, additional)


def qk_backward_flops(query_shape: Sequence[Any], params: NAParams, needed: Sequence[bool], additional: Any = 0) -> Any:
    """FLOPs of `na_qk_backward`: one product for each gradient of (query, key, rpb, additional keys) that is needed.

    The query's runs over window and additional tokens; the bias table's only adds.
    """
    query, key, _, additional_keys = needed
    window, extra = _window_and_extra(_heads_last(query_shape), params, additional, None)
    return 2 * query_shape[-1] * (window * (query + key) + extra * (query + additional_keys))


def av_backward_flops(value_shape: Sequence[Any], params: NAParams, needed: Sequence[bool], additional: Any = 0) -> Any:
    """FLOPs of `na_av_backward`: one product for each gradient of (attn, value, additional values) that is needed.

    The attention weights take the place that the query has in `na_qk_backward`.
    """
    attn, value, additional_values = needed
    return qk_backward_flops(value_shape, params, (attn, value, False, additional_values), additional)


def _heads_last(shape: Sequence[Any]) -> tuple[Any, ...]:
    return (shape[0], *shape[2:-1], shape[1], shape[-1])


def _head_pairs(query_shape: Sequence[Any], params: NAParams, additional: Any, box: Box | None) -> Any:
    spatial = query_shape[1:-2]
    return query_shape[0] * query_shape[-2] * (visible_pairs(params, spatial, box) + math.prod(spatial) * additional)


def _window_and_extra(
    query_shape: Sequence[Any], params: NAParams, additional: Any, box: Box | None
) -> tuple[Any, Any]:
    window = _head_pairs(query_shape, params, 0, box)
    return window, _head_pairs(query_shape, params, additional, box) - window


# ---- formulas on shapes: what users call ---------------------------------------------------------------------------


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_tokens: int = 0,
    q_origin: Sequence[int] = (),
    kv_origin: Sequence[int] = (),
    extent: Sequence[int] = (),
) -> int:
    """FLOPs of one forward of fused neighborhood attention: 2 * batch * heads * pairs * (head_dim + value_dim).

    `pairs` counts the keys that each query really sees: the full window at borders, less on causal axes.

    Args:
        q_shape: `[batch, *spatial, heads, head_dim]`, heads last, 1 to 3 spatial axes.
        k_shape: `[batch, *spatial, heads_kv, head_dim]`; heads is a multiple of heads_kv.
        v_shape: `[batch, *spatial, heads_kv, value_dim]`.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.
        additional_tokens: T of additional keys and values `[batch, T, heads_kv, dim]`.
        q_origin, kv_origin, extent: as in `natten_ops.neighborhood_attention`; all three or none.

    Raises:
        ValueError, TypeError: shapes or settings that no call could have.

    Example:
        >>> from natten_ops.flops import fna_flop_count
        >>> shape = (1, 56, 56, 4, 32)
        >>> fna_flop_count(shape, shape, shape, kernel_size=7)
        78675968
        >>> fna_flop_count(shape, shape, shape, kernel_size=7, is_causal=True)
        70472192
    """
    query, key, value = _shapes(q_shape=q_shape, k_shape=k_shape, v_shape=v_shape)
    rank = len(query) - 3
    params = make_params(rank, kernel_size, stride, dilation, is_causal)
    box = make_box(rank, q_origin, kv_origin, extent)
    spatial = range(1, 1 + rank)
    _check_equal("k_shape", key, "q_shape", query, [0, *(spatial if box is None else ()), rank + 2])
    _check_equal("v_shape", value, "k_shape", key, [0, *spatial, rank + 1])
    heads, heads_kv = query[-2], key[-2]
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(f"q_shape={query} has {heads} heads, k_shape={key} {heads_kv}; give a multiple of key's")
    params.check_extent(query[1:-2] if box is None else box.extent)
    if box is not None:
        box.check_bounds(query[1:-2], key[1:-2])
        if 0 not in query:
            box.check_cover(params, query[1:-2], key[1:-2])
    return int(forward_flops(query, value, params, _token_count(additional_tokens), box))


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_tokens: int = 0,
) -> int:
    """FLOPs of one forward of unfused `qk`: 2 * batch * heads * pairs * head_dim, without the -inf slots.

    Args:
        q_shape, k_shape: `[batch, heads, *spatial, head_dim]`, heads first, equal.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.
        additional_tokens: T of additional keys `[batch, heads, T, head_dim]`.

    Raises:
        ValueError, TypeError: shapes or settings that no call could have.

    Example:
        >>> from natten_ops.flops import na_qk_flop_count
        >>> na_qk_flop_count((1, 4, 56, 56, 32), (1, 4, 56, 56, 32), kernel_size=7)
        39337984
    """
    query, key = _shapes(q_shape=q_shape, k_shape=k_shape)
    _check_equal("k_shape", key, "q_shape", query, range(len(query)))
    params = make_params(len(query) - 3, kernel_size, stride, dilation, is_causal)
    params.check_extent(query[2:-1])
    return int(qk_flops(query, params, _token_count(additional_tokens)))


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> int:
    """FLOPs of one forward of unfused `av`: 2 * batch * heads * pairs * value_dim, without slots of later keys.

    Args:
        a_shape: `[batch, heads, *spatial, prod(kernel_size) + T]`, heads first, with T additional tokens.
        v_shape: `[batch, heads, *spatial, value_dim]`.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.

    Raises:
        ValueError, TypeError: shapes or settings that no call could have.

    Example:
        >>> from natten_ops.flops import na_av_flop_count
        >>> na_av_flop_count((1, 4, 56, 56, 49), (1, 4, 56, 56, 32), kernel_size=7)
        39337984
    """
    attn, value = _shapes(a_shape=a_shape, v_shape=v_shape)
    _check_equal("v_shape", value, "a_shape", attn, range(len(attn) - 1))
    params = make_params(len(attn) - 3, kernel_size, stride, dilation, is_causal)
    params.check_extent(value[2:-1])
    slots = math.prod(params.kernel_size)
    if attn[-1] < slots:
        raise ValueError(
            f"a_shape={attn} has {attn[-1]} slots a query, kernel_size={params.kernel_size} takes {slots} and one "
            f"more for each additional token; give the shape that qk returns"
        )
    return int(av_flops(value, params, attn[-1] - slots))


def _shapes(**given: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes as tuples of ints, all of the first one's length, which must be that of 1 to 3 spatial axes."""
    shapes: list[tuple[int, ...]] = []
    for name, value in given.items():
        if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
            raise TypeError(f"{name} is a {type(value).__name__}; give a shape, such as tuple(tensor.shape)")
        shape = tuple(integer(f"{name}[{dim}]", size) for dim, size in enumerate(value))
        if len(shape) not in (4, 5, 6):
            raise ValueError(f"{name}={shape} has {len(shape)} dims; give 4 to 6: batch, 1 to 3 axes, heads, dim")
        if shapes and len(shape) != len(shapes[0]):
            raise ValueError(f"{name}={shape} has {len(shape)} dims, {next(iter(given))} {len(shapes[0])}; give equal")
        if min(shape) < 0 or (not shapes and shape[-1] == 0):  # the first is of queries or weights, which have a dim
            raise ValueError(f"{name}={shape} has a size of {min(shape)}; give at least 0, and 1 as the last")
        shapes.append(shape)
    return shapes


def _check_equal(name: str, shape: Sequence[int], other_name: str, other: Sequence[int], dims: Sequence[int]) -> None:
    for dim in dims:
        if shape[dim] != other[dim]:
            raise ValueError(f"{name}[{dim}]={shape[dim]} and {other_name}[{dim}]={other[dim]} must be equal")


def _token_count(value: int) -> int:
    count = integer("additional_tokens", value)
    if count < 0:
        raise ValueError(f"additional_tokens={count} must be at least 0")
    return count


# ---- fvcore --------------------------------------------------------------------------------------------------------

# What fvcore counts once for each multiply-add: its operators, and its handles in fvcore.nn.jit_handles.
_MULTIPLY_ADDS = {
    "aten::addmm": "addmm_flop_jit",
    "aten::bmm": "bmm_flop_jit",
    "aten::_convolution": "conv_flop_jit",
    "aten::einsum": "einsum_flop_jit",
    "aten::linear": "linear_flop_jit",
    "aten::matmul": "matmul_flop_jit",
    "aten::mm": "matmul_flop_jit",
}
# Ops of our modules that multiply nothing, and that fvcore would warn of.
_NO_PRODUCTS = ("aten::unflatten", "natten::merge_attentions")


def get_flops(model: nn.Module, input: Tensor | tuple[Any, ...], disable_warnings: bool = False) -> int:
    """FLOPs of `model(*input)`, forward, counted by fvcore with a multiply-add as two FLOPs throughout.

    The sum has one convention: the ops of natten_ops count as in `FlopCounterMode`, and fvcore's own counts of matrix
    products, convolutions and einsum, one for each multiply-add, are taken twice. fvcore's estimates for normalisation
    and resampling layers, a few operations an element, stay as they are; `FlopCounterMode` leaves them out. Without
    such layers, and without operators that fvcore cannot count (it warns of them), the two give the same number.
    It is twice what `get_flops` of the natten package gives, which are multiply-adds, with causal windows as full ones.

    Args:
        model: is traced by `torch.jit`, so it runs once.
        input: a tensor, or the tuple of the model's positional arguments.
        disable_warnings: do not warn of operators that fvcore cannot count and of modules that were not called.

    Raises:
        ImportError: fvcore is not installed.
        TypeError: model or input of another type.

    Example:
        >>> import torch, natten_ops
        >>> from natten_ops.flops import get_flops
        >>> layer = natten_ops.nn.NeighborhoodAttention2D(64, num_heads=4, kernel_size=3)
        >>> get_flops(layer, torch.randn(1, 8, 8, 64))
        2244608
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if not isinstance(input, (Tensor, tuple)):
        raise TypeError(f"input is a {type(input).__name__}; give a tensor, or the tuple of the model's arguments")
    analysis = add_natten_handle(_fvcore("flop_count").FlopCountAnalysis(model, input))
    if disable_warnings:
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total())


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teach an fvcore analysis the ops of natten_ops, and to count a multiply-add as two FLOPs; returns it.

    fvcore's handles of matrix products, convolutions and einsum are replaced by ones that give twice their counts, as
    a sum of two conventions would mean nothing; those of normalisations and resampling, which count operations, stay.
    Handles that are set afterwards replace these and should count two as well. Calling it again changes nothing.

    Args:
        flop_ctr: a `fvcore.nn.FlopCountAnalysis`.

    Raises:
        ImportError: fvcore is not installed.
        TypeError: an object that takes no handles.

    Example:
        >>> import fvcore.nn, torch, natten_ops
        >>> layer = natten_ops.nn.NeighborhoodAttention2D(64, num_heads=4, kernel_size=3)
        >>> analysis = natten_ops.flops.add_natten_handle(fvcore.nn.FlopCountAnalysis(layer, (torch.randn(1, 8, 8, 64),)))
        >>> analysis.by_operator()
        Counter({'linear': 2097152, 'neighborhood_attention_lse': 147456})
    """
    handles = _fvcore("jit_handles")
    if not hasattr(flop_ctr, "set_op_handle"):
        raise TypeError(f"flop_ctr is a {type(flop_ctr).__name__}; give a fvcore.nn.FlopCountAnalysis")
    flop_ctr.set_op_handle(**{op: _twice(getattr(handles, handle)) for op, handle in _MULTIPLY_ADDS.items()})
    flop_ctr.set_op_handle(**{f"natten::{name}": _handle(name) for name in _COUNTS})
    return flop_ctr.set_op_handle(**dict.fromkeys(_NO_PRODUCTS))


def _fvcore(module: str) -> Any:
    try:
        return importlib.import_module(f"fvcore.nn.{module}")
    except ImportError as error:
        raise ImportError(
            "get_flops and add_natten_handle need fvcore, which cannot be imported: `pip install fvcore`; "
            "torch.utils.flop_counter.FlopCounterMode counts the same ops without it"
        ) from error


def _twice(handle: Callable[..., Any]) -> Callable[..., Any]:
    def doubled(inputs: Any, outputs: Any) -> Any:
        count = handle(inputs, outputs)
        return Counter({name: 2 * n for name, n in count.items()}) if isinstance(count, Counter) else 2 * count

    return doubled


def _of_fused(call: dict[str, Any]) -> int:
    box = {name: call[name] for name in Box._fields if name in call}  # na1d, na2d and na3d have none
    tokens = (call["additional_keys"] or (0, 0, 0))[1]
    return fna_flop_count(call["query"], call["key"], call["value"], **_windows(call), additional_tokens=tokens, **box)


def _of_qk(call: dict[str, Any]) -> int:
    tokens = (call["additional_keys"] or (0, 0, 0))[2]
    return na_qk_flop_count(call["query"], call["key"], **_windows(call), additional_tokens=tokens)


def _of_av(call: dict[str, Any]) -> int:
    return na_av_flop_count(call["attn"], call["value"], **_windows(call))


# Op -> count of one call, given as {argument: shape of a tensor, or the value itself}.
_FUSED = ("neighborhood_attention_lse", "na1d", "na2d", "na3d")
_COUNTS = dict.fromkeys(_FUSED, _of_fused) | {"na_qk": _of_qk, "na_av": _of_av}


def _windows(call: dict[str, Any]) -> dict[str, Any]:
    # The composites take lists of one entry for all axes; the formulas take a number for that.
    return {name: call[name][0] if len(call[name]) == 1 else call[name] for name in NAParams._fields}


def _handle(name: str) -> Callable[..., int]:
    """The fvcore handle of one op: reads a call off the values of a graph node."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        arguments = getattr(torch.ops.natten, name).default._schema.arguments
        return _COUNTS[name]({argument.name: _read(value) for argument, value in zip(arguments, inputs)})

    return handle


def _read(value: Any) -> Any:
    if isinstance(value.type(), torch._C.TensorType):
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [entry.toIValue() for entry in value.node().inputs()]
    return value.toIValue()
