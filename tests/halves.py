# SPDX-License-Identifier: MIT
"""The problems of `samples` for the unfused ops: heads first, one head of keys a query head, no mask, no sub-box."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from samples import Problem
from torch import Tensor

from natten_ops import reference

ops = torch.ops.natten


class Halves(NamedTuple):
    """The tensors of one attention in two halves; `attn` and `grad` are any numbers of the weights' shape."""

    query: Tensor
    key: Tensor
    attn: Tensor
    value: Tensor
    rpb: Tensor | None
    additional_keys: Tensor | None
    additional_values: Tensor | None


def halved(problem: Problem) -> Problem:
    """The problem with what the unfused ops do not have left out."""
    return dataclasses.replace(problem, group=1, mask=False, box=None, value_dim=None, scale=None)


def make(problem: Problem, dtype: torch.dtype = torch.float64, seed: int = 0) -> Halves:
    inputs = halved(problem).make(dtype, seed)
    query, key, value = (tokens.movedim(-2, 1) for tokens in inputs[:3])
    extras = [None if t is None else t.transpose(1, 2) for t in inputs[3:5]]
    slots = reference.qk(query, key, *problem.lists(), additional_keys=extras[0]).shape
    attn = torch.randn(slots, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)
    if problem.transposed:
        attn = attn.transpose(-1, -2).contiguous().transpose(-1, -2)
    return Halves(query, key, attn, value, inputs.rpb, *extras)


def qk(halves: Halves, problem: Problem, module: Any = ops) -> Tensor:
    """Logits of the op, or of the reference."""
    function = ops.na_qk if module is ops else module.qk
    extras = {"rpb": halves.rpb, "additional_keys": halves.additional_keys}
    return function(halves.query, halves.key, *problem.lists(), **extras)


def av(halves: Halves, problem: Problem, module: Any = ops) -> Tensor:
    """Sums of the op, or of the reference."""
    function = ops.na_av if module is ops else module.av
    return function(halves.attn, halves.value, *problem.lists(), additional_values=halves.additional_values)


def finite(attn: Tensor) -> Tensor:
    """The logits with 0 in the slots that are not seen."""
    return attn.masked_fill(attn == -torch.inf, 0.0)


def replaced(halves: Halves, tensors: Any) -> Halves:
    """The tensors that are there, replaced in order."""
    iterator = iter(tensors)
    return Halves(*[None if t is None else next(iterator) for t in halves])


def present(halves: Halves) -> list[Tensor]:
    return [t for t in halves if t is not None]


def in_double(halves: Halves) -> Halves:
    return replaced(halves, [t.detach().double() for t in present(halves)])


def both(halves: Halves, problem: Problem, module: Any) -> tuple[Tensor, Tensor]:
    """Logits with zeros for what is not seen, and sums."""
    return finite(qk(halves, problem, module)), av(halves, problem, module)
