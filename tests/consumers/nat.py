# SPDX-License-Identifier: MIT
"""A small classifier in the manner of the NAT repository: natten's module in levels that halve the image.

`build_padded` has a last level that is smaller than its window, which the modules of the first releases pad.
"""

from natten import NeighborhoodAttention2D as NeighborhoodAttention
from torch import nn

INPUT_SHAPES = [(2, 3, 24, 24)]


class Layer(nn.Module):
    """Attention and MLP, each behind a norm; the module gets its settings by keyword."""

    def __init__(self, dim, heads, kernel_size, dilation, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention(
            dim,
            kernel_size=kernel_size,
            dilation=dilation,
            num_heads=heads,
            qkv_bias=True,
            qk_scale=None,
            attn_drop=0.0,
            proj_drop=0.0,
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Overlapping patches, levels with a convolution between them, the mean token, class scores."""

    def __init__(self, levels, attention):
        super().__init__()
        self.tokenizer = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.levels, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for depth, dilations in enumerate(levels):
            dim = 8 * 2**depth
            self.levels.append(nn.Sequential(*(Layer(dim, 2, 3, dilation, attention) for dilation in dilations)))
            self.downsamples.append(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False))
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Linear(2 * dim, 4)

    def forward(self, images):
        x = self.tokenizer(images)
        for level, downsample in zip(self.levels, self.downsamples):
            x = downsample(level(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.head(self.norm(x.flatten(2).mean(-1)))


def build(attention=NeighborhoodAttention):
    return Classifier([[None, 4], [1, 2]], attention)


def build_padded(attention=NeighborhoodAttention):
    return Classifier([[None, 4], [1, 3]], attention)
