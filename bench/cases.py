# SPDX-License-Identifier: MIT
"""The problems that are timed, and the ways of solving them that are timed against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import natten_ops
from natten_ops import reference
from natten_ops.geometry.params import NAParams, make_params


@dataclasses.dataclass(frozen=True)
class Case:
    """One self-attention of seeded numbers; batch 1 unless said."""

    name: str
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def params(self) -> NAParams:
        return make_params(len(self.spatial), self.kernel_size, self.stride, self.dilation, self.is_causal)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (1, *self.spatial, self.heads, self.head_dim)
        query, key, value = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(3))
        return query, key, value


CASES = (
    Case("headline", (56, 56), 4, 32, (7, 7)),
    Case("wide_heads", (32, 32), 4, 64, (13, 13)),
    Case("line", (2048,), 4, 64, (127,)),
    Case("volume", (8, 16, 16), 4, 32, (3, 7, 7)),
    Case("dilated", (56, 56), 4, 32, (7, 7), dilation=4),
    Case("causal", (56, 56), 4, 32, (7, 7), is_causal=True),
    Case("strided", (56, 56), 4, 32, (8, 8), stride=4),
    Case("blocked", (56, 56), 4, 32, (8, 8), stride=8),
    Case("small", (14, 14), 2, 32, (7, 7)),
    Case("headline_bf16", (56, 56), 4, 32, (7, 7), dtype=torch.bfloat16),
    Case("headline_fp16", (56, 56), 4, 32, (7, 7), dtype=torch.float16),
)
# The cost of a pixel must not depend on the size of the image.
SCALING = tuple(Case(f"scaling_{size}", (size, size), 4, 32, (7, 7)) for size in (56, 112, 224, 448))


def natten(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The op as a user calls it."""
    settings = (case.kernel_size, case.stride, case.dilation, case.is_causal)
    out: Tensor = natten_ops.neighborhood_attention(query, key, value, *settings)
    return out


def clamped_starts(length: int, kernel: int) -> Tensor:
    """Where each window starts, undilated, stride 1."""
    return (torch.arange(length) - kernel // 2).clamp(0, length - kernel)


def gather(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What people write without a library: windows by unfold, indexed by clamped starts, two einsums, softmax."""
    windows = []
    for tokens in (key, value):
        for axis, kernel in enumerate(case.kernel_size, start=1):
            starts = clamped_starts(case.spatial[axis - 1], kernel)
            tokens = tokens.unfold(axis, kernel, 1).index_select(axis, starts)
        windows.append(tokens.flatten(-len(case.spatial)))
    keys, values = windows
    scores = torch.einsum("b...hd,b...hdk->b...hk", query, keys) * case.head_dim**-0.5
    return torch.einsum("b...hk,b...hdk->b...hd", scores.softmax(-1), values)


def supports_gather(case: Case) -> bool:
    return case.stride == 1 and case.dilation == 1 and not case.is_causal


@functools.lru_cache(maxsize=1)
def matrices() -> tuple[Tensor, Tensor]:
    """The yardstick of the machine: 1024^3 in float32."""
    return torch.randn(1024, 1024), torch.randn(1024, 1024)


def sgemm() -> Tensor:
    left, right = matrices()
    return left @ right


SGEMM_FLOPS = 2 * 1024**3


def forward_contenders(case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    contenders: dict[str, Callable[[], Any]] = {"natten_ops": lambda: natten(case, *tensors)}
    if supports_gather(case) and len(case.spatial) == 2:
        compiled = torch.compile(functools.partial(gather, case), fullgraph=True)
        contenders["compiled_gather"] = lambda: compiled(*tensors)
    return contenders


def training_contenders(case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """Forward and backward to query, key and value."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    grad = torch.randn_like(tensors[0])

    def step(function: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(function(*leaves), leaves, grad)

    contenders: dict[str, Callable[[], Any]] = {"natten_ops": lambda: step(functools.partial(natten, case))}
    if supports_gather(case) and len(case.spatial) == 2:
        compiled = torch.compile(functools.partial(gather, case), fullgraph=True)
        contenders["compiled_gather"] = lambda: step(compiled)
    return contenders


def check(case: Case, tensors: tuple[Tensor, ...], contenders: dict[str, Callable[[], Any]]) -> None:
    """No contender is timed before its numbers are right."""
    inputs = reference.Inputs(*(t.double() for t in tensors))
    want, _ = reference.forward(inputs, case.params, None, None)
    tolerance = 1e-4 if case.dtype == torch.float32 else 3e-2
    for name, function in contenders.items():
        error = (function().double() - want).abs().max().item()
        assert error < tolerance, f"{case.name}: {name} is off by {error}"
