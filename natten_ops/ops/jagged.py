# SPDX-License-Identifier: MIT
"""The life of fused attention over lines of different lengths: values `[tokens, heads, dim]` and offsets of the samples.

An op of its own, because how many tokens a sample has is data: a compiler must not look into it. Schemas and CPU kernels
are C++ (`csrc/jagged.cpp`). Derivatives are of first order; whoever asks for more is told the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from natten_ops import flops
from natten_ops.geometry.params import NAParams, make_params
from natten_ops.ops._register import (
    LIBRARY,
    SingleLevelFunction,
    below_autograd,
    direct,
    register_autocast,
    register_autograd,
    register_missing_cuda,
    wake,
)
from natten_ops.ops.arguments import (
    autocast_tensor,
    check_dtypes_of,
    check_kinds,
    check_saved,
    check_table,
    expect,
    lse_dtype,
)
from natten_ops.ops.fused import GRADIENTS
from natten_ops.reference import Inputs

FORWARD, BACKWARD = "neighborhood_attention_jagged", "neighborhood_attention_jagged_backward"
forward_op = torch.ops.natten.neighborhood_attention_jagged.default
backward_op = torch.ops.natten.neighborhood_attention_jagged_backward.default

# The tensors of the forward in the order of its rule.
TENSORS = ("query", "key", "value", "offsets", "additional_keys", "additional_values", "rpb")

Lines = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool], float | None]


# ---- arguments -----------------------------------------------------------------------------------------------------


def _split(
    query: Any,
    key: Any,
    value: Any,
    offsets: Any,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: Any = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
) -> tuple[Lines, list[Any]]:
    """(windows and scale, tensors in the order of TENSORS)"""
    tensors = [query, key, value, offsets, additional_keys, additional_values, rpb]
    return (kernel_size, stride, dilation, is_causal, scale), tensors


def _call(settings: Lines, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    *rows, additional_keys, additional_values, rpb = tensors
    return call(forward_op, *rows, *settings, additional_keys, additional_values, rpb=rpb)


def _split_backward(*args: Any) -> tuple[tuple[Lines, Sequence[bool]], list[Any]]:
    """((windows and scale, needed), the two gradients, out, lse and TENSORS)"""
    return (args[8:13], args[16]), [*args[:8], *args[13:16]]


def _call_backward(settings: Any, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    lines, needed = settings
    return call(backward_op, *tensors[:8], *lines, *tensors[8:], needed)


def check_jagged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    params: NAParams,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless the values fit each other; what offsets hold is the kernel's business."""
    named = [("query", query), ("key", key), ("value", value)]
    named += [("additional_keys", additional_keys), ("additional_values", additional_values)]  # type: ignore[list-item]
    check_kinds([*named[:3], ("offsets", offsets), *named[3:], ("rpb", rpb)], required=4)
    for name, tensor in named[:3]:
        if tensor.dim() != 3 or tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has values {list(tensor.shape)}; give [{query.shape[0]} tokens, heads, head dim]")
    heads, heads_kv, dim = query.shape[1], key.shape[1], query.shape[2]
    if dim < 1:
        raise ValueError(f"query has head dim {dim}; it must be at least 1")
    expect("key", key, (query.shape[0], heads_kv, dim), "[tokens, heads of key, head dim]")
    expect("value", value, (query.shape[0], heads_kv, value.shape[2]), "[tokens, heads of key, head dim of value]")
    if (heads_kv == 0 and heads != 0) or (heads_kv != 0 and heads % heads_kv != 0):
        raise ValueError(f"query has {heads} heads, key {heads_kv}; query's heads must be a multiple of key's")
    if offsets.dim() != 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets is {offsets.dtype} {list(offsets.shape)}; give int64 [samples + 1]")
    samples = offsets.shape[0] - 1
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together; give both or none")
    if additional_keys is not None and additional_values is not None:
        count = additional_keys.shape[1] if additional_keys.dim() > 1 else 0
        lead = (samples, count, heads_kv)
        expect("additional_keys", additional_keys, (*lead, dim), "[samples, tokens, heads of key, head dim]")
        expect("additional_values", additional_values, (*lead, value.shape[2]), "[samples, tokens, heads of key, dim]")
    check_dtypes_of(named)
    if rpb is not None:
        check_table(rpb, heads, params)
        if rpb.dtype != lse_dtype(query):
            raise ValueError(
                f"rpb has dtype {rpb.dtype}; cast it to {lse_dtype(query)}, the type of its gradient's sums"
            )


# ---- fake ----------------------------------------------------------------------------------------------------------


