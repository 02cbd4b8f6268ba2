# SPDX-License-Identifier: MIT
"""The arguments of the fused ops as two records, and every check on their tensors.

`functional` and the fake kernel run the same checks, so that eager users and compiling users read the same sentence;
the C++ front repeats only what keeps memory safe.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten_ops.backends import ALL_DTYPES
from natten_ops.geometry.params import Box, NAParams, make_box, make_params
from natten_ops.reference import Inputs

DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in ALL_DTYPES)


MAX_HEAD_DIM = 2**20  # of the kernels, whose scratch grows with it


class Settings(NamedTuple):
    """What is not a tensor among the arguments of the primitive."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    scale: float | None = None
    q_origin: Sequence[Any] = ()
    kv_origin: Sequence[Any] = ()
    extent: Sequence[Any] = ()
    backend: int = 0

    def geometry(self) -> tuple[NAParams, Box | None]:
        """The checked geometry; raises ValueError or TypeError."""
        rank = len(self.kernel_size)
        params = make_params(rank, self.kernel_size, self.stride, self.dilation, self.is_causal)
        return params, make_box(rank, self.q_origin, self.kv_origin, self.extent)


def check_inputs(inputs: Inputs, params: NAParams, box: Box | None) -> None:
    """Raise ValueError or TypeError unless a kernel can run."""
    named = list(zip(inputs._fields, inputs))
    check_kinds(named, required=3)
    _check_core(inputs, params, box)
    _check_additional(inputs)
    if inputs.rpb is not None:
        check_table(inputs.rpb, inputs.query.shape[-2], params)
    _check_mask(inputs)
    check_dtypes_of(named)


