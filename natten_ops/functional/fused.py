# SPDX-License-Identifier: MIT
"""Fused attention and merging: arguments normalised and checked, then one op called.

`na1d`, `na2d` and `na3d` are one body behind three front doors. Every mistake of a user is a ValueError or TypeError
from here that names the argument, its value, the bound and the way out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from natten_ops import backends, reference
from natten_ops.functional import nested
from natten_ops.geometry.block_masks import block_mask
from natten_ops.geometry.masks import score_mod
from natten_ops.geometry.params import Box, NAParams, make_box, make_params
from natten_ops.ops._register import (
    AUTOCAST_KEYS,
    direct,
    no_autocast,
    past_autograd,
    records_derivatives,
    telling_of_memory,
)
from natten_ops.ops.arguments import autocast_inputs, check_inputs, checked_scale
from natten_ops.ops.fused import forward_op
from natten_ops.reference import Inputs

_log = logging.getLogger("natten_ops")

_FRONT_DOOR = """{rank}-D neighborhood attention: out = softmax(scale * q.k + bias over the window of each query) . v

    Args:
        query: `[batch, {axes}, heads, head_dim]`, float64, float32, float16 or bfloat16, any strides.
        key: `[batch, {axes}, heads_kv, head_dim]`; heads must be a multiple of heads_kv (grouped-query attention).
        value: `[batch, {axes}, heads_kv, value_dim]`.
        kernel_size: window size in tokens, an int or one per axis; kernel_size * dilation <= tokens of the axis.
        stride: queries that share a window, in tokens, 1 (each its own) to kernel_size (blocked attention).
        dilation: distance of the keys of a window, in tokens.
        is_causal: a bool or one per axis: keys after the query are invisible on that axis.
        scale: factor of the dot products; None means head_dim ** -0.5.
        additional_keys: `[batch, tokens, heads_kv, head_dim]`, visible to every query, in the same softmax.
        additional_values: `[batch, tokens, heads_kv, value_dim]`; both or none.
        rpb: relative positional bias `[heads, {table}]`, added to the scaled dot products; trains;
            stride 1 only; may be float32 beside 16-bit inputs.
        key_mask: bool `[batch, {axes}]`, True where a key may be attended.
        return_lse: also return the log-sum-exp of every row.
        backend: name of a backend, or None to choose; a named one never falls back.

    Returns:
        `[batch, {axes}, heads, value_dim]` in the query's dtype; with return_lse also
        `[batch, {axes}, heads]` in float32 (float64 for float64 inputs), -inf for a row that sees nothing.
        `torch.export` shows `natten.na{rank}d`, or `natten.neighborhood_attention_lse` with return_lse or a backend.

    Raises:
        ValueError, TypeError: what is wrong, its value, the bound and the way out.

    Source: Hassani et al., "Neighborhood Attention Transformer", 2023; "Dilated Neighborhood Attention Transformer", 2022.

    Example:
        >>> import torch, natten_ops
        >>> query, key, value = torch.randn(3, 1, {example}, 4, 32).unbind(0)
        >>> natten_ops.na{rank}d(query, key, value, kernel_size=3, dilation=2).shape
        torch.Size([1, {example}, 4, 32])
"""


class FrontDoor(Protocol):
    """The signature of na1d, na2d and na3d."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        rpb: Tensor | None = None,
        key_mask: Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        **unknown: object,
    ) -> Any: ...


def _front_door(rank: int) -> FrontDoor:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        rpb: Tensor | None = None,
        key_mask: Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        **unknown: object,
    ) -> Any:
        inputs = Inputs(query, key, value, additional_keys, additional_values, rpb, key_mask)
        windows = kernel_size, stride, dilation, is_causal
        return _attend(f"na{rank}d", rank, inputs, windows, scale, (), return_lse, backend, unknown)

    attend.__name__ = attend.__qualname__ = f"na{rank}d"
    axes = ", ".join(("z", "y", "x")[-rank:])
    table = ", ".join(["2 * kernel_size - 1"] * rank)
    attend.__doc__ = _FRONT_DOOR.format(rank=rank, axes=axes, table=table, example=", ".join(["8"] * rank))
    return attend


