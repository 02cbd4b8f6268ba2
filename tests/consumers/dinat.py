# SPDX-License-Identifier: MIT
"""A small Dinat in the manner of transformers: natten is looked up by spec and by version, its two functions by name.

Heads come first, the query is scaled before the product, grids smaller than the window are padded by the layer.
"""

import importlib.metadata
import importlib.util
import math

import torch
from torch import nn

if importlib.util.find_spec("natten") is None or importlib.metadata.version("natten") == "N/A":
    raise ImportError("Dinat needs natten")
from natten.functional import natten2dav, natten2dqkrpb

INPUT_SHAPES = [(2, 3, 16, 14)]


class NeighborhoodAttention(nn.Module):
    """Separate projections, scores, softmax, dropout, values."""

    def __init__(self, dim, heads, kernel_size, dilation):
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1) * 0.5)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dense = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.0)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)

    def forward(self, hidden):
        query, key, value = (self.split_heads(layer(hidden)) for layer in (self.query, self.key, self.value))
        context = self.attend(query / math.sqrt(query.shape[-1]), key, value)
        return self.dense(context.permute(0, 2, 3, 1, 4).flatten(-2))

    def attend(self, query, key, value):
        scores = natten2dqkrpb(query, key, self.rpb, self.kernel_size, self.dilation)
        weights = self.dropout(scores.softmax(dim=-1))
        return natten2dav(weights, value, self.kernel_size, self.dilation)


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and before a learned scale."""

    def __init__(self, dim, heads, kernel_size, dilation, attention):
        super().__init__()
        self.window = kernel_size * dilation
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention(dim, heads, kernel_size, dilation)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.layer_scale = nn.Parameter(torch.full((2, dim), 0.5))

    def forward(self, hidden):
        rows, columns = hidden.shape[1:3]
        padding = (0, 0, 0, max(0, self.window - columns), 0, max(0, self.window - rows))
        attended = self.attention(nn.functional.pad(self.before(hidden), padding))[:, :rows, :columns]
        hidden = hidden + self.layer_scale[0] * attended
        return hidden + self.layer_scale[1] * self.mlp(self.after(hidden))


class Dinat(nn.Module):
    """Patches, a dense and a dilated layer (whose window is larger than the grid), class scores."""

    def __init__(self, attention):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.layers = nn.Sequential(*(Layer(16, 2, 3, dilation, attention) for dilation in (1, 3)))
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        return self.head(self.layers(self.patches(images).permute(0, 2, 3, 1)).mean((1, 2)))


def build(attention=NeighborhoodAttention):
    return Dinat(attention)
