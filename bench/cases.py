# SPDX-License-Identifier: MIT
"""The problems that are timed, in suites."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from natten_ops import flops
from natten_ops.geometry.params import NAParams, make_params
from natten_ops.reference import Inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """One self-attention of seeded numbers."""

    name: str
    spatial: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int = 1
    is_causal: bool = False
    dtype: torch.dtype = torch.float32
    heads_kv: int | None = None
    rpb: bool = False
    mask: bool = False
    additional: int = 0
    batch: int = 1
    device: str = "cpu"

    @property
    def params(self) -> NAParams:
        return make_params(len(self.spatial), self.kernel_size, self.stride, self.dilation, self.is_causal)

    @property
    def tokens(self) -> int:
        return math.prod(self.spatial)

    @property
    def plain(self) -> bool:
        """No bias, mask, additional tokens or shared heads."""
        return not (self.rpb or self.mask or self.additional or self.heads_kv)

    def inputs(self) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        heads_kv = self.heads_kv or self.heads
        query = draw(self.batch, *self.spatial, self.heads, self.head_dim)
        key, value = (draw(self.batch, *self.spatial, heads_kv, self.head_dim) for _ in range(2))
        more: list[Any] = [None] * 4
        if self.additional:
            more[:2] = (draw(self.batch, self.additional, heads_kv, self.head_dim) for _ in range(2))
        if self.rpb:
            more[2] = draw(self.heads, *(2 * kernel - 1 for kernel in self.kernel_size))
        if self.mask:
            more[3] = torch.rand(self.batch, *self.spatial, generator=generator, device=self.device) > 0.1
        return Inputs(query, key, value, *more)

    def work(self, kind: str) -> int:
        """Useful FLOPs: of the forward, 3.5 times that with the backward."""
        shape = (self.batch, *self.spatial, self.heads, self.head_dim)
        forward = flops.forward_flops(shape, shape, self.params)
        forward += 4 * self.batch * self.heads * self.tokens * self.additional * self.head_dim
        return int(forward if kind == "forward" else 3.5 * forward)


def _square(name: str, size: int = 56, heads: int = 4, kernel: int = 7, **more: Any) -> Case:
    return Case(name, (size, size), heads, 32, (kernel, kernel), **more)


CASES = (
    _square("headline"),
    Case("wide_heads", (32, 32), 4, 64, (13, 13)),
    Case("line", (2048,), 4, 64, (127,)),
    Case("volume", (8, 16, 16), 4, 32, (3, 7, 7)),
    _square("dilated", dilation=4),
    _square("causal", is_causal=True),
    _square("strided", kernel=8, stride=4),
    _square("blocked", kernel=8, stride=8),
    _square("small", size=14, heads=2),
    _square("large", size=448, heads=2),
    Case("in_parts", (64, 64), 1, 64, (63, 63)),  # a window whose keys exceed a thread's scratch
    _square("headline_bf16", dtype=torch.bfloat16),
    _square("headline_fp16", dtype=torch.float16),
    _square("headline_fp64", dtype=torch.float64),
    _square("headline_rpb", rpb=True),
    _square("headline_mask", mask=True),
    _square("headline_gqa", heads_kv=2),
    _square("headline_additional", additional=16),
)
# The cost of a pixel must not depend on the size of the image.
SCALING = tuple(_square(f"scaling_{size}", size=size) for size in (56, 112, 224, 448))
_ON_GPU: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
GPU_CASES = (
    Case("video_strided", (30, 48, 80), 24, 128, (18, 24, 24), (2, 8, 8), **_ON_GPU),
    Case("video", (30, 48, 80), 24, 128, (18, 24, 24), **_ON_GPU),
    Case("image", (256, 256), 24, 128, (80, 80), **_ON_GPU),
    Case("long_line", (32768,), 24, 128, (2048,), **_ON_GPU),
    Case("image_31", (128, 128), 24, 128, (31, 31), **_ON_GPU),
    _square("headline_64", batch=64, **_ON_GPU),
    Case("image_dilated", (256, 256), 24, 128, (13, 13), dilation=4, **_ON_GPU),
    Case("volume_5", (16, 32, 32), 24, 128, (5, 5, 5), **_ON_GPU),
)
SUITES = {"cpu": CASES, "smoke": CASES[:1] + CASES[8:9], "gpu": GPU_CASES}