na1d, na2d, na3d = (_front_door(rank) for rank in (1, 2, 3))


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_origin: Sequence[int] = (),
    kv_origin: Sequence[int] = (),
    extent: Sequence[int] = (),
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: object,
) -> Any:
    """Neighborhood attention of the rank that the query has: softmax(scale * q.k + bias over each window) . v

    Takes what `na2d` takes and returns what it returns. It alone takes sub-boxes of a larger grid: the query tensor
    then holds the tokens from `q_origin` on, key and value those from `kv_origin` on, of a grid of `extent` tokens an
    axis, and windows, dilation and borders are those of the grid. Keys must cover the windows of all queries.

    Args:
        query: `[batch, *spatial, heads, head_dim]` with 1 to 3 spatial axes.
        q_origin, kv_origin, extent: one int an axis, in tokens; all three or none.

    Raises:
        ValueError, TypeError: what is wrong, its value, the bound and the way out.

    Example:
        >>> import torch, natten_ops
        >>> query, key, value = torch.randn(3, 1, 16, 4, 32).unbind(0)
        >>> whole = natten_ops.neighborhood_attention(query, key, value, kernel_size=5)
        >>> right = natten_ops.neighborhood_attention(
        ...     query[:, 8:], key[:, 6:], value[:, 6:], kernel_size=5, q_origin=[8], kv_origin=[6], extent=[16])
        >>> torch.testing.assert_close(whole[:, 8:], right)
    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query is a {type(query).__name__}; give a torch.Tensor")
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(f"query has shape {list(query.shape)}; give [batch, 1 to 3 spatial axes, heads, head dim]")
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb, key_mask)
    windows, box = (kernel_size, stride, dilation, is_causal), (q_origin, kv_origin, extent)
    return _attend("neighborhood_attention", rank, inputs, windows, scale, box, return_lse, backend, unknown)


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over disjoint keys: out = sum_i exp(l_i - l) o_i, l = log sum_i exp(l_i)

    Args:
        outputs: tensors `[batch, *spatial, heads, value_dim]` of one shape and dtype.
        lses: their log-sum-exps `[batch, *spatial, heads]`, float32 or float64; -inf rows weigh nothing.

    Returns:
        (out, lse); gradients flow through both and to all outputs and lses.

    Raises:
        ValueError: empty or unequal lists, shapes that do not fit.

    Example:
        >>> import torch, natten_ops
        >>> query, key, value = torch.randn(3, 1, 8, 4, 32).unbind(0)
        >>> near = natten_ops.na1d(query, key, value, kernel_size=3, return_lse=True)
        >>> far = natten_ops.na1d(query, key, value, kernel_size=3, dilation=2, return_lse=True)
        >>> natten_ops.merge_attentions([near[0], far[0]], [near[1], far[1]])[0].shape
        torch.Size([1, 8, 4, 32])
    """
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] is a {type(tensor).__name__}; give a torch.Tensor")
            if tensor.is_nested:
                raise ValueError(
                    f"{name}[{i}] is a nested tensor; merge its samples one by one, or the values of lines"
                )
    merged: tuple[Tensor, Tensor] = torch.ops.natten.merge_attentions(list(outputs), list(lses))
    return merged


# ---- behind the counter --------------------------------------------------------------------------------------------


def _attend(
    name: str,
    rank: int,
    inputs: Inputs,
    windows: tuple[Any, Any, Any, Any],
    scale: float | None,
    box_settings: tuple[Any, ...],
    return_lse: bool,
    backend: str | None,
    unknown: dict[str, object],
) -> Any:
    if unknown:
        raise TypeError(_unknown_argument(name, next(iter(unknown))))
    params = make_params(rank, *windows)
    box = make_box(rank, *box_settings) if box_settings else None
    scale = checked_scale(scale)
    if nested.any_nested(inputs.query, inputs.key, inputs.value):
        if box is not None:
            raise ValueError("q_origin, kv_origin and extent beside nested tensors; every sample is a whole grid")

        def dense(sample: Inputs) -> Any:
            return _attend(name, rank, sample, windows, scale, (), True, backend, {})

        result = nested.attend(inputs, params, scale, backend, dense)
        return result if return_lse else result[0]
    device = inputs.query.device.type if isinstance(inputs.query, Tensor) else None
    autocasts = device in AUTOCAST_KEYS and torch.is_autocast_enabled(device)
    seen = autocast_inputs(inputs, torch.get_autocast_dtype(device), device) if autocasts else inputs
    check_inputs(seen, params, box)
    number = _backend_number(seen, params, box, scale, return_lse, backend)
    if number is None:
        with no_autocast(inputs.query.device.type):
            if backend == "flex" and seen.query.shape[-2] > 0:  # FlexAttention divides by the number of heads
                return _flex(seen, params, scale, return_lse)
            out, lse = reference.forward(seen, params, box, scale)
        return (out, lse) if return_lse else out
    # Sub-boxes go on as they came: sizes filled in here would recompile at every shape.
    core = *inputs[:3], *params, scale, inputs.additional_keys, inputs.additional_values
    # Graphs show the op that was called; eager calls save its way to the primitive.
    if number == 0 and box is None and not return_lse and torch.compiler.is_compiling():
        return getattr(torch.ops.natten, f"na{rank}d")(*core, rpb=inputs.rpb, key_mask=inputs.key_mask)
    # What is absent is left out, and nothing to record goes past the autograd kernel, which is Python. What a call costs beside
    # its kernel: python -m bench.run calls.
    more: dict[str, Any] = {} if box is None else box._asdict()
    if number:
        more["backend"] = number
    if inputs.rpb is not None:
        more["rpb"] = inputs.rpb
    if inputs.key_mask is not None:
        more["key_mask"] = inputs.key_mask
    compiling = torch.compiler.is_compiling()
    call = direct if autocasts or compiling or records_derivatives(inputs) else past_autograd
    out, lse = telling_of_memory(inputs.query, call)(forward_op, *core, **more)
    return (out, lse) if return_lse else out


