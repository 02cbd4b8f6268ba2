# SPDX-License-Identifier: MIT
"""The arguments of the fused ops as two records, and every check on their tensors.

`functional` and the fake kernel run the same checks, so that eager users and compiling users read the same sentence;
the C++ front repeats only what keeps memory safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten_ops.backends import ALL_DTYPES
from natten_ops.geometry.params import Box, NAParams, make_box, make_params
from natten_ops.reference import Inputs

DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in ALL_DTYPES)


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


def check_inputs(inputs: Inputs, params: NAParams, box: Box | None, *, same_dtype: bool = True) -> None:
    """Raise ValueError or TypeError unless a kernel can run; `same_dtype=False` where autocast will unify them."""
    _check_kinds(inputs)
    _check_core(inputs, params, box)
    _check_additional(inputs)
    _check_rpb(inputs, params)
    _check_mask(inputs)
    if same_dtype:
        check_dtypes(inputs)


def _named(inputs: Inputs) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in zip(inputs._fields, inputs) if tensor is not None]


def _check_kinds(inputs: Inputs) -> None:
    for name, tensor in _named(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
        if tensor.is_nested:
            raise ValueError(
                f"{name} is a nested tensor, which this version does not take; pad to one size and use key_mask"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(f"{name} is a {kind} tensor; give a dense one ({name}.to_dense() or .dequantize())")
        if tensor.device != inputs.query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {inputs.query.device}; move them to one device")


def check_dtypes(inputs: Inputs) -> None:
    """All equal and supported; rpb may be float32 beside 16-bit inputs; key_mask is bool."""
    dtype = inputs.query.dtype
    for name, tensor in _named(inputs):
        if name == "key_mask" or (name == "rpb" and tensor.dtype == torch.float32 and dtype.itemsize == 2):
            continue
        if tensor.dtype not in ALL_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; cast it to one of {DTYPE_NAMES}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, query {dtype}; cast them to one dtype")


def _check_core(inputs: Inputs, params: NAParams, box: Box | None) -> None:
    query, key, value = inputs[:3]
    rank = params.rank
    for name, tensor in _named(inputs)[:3]:
        if tensor.dim() != rank + 3:
            raise ValueError(
                f"{name} has shape {_shape(tensor)}; {rank}-D neighborhood attention takes {rank + 3} dims: "
                f"[batch, {', '.join(f'axis {axis}' for axis in range(rank))}, heads, head dim]"
            )
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has batch {tensor.shape[0]}, query {query.shape[0]}; they must be equal")
    if query.shape[-1] < 1:
        raise ValueError(f"query has head dim {query.shape[-1]}; at least 1 is needed")
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
        box.check(params, q_shape, kv_shape)


def _check_additional(inputs: Inputs) -> None:
    keys, values = inputs.additional_keys, inputs.additional_values
    if (keys is None) != (values is None):
        given, missing = ("keys", "values") if values is None else ("values", "keys")
        raise ValueError(f"additional_{given} is given without additional_{missing}; give both or none")
    if keys is None or values is None:
        return
    tokens = keys.shape[1] if keys.dim() > 1 else 0
    lead = (inputs.key.shape[0], tokens, inputs.key.shape[-2])
    _expect("additional_keys", keys, (*lead, inputs.key.shape[-1]), "[batch, tokens, heads of key, head dim]")
    _expect(
        "additional_values", values, (*lead, inputs.value.shape[-1]), "[batch, tokens, heads of key, head dim of value]"
    )


def _check_rpb(inputs: Inputs, params: NAParams) -> None:
    if inputs.rpb is None:
        return
    for axis, stride in enumerate(params.stride):
        if stride != 1:
            raise ValueError(f"rpb is defined for stride 1 only, and stride[{axis}]={stride}; drop one of them")
    table = tuple(2 * kernel - 1 for kernel in params.kernel_size)
    _expect("rpb", inputs.rpb, (inputs.query.shape[-2], *table), "[heads, 2 * kernel_size - 1 an axis]")


def _check_mask(inputs: Inputs) -> None:
    if inputs.key_mask is None:
        return
    if inputs.key_mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask has dtype {inputs.key_mask.dtype}; give torch.bool, True where a key may be attended"
        )
    _expect("key_mask", inputs.key_mask, tuple(inputs.key.shape[:-2]), "[batch, the key's axes]")


def _expect(name: str, tensor: Tensor, shape: tuple[Any, ...], meaning: str) -> None:
    if tensor.dim() != len(shape) or any(have != want for have, want in zip(tensor.shape, shape)):
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected {list(shape)}: {meaning}")


def _shape(tensor: Tensor) -> list[Any]:
    return list(tensor.shape)


def check_scale(scale: Any) -> None:
    """A number that is not NaN, or None."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale is a {type(scale).__name__}; give a float, or None for head_dim ** -0.5")
    if scale != scale:
        raise ValueError("scale is nan; give a number, or None for head_dim ** -0.5")
