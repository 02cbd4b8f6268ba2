# SPDX-License-Identifier: MIT
"""Neighborhood attention in plain torch: slow, obvious, differentiable, on any device. The oracle of every test.

out = softmax(scale * <q, k> + bias over the visible keys) . v, computed in float64 for float64 inputs and in float32
for every other type. A window is gathered slot by slot, the additional tokens are its last slots, and everything after
the gathering is an einsum.

Shape suffixes: B batch; N queries (all axes flattened); M keys; S slots of a window, additional tokens included;
K key/value heads; G query heads per key/value head (H = K * G); D head dim; E head dim of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten_ops.geometry.masks import TENSORS
from natten_ops.geometry.params import Box, NAParams, axis_window, make_box, make_params


class Inputs(NamedTuple):
    """The tensors of one attention; absent ones are None. Tangents of them use the same record."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    rpb: Tensor | None = None
    key_mask: Tensor | None = None


class Slots(NamedTuple):
    """For each query and slot of its window: which key, is it visible, which entry of the bias table."""

    key_NS: Tensor
    visible_NS: Tensor
    bias_NS: Tensor


class Lifted(NamedTuple):
    """The inputs brought to the windows; a linear map of the inputs, so that tangents go through it unchanged."""

    query_BNKGD: Tensor
    keys_BNSKD: Tensor
    values_BNSKE: Tensor
    bias_NKGS: Tensor | None


def neighborhood_attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_origin: Sequence[int] = (),
    kv_origin: Sequence[int] = (),
    extent: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """(softmax(scale * q.k + bias) . v, log-sum-exp) with the arguments of `torch.ops.natten.neighborhood_attention_lse`.

    Args:
        query: `[B, *spatial, H, D]`; key and value: `[B, *spatial, H_kv, D or D_v]`, any floating dtype.
        kernel_size, stride, dilation, is_causal: one entry an axis, in tokens.

    Returns:
        out `[B, *spatial, H, D_v]` in the query's dtype and lse `[B, *spatial, H]` in float32 (float64 for float64).

    Raises:
        ValueError: a geometry that `natten_ops.geometry.params` refuses.
    """
    rank = query.dim() - 3
    params = make_params(rank, kernel_size, stride, dilation, is_causal)
    box = make_box(rank, q_origin, kv_origin, extent)
    q_shape, kv_shape = query.shape[1:-2], key.shape[1:-2]
    params.check_extent(q_shape if box is None else box.extent)
    where = box or Box((0,) * rank, (0,) * rank, tuple(q_shape))
    where.check_bounds(q_shape, kv_shape)
    where.check_cover(params, q_shape, kv_shape)
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb, key_mask)
    return forward(inputs, params, box, scale)


def forward(inputs: Inputs, params: NAParams, box: Box | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """out and lse, by the definition."""
    slots = window_slots(inputs, params, box)
    mask = slot_mask(inputs, slots)
    lifted = mask_lifted(lift(inputs, slots), mask)
    weights_BNKGS, lse_BNKG = _softmax(_logits(lifted, _scale(inputs, scale)), mask)
    out_BNKGE = torch.einsum("bnkgs,bnske->bnkge", weights_BNKGS, lifted.values_BNSKE)
    return _as_out(out_BNKGE, inputs), lse_BNKG.reshape(inputs.query.shape[:-1])


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    inputs: Inputs,
    params: NAParams,
    box: Box | None,
    scale: float | None,
) -> Inputs:
    """Gradients of <out, grad_out> + <lse, grad_lse>; recomputes the weights, so that it can be differentiated again."""
    slots = window_slots(inputs, params, box)
    mask, factor = slot_mask(inputs, slots), _scale(inputs, scale)
    lifted = mask_lifted(lift(inputs, slots), mask)
    weights_BNKGS, _ = _softmax(_logits(lifted, factor), mask)
    grad_BNKGE, grad_lse_BNKG = _lift_gradients(grad_out, grad_lse, lifted, inputs)
    grad_weights = torch.einsum("bnkge,bnske->bnkgs", grad_BNKGE, lifted.values_BNSKE)
    delta_BNKG = (weights_BNKGS * grad_weights).sum(-1) - grad_lse_BNKG
    grad_logits = weights_BNKGS * (grad_weights - delta_BNKG[..., None])
    gradient = Lifted(
        torch.einsum("bnkgs,bnskd->bnkgd", grad_logits, lifted.keys_BNSKD) * factor,
        torch.einsum("bnkgs,bnkgd->bnskd", grad_logits, lifted.query_BNKGD) * factor,
        torch.einsum("bnkgs,bnkge->bnske", weights_BNKGS, grad_BNKGE),
        grad_logits.sum(0),
    )
    return lower(gradient, inputs, slots)


