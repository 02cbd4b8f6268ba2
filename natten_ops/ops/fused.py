# SPDX-License-Identifier: MIT
"""The life of the fused op: composites over one primitive, its fake, derivatives, autocast, vmap and FLOPs.

Schemas and CPU kernels are C++ (`csrc/neighborhood_attention.cpp`). Everything that is not a kernel is here, in the
order in which a call meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from natten_ops import backends, flops, reference
from natten_ops.ops._batching import fold, sample_by_sample, unfold
from natten_ops.ops._register import (
    LIBRARY,
    SingleLevelFunction,
    below_autograd,
    direct,
    forward_rule,
    no_autocast,
    past_autograd,
    records_derivatives,
    register_autocast,
    register_autograd,
    register_composite,
    register_missing_cuda,
    register_vmap,
    telling_of_memory,
    wake,
)
from natten_ops.ops.arguments import (
    Settings,
    autocast_inputs,
    autocast_tensor,
    check_inputs,
    check_saved,
    checked_scale,
    lse_dtype,
)
from natten_ops.reference import Inputs

FORWARD, BACKWARD = "neighborhood_attention_lse", "neighborhood_attention_lse_backward"
forward_op = torch.ops.natten.neighborhood_attention_lse.default
backward_op = torch.ops.natten.neighborhood_attention_lse_backward.default

# The order of `needed` and of the backward's outputs; fields of Inputs.
GRADIENTS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


# ---- composites ----------------------------------------------------------------------------------------------------


def _composite(rank: int) -> Callable[..., Tensor]:
    """na1d, na2d and na3d."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1,),
        dilation: Sequence[int] = (1,),
        is_causal: Sequence[bool] = (False,),
        *extras: Any,
        **keywords: Any,
    ) -> Tensor:
        # The dispatcher leaves defaults out and does not hold lists to the rank.
        lists = (kernel_size, stride, dilation, is_causal)
        full: list[Any] = [[*values] * rank if len(values) == 1 else [*values] for values in lists]
        if not isinstance(query, Tensor):
            raise TypeError(f"query is {query}; give a torch.Tensor")
        if len(full[0]) != rank or query.dim() != rank + 3:
            raise ValueError(
                f"kernel_size={full[0]} with a query of {query.dim()} dims; na{rank}d takes {rank} entries or one, "
                f"and {rank + 3} dims: [batch, {rank} axes, heads, head dim]"
            )
        if number := backends.number_for_tf32(
            query
        ):  # the composites heed torch's flag, the primitive does as it is told
            keywords["backend"] = number
        out: Tensor = forward_op(query, key, value, *full, *extras, **keywords)[0]
        return out

    return attend


for rank in (1, 2, 3):
    register_composite(f"na{rank}d", _composite(rank))


# ---- arguments -----------------------------------------------------------------------------------------------------


def _split(
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
    q_origin: Sequence[Any] = (),
    kv_origin: Sequence[Any] = (),
    extent: Sequence[Any] = (),
    backend: int = 0,
) -> tuple[Settings, Inputs]:
    """The primitive's arguments as two records."""
    settings = Settings(kernel_size, stride, dilation, is_causal, scale, q_origin, kv_origin, extent, backend)
    return settings, Inputs(query, key, value, additional_keys, additional_values, rpb, key_mask)


