# SPDX-License-Identifier: MIT
"""Merging partial attentions: out = sum_i w_i o_i and lse = log sum_i exp(l_i), with w_i = exp(l_i - lse).

A composition of ATen ops: every compiler fuses it, and all derivatives and transforms come with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from natten_ops.backends import ALL_DTYPES
from natten_ops.ops._register import register_composite
from natten_ops.ops.arguments import DTYPE_NAMES


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over disjoint keys; rows that saw nothing (lse -inf) weigh nothing."""
    _check(outputs, lses)
    stacked = torch.stack(list(lses))
    # The shift cancels in every derivative; where nothing was seen it must be finite, for -inf - -inf is NaN.
    peak = stacked.detach().amax(0)
    shift = torch.where(peak == -math.inf, torch.zeros_like(peak), peak)
    weights = (stacked - shift).exp()
    total = weights.sum(0)
    dead = total == 0
    safe = torch.where(dead, torch.ones_like(total), total)
    lse = torch.where(dead, torch.full_like(total, -math.inf), shift + safe.log())
    merged = sum(w[..., None] * out.to(w.dtype) for w, out in zip((weights / safe).unbind(0), outputs))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), lse


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Raise ValueError or TypeError unless there are pairs of one shape, floating dtype and device."""
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attentions got {len(outputs)} outputs and {len(lses)} lses; give at least one of each, paired"
        )
    first = outputs[0]
    for i, (out, lse) in enumerate(zip(outputs, lses)):
        for name, tensor in ((f"outputs[{i}]", out), (f"lses[{i}]", lse)):
            if tensor.device != first.device:
                raise ValueError(f"{name} is on {tensor.device}, outputs[0] on {first.device}; move them to one device")
        if out.dtype not in ALL_DTYPES or out.dim() == 0:
            raise ValueError(f"outputs[{i}] is {_kind(out)}; give [.., value dim] in {DTYPE_NAMES}")
        if out.shape != first.shape or out.dtype != first.dtype:
            raise ValueError(f"outputs[{i}] is {_kind(out)}, outputs[0] {_kind(first)}; they must be alike")
        if lse.shape != out.shape[:-1] or lse.dtype not in (torch.float32, torch.float64):
            want = f"float32 or float64 {list(out.shape[:-1])}, the shape of outputs[{i}] without its last dim"
            raise ValueError(f"lses[{i}] is {_kind(lse)}; give {want}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


register_composite("merge_attentions", merge_attentions)