def check_kinds(named: Sequence[tuple[str, Any]], required: int) -> None:
    """Dense tensors on the device of the first; only those after the `required` first may be None."""
    first, leader = named[0]
    device = leader.device if isinstance(leader, Tensor) else None
    for position, (name, tensor) in enumerate(named):
        if tensor is None and position >= required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} is {'None' if tensor is None else f'a {type(tensor).__name__}'}; give a torch.Tensor"
            )
        if tensor.is_nested:
            raise ValueError(
                f"{name} is a nested tensor, which the op itself does not take; natten_ops.na1d and its kin take nested "
                "queries, keys and values, all of them, and nothing else nested"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind, way = ("quantised", "dequantize") if tensor.is_quantized else (str(tensor.layout), "to_dense")
            raise ValueError(f"{name} is a {kind} tensor; give a dense one: {name}.{way}()")
        if position and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {device}; move them to one device")


def check_dtypes_of(named: Sequence[tuple[str, Tensor | None]]) -> None:
    """All equal and supported; rpb may be float32 beside 16-bit inputs; key_mask is bool."""
    first, leader = named[0]
    assert leader is not None
    dtype = leader.dtype
    for name, tensor in named:
        if tensor is None or name == "key_mask" or (tensor is not leader and tensor.dtype == dtype):
            continue
        if tensor.dtype not in ALL_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; cast it to one of {DTYPE_NAMES}")
        wide_table = name == "rpb" and tensor.dtype == torch.float32 and dtype.itemsize == 2
        if tensor.dtype != dtype and not wide_table:
            raise ValueError(f"{name} has dtype {tensor.dtype}, {first} {dtype}; cast them to one dtype")


def _check_core(inputs: Inputs, params: NAParams, box: Box | None) -> None:
    query, key, value = inputs[:3]
    rank = params.rank
    for name, tensor in zip(inputs._fields[:3], inputs[:3]):
        if tensor.dim() != rank + 3:
            raise ValueError(
                f"{name} has shape {_shape(tensor)}; {rank}-D neighborhood attention takes {rank + 3} dims: "
                f"[batch, {', '.join(f'axis {axis}' for axis in range(rank))}, heads, head dim]"
            )
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch {tensor.shape[0]}, query {query.shape[0]}; they must be equal")
    for name, tensor, least in (("query", query, 1), ("value", value, 0)):
        if tensor.shape[-1] < least or tensor.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {tensor.shape[-1]}; it must be {least} to {MAX_HEAD_DIM}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key has head dim {key.shape[-1]}, query {query.shape[-1]}; they must be equal (value's may differ)"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value has {value.shape[-2]} heads, key {key.shape[-2]}; they must be equal")
    heads, heads_kv = query.shape[-2], key.shape[-2]
    if (heads_kv == 0 and heads != 0) or (heads_kv != 0 and heads % heads_kv != 0):
        raise ValueError(f"query has {heads} heads, key {heads_kv}; query's heads must be a multiple of key's")
    q_shape, kv_shape = query.shape[1:-2], key.shape[1:-2]
    for axis in range(rank):
        if value.shape[1 + axis] != kv_shape[axis]:
            raise ValueError(
                f"value has {value.shape[1 + axis]} tokens on axis {axis}, key {kv_shape[axis]}; they must be equal"
            )
        if box is None and kv_shape[axis] != q_shape[axis]:
            raise ValueError(
                f"key has {kv_shape[axis]} tokens on axis {axis}, query {q_shape[axis]}; they must be equal, "
                f"or say where they lie with q_origin, kv_origin and extent"
            )
    params.check_extent(q_shape if box is None else box.extent)
    if box is not None:
        _check_box(box, params, query, kv_shape)


def _check_box(box: Box, params: NAParams, query: Tensor, kv_shape: Sequence[Any]) -> None:
    # Comparing symbolic origins would guard on them: a recompile for every sub-box. The C++ front checks them at run time.
    symbolic = any(isinstance(size, torch.SymInt) for size in (*query.shape, *kv_shape, *box[0], *box[1], *box[2]))
    if symbolic or torch.compiler.is_dynamo_compiling():
        return
    q_shape = query.shape[1:-2]
    box.check_bounds(q_shape, kv_shape)
    if query.numel() != 0:
        box.check_cover(params, q_shape, kv_shape)


def _check_additional(inputs: Inputs) -> None:
    keys, values = inputs.additional_keys, inputs.additional_values
    if (keys is None) != (values is None):
        given, missing = ("keys", "values") if values is None else ("values", "keys")
        raise ValueError(f"additional_{given} is given without additional_{missing}; give both or none")
    if keys is None or values is None:
        return
    tokens = keys.shape[1] if keys.dim() > 1 else 0
    lead = (inputs.key.shape[0], tokens, inputs.key.shape[-2])
    expect("additional_keys", keys, (*lead, inputs.key.shape[-1]), "[batch, tokens, heads of key, head dim]")
    expect(
        "additional_values", values, (*lead, inputs.value.shape[-1]), "[batch, tokens, heads of key, head dim of value]"
    )


def check_table(rpb: Tensor, heads: Any, params: NAParams) -> None:
    """Raise ValueError unless the bias table fits that many heads and windows of stride 1."""
    for axis, stride in enumerate(params.stride):
        if stride != 1:
            raise ValueError(f"rpb is defined for stride 1 only, and stride[{axis}]={stride}; drop one of them")
    table = tuple(2 * kernel - 1 for kernel in params.kernel_size)
    expect("rpb", rpb, (heads, *table), "[heads, 2 * kernel_size - 1 an axis]")


def _check_mask(inputs: Inputs) -> None:
    if inputs.key_mask is None:
        return
    if inputs.key_mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask has dtype {inputs.key_mask.dtype}; give torch.bool, True where a key may be attended"
        )
    expect("key_mask", inputs.key_mask, tuple(inputs.key.shape[:-2]), "[batch, the key's axes]")


def expect(name: str, tensor: Tensor, shape: tuple[Any, ...], meaning: str) -> None:
    """Raise ValueError with both shapes unless they are equal."""
    if tensor.dim() != len(shape) or any(have != want for have, want in zip(tensor.shape, shape)):
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected {list(shape)}: {meaning}")


def _shape(tensor: Tensor) -> list[Any]:
    return list(tensor.shape)


def checked_scale(scale: Any) -> Any:
    """A finite float (or what a compiler traces for one), or None."""
    if scale is None or isinstance(scale, torch.SymFloat):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        shown = f"={scale!r}" if isinstance(scale, (bool, str)) else ""  # a traced tensor has no repr
        raise TypeError(f"scale{shown} is a {type(scale).__name__}; give a float, or None for head_dim ** -0.5")
    number: Any = scale
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(
            f"scale={scale if isinstance(scale, float) else 'an int'} is not finite as a float; "
            "give a finite number, or None for head_dim ** -0.5"
        )
    return number if isinstance(scale, float) else float(number)


def autocast_tensor(tensor: Any, dtype: torch.dtype, device_type: str) -> Any:
    """What autocast makes of one argument: floating-point tensors of its device get its dtype, float64 stays."""
    if not isinstance(tensor, Tensor) or tensor.device.type != device_type or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def autocast_inputs(inputs: Inputs, dtype: torch.dtype, device_type: str) -> Inputs:
    """What autocast makes of the inputs: q, k, v and additional tokens in its dtype; rpb and mask as they are."""
    return Inputs(*[*(autocast_tensor(tensor, dtype, device_type) for tensor in inputs[:5]), *inputs[5:]])


def check_saved(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, inputs: Inputs, needed: Sequence[bool]
) -> None:
    """The backward's own arguments: shapes, dtypes and device of the forward's outputs, one flag a gradient."""
    if len(needed) != 6:
        raise ValueError(
            f"needed has {len(needed)} entries; give 6: query, key, value, rpb, additional keys and values"
        )
    shape, dtype = tuple(inputs.query.shape[:-1]), lse_dtype(inputs.query)
    whole = (*shape, inputs.value.shape[-1])
    saved = (("out", out, whole, inputs.query.dtype), ("grad_out", grad_out, whole, inputs.query.dtype))
    for name, tensor, want, kind in (*saved, ("lse", lse, shape, dtype), ("grad_lse", grad_lse, shape, dtype)):
        if tensor is None:
            continue
        expect(name, tensor, want, "as in the forward's output")
        if tensor.dtype != kind:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected {kind}; cast it")
        if tensor.device != inputs.query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {inputs.query.device}; move them to one device")


def lse_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
