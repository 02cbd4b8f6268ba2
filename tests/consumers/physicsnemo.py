# SPDX-License-Identifier: MIT
"""A block over a volume in the manner of physicsnemo: the fused function of the rank, a window size of its own
for levels, rows and columns, and a kernel asked for by natten's name.
"""

from natten.functional import na1d, na2d, na3d
from torch import nn

INPUT_SHAPES = [(2, 3, 4, 8, 10)]
FUSED = {1: na1d, 2: na2d, 3: na3d}


class NeighborhoodAttention(nn.Module):
    """Heads last; everything after the kernel size by keyword."""

    def __init__(self, dim, heads, kernel_size, dilation):
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.proj(self.attend(*qkv.unbind(-3)).flatten(-2))

    def attend(self, query, key, value):
        attention = FUSED[query.dim() - 3]
        return attention(query, key, value, self.kernel_size, dilation=self.dilation, backend="cutlass-fna")


class Forecaster(nn.Module):
    """Fields on levels, rows and columns; a step of time is a residual of two blocks."""

    def __init__(self, attention):
        super().__init__()
        self.lift, self.lower = nn.Linear(3, 12), nn.Linear(12, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.blocks = nn.ModuleList(attention(12, 2, (2, 5, 3), dilation) for dilation in (1, (1, 1, 3)))
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 12))

    def forward(self, fields):
        x = self.lift(fields.movedim(1, -1))
        for norm, block in zip(self.norms, self.blocks):
            x = x + block(norm(x))
        return fields + self.lower(x + self.mlp(x)).movedim(-1, 1)


def build(attention=NeighborhoodAttention):
    return Forecaster(attention)
