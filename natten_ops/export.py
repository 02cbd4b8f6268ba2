# SPDX-License-Identifier: MIT
"""Exported programs without `natten` ops, for runtimes that have none: ATen alone, and ONNX through it.

`torch.onnx.export` takes a program that was decomposed; batch and grid may stay dynamic:

    >>> import onnxruntime, torch, natten_ops
    >>> layer = natten_ops.nn.NeighborhoodAttention2D(16, num_heads=2, kernel_size=3).eval()
    >>> sizes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 1, 2)}
    >>> program = torch.export.export(layer, (torch.randn(2, 8, 8, 16),), dynamic_shapes=(sizes,))
    >>> program = program.run_decompositions(natten_ops.export.decompositions())
    >>> model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    >>> session = onnxruntime.InferenceSession(model.SerializeToString())
    >>> image = torch.randn(3, 5, 12, 16)
    >>> (out,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    >>> torch.testing.assert_close(torch.from_numpy(out), layer(image).detach(), rtol=1e-4, atol=1e-4)

The extra `natten-ops[onnx]` installs what this takes.

The forward is not `reference.forward`, though its windows are: with heads before tokens the two products are plain
batched matrix products, and hidden slots are kept harmless in the index instead of in the gathered keys. Measured in
onnxruntime at 56x56 tokens, 4 heads of 32, window 7x7, 2 threads: 13 ms instead of 108, with a causal axis 19 to 31
instead of 63.

Shape suffixes: B batch; N queries (all axes flattened); M keys; S slots of a window; T additional tokens;
K key/value heads; G query heads per key/value head (H = K * G); D head dim; E head dim of the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from natten_ops import reference
from natten_ops.ops import fused
from natten_ops.ops.arguments import lse_dtype
from natten_ops.ops.merge import merge_attentions
from natten_ops.ops.unfused_arguments import av_backward_op, av_op, params_of, qk_backward_op, qk_op, split_backward
from natten_ops.reference import Inputs


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """A table that makes of `natten` ops gathered windows: softmax(scale * q.k + bias over the gathered keys) . v

    Give it to `ExportedProgram.run_decompositions`. The result has the numbers of the ops, serves the same sizes, and
    loads where natten_ops is not installed. Every option and dtype is taken; 16-bit inputs are computed in float32. The
    price is memory: the gathered keys and values are tokens times window, so where `natten` ops can run, keep them.

    Returns:
        A new dict {op: function}, of the fused and the unfused ops, their gradients and merging. Other ops stay as they
        are, jagged attention too, whose lengths are data; for core ATen update `torch.export.default_decompositions()`
        with it.

    Raises:
        Nothing itself. A decomposed program refuses sizes as the program that it was made of does, with one exception:
        the place of a sub-box is not checked when it runs. An ONNX model checks nothing: grids below kernel_size *
        dilation give wrong numbers there.

    Example:
        >>> import torch, natten_ops
        >>> layer = natten_ops.nn.NeighborhoodAttention1D(8, num_heads=2, kernel_size=3)
        >>> program = torch.export.export(layer, (torch.randn(2, 9, 8),))
        >>> program = program.run_decompositions(natten_ops.export.decompositions())
        >>> [node for node in program.graph.nodes if "natten" in str(node.target)]
        []
    """
    ops = torch.ops.natten
    table: dict[OpOverload, Callable[..., Any]] = {
        # These become the primitive, which is an entry as well.
        getattr(ops, f"na{rank}d").default: fused._composite(rank)
        for rank in (1, 2, 3)
    }
    table[fused.forward_op] = _forward
    table[fused.backward_op] = _backward
    table[ops.merge_attentions.default] = merge_attentions
    table[qk_op], table[qk_backward_op] = _contiguous(reference.qk), _qk_backward
    table[av_op], table[av_backward_op] = _contiguous(reference.av), _av_backward
    return table


def _forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """out and lse of the primitive."""
    settings, inputs = fused._split(*args, **kwargs)
    query, key, value, scale = *inputs[:3], settings.scale
    dtype, heads_kv = lse_dtype(query), key.shape[-2]
    slots = reference.window_slots(inputs, *settings.geometry())
    index_NS = slots.key_NS
    if any(settings.is_causal):
        # A hidden slot reads its window's first key, which is visible: what the query must not see, NaN too, never
        # enters a product, and nothing of the size of the gathered keys has to be masked.
        index_NS = torch.where(slots.visible_NS, index_NS, index_NS[:, :1])
    if inputs.key_mask is not None:
        key, value = (t.masked_fill(~inputs.key_mask[..., None, None], 0.0) for t in (key, value))

    query_BNKGD = query.to(dtype).flatten(1, -3).unflatten(2, (heads_kv, query.shape[-2] // max(heads_kv, 1)))
    query_BKNGD = query_BNKGD.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits_BKNGS = query_BKNGD @ _gathered(key.to(dtype), index_NS).transpose(-1, -2)
    if inputs.rpb is not None:
        logits_BKNGS = logits_BKNGS + _bias(inputs.rpb.to(dtype), slots.bias_NS, query_BKNGD)
    if any(settings.is_causal) or inputs.key_mask is not None:
        mask_BNS = reference.slot_mask(inputs._replace(additional_keys=None), slots)
        logits_BKNGS = logits_BKNGS.masked_fill(~mask_BNS[:, None, :, None], -math.inf)
    out_BKNGE, lse_BKNG = _softmax_product(logits_BKNGS, _gathered(value.to(dtype), index_NS), query_BKNGD, inputs)
    out = out_BKNGE.transpose(1, 2).reshape([*query.shape[:-1], value.shape[-1]]).to(query.dtype)
    return out, lse_BKNG.transpose(1, 2).reshape(query.shape[:-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """The reference's gradients; like the op's, of size 0 where they are not needed."""
    (settings, needed, _), (grad_out, grad_lse, _, _, *tensors) = fused._split_backward(*args)
    inputs = Inputs(*tensors)
    gradients = reference.backward(grad_out, grad_lse, inputs, *settings.geometry(), settings.scale)
    return _chosen([getattr(gradients, name) for name in fused.GRADIENTS], needed, inputs.query)


def _contiguous(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with its result laid out as the op's: programs may view it."""
    return lambda *args, **kwargs: function(*args, **kwargs).contiguous()


