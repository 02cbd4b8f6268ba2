# SPDX-License-Identifier: MIT
"""The life of the unfused ops: attn = na_qk(query, key) and out = na_av(attn, value), heads first, unscaled.

Both are bilinear. Three products are enough for them and every derivative of any order: `na_av` sums rows of keys into
rows of queries, `_products` (a gradient of `na_av`) multiplies rows of queries and keys, and the gradients by keys sum
rows of queries into rows of keys. Slots of keys that a causal query does not see take part in none of them.
Schemas and CPU kernels are C++ (`csrc/unfused.cpp`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from natten_ops import flops, reference
from natten_ops.ops._batching import fold, sample_by_sample, unfold
from natten_ops.ops._register import (
    LIBRARY,
    SingleLevelFunction,
    below_autograd,
    forward_rule,
    register_autocast,
    register_autograd,
    register_missing_cuda,
    register_vmap,
    telling_of_memory,
    wake,
)
from natten_ops.ops.arguments import autocast_tensor
from natten_ops.ops.unfused_arguments import (
    AV_TENSORS,
    QK_TENSORS,
    Needing,
    Windows,
    av_backward_op,
    av_op,
    call_av,
    call_av_backward,
    call_qk,
    call_qk_backward,
    check_av,
    check_gradient,
    check_needed,
    check_qk,
    params_of,
    qk_backward_op,
    qk_op,
    slots_shape,
    split_av,
    split_backward,
    split_qk,
)

# ---- fake ----------------------------------------------------------------------------------------------------------


def _fake_qk(*args: Any, **kwargs: Any) -> Tensor:
    wake()
    windows, (query, key, rpb, additional_keys) = split_qk(*args, **kwargs)
    params = params_of(windows)
    check_qk(query, key, params, rpb, additional_keys)
    return query.new_empty(slots_shape(query, params, additional_keys))  # type: ignore[no-any-return]


def _fake_av(*args: Any, **kwargs: Any) -> Tensor:
    wake()
    windows, (attn, value, additional_values) = split_av(*args, **kwargs)
    check_av(attn, value, params_of(windows), additional_values)
    return value.new_empty(value.shape)  # type: ignore[no-any-return]


def _fake_qk_backward(*args: Any) -> tuple[Tensor, ...]:
    wake()
    (windows, needed), (grad, query, key, rpb, additional_keys) = split_backward(*args)
    params = params_of(windows)
    check_qk(query, key, params, rpb, additional_keys)
    check_gradient("grad", grad, slots_shape(query, params, additional_keys), query)
    check_needed(needed, QK_TENSORS)
    return _fake_gradients([query, key, rpb, additional_keys], needed)


def _fake_av_backward(*args: Any) -> tuple[Tensor, ...]:
    wake()
    (windows, needed), (grad, attn, value, additional_values) = split_backward(*args)
    check_av(attn, value, params_of(windows), additional_values)
    check_gradient("grad", grad, value.shape, value)
    check_needed(needed, AV_TENSORS)
    return _fake_gradients([attn, value, additional_values], needed)


def _fake_gradients(tensors: Sequence[Any], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    wanted = [tensor if need else None for tensor, need in zip(tensors, needed)]
    return tuple(tensors[0].new_empty([0]) if t is None else t.new_empty(t.shape) for t in wanted)


for name, fake in (
    ("na_qk", _fake_qk),
    ("na_av", _fake_av),
    ("na_qk_backward", _fake_qk_backward),
    ("na_av_backward", _fake_av_backward),
):
    torch.library.register_fake(f"natten::{name}", fake, lib=LIBRARY)


# ---- derivatives ---------------------------------------------------------------------------------------------------


def _sum(*terms: Tensor | None) -> Any:
    """Of the terms that are there; None if none is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _zeros(tensor: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The tensor; zeros where it is None and `like` is there."""
    return torch.zeros_like(like) if tensor is None and like is not None else tensor


def _products(windows: Windows, query: Any, key: Any, additional_keys: Any) -> Tensor | None:
    """<query, key of the slot>, 0 instead of -inf in slots that are not seen; None if a factor of the window is None."""
    if query is None or (key is None and additional_keys is None):
        return None
    if key is None:
        key = torch.zeros_like(query)
    shape = slots_shape(query, params_of(windows), additional_keys)
    weights = query.new_zeros(()).expand(shape)  # for its shape: the gradient by weights does not read them
    settings = windows, [True, False, False]
    product: Tensor = call_av_backward(settings, [query, weights, key, additional_keys])[0]
    return product


def _biases(windows: Windows, rpb: Tensor | None, query: Tensor, additional: Tensor | None) -> Tensor | None:
    """What a bias table adds to each slot, 0 in slots that are not seen."""
    if rpb is None:
        return None
    tokens = query.movedim(1, -2)
    inputs = reference.Inputs(tokens, tokens, tokens)
    slots = reference.window_slots(inputs, params_of(windows), None)
    entries = reference.biases_of(rpb.to(query.dtype), slots).masked_fill(~slots.visible_NS, 0.0)
    entries = torch.nn.functional.pad(entries, (0, 0 if additional is None else additional.shape[2]))
    entries = entries.reshape(entries.shape[0], *query.shape[2:-1], entries.shape[-1])
    return entries.expand(query.shape[0], *[-1] * (query.dim() - 1))


class _QK(SingleLevelFunction):
    """attn = <query, key of the slot> + bias; arguments: windows, then QK_TENSORS."""

    @staticmethod
    def forward(ctx: Any, windows: Windows, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.windows = windows
        return call_qk(windows, tensors, below_autograd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = list(ctx.needs_input_grad[1:])
        gradients = call_qk_backward((ctx.windows, needed), [grad, *ctx.saved_tensors], telling_of_memory(grad))
        return None, *(gradient if need else None for gradient, need in zip(gradients, needed))

    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        query, key, _, additional = saved
        query_t, key_t, rpb_t, additional_t = tangents
        return _sum(
            _products(ctx.windows, query_t, key, additional),
            _products(ctx.windows, query, _zeros(key_t, key), _zeros(additional_t, additional)),
            _biases(ctx.windows, rpb_t, query, additional),
        )


class _QKBackward(SingleLevelFunction):
    """(dquery, dkey, drpb, dadditional), each linear in the gradient; arguments: (windows, needed), grad, QK_TENSORS."""

    @staticmethod
    def forward(ctx: Any, settings: Needing, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.settings = settings
        return call_qk_backward(settings, tensors, below_autograd)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        windows, needed = ctx.settings
        grad, query, key, rpb, additional = ctx.saved_tensors
        inputs = query, key, rpb, additional
        c_query, c_key, c_rpb, c_additional = (
            c if need and t is not None else None for c, need, t in zip(cotangents, needed, inputs)
        )
        wants_grad, wants_query, wants_key, _, wants_additional = ctx.needs_input_grad[1:]
        of_grad = None
        if wants_grad:
            of_grad = _sum(
                _products(windows, c_query, key, additional),
                _products(windows, query, _zeros(c_key, key), _zeros(c_additional, additional)),
                _biases(windows, c_rpb, query, additional),
            )
        # The same sums again, over cotangents in the places of query and keys.
        swapped = [grad, _zeros(c_query, query), _zeros(c_key, key), None, _zeros(c_additional, additional)]
        wanted = [wants_query, wants_key, False, wants_additional]
        of_query, of_key, _, of_additional = call_qk_backward((windows, wanted), swapped)
        return (
            None,
            of_grad,
            of_query if wants_query else None,
            of_key if wants_key else None,
            None,
            of_additional if wants_additional else None,
        )

    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        grad, query, key, rpb, additional = saved
        grad_t, query_t, key_t, _, additional_t = tangents
        windows, needed = ctx.settings
        first = call_qk_backward(ctx.settings, [_zeros(grad_t, grad), query, key, rpb, additional])
        moved = [grad, _zeros(query_t, query), _zeros(key_t, key), None, _zeros(additional_t, additional)]
        second = call_qk_backward((windows, [needed[0], needed[1], False, needed[3]]), moved)
        return tuple(a if i == 2 else a + b for i, (a, b) in enumerate(zip(first, second)))


class _AV(SingleLevelFunction):
    """out = sum of attn * value of the slot; arguments: windows, then AV_TENSORS."""

    @staticmethod
    def forward(ctx: Any, windows: Windows, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.windows = windows
        return call_av(windows, tensors, below_autograd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = list(ctx.needs_input_grad[1:])
        gradients = call_av_backward((ctx.windows, needed), [grad, *ctx.saved_tensors], telling_of_memory(grad))
        return None, *(gradient if need else None for gradient, need in zip(gradients, needed))

    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        attn, value, additional = saved
        attn_t, value_t, additional_t = tangents
        moved = _zeros(value_t, value), _zeros(additional_t, additional)
        return call_av(ctx.windows, [_zeros(attn_t, attn), value, additional]) + call_av(ctx.windows, [attn, *moved])


class _AVBackward(SingleLevelFunction):
    """(dattn, dvalue, dadditional), each linear in the gradient; arguments: (windows, needed), grad, AV_TENSORS."""

    @staticmethod
    def forward(ctx: Any, settings: Needing, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.settings = settings
        return call_av_backward(settings, tensors, below_autograd)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        windows, needed = ctx.settings
        grad, attn, value, additional = ctx.saved_tensors
        c_attn, c_value, c_additional = (
            c if need and t is not None else None for c, need, t in zip(cotangents, needed, (attn, value, additional))
        )
        wants_grad, wants_attn, wants_value, wants_additional = ctx.needs_input_grad[1:]
        moved = _zeros(c_value, value), _zeros(c_additional, additional)
        weights = _zeros(c_attn, attn)
        of_grad = None
        if wants_grad:
            of_grad = call_av(windows, [weights, value, additional]) + call_av(windows, [attn, *moved])
        _, of_value, of_additional = call_av_backward(
            (windows, [False, wants_value, wants_additional]), [grad, weights, value, additional]
        )
        return (
            None,
            of_grad,
            _products(windows, grad, *moved) if wants_attn else None,
            of_value if wants_value else None,
            of_additional if wants_additional else None,
        )

    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        grad, attn, value, additional = saved
        grad_t, *rest_t = (_zeros(t, primal) for t, primal in zip(tangents, saved))
        first = call_av_backward(ctx.settings, [grad_t, attn, value, additional])
        second = call_av_backward(ctx.settings, [grad, *rest_t])
        return tuple(a + b for a, b in zip(first, second))


for name, op, function, split in (
    ("na_qk", qk_op, _QK, split_qk),
    ("na_av", av_op, _AV, split_av),
    ("na_qk_backward", qk_backward_op, _QKBackward, split_backward),
    ("na_av_backward", av_backward_op, _AVBackward, split_backward),
):
    register_autograd(name, op, function, split)


# ---- autocast ------------------------------------------------------------------------------------------------------


def _casting(split: Callable[..., Any], call: Callable[..., Any], stays: int | None) -> Callable[..., Any]:
    """Tensors get the active dtype, but for the one at `stays`, the bias table."""

    def casting(*args: Any, **kwargs: Any) -> Callable[[torch.dtype, str], Any]:
        windows, tensors = split(*args, **kwargs)

        def cast(dtype: torch.dtype, device_type: str) -> Any:
            moved = (t if i == stays else autocast_tensor(t, dtype, device_type) for i, t in enumerate(tensors))
            return call(windows, list(moved))

        return cast

    return casting


register_autocast("na_qk", _casting(split_qk, call_qk, QK_TENSORS.index("rpb")))
register_autocast("na_av", _casting(split_av, call_av, None))


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _vmap_gradients(call: Callable[..., Any], table: int | None) -> Callable[..., Any]:
    """The batching rule of an op with several outputs; `table` is the place of the bias table, which has no batch."""

    def rule(size: int, dims: Sequence[int | None], settings: Any, tensors: Sequence[Any]) -> Any:
        # The table's gradient sums over the batch: folding would mix the samples.
        if table is not None and tensors[table] is not None and (dims[table] is not None or settings[1][table - 1]):
            return sample_by_sample(call, settings, tensors, dims, size)
        folded = [t if i == table else fold(t, dim, size) for i, (t, dim) in enumerate(zip(tensors, dims))]
        return unfold(call(settings, folded), tensors[1], dims[1], size)

    return rule


def _vmap_one(call: Callable[..., Any], table: int | None) -> Callable[..., Any]:
    """The batching rule of an op with one output."""

    def rule(size: int, dims: Sequence[int | None], windows: Windows, tensors: Sequence[Any]) -> Any:
        def call_as_tuple(settings: Windows, given: Sequence[Any]) -> tuple[Tensor]:
            return (call(settings, given),)

        if table is not None and dims[table] is not None:
            outputs, _ = sample_by_sample(call_as_tuple, windows, tensors, dims, size)
        else:
            folded = [t if i == table else fold(t, dim, size) for i, (t, dim) in enumerate(zip(tensors, dims))]
            outputs, _ = unfold(call_as_tuple(windows, folded), tensors[1], dims[1], size)
        return outputs[0], 0

    return rule


register_vmap("na_qk", split_qk, call_qk, _vmap_one(call_qk, 2))
register_vmap("na_av", split_av, call_av, _vmap_one(call_av, None))
register_vmap("na_qk_backward", split_backward, call_qk_backward, _vmap_gradients(call_qk_backward, 3))
register_vmap("na_av_backward", split_backward, call_av_backward, _vmap_gradients(call_av_backward, None))


# ---- FLOPs and devices ---------------------------------------------------------------------------------------------


@register_flop_formula([torch.ops.natten.na_qk])
def _qk_flops(*shapes: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
    windows, (query, _, _, additional) = split_qk(*shapes, **kwargs)
    return flops.qk_flops(query, params_of(windows), additional[2] if additional else 0)  # type: ignore[no-any-return]


@register_flop_formula([torch.ops.natten.na_av])
def _av_flops(*shapes: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
    windows, (_, value, additional) = split_av(*shapes, **kwargs)
    return flops.av_flops(value, params_of(windows), additional[2] if additional else 0)  # type: ignore[no-any-return]


@register_flop_formula([torch.ops.natten.na_qk_backward])
def _qk_backward_flops(*shapes: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
    (windows, needed), (_, query, _, _, additional) = split_backward(*shapes)
    count: int = flops.qk_backward_flops(query, params_of(windows), needed, additional[2] if additional else 0)
    return count


@register_flop_formula([torch.ops.natten.na_av_backward])
def _av_backward_flops(*shapes: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
    (windows, needed), (_, _, value, additional) = split_backward(*shapes)
    count: int = flops.av_backward_flops(value, params_of(windows), needed, additional[2] if additional else 0)
    return count


for name in ("na_qk", "na_av", "na_qk_backward", "na_av_backward"):
    register_missing_cuda(name)
