# SPDX-License-Identifier: MIT
"""An encoder of trajectories in the manner of Forecast-MAE: the release of natten is told by whether it has a context,
and the bias is asked for by the name that the release has for it.
"""

import natten
from natten import NeighborhoodAttention1D
from torch import nn

INPUT_SHAPES = [(3, 5, 20)]
BIAS = {"rel_pos_bias": True} if hasattr(natten, "context") else {"bias": True}


def biased_attention(dim, heads, kernel_size):
    return NeighborhoodAttention1D(dim=dim, num_heads=heads, kernel_size=kernel_size, dilation=1, **BIAS)


class Block(nn.Module):
    """Attention along time and an MLP, each behind a norm."""

    def __init__(self, dim, heads, kernel_size, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention(dim, heads, kernel_size)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Features of an agent in time, channels first; two levels, the second at half the rate; the last instant."""

    def __init__(self, attention):
        super().__init__()
        self.embed = nn.Conv1d(5, 8, 3, padding=1)
        self.first, self.second = Block(8, 2, 3, attention), Block(16, 4, 5, attention)
        self.halve = nn.Conv1d(8, 16, 3, stride=2, padding=1)

    def forward(self, x):
        x = self.first(self.embed(x).transpose(1, 2))
        return self.second(self.halve(x.transpose(1, 2)).transpose(1, 2))[:, -1]


def build(attention=biased_attention):
    return Encoder(attention)