def _call_forward(settings: Settings, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    s, i = settings, Inputs(*tensors)
    return call(
        forward_op, *i[:3], *s[:5], i.additional_keys, i.additional_values, rpb=i.rpb, key_mask=i.key_mask,
        q_origin=s.q_origin, kv_origin=s.kv_origin, extent=s.extent, backend=s.backend,
    )  # fmt: skip


# The backward's tensors: the two gradients, out, lse and the inputs; its settings: those, `needed`, `deterministic`.
_BackwardSettings = tuple[Settings, Sequence[bool], bool]


def _split_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[_BackwardSettings, list[Any]]:
    query, key, value, kernel_size, stride, dilation, is_causal, scale = rest[:8]
    additional_keys, additional_values, rpb, key_mask, q_origin, kv_origin, extent, backend, needed, deterministic = (
        rest[8:]
    )
    settings = Settings(kernel_size, stride, dilation, is_causal, scale, q_origin, kv_origin, extent, backend)
    inputs = Inputs(query, key, value, additional_keys, additional_values, rpb, key_mask)
    return (settings, needed, deterministic), [grad_out, grad_lse, out, lse, *inputs]


def _call_backward(settings: _BackwardSettings, tensors: Sequence[Any], call: Callable[..., Any] = direct) -> Any:
    (s, needed, deterministic), i = settings, Inputs(*tensors[4:])
    return call(
        backward_op, *tensors[:4], *i[:3], *s[:5], i.additional_keys, i.additional_values, i.rpb, i.key_mask,
        *s[5:], needed, deterministic,
    )  # fmt: skip


# ---- fake ----------------------------------------------------------------------------------------------------------


def _fake_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    wake()
    settings, inputs = _split(*args, **kwargs)
    query = inputs.query
    check_inputs(inputs, *settings.geometry())
    checked_scale(settings.scale)
    backends.check_id(settings.backend)
    out = query.new_empty([*query.shape[:-1], inputs.value.shape[-1]])
    return out, query.new_empty(query.shape[:-1], dtype=lse_dtype(query))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    wake()
    (settings, needed, _), tensors = _split_backward(*args)
    inputs = Inputs(*tensors[4:])
    check_inputs(inputs, *settings.geometry())
    check_saved(tensors[0], tensors[1], tensors[2], tensors[3], inputs, needed)
    backends.check_id(settings.backend)
    sources = [getattr(inputs, name) if need else None for name, need in zip(GRADIENTS, needed)]
    return tuple(inputs.query.new_empty([0]) if t is None else t.new_empty(t.shape) for t in sources)


torch.library.register_fake(f"natten::{FORWARD}", _fake_forward, lib=LIBRARY)
torch.library.register_fake(f"natten::{BACKWARD}", _fake_backward, lib=LIBRARY)


# ---- derivatives ---------------------------------------------------------------------------------------------------


def _zeros_for_none(primals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    return [torch.zeros_like(p) if t is None and p is not None else t for p, t in zip(primals, tangents)]


class _Forward(SingleLevelFunction):
    """out and lse with their derivatives; arguments: settings, then the fields of Inputs."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> Any:
        out, lse = _call_forward(settings, tensors, below_autograd)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(tensors))
        wanted = dict(zip(Inputs._fields, ctx.needs_input_grad[1:]))
        needed = [wanted[name] for name in GRADIENTS]
        settings = ctx.settings, needed, torch.are_deterministic_algorithms_enabled()
        saved = [grad_out, grad_lse, out, lse, *tensors]
        call = direct if records_derivatives(saved) else past_autograd
        gradients = dict(zip(GRADIENTS, _call_backward(settings, saved, telling_of_memory(lse, call))))
        return None, *(gradients[name] if wanted[name] else None for name in Inputs._fields[:-1]), None

    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        inputs = Inputs(*saved[: len(tangents)])
        params, box = ctx.settings.geometry()
        with no_autocast(inputs.query.device.type):
            return reference.forward_jvp(inputs, _input_tangents(inputs, tangents), params, box, ctx.settings.scale)


def _input_tangents(inputs: Inputs, tangents: Sequence[Any]) -> Inputs:
    return Inputs(*[*_zeros_for_none(inputs[:-1], tangents[:-1]), inputs.key_mask])


class _Backward(SingleLevelFunction):
    """The gradients with their own derivatives: out and lse are recomputed by the formula, so they get none."""

    @staticmethod
    def forward(ctx: Any, settings: _BackwardSettings, *tensors: Any) -> Any:
        grads = _call_backward(settings, tensors, below_autograd)
        saved = *tensors[:2], *tensors[4:]  # grad_out, grad_lse, inputs
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.settings = settings
        return grads

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        settings, needed, _ = ctx.settings
        saved = ctx.saved_tensors
        params, box = settings.geometry()
        mask = saved[-1]
        present = [i for i, t in enumerate(saved[:-1]) if t is not None]

        def formula(*given: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * (len(saved) - 1)
            for i, tensor in zip(present, given):
                full[i] = tensor
            result = reference.backward(full[0], full[1], Inputs(*[*full[2:], mask]), params, box, settings.scale)
            return tuple(_of_needed(result, needed))

        chosen = tuple(c for c, name, need in zip(cotangents, GRADIENTS, needed) if need and _has(saved, name))
        with no_autocast(saved[2].device.type):
            pull: Any = torch.func.vjp(formula, *(saved[i] for i in present))[1]
            pulled = dict(zip(present, pull(chosen)))
        wanted = [*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[5:]]
        slots = [pulled.get(i) if wanted[i] else None for i in range(len(saved) - 1)]
        return None, *slots[:2], None, None, *slots[2:], None

    @forward_rule
    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Any:
        settings, needed, _ = ctx.settings
        params, box = settings.geometry()
        inputs = Inputs(*saved[2:])
        grads_t = _zeros_for_none(saved[:2], tangents[:2])
        inputs_t = _input_tangents(inputs, tangents[4:])
        with no_autocast(inputs.query.device.type):
            result = reference.backward_jvp(
                (saved[0], saved[1]), (grads_t[0], grads_t[1]), inputs, inputs_t, params, box, settings.scale
            )
        empty = inputs.query.new_zeros([0])
        values = [getattr(result, name) if need else None for name, need in zip(GRADIENTS, needed)]
        return tuple(empty if value is None else value for value in values)


def _of_needed(result: Inputs, needed: Sequence[bool]) -> list[Tensor]:
    values = (getattr(result, name) for name, need in zip(GRADIENTS, needed) if need)
    return [value for value in values if value is not None]


def _has(saved: Sequence[Any], name: str) -> bool:
    return getattr(Inputs(*saved[2:]), name) is not None


register_autograd(FORWARD, forward_op, _Forward, _split)
register_autograd(BACKWARD, backward_op, _Backward, _split_backward)


# ---- autocast ------------------------------------------------------------------------------------------------------


def _casting_forward(*args: Any, **kwargs: Any) -> Callable[[torch.dtype, str], Any]:
    settings, inputs = _split(*args, **kwargs)

    return lambda dtype, device_type: _call_forward(settings, autocast_inputs(inputs, dtype, device_type))


def _casting_composite(op: Any) -> Callable[..., Callable[[torch.dtype, str], Any]]:
    """The composites cast as well: one that export keeps is decomposed later, below autocast, and would lose the cast."""

    def casting(*args: Any, **kwargs: Any) -> Callable[[torch.dtype, str], Any]:
        return lambda dtype, device_type: op(*(autocast_tensor(a, dtype, device_type) for a in args), **kwargs)

    return casting


register_autocast(FORWARD, _casting_forward)
for rank in (1, 2, 3):
    register_autocast(f"na{rank}d", _casting_composite(getattr(torch.ops.natten, f"na{rank}d")))


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _vmap_forward(size: int, dims: Sequence[int | None], settings: Settings, tensors: Sequence[Any]) -> Any:
    rpb = Inputs._fields.index("rpb")
    if dims[rpb] is not None:
        return sample_by_sample(_call_forward, settings, tensors, dims, size)
    folded = [t if i == rpb else fold(t, dim, size) for i, (t, dim) in enumerate(zip(tensors, dims))]
    return unfold(_call_forward(settings, folded), tensors[0], dims[0], size)


def _vmap_backward(size: int, dims: Sequence[int | None], settings: _BackwardSettings, tensors: Sequence[Any]) -> Any:
    rpb = 4 + Inputs._fields.index("rpb")
    if tensors[rpb] is not None and (dims[rpb] is not None or settings[1][GRADIENTS.index("rpb")]):
        # The table's gradient sums over the batch: folding would mix the samples.
        return sample_by_sample(_call_backward, settings, tensors, dims, size)
    folded = [t if i == rpb else fold(t, dim, size) for i, (t, dim) in enumerate(zip(tensors, dims))]
    return unfold(_call_backward(settings, folded), tensors[4], dims[4], size)


register_vmap(FORWARD, _split, _call_forward, _vmap_forward)
register_vmap(BACKWARD, _split_backward, _call_backward, _vmap_backward)


# ---- FLOPs and devices ---------------------------------------------------------------------------------------------


@register_flop_formula([torch.ops.natten.neighborhood_attention_lse])
def _forward_flops(*shapes: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
    settings, inputs = _split(*shapes, **kwargs)
    params, box = settings.geometry()
    additional = inputs.additional_keys[1] if inputs.additional_keys is not None else 0
    return flops.forward_flops(inputs.query, inputs.value, params, additional, box)  # type: ignore[arg-type, no-any-return]


@register_flop_formula([torch.ops.natten.neighborhood_attention_lse_backward])
def _backward_flops(*shapes: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
    (settings, needed, _), tensors = _split_backward(*shapes)
    inputs = Inputs(*tensors[4:])
    params, box = settings.geometry()
    additional = inputs.additional_keys[1] if inputs.additional_keys is not None else 0
    return flops.backward_flops(inputs.query, inputs.value, params, needed, additional, box)  # type: ignore[arg-type, no-any-return]


for name in (FORWARD, BACKWARD):
    register_missing_cuda(name)