def _qk_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of the query, the key, the bias table and the additional keys of na_qk."""
    (windows, needed), (grad, query, key, rpb, additional) = split_backward(*args)
    inputs, slots, mask, lifted = _lifted(windows, query, key, additional, rpb)
    grad_BNKGS = _weights(grad, mask, lifted)
    of_keys = _seen(torch.einsum("bnkgs,bnkgd->bnskd", grad_BNKGS, lifted.query_BNKGD), mask)
    of_query = torch.einsum("bnkgs,bnskd->bnkgd", grad_BNKGS, lifted.keys_BNSKD)
    found = reference.lower(reference.Lifted(of_query, of_keys, of_keys, grad_BNKGS.sum(0)), inputs, slots)
    return _chosen([_first(found.query), _first(found.key), found.rpb, _first(found.additional_keys)], needed, query)


def _av_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of the weights, the value and the additional values of na_av."""
    (windows, needed), (grad, attn, value, additional) = split_backward(*args)
    inputs, slots, mask, lifted = _lifted(windows, grad, value, additional)
    of_attn = torch.einsum("bnkgd,bnskd->bnkgs", lifted.query_BNKGD, lifted.keys_BNSKD)
    of_attn = of_attn.flatten(2, 3).masked_fill(~mask[:, :, None], 0.0).transpose(1, 2).reshape(attn.shape)
    of_values = _seen(torch.einsum("bnkgs,bnkgd->bnskd", _weights(attn, mask, lifted), lifted.query_BNKGD), mask)
    found = reference.lower(reference.Lifted(lifted.query_BNKGD, of_values, of_values, None), inputs, slots)
    return _chosen(
        [of_attn.to(attn.dtype).contiguous(), _first(found.key), _first(found.additional_keys)], needed, value
    )


