# SPDX-License-Identifier: MIT
"""Problems for every property test: a record of one attention, a list of named ones, and a hypothesis strategy."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from natten_ops import reference
from natten_ops.geometry.params import Box, NAParams, axis_keys_needed, make_box, make_params
from natten_ops.ops import fused
from natten_ops.ops.arguments import Settings
from natten_ops.reference import Inputs

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes and settings of one attention; `make` fills it with seeded numbers."""

    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    batch: int = 2
    heads: int = 2
    group: int = 1  # query heads per key/value head
    head_dim: int = 8
    value_dim: int | None = None
    scale: float | None = None
    rpb: bool = False
    mask: bool = False
    additional: int | None = None
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # q_origin and query shape; keys: what is needed
    transposed: bool = False  # head dim strided
    packed: bool = False  # q, k, v views of one projection

    @property
    def rank(self) -> int:
        return len(self.spatial)

    def lists(self) -> tuple[Any, Any, Any, Any]:
        """kernel_size, stride, dilation, is_causal as the primitive takes them."""
        ones = (1,) * self.rank
        causal = self.is_causal or (False,) * self.rank
        return list(self.kernel_size), list(self.stride or ones), list(self.dilation or ones), list(causal)

    def params(self) -> NAParams:
        return make_params(self.rank, *self.lists())

    def boxes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """q_origin, kv_origin, extent; three empty tuples without a box."""
        if self.box is None:
            return (), (), ()
        return self.box[0], tuple(first for first, _ in self.key_range()), self.spatial

    def key_range(self) -> list[tuple[int, int]]:
        assert self.box is not None
        origin, shape = self.box
        params = self.params()
        return [axis_keys_needed(origin[a], shape[a], self.spatial[a], *params.axis(a)) for a in range(self.rank)]

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial shapes of query and key."""
        if self.box is None:
            return self.spatial, self.spatial
        return self.box[1], tuple(stop - first for first, stop in self.key_range())

    def settings(self) -> Settings:
        q_origin, kv_origin, extent = self.boxes()
        return Settings(*self.lists(), self.scale, q_origin, kv_origin, extent)

    def geometry(self) -> tuple[NAParams, Box | None]:
        return self.params(), make_box(self.rank, *self.boxes())

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return numbers.transpose(-1, -2).contiguous().transpose(-1, -2) if self.transposed else numbers

        q_shape, kv_shape = self.shapes()
        heads_kv = self.heads // self.group
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        query = draw(self.batch, *q_shape, self.heads, self.head_dim)
        key = draw(self.batch, *kv_shape, heads_kv, self.head_dim)
        value = draw(self.batch, *kv_shape, heads_kv, value_dim)
        if self.packed:
            query, key, value = torch.cat([query, key, value], dim=-2).split([self.heads, heads_kv, heads_kv], dim=-2)
        extras: list[Tensor | None] = [None] * 4
        if self.additional is not None:
            extras[0] = draw(self.batch, self.additional, heads_kv, self.head_dim)
            extras[1] = draw(self.batch, self.additional, heads_kv, value_dim)
        if self.rpb:
            extras[2] = draw(self.heads, *(2 * kernel - 1 for kernel in self.kernel_size))
        if self.mask:
            extras[3] = torch.rand(self.batch, *kv_shape, generator=generator) > 0.3
        return Inputs(query, key, value, *extras)


def run(inputs: Inputs, problem: Problem, backend: int = 0) -> tuple[Tensor, Tensor]:
    """out and lse of the primitive."""
    return fused._call_forward(problem.settings()._replace(backend=backend), inputs)


def differentiable(inputs: Inputs) -> list[Tensor]:
    """The inputs that are there and have gradients, in the order of Inputs."""
    return [tensor for tensor in inputs[:-1] if tensor is not None]


def with_tensors(inputs: Inputs, tensors: Any) -> Inputs:
    """The inputs with their differentiable tensors replaced, in order."""
    iterator = iter(tensors)
    return Inputs(*[None if t is None else next(iterator) for t in inputs[:-1]], inputs.key_mask)


def expected(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    return reference.forward(in_double(inputs), *problem.geometry(), problem.scale)


def in_double(inputs: Inputs) -> Inputs:
    return with_tensors(inputs, [t.detach().double() for t in differentiable(inputs)])


NAMED = {
    "line": Problem((11,), (4,), dilation=(2,)),
    "line_full": Problem((9,), (9,), is_causal=(True,)),
    "plain": Problem((7, 9), (3, 5)),
    "dilated": Problem((9, 11), (4, 3), dilation=(2, 3), head_dim=5),
    "strided": Problem((9, 8), (4, 3), stride=(3, 2), is_causal=(False, True), group=2),
    "blocked": Problem((8, 6), (4, 3), stride=(4, 3), packed=True),
    "biased": Problem((6, 7), (3, 4), is_causal=(True, False), dilation=(1, 1), rpb=True, value_dim=3),
    "masked": Problem((6, 5), (4, 3), mask=True, additional=2, transposed=True),
    "everything": Problem(
        (6, 8), (3, 3), dilation=(2, 1), is_causal=(False, True), heads=4, group=2, value_dim=5, scale=0.3,
        rpb=True, mask=True, additional=3,
    ),
    "volume": Problem((4, 5, 6), (2, 3, 3), stride=(1, 2, 3), dilation=(2, 1, 2), is_causal=(True, False, False), batch=1),
    "box": Problem((12, 10), (5, 3), dilation=(2, 1), stride=(2, 1), box=((3, 4), (5, 4)), mask=True),
    "one_dim": Problem((5, 5), (3, 3), head_dim=1, value_dim=1),
    "wide": Problem((5, 4), (3, 2), head_dim=80, value_dim=24, batch=1),
}  # fmt: skip

EMPTY = {
    "no_batch": Problem((5, 5), (3, 3), batch=0, rpb=True, additional=2),
    "no_heads": Problem((5, 5), (3, 3), heads=0, rpb=True, additional=2),
    "no_value_dim": Problem((5, 5), (3, 3), value_dim=0, rpb=True),
    "no_additional": Problem((5, 5), (3, 3), additional=0),
}


@st.composite
def problems(draw: Any, max_rank: int = 3) -> Problem:
    """Any problem of the semantics page, small."""
    rank = draw(st.integers(1, max_rank))
    top = {1: 24, 2: 10, 3: 6}[rank]
    kernel, stride, dilation, spatial = [], [], [], []
    for _ in range(rank):
        kernel.append(draw(st.integers(1, top // 2 + 1)))
        stride.append(draw(st.integers(1, kernel[-1])))
        dilation.append(draw(st.integers(1, 3)))
        spatial.append(draw(st.integers(kernel[-1] * dilation[-1], max(kernel[-1] * dilation[-1], top) + 2)))
    rpb = draw(st.booleans())
    group = draw(st.integers(1, 2))
    box = None
    if draw(st.integers(0, 3)) == 0:
        origin = [draw(st.integers(0, length - 1)) for length in spatial]
        box = (tuple(origin), tuple(draw(st.integers(1, n - o)) for n, o in zip(spatial, origin)))
    return Problem(
        tuple(spatial),
        tuple(kernel),
        (1,) * rank if rpb else tuple(stride),
        tuple(dilation),
        tuple(draw(st.booleans()) for _ in range(rank)),
        batch=draw(st.integers(1, 2)),
        heads=group * draw(st.integers(1, 2)),
        group=group,
        head_dim=draw(st.sampled_from([1, 3, 8, 16, 20, 33])),
        value_dim=draw(st.sampled_from([None, 1, 6, 16, 40])),
        scale=draw(st.sampled_from([None, None, 0.0, 0.7])),
        rpb=rpb,
        mask=draw(st.booleans()),
        additional=draw(st.sampled_from([None, None, 1, 4])),
        box=box,
        transposed=draw(st.booleans()),
    )
