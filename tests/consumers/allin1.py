# SPDX-License-Identifier: MIT
"""A stack over the beats of music in the manner of allin1: 1-D attention in time whose dilations double from layer to
layer, twice a layer, and 2-D attention over instruments and time, padded where the window is larger than the input.
"""

import math

import torch
from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb
from torch import nn

INPUT_SHAPES = [(2, 4, 26, 12)]
SCORES = {1: natten1dqkrpb, 2: natten2dqkrpb}
VALUES = {1: natten1dav, 2: natten2dav}


class NeighborhoodAttention(nn.Module):
    """One body for both ranks; the functions are picked when the layer is made."""

    def __init__(self, rank, dim, heads, kernel_size, dilation):
        super().__init__()
        self.rank, self.heads, self.kernel_size, self.dilation = rank, heads, kernel_size, dilation
        self.scores, self.values = SCORES[rank], VALUES[rank]
        self.rpb = nn.Parameter(torch.randn(heads, *[2 * kernel_size - 1] * rank) * 0.5)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x):
        sizes = x.shape[1:-1]
        missing = [max(0, self.kernel_size * self.dilation - size) for size in sizes]
        x = nn.functional.pad(x, [0, 0] + [pad for axis in reversed(missing) for pad in (0, axis)])
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).movedim(-2, 1) for layer in (self.query, self.key, self.value)
        )
        out = self.attend(query / math.sqrt(query.shape[-1]), key, value).movedim(1, -2).flatten(-2)
        for axis, size in enumerate(sizes, start=1):
            out = out.narrow(axis, 0, size)
        return out

    def attend(self, query, key, value):
        scores = self.scores(query, key, self.rpb, self.kernel_size, self.dilation)
        return self.values(scores.softmax(dim=-1), value, self.kernel_size, self.dilation)


class Block(nn.Module):
    """Time with two dilations side by side, then instruments with time, then an MLP."""

    def __init__(self, dim, dilation, attention):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.near = attention(1, dim, 2, 5, dilation)
        self.far = attention(1, dim, 2, 5, 2 * dilation)
        self.joined = nn.Linear(2 * dim, dim)
        self.instruments = attention(2, dim, 2, 5, 1)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        batch = x.shape[0]
        tracks = self.norms[0](x).flatten(0, 1)
        both = torch.cat([self.near(tracks), self.far(tracks)], dim=-1)
        x = x + self.joined(both).unflatten(0, (batch, -1))
        x = x + self.instruments(self.norms[1](x))
        return x + self.mlp(self.norms[2](x))


class Stack(nn.Module):
    """Blocks of dilation 1, 2, 4; one score an instant."""

    def __init__(self, attention):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(12, 2**depth, attention) for depth in range(3)))
        self.head = nn.Linear(12, 1)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


def build(attention=NeighborhoodAttention):
    return Stack(attention)