def _lifted(windows: Any, query: Tensor, key: Tensor, additional: Any, rpb: Any = None) -> tuple[Any, Any, Any, Any]:
    """(inputs, slots, mask, lifted tensors) of heads-first tensors, as the reference has them."""
    inputs = reference.heads_last(query, key, additional, rpb)
    slots = reference.window_slots(inputs, params_of(windows), None)
    mask = reference.slot_mask(inputs, slots)
    return inputs, slots, mask, reference.mask_lifted(reference.lift(inputs, slots), mask)


def _weights(attn: Tensor, mask: Tensor, lifted: Any) -> Tensor:
    """[B, H, *axes, S] to [B, N, K, 1, S], zeros in slots that are not seen."""
    weights_BNHS = attn.to(lifted.keys_BNSKD.dtype).flatten(2, -2).transpose(1, 2)
    return weights_BNHS.masked_fill(~mask[:, :, None], 0.0).unsqueeze(3)


def _seen(of_slots_BNSKD: Tensor, mask: Tensor) -> Tensor:
    """0 in slots that are not seen: their weight is, but 0 times NaN is NaN, and would reach another key."""
    return of_slots_BNSKD.masked_fill(~mask[..., None, None], 0.0)


def _first(tokens: Tensor | None) -> Tensor | None:
    """Heads first again."""
    return None if tokens is None else tokens.movedim(-2, 1).contiguous()


def _chosen(gradients: Sequence[Tensor | None], needed: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """Of size 0 where they are not needed, as the ops have them."""
    kept = (gradient if need else None for gradient, need in zip(gradients, needed))
    return tuple(like.new_empty([0]) if gradient is None else gradient for gradient in kept)


def _gathered(tokens: Tensor, index_NS: Tensor) -> Tensor:
    """[B, *axes, K, D] to [B, K, N, S, D]."""
    return tokens.flatten(1, -3).transpose(1, 2).index_select(2, index_NS.flatten()).unflatten(2, index_NS.shape)


def _bias(rpb: Tensor, bias_NS: Tensor, query_BKNGD: Tensor) -> Tensor:
    """[H, *table] to [K, N, G, S]."""
    bias_HNS = rpb.flatten(1).index_select(1, bias_NS.flatten()).unflatten(1, bias_NS.shape)
    return bias_HNS.unflatten(0, (query_BKNGD.shape[1], query_BKNGD.shape[3])).transpose(1, 2)


def _softmax_product(
    logits_BKNGS: Tensor, values_BKNSE: Tensor, query_BKNGD: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """softmax . values and log-sum-exp, additional tokens included; a row that is -inf throughout gives 0 and -inf."""
    extra_BKNGT, additional_values = None, inputs.additional_values
    peak = logits_BKNGS.detach().amax(-1, keepdim=True)
    if inputs.additional_keys is not None and inputs.additional_keys.shape[1] > 0:
        extra_BKNGT = _shared_product(query_BKNGD, inputs.additional_keys.to(query_BKNGD.dtype).permute(0, 2, 3, 1))
        peak = torch.maximum(peak, extra_BKNGT.detach().amax(-1, keepdim=True))
    shift = torch.where(peak == -math.inf, torch.zeros_like(peak), peak)
    weights_BKNGS = (logits_BKNGS - shift).exp()
    total, product = weights_BKNGS.sum(-1, keepdim=True), weights_BKNGS @ values_BKNSE
    if extra_BKNGT is not None and additional_values is not None:
        extra_weights = (extra_BKNGT - shift).exp()
        total = total + extra_weights.sum(-1, keepdim=True)
        product = product + _shared_product(extra_weights, additional_values.to(product.dtype).transpose(1, 2))
    dead = total == 0
    safe = torch.where(dead, torch.ones_like(total), total)
    lse = torch.where(dead, torch.full_like(total, -math.inf), shift + safe.log())
    return product / safe, lse.squeeze(-1)


def _shared_product(rows: Tensor, matrices: Tensor) -> Tensor:
    """[B, K, N, G, X] by [B, K, X, Y]: one matrix for all queries of a head."""
    return (rows.flatten(2, 3) @ matrices).unflatten(2, rows.shape[2:4])
