# SPDX-License-Identifier: MIT
"""What the choice of a backend depends on: one problem as plain facts, and how it is described from tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten_ops.geometry.params import Box, NAParams

ALL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# What the tensor-core kernels count in 32 bits, and fewer than how much: a box of keys may reach 1024 tokens beyond the end of an
# axis, and 64 queries walk their windows together.
LIMITS = {
    "samples or heads": 2**31,
    "tokens on an axis": 2**31 - 1025,
    "tokens in a window": (2**31 - 1) // 64,
    "additional tokens": 2**31 - 1025,
    "entries in a head's bias table": 2**31 - 1,
}


class Problem(NamedTuple):
    """What a choice of backend depends on; the later fields may be left at what every backend takes."""

    device: str
    dtype: torch.dtype
    scale: float = 1.0
    head_dim: int = 1  # the smaller of the head dim and the value dim
    tile_bytes: int = 0  # scratch of one thread of the tiled CPU kernels
    whole: bool = False  # tiles must hold whole windows
    bias: bool = False  # a bias table, with which they do too
    masked: bool = False  # a mask of keys
    gradients: bool = False  # some input wants its gradient
    lse: bool = False  # the log-sum-exp is asked for
    additional: bool = False  # additional keys and values
    sub_box: bool = False
    dims: tuple[int, int] | None = None  # head dim and value dim
    aligned: bool = True  # rows begin at multiples of 16 bytes and lie densely
    mapped: bool = True  # a tensor map can say how the heads of keys and values lie
    dilation: int = 1  # the largest of all axes
    capability: int | None = None  # of a CUDA device, times ten
    counts: tuple[int, ...] = ()  # of LIMITS

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} tensors on {self.device}"


def describe(
    inputs: Sequence[Tensor | None], params: NAParams, box: Box | None, scale: float | None, whole: bool = False
) -> Problem:
    """Everything that the choice depends on; `inputs` in the order of `reference.Inputs`, on any device.

    `whole` asks for tiles that hold whole windows, which is all that generated code has.
    """
    query, _, value, *_ = inputs
    assert query is not None and value is not None
    tile_bytes = 0
    if query.device.type == "cpu" and query.dtype in ALL_DTYPES:
        # Shapes alone count; fresh tensors of them, because those at hand may be batched by vmap.
        shells = [None if t is None else torch.empty((), dtype=t.dtype, device="cpu").expand(t.shape) for t in inputs]
        lists = [list(entry) for entry in params], [list(entry) for entry in box or ((), (), ())]
        tile_bytes = torch.ops.natten._cpu_tiled_scratch_bytes(*shells[:3], *lists[0], *shells[3:], *lists[1], whole)
    dims = query.shape[-1], value.shape[-1]
    capability = None
    if query.device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(query.device)
        capability = 10 * major + minor
    facts: dict[str, Any] = {
        "whole": whole,
        "bias": inputs[5] is not None,
        "masked": inputs[6] is not None,
        "additional": inputs[3] is not None,
        "sub_box": box is not None,
        "dims": dims,
        "aligned": query.device.type != "cuda" or all(t is None or is_aligned(t) for t in inputs[:5]),
        "mapped": query.device.type != "cuda" or all(t is None or fits_tensor_map(t) for t in inputs[1:3]),
        "dilation": max(params.dilation),
        "capability": capability,
        "counts": count(inputs, params, box),
    }
    return Problem(query.device.type, query.dtype, 1.0 if scale is None else scale, min(dims), tile_bytes, **facts)


def count(inputs: Sequence[Tensor | None], params: NAParams, box: Box | None) -> tuple[int, ...]:
    """In the order of LIMITS."""
    query, _, _, additional_keys, _, rpb, _ = inputs
    assert query is not None
    return (
        max(query.shape[0], query.shape[-2]),
        max(query.shape[1:-2] if box is None else box.extent),
        math.prod(params.kernel_size),
        0 if additional_keys is None else additional_keys.shape[1],
        0 if rpb is None else math.prod(rpb.shape[1:]),
    )


def is_aligned(tensor: Tensor) -> bool:
    """Whether sixteen bytes at a time may be read of every row; memory itself begins at more than that."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # how the tensors below lie is not to be seen from here
        return True
    offsets = [step * tensor.element_size() for step in (tensor.storage_offset(), *tensor.stride()[:-1])]
    return tensor.stride(-1) == 1 and not any(n % 16 for n in offsets)


def fits_tensor_map(tensor: Tensor) -> bool:
    """Whether TMA can bring keys or values: heads lie within a token's stride, or as further samples."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    batch, *spatial, heads, dim = tensor.shape
    of_batch, *of_tokens, of_head, _ = tensor.stride()

    def hold(row: int, samples: int, of_sample: int) -> bool:
        """Whether every stride that is in use holds a row."""
        pairs = [(samples, of_sample), *zip(spatial, of_tokens)]
        return all(count == 1 or row <= stride < 2**39 for count, stride in pairs)

    row = (heads - 1) * of_head + dim
    if row < 2**31 - 1 and hold(row, batch, of_batch):
        return True
    uniform = batch == 1 or of_batch == heads * of_head
    return uniform and batch * heads < 2**31 - 1 and hold(dim, batch * heads, of_head)
