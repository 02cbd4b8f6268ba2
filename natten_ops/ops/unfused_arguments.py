# SPDX-License-Identifier: MIT
"""The arguments of the unfused ops, heads first: as records, and every check on their tensors.

As in `arguments`, `functional` and the fake kernels run the same checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natten_ops.geometry.params import NAParams, make_params
from natten_ops.ops._register import direct
from natten_ops.ops.arguments import MAX_HEAD_DIM, check_dtypes_of, check_kinds, check_table, expect

qk_op = torch.ops.natten.na_qk.default
av_op = torch.ops.natten.na_av.default
qk_backward_op = torch.ops.natten.na_qk_backward.default
av_backward_op = torch.ops.natten.na_av_backward.default

# The tensors of each op in the order of its autograd rule; the backward's have the gradient before them.
QK_TENSORS = ("query", "key", "rpb", "additional_keys")
AV_TENSORS = ("attn", "value", "additional_values")

Windows = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]
Needing = tuple[Windows, Sequence[bool]]


# ---- as records ----------------------------------------------------------------------------------------------------


def split_qk(query: Any, key: Any, *windows: Any, rpb: Any = None, additional_keys: Any = None) -> Any:
    return windows, [query, key, rpb, additional_keys]


def split_av(attn: Any, value: Any, *windows: Any, additional_values: Any = None) -> Any:
    return windows, [attn, value, additional_values]


def split_backward(grad: Any, first: Any, second: Any, *rest: Any) -> tuple[Needing, list[Any]]:
    """Of both backwards: ((windows, needed), tensors)."""
    return (rest[:4], rest[-1]), [grad, first, second, *rest[4:-1]]


def call_qk(windows: Windows, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    query, key, rpb, additional_keys = tensors
    return call(qk_op, query, key, *windows, rpb=rpb, additional_keys=additional_keys)


def call_av(windows: Windows, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    attn, value, additional_values = tensors
    return call(av_op, attn, value, *windows, additional_values=additional_values)


def call_qk_backward(settings: Needing, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    (windows, needed), (grad, query, key, *extras) = settings, tensors
    return call(qk_backward_op, grad, query, key, *windows, *extras, needed)


def call_av_backward(settings: Needing, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    (windows, needed), (grad, attn, value, *extras) = settings, tensors
    return call(av_backward_op, grad, attn, value, *windows, *extras, needed)


def params_of(windows: Windows) -> NAParams:
    return make_params(len(windows[0]), *windows)


# ---- checks --------------------------------------------------------------------------------------------------------


def check_qk(
    query: Tensor, key: Tensor, params: NAParams, rpb: Tensor | None = None, additional_keys: Tensor | None = None
) -> None:
    """Raise ValueError or TypeError unless `na_qk` can run."""
    named = [("query", query), ("key", key), ("additional_keys", additional_keys), ("rpb", rpb)]
    check_kinds(named, required=2)
    _check_tokens("query", query, params, least=1)
    expect("key", key, tuple(query.shape), "the shape of query")
    _check_additional("additional_keys", additional_keys, query)
    if rpb is not None:
        check_table(rpb, query.shape[1], params)
    check_dtypes_of(named)


def check_av(attn: Tensor, value: Tensor, params: NAParams, additional_values: Tensor | None = None) -> None:
    """Raise ValueError or TypeError unless `na_av` can run."""
    named = [("value", value), ("attn", attn), ("additional_values", additional_values)]
    check_kinds(named, required=2)
    _check_tokens("value", value, params, least=0)
    _check_additional("additional_values", additional_values, value)
    meaning = "[batch, heads, the value's axes, window slots + additional tokens]"
    expect("attn", attn, slots_shape(value, params, additional_values), meaning)
    check_dtypes_of(named)


def slots_shape(tokens: Tensor, params: NAParams, additional: Tensor | None) -> tuple[Any, ...]:
    """The shape of the attention weights of tensors `[batch, heads, *spatial, dim]`."""
    extra = 0 if additional is None else additional.shape[2]
    return (*tokens.shape[:-1], math.prod(params.kernel_size) + extra)


def check_gradient(name: str, gradient: Tensor, like: Sequence[Any], inputs: Tensor) -> None:
    """The backward ops' own arguments: as the forward's outputs."""
    named = [("the forward's inputs", inputs), (name, gradient)]
    check_kinds(named, required=2)
    expect(name, gradient, tuple(like), "as in the forward's output")
    check_dtypes_of(named)


def check_needed(needed: Sequence[bool], names: Sequence[str]) -> None:
    """One flag a gradient."""
    if len(needed) != len(names):
        raise ValueError(f"needed has {len(needed)} entries; give {len(names)}: {', '.join(names)}")


def _check_tokens(name: str, tensor: Tensor, params: NAParams, least: int) -> None:
    rank = params.rank
    if tensor.dim() != rank + 3:
        axes = ", ".join(f"axis {axis}" for axis in range(rank))
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; unfused {rank}-D neighborhood attention takes {rank + 3} dims, "
            f"heads first: [batch, heads, {axes}, head dim]"
        )
    if tensor.shape[-1] < least or tensor.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{name} has head dim {tensor.shape[-1]}; it must be {least} to {MAX_HEAD_DIM}")
    params.check_extent(tensor.shape[2:-1])


def _check_additional(name: str, additional: Tensor | None, tokens: Tensor) -> None:
    if additional is None:
        return
    count = additional.shape[2] if additional.dim() > 2 else 0
    shape = (tokens.shape[0], tokens.shape[1], count, tokens.shape[-1])
    expect(name, additional, shape, "[batch, heads, tokens, head dim], heads first")
