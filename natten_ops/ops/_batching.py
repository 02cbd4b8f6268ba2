# SPDX-License-Identifier: MIT
"""How vmap's dimension becomes part of the batch, for all ops alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension folded into the batch; copies what is not mapped, once a sample."""
    if tensor is None:
        return None
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def unfold(outputs: Sequence[Tensor], query: Tensor, dim: int | None, size: int) -> Any:
    """The batch of each output split again; a gradient that was not needed has one dim, of size 0."""
    shape = list(query.shape)
    if dim is not None:
        shape.pop(dim)
    return tuple(t.unflatten(0, (size, shape[0] if t.dim() > 1 else 0)) for t in outputs), (0,) * len(outputs)


def sample_by_sample(call: Any, settings: Any, tensors: Sequence[Any], dims: Sequence[int | None], size: int) -> Any:
    """The way that is always right: a bias table has no batch dimension into which a mapped one could be folded."""

    def sample(i: int) -> list[Any]:
        return [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims)]

    if size == 0:  # one call on zeros tells the shapes; joined to what there is, they leave the graph whole
        tensors = [t if dim is None else torch.cat([t, _one_of_zeros(t, dim)], dim) for t, dim in zip(tensors, dims)]
    results = [call(settings, sample(i)) for i in range(max(size, 1))]
    return tuple(torch.stack(parts)[:size] for parts in zip(*results)), (0,) * len(results[0])


def _one_of_zeros(tensor: Tensor, dim: int) -> Tensor:
    return tensor.new_zeros([*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :]])