_OF_NATTEN = {
    "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits",
    "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile", "try_token_permute",
    "attention_kwargs", "rel_pos_bias", "bias",
}  # fmt: skip


def _unknown_argument(function: str, name: str) -> str:
    text = f"{function}() got an unexpected keyword argument {name!r}"
    if name in _OF_NATTEN:
        return f"{text}: an argument of the natten package, which natten_ops.compat takes; leave it out here"
    if name in Box._fields:
        return f"{text}: sub-boxes are taken by natten_ops.neighborhood_attention"
    return f"{text}; see help(natten_ops.{function})"


def _backend_number(
    inputs: Inputs, params: NAParams, box: Box | None, scale: float | None, return_lse: bool, name: str | None
) -> int | None:
    """The op's backend id: 0 where the kernels choose, None for the reference and flex, which are no kernels."""
    problem = backends.Problem(inputs.query.device.type, inputs.query.dtype)
    here, compiling = backends.runs_here(inputs.query), torch.compiler.is_compiling()
    if name is not None:
        if here and not compiling:  # compiled code learns it when it runs: the kernel raises for the same facts
            problem = backends.describe(inputs, params, box, scale)
        gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        problem = problem._replace(gradients=gradients, lse=return_lse)
        problem = problem._replace(additional=inputs.additional_keys is not None, sub_box=box is not None)
        return backends.require(name, problem).id
    if here:
        number = backends.number_for_tf32(inputs.query)
        prefers_tf32 = number == backends.PREFER_TF32
        backends.choose(problem, prefers_tf32)
        if not compiling and _log.isEnabledFor(logging.DEBUG):  # a logger's call would break the graph
            described = backends.describe(inputs, params, box, scale)
            chosen = backends.choose(described, prefers_tf32)
            before = backends.BACKENDS[: backends.BACKENDS.index(chosen)]
            lacks = [f"; {b.name} {'; '.join(b.why_not_chosen(described, prefers_tf32))}" for b in before]
            _log.debug("%s runs %s%s", chosen.name, problem, "".join(lacks))
        return number
    return 0


def _flex(inputs: Inputs, params: NAParams, scale: float | None, return_lse: bool) -> Any:
    """FlexAttention on row-major tokens, heads first; bias and key mask through its score_mod."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    query, key, value, _, _, rpb, key_mask = inputs
    shape, spatial_shape = query.shape[:-1], query.shape[1:-2]
    if key_mask is not None:  # what the mask hides is inert, NaN too: a weight of 0 alone would not do
        key, value = (t.masked_fill(~key_mask[..., None, None], 0.0) for t in (key, value))
    query, key, value = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
    if query.device.type == "cpu":  # Inductor of torch 2.13 fails there on views of tensors with more than four dims
        query, key, value = (t.contiguous() for t in (query, key, value))
    if not torch.is_grad_enabled():  # on CPU FlexAttention refuses inputs that could have gradients, wanted or not
        query, key, value = (t.detach() for t in (query, key, value))
    out, aux = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod(params, spatial_shape, rpb, key_mask),
        block_mask=block_mask(spatial_shape, *params, device=query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=return_lse),
    )
    out = out.transpose(1, 2).reshape(*shape, value.shape[-1]).contiguous()
    return out if aux.lse is None else (out, aux.lse.transpose(1, 2).reshape(shape).contiguous())