def forward_jvp(
    inputs: Inputs, tangents: Inputs, params: NAParams, box: Box | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Tangents of out and lse, spelled out: no torch.func transform can be started inside a forward-mode rule."""
    slots = window_slots(inputs, params, box)
    mask, factor = slot_mask(inputs, slots), _scale(inputs, scale)
    primal, tangent = (mask_lifted(lift(t, slots), mask) for t in (inputs, tangents))
    weights, _ = _softmax(_logits(primal, factor), mask)
    weights_t, lse_t = _weights_jvp(weights, _logits_jvp(primal, tangent, factor))
    out_t = torch.einsum("bnkgs,bnske->bnkge", weights_t, primal.values_BNSKE)
    out_t = out_t + torch.einsum("bnkgs,bnske->bnkge", weights, tangent.values_BNSKE)
    return _as_out(out_t, inputs), lse_t.reshape(inputs.query.shape[:-1])


def backward_jvp(
    grads: tuple[Tensor | None, Tensor | None],
    grads_tangents: tuple[Tensor | None, Tensor | None],
    inputs: Inputs,
    tangents: Inputs,
    params: NAParams,
    box: Box | None,
    scale: float | None,
) -> Inputs:
    """Tangents of `backward`: the product rule, line by line."""
    slots = window_slots(inputs, params, box)
    mask, factor = slot_mask(inputs, slots), _scale(inputs, scale)
    primal, tangent = (mask_lifted(lift(t, slots), mask) for t in (inputs, tangents))
    weights, _ = _softmax(_logits(primal, factor), mask)
    weights_t, _ = _weights_jvp(weights, _logits_jvp(primal, tangent, factor))
    grad, grad_lse = _lift_gradients(*grads, primal, inputs)
    grad_t, grad_lse_t = _lift_gradients(*grads_tangents, primal, inputs)
    dot = "bnkge,bnske->bnkgs"
    grad_weights = torch.einsum(dot, grad, primal.values_BNSKE)
    grad_weights_t = torch.einsum(dot, grad_t, primal.values_BNSKE) + torch.einsum(dot, grad, tangent.values_BNSKE)
    centred = grad_weights - ((weights * grad_weights).sum(-1) - grad_lse)[..., None]
    delta_t = (weights_t * grad_weights + weights * grad_weights_t).sum(-1) - grad_lse_t
    grad_logits = weights * centred
    grad_logits_t = weights_t * centred + weights * (grad_weights_t - delta_t[..., None])

    def product(equation: str, left: Tensor, left_t: Tensor, right: Tensor, right_t: Tensor) -> Tensor:
        return torch.einsum(equation, left_t, right) + torch.einsum(equation, left, right_t)

    q, q_t, keys, keys_t = primal.query_BNKGD, tangent.query_BNKGD, primal.keys_BNSKD, tangent.keys_BNSKD
    gradient_t = Lifted(
        product("bnkgs,bnskd->bnkgd", grad_logits, grad_logits_t, keys, keys_t) * factor,
        product("bnkgs,bnkgd->bnskd", grad_logits, grad_logits_t, q, q_t) * factor,
        product("bnkgs,bnkge->bnske", weights, weights_t, grad, grad_t),
        grad_logits_t.sum(0),
    )
    return lower(gradient_t, inputs, slots)


# ---- the two halves, heads first ------------------------------------------------------------------------------------


def qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """attn[.., s] = <query, key of slot s> + bias of slot s, unscaled, with the arguments of `torch.ops.natten.na_qk`.

    Args:
        query, key: `[B, H, *spatial, D]`; additional_keys: `[B, H, T, D]`, the last slots.

    Returns:
        `[B, H, *spatial, prod(kernel_size) + T]`, -inf in the slots of keys that a causal query does not see.
    """
    inputs = heads_last(query, key, additional_keys, rpb)
    slots = window_slots(inputs, make_params(query.dim() - 3, kernel_size, stride, dilation, is_causal), None)
    mask = slot_mask(inputs, slots)
    logits_BNKGS = _logits(mask_lifted(lift(inputs, slots), mask), 1.0)
    attn_BNHS = logits_BNKGS.masked_fill(~mask[:, :, None, None], -math.inf).flatten(2, 3)
    return attn_BNHS.transpose(1, 2).reshape(query.shape[:-1] + attn_BNHS.shape[-1:]).to(query.dtype)


def av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """out = sum over the visible slots s of attn[.., s] * value of slot s, with the arguments of `torch.ops.natten.na_av`.

    Args:
        attn: `[B, H, *spatial, prod(kernel_size) + T]`; value: `[B, H, *spatial, D]`; additional_values: `[B, H, T, D]`.
    """
    inputs = heads_last(value, value, additional_values)
    slots = window_slots(inputs, make_params(value.dim() - 3, kernel_size, stride, dilation, is_causal), None)
    mask = slot_mask(inputs, slots)
    values_BNSHE = mask_lifted(lift(inputs, slots), mask).values_BNSKE
    weights_BNHS = attn.to(values_BNSHE.dtype).flatten(2, -2).transpose(1, 2).masked_fill(~mask[:, :, None], 0.0)
    return torch.einsum("bnhs,bnshe->bhne", weights_BNHS, values_BNSHE).reshape(value.shape).to(value.dtype)


def heads_last(query: Tensor, key: Tensor, additional: Tensor | None, rpb: Tensor | None = None) -> Inputs:
    """As the inputs of a fused attention whose values are its keys."""
    keys = key.movedim(1, -2)
    extra = None if additional is None else additional.transpose(1, 2)
    return Inputs(query.movedim(1, -2), keys, keys, extra, extra, rpb)


# ---- windows -------------------------------------------------------------------------------------------------------


def window_slots(inputs: Inputs, params: NAParams, box: Box | None) -> Slots:
    """The slots of every query: row-major over the axes, slot t of an axis is key group + dilation * (start + t)."""
    q_shape, kv_shape = inputs.query.shape[1:-2], inputs.key.shape[1:-2]
    device = inputs.query.device
    slots = Slots(*(torch.zeros(1, 1, dtype=dtype, device=device) for dtype in (torch.int64, torch.bool, torch.int64)))
    slots = slots._replace(visible_NS=torch.ones_like(slots.visible_NS))
    for axis in range(params.rank):
        origin, kv_origin = (box.q_origin[axis], box.kv_origin[axis]) if box else (0, 0)
        length = box.extent[axis] if box else q_shape[axis]
        kernel, _, dilation, _ = params.axis(axis)
        index = torch.arange(q_shape[axis], device=device) + origin
        group, start, end = axis_window(index, length, *params.axis(axis), ops=TENSORS)
        position = start[:, None] + torch.arange(kernel, device=device)
        key = (group[:, None] + dilation * position - kv_origin).clamp(0, max(kv_shape[axis] - 1, 0))
        offset = (kernel - 1 + position - (index // dilation)[:, None]).clamp(0, 2 * kernel - 2)
        slots = Slots(
            _product(slots.key_NS * kv_shape[axis], key, torch.add),
            _product(slots.visible_NS, position < end[:, None], torch.logical_and),
            _product(slots.bias_NS * (2 * kernel - 1), offset, torch.add),
        )
    return slots


def _product(outer: Tensor, inner: Tensor, combine: Any) -> Tensor:
    """[N, S] and [n, s] to [N * n, S * s], row-major."""
    return combine(outer[:, None, :, None], inner[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def slot_mask(inputs: Inputs, slots: Slots) -> Tensor:
    """[B or 1, N, S] bool: the slots that take part; additional tokens always do."""
    mask = slots.visible_NS[None]
    if inputs.key_mask is not None:
        mask = mask & _gather(inputs.key_mask.flatten(1), slots.key_NS)
    if inputs.additional_keys is not None:
        extra = mask.new_ones(mask.shape[:2] + (inputs.additional_keys.shape[1],))
        mask = torch.cat([mask, extra], dim=-1)
    return mask


def _gather(tokens: Tensor, index_NS: Tensor) -> Tensor:
    """[B, M, ...] to [B, N, S, ...]."""
    return tokens.index_select(1, index_NS.flatten()).unflatten(1, index_NS.shape)


def biases_of(table: Tensor, slots: Slots) -> Tensor:
    """Entries of a bias table by slots: [H, ...] to [H, N, S]; by reshape, which torch.autograd's own vmap knows."""
    flat = table.reshape(table.shape[0], math.prod(table.shape[1:]))
    entries = flat.index_select(1, slots.bias_NS.flatten())
    return entries.reshape(table.shape[0], *slots.bias_NS.shape)


def lift(inputs: Inputs, slots: Slots) -> Lifted:
    """Bring queries, windows of keys and values, and biases to a common shape, in the dtype of the computation."""
    dtype = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    heads, heads_kv = inputs.query.shape[-2], inputs.key.shape[-2]
    group = heads // max(heads_kv, 1)
    query = inputs.query.to(dtype).flatten(1, -3).unflatten(2, (heads_kv, group))
    windows = []
    for tokens, additional in ((inputs.key, inputs.additional_keys), (inputs.value, inputs.additional_values)):
        window = _gather(tokens.to(dtype).flatten(1, -3), slots.key_NS)
        if additional is not None:
            extra = additional.to(dtype)[:, None].expand(-1, window.shape[1], -1, -1, -1)
            window = torch.cat([window, extra], dim=2)
        windows.append(window)
    bias = None
    if inputs.rpb is not None:
        bias = biases_of(inputs.rpb.to(dtype), slots)
        bias = bias.movedim(0, 1).unflatten(1, (heads_kv, group))
        bias = torch.nn.functional.pad(bias, (0, windows[0].shape[2] - bias.shape[-1]))
    return Lifted(query, windows[0], windows[1], bias)


def lower(gradient: Lifted, inputs: Inputs, slots: Slots) -> Inputs:
    """The adjoint of `lift`: gradients back in the shapes and dtypes of the inputs."""

    def scatter(windows: Tensor, tokens: Tensor, additional: Tensor | None) -> tuple[Tensor, Tensor | None]:
        count = slots.key_NS.shape[1]
        flat = windows[:, :, :count].flatten(1, 2)
        summed = flat.new_zeros(tokens.flatten(1, -3).shape).index_add(1, slots.key_NS.flatten(), flat)
        extra = None if additional is None else windows[:, :, count:].sum(1).to(additional.dtype)
        return summed.reshape(tokens.shape).to(tokens.dtype), extra

    key, additional_keys = scatter(gradient.keys_BNSKD, inputs.key, inputs.additional_keys)
    value, additional_values = scatter(gradient.values_BNSKE, inputs.value, inputs.additional_values)
    rpb = None
    if inputs.rpb is not None and gradient.bias_NKGS is not None:
        bias = gradient.bias_NKGS[..., : slots.bias_NS.shape[1]].flatten(1, 2).movedim(1, 0).flatten(1)
        table = bias.new_zeros(inputs.rpb.flatten(1).shape).index_add(1, slots.bias_NS.flatten(), bias)
        rpb = table.reshape(inputs.rpb.shape).to(inputs.rpb.dtype)
    query = gradient.query_BNKGD.reshape(inputs.query.shape).to(inputs.query.dtype)
    return Inputs(query, key, value, additional_keys, additional_values, rpb)


# ---- the formulas between lifting and lowering ---------------------------------------------------------------------


def _scale(inputs: Inputs, scale: float | None) -> float:
    return 1.0 / math.sqrt(inputs.query.shape[-1]) if scale is None else scale


def _logits(lifted: Lifted, scale: float) -> Tensor:
    logits = torch.einsum("bnkgd,bnskd->bnkgs", lifted.query_BNKGD, lifted.keys_BNSKD) * scale
    return logits if lifted.bias_NKGS is None else logits + lifted.bias_NKGS


def _softmax(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse; a row whose logits are all -inf gets weights 0, lse -inf and no gradient."""
    logits = logits.masked_fill(~mask[:, :, None, None], -math.inf)
    dead = (logits == -math.inf).all(-1)
    safe = logits.masked_fill(dead[..., None], 0.0)
    lse = safe.logsumexp(-1)
    weights = (safe - lse[..., None]).exp().masked_fill(dead[..., None], 0.0)
    return weights, lse.masked_fill(dead, -math.inf)


def _weights_jvp(weights: Tensor, logits_t: Tensor) -> tuple[Tensor, Tensor]:
    lse_t = (weights * logits_t).sum(-1)
    return weights * (logits_t - lse_t[..., None]), lse_t


def _logits_jvp(primal: Lifted, tangent: Lifted, scale: float) -> Tensor:
    product = torch.einsum("bnkgd,bnskd->bnkgs", tangent.query_BNKGD, primal.keys_BNSKD)
    product = (product + torch.einsum("bnkgd,bnskd->bnkgs", primal.query_BNKGD, tangent.keys_BNSKD)) * scale
    return product if tangent.bias_NKGS is None else product + tangent.bias_NKGS


def mask_lifted(lifted: Lifted, mask: Tensor) -> Lifted:
    """Zero the keys and values that are not seen, so that a NaN there stays inert in every product and gradient."""
    hidden = ~mask[..., None, None]
    keys, values = lifted.keys_BNSKD.masked_fill(hidden, 0.0), lifted.values_BNSKE.masked_fill(hidden, 0.0)
    return lifted._replace(keys_BNSKD=keys, values_BNSKE=values)


def _lift_gradients(
    grad_out: Tensor | None, grad_lse: Tensor | None, lifted: Lifted, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """The two output gradients (zeros for None) as [B, N, K, G, E] and [B, N, K, G]."""
    shape, dtype = lifted.query_BNKGD.shape[:-1], lifted.query_BNKGD.dtype
    if grad_out is None:
        grad_out = lifted.query_BNKGD.new_zeros(shape + (inputs.value.shape[-1],))
    if grad_lse is None:
        grad_lse = lifted.query_BNKGD.new_zeros(shape)
    return grad_out.to(dtype).reshape(shape + (inputs.value.shape[-1],)), grad_lse.to(dtype).reshape(shape)


def _as_out(out_BNKGE: Tensor, inputs: Inputs) -> Tensor:
    return out_BNKGE.reshape(inputs.query.shape[:-1] + (inputs.value.shape[-1],)).to(inputs.query.dtype)
