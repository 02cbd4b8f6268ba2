# SPDX-License-Identifier: MIT
"""Attention in two halves, for what needs its weights: dropout on them, looking at them, any softmax of one's own.

`na1d_qk`, `na2d_qk` and `na3d_qk` are one body behind three front doors, and so are the `av`s. Heads come first, as in
the unfused functions of the natten package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from natten_ops import backends
from natten_ops.functional.nested import any_nested, by_halves
from natten_ops.geometry.params import NAParams, make_params
from natten_ops.ops._register import AUTOCAST_KEYS, telling_of_memory
from natten_ops.ops.arguments import autocast_tensor
from natten_ops.ops.unfused_arguments import check_av, check_qk

_QK_DOC = """attn[.., s] = <query, key of slot s> + bias of slot s: the logits of every query's {rank}-D window, unscaled.

    Slots are row-major over the axes: slot t of an axis is the key `group + dilation * (start + t)` of the query's
    window. The additional tokens are the last slots. A slot of a key that a causal query does not see holds -inf, and
    its gradient is ignored.

    Args:
        query, key: `[batch, heads, {axes}, head_dim]`, heads first; float64, float32, float16 or bfloat16, any strides.
        kernel_size: window size in tokens, an int or one per axis; kernel_size * dilation <= tokens of the axis.
        stride: queries that share a window, in tokens, 1 (each its own) to kernel_size (blocked attention).
        dilation: distance of the keys of a window, in tokens.
        is_causal: a bool or one per axis: keys after the query are invisible on that axis.
        additional_keys: `[batch, heads, tokens, head_dim]`, heads first, visible to every query.
        rpb: relative positional bias `[heads, {table}]`, added to the products; trains; stride 1 only;
            may be float32 beside 16-bit inputs.

    Returns:
        `[batch, heads, {axes}, prod(kernel_size) + additional tokens]` in the query's dtype, contiguous.

    Raises:
        ValueError, TypeError: what is wrong, its value, the bound and the way out.

    Source: Hassani et al., "Neighborhood Attention Transformer", 2023.

    Example:
        >>> import torch, natten_ops
        >>> query, key, value = torch.randn(3, 1, 4, {example}, 32).unbind(0)
        >>> attn = natten_ops.na{rank}d_qk(query * 32**-0.5, key, kernel_size=3).softmax(-1)
        >>> natten_ops.na{rank}d_av(attn, value, kernel_size=3).shape
        torch.Size([1, 4, {example}, 32])
"""

_AV_DOC = """out = sum over the visible slots s of attn[.., s] * value of slot s, over every query's {rank}-D window.

    Args:
        attn: `[batch, heads, {axes}, prod(kernel_size) + additional tokens]`, slots as `na{rank}d_qk` has them.
        value: `[batch, heads, {axes}, value_dim]`, heads first; float64, float32, float16 or bfloat16, any strides.
        kernel_size, stride, dilation, is_causal: as in `na{rank}d_qk`, in tokens.
        additional_values: `[batch, heads, tokens, value_dim]`, heads first.

    Returns:
        `[batch, heads, {axes}, value_dim]` in the value's dtype, contiguous.

    Raises:
        ValueError, TypeError: what is wrong, its value, the bound and the way out.

    Source: Hassani et al., "Neighborhood Attention Transformer", 2023.

    Example:
        >>> import torch, natten_ops
        >>> attn, value = torch.rand(1, 4, {example}, {slots}), torch.randn(1, 4, {example}, 32)
        >>> natten_ops.na{rank}d_av(attn, value, kernel_size=3).shape
        torch.Size([1, 4, {example}, 32])
"""


class QK(Protocol):
    """The signature of na1d_qk, na2d_qk and na3d_qk."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        additional_keys: Tensor | None = None,
        *,
        rpb: Tensor | None = None,
    ) -> Tensor: ...


class AV(Protocol):
    """The signature of na1d_av, na2d_av and na3d_av."""

    def __call__(
        self,
        attn: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        additional_values: Tensor | None = None,
    ) -> Tensor: ...


def _make_qk(rank: int) -> QK:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        additional_keys: Tensor | None = None,
        *,
        rpb: Tensor | None = None,
    ) -> Tensor:
        if any_nested(query, key, additional_keys, rpb):
            named, rest = [("query", query), ("key", key)], [("additional_keys", additional_keys)]
            settings = (kernel_size, stride, dilation, is_causal)
            shared = [("rpb", rpb)]
            return by_halves(named, rest, shared, rank, lambda q, k, extra: qk(q, k, *settings, extra, rpb=rpb))
        params = make_params(rank, kernel_size, stride, dilation, is_causal)
        _check(lambda q, k, extra: check_qk(q, k, params, rpb, extra), query, key, additional_keys)
        return _call(torch.ops.natten.na_qk, query, key, params, rpb=rpb, additional_keys=additional_keys)

    return _named(qk, f"na{rank}d_qk", _QK_DOC, rank)


def _make_av(rank: int) -> AV:
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        additional_values: Tensor | None = None,
    ) -> Tensor:
        if any_nested(attn, value, additional_values):
            named, rest = [("attn", attn), ("value", value)], [("additional_values", additional_values)]
            settings = (kernel_size, stride, dilation, is_causal)
            return by_halves(named, rest, (), rank, lambda a, v, extra: av(a, v, *settings, extra))
        params = make_params(rank, kernel_size, stride, dilation, is_causal)
        _check(lambda a, v, extra: check_av(a, v, params, extra), attn, value, additional_values)
        return _call(torch.ops.natten.na_av, attn, value, params, additional_values=additional_values)

    return _named(av, f"na{rank}d_av", _AV_DOC, rank)


def _named(function: Any, name: str, doc: str, rank: int) -> Any:
    function.__name__ = function.__qualname__ = name
    axes, table = ", ".join(("z", "y", "x")[-rank:]), ", ".join(["2 * kernel_size - 1"] * rank)
    function.__doc__ = doc.format(rank=rank, axes=axes, table=table, example=", ".join(["8"] * rank), slots=3**rank)
    return function


def _check(check: Callable[..., None], *tensors: Any) -> None:
    """The check of what the op will see: what autocast makes of the tensors."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else None
    if device in AUTOCAST_KEYS and torch.is_autocast_enabled(device):
        tensors = tuple(autocast_tensor(t, torch.get_autocast_dtype(device), device) for t in tensors)
    check(*tensors)


def _call(op: Any, first: Tensor, second: Tensor, params: NAParams, **extras: Any) -> Tensor:
    backends.check_unfused(first)
    result: Tensor = telling_of_memory(first)(op, first, second, *params, **extras)
    return result


na1d_qk, na2d_qk, na3d_qk = (_make_qk(rank) for rank in (1, 2, 3))
na1d_av, na2d_av, na3d_av = (_make_av(rank) for rank in (1, 2, 3))