def _fake_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    wake()
    settings, tensors = _split(*args, **kwargs)
    query, key, value, offsets, additional_keys, additional_values, rpb = tensors
    params = make_params(1, *settings[:4])
    check_jagged(query, key, value, offsets, params, additional_keys, additional_values, rpb)
    out = query.new_empty([*query.shape[:2], value.shape[2]])
    return out, query.new_empty(query.shape[:2], dtype=lse_dtype(query))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    wake()
    (settings, needed), (*saved, query, key, value, offsets, additional_keys, additional_values, rpb) = _split_backward(
        *args
    )
    params = make_params(1, *settings[:4])
    check_jagged(query, key, value, offsets, params, additional_keys, additional_values, rpb)
    check_saved(saved[0], saved[1], saved[2], saved[3], Inputs(query, key, value), needed)
    by_name = dict(zip(TENSORS, (query, key, value, offsets, additional_keys, additional_values, rpb)))
    wanted = [by_name[name] if need else None for name, need in zip(GRADIENTS, needed)]
    return tuple(query.new_empty([0]) if t is None else t.new_empty(t.shape) for t in wanted)


torch.library.register_fake(f"natten::{FORWARD}", _fake_forward, lib=LIBRARY)
torch.library.register_fake(f"natten::{BACKWARD}", _fake_backward, lib=LIBRARY)


# ---- derivatives ---------------------------------------------------------------------------------------------------


_ONLY_FIRST = (
    "attention over jagged lines has first derivatives in reverse mode only; pad the lines to one length and hide what is "
    "not there with key_mask: dense attention has every derivative"
)


class _Forward(SingleLevelFunction):
    """out and lse; arguments: windows and scale, then TENSORS."""

    @staticmethod
    def forward(ctx: Any, settings: Lines, *tensors: Any) -> Any:
        out, lse = _call(settings, tensors, below_autograd)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        wanted = dict(zip(TENSORS, ctx.needs_input_grad[1:]))
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(tensors))
        needed = [wanted[name] for name in GRADIENTS]
        gradients = _call_backward((ctx.settings, needed), [grad_out, grad_lse, out, lse, *tensors])
        by_name = dict(zip(GRADIENTS, gradients))
        return None, *(by_name[name] if wanted[name] else None for name in TENSORS)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_ONLY_FIRST)


class _Backward(SingleLevelFunction):
    """The gradients, which have none of their own: whoever asks for them is told, instead of getting zeros."""

    @staticmethod
    def forward(ctx: Any, settings: Any, *tensors: Any) -> Any:
        return _call_backward(settings, tensors, below_autograd)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise NotImplementedError(_ONLY_FIRST)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_ONLY_FIRST)


register_autograd(FORWARD, forward_op, _Forward, _split)
register_autograd(BACKWARD, backward_op, _Backward, _split_backward)


# ---- autocast, FLOPs and devices -----------------------------------------------------------------------------------


def _casting(*args: Any, **kwargs: Any) -> Callable[[torch.dtype, str], Any]:
    settings, tensors = _split(*args, **kwargs)

    def cast(dtype: torch.dtype, device_type: str) -> Any:
        return _call(settings, [*(autocast_tensor(t, dtype, device_type) for t in tensors[:6]), tensors[6]])

    return cast


register_autocast(FORWARD, _casting)


def _lengths(query: Tensor, offsets: Tensor) -> list[int]:
    """Tokens of each sample; of all together where offsets hold no data, which is exact but for causal lines."""
    if offsets.device.type == "meta" or isinstance(offsets, torch._subclasses.FakeTensor):
        return [query.shape[0]]
    return offsets.diff().tolist()  # type: ignore[no-any-return]


@register_flop_formula([torch.ops.natten.neighborhood_attention_jagged], get_raw=True)
def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    settings, (query, _, value, offsets, additional, *_) = _split(*args, **kwargs)
    params, tokens = make_params(1, *settings[:4]), 0 if additional is None else additional.shape[1]
    rows = [((1, n, *query.shape[1:]), (1, n, *value.shape[1:])) for n in _lengths(query, offsets)]
    return sum(flops.forward_flops(of_query, of_value, params, tokens) for of_query, of_value in rows)


@register_flop_formula([torch.ops.natten.neighborhood_attention_jagged_backward], get_raw=True)
def _backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    (settings, needed), (*_, query, _, value, offsets, additional, _, _) = _split_backward(*args)
    params, tokens = make_params(1, *settings[:4]), 0 if additional is None else additional.shape[1]
    rows = [((1, n, *query.shape[1:]), (1, n, *value.shape[1:])) for n in _lengths(query, offsets)]
    return sum(flops.backward_flops(of_query, of_value, params, needed, tokens) for of_query, of_value in rows)


for name in (FORWARD, BACKWARD):
    register_missing_cuda(name, has_kernel=False)
