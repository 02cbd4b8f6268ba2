# SPDX-License-Identifier: MIT
"""Merging partial attentions: out = sum_i w_i o_i and lse = log sum_i exp(l_i), with w_i = exp(l_i - lse).

A composition of ATen ops: every compiler fuses it, and all derivatives and transforms come with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from natten_ops.ops._register import register_composite


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over disjoint keys; rows that saw nothing (lse -inf) weigh nothing."""
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


register_composite("merge_attentions", merge_attentions)
