# SPDX-License-Identifier: MIT
"""A generator block in the manner of StyleNAT: the heads are split into groups, each with its own kernel and dilation."""

import natten
import torch
from natten.functional import natten2dav, natten2dqkrpb
from torch import nn

INPUT_SHAPES = [(2, 10, 12, 16), (2, 6)]


class HydraAttention(nn.Module):
    """One projection, groups of heads with windows of their own, one projection."""

    def __init__(self, dim, kernel_sizes, dilations, heads_per_group):
        super().__init__()
        self.kernel_sizes, self.dilations, self.heads_per_group = kernel_sizes, dilations, heads_per_group
        heads = heads_per_group * len(kernel_sizes)
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.ParameterList(
            nn.Parameter(torch.randn(heads_per_group, 2 * kernel - 1, 2 * kernel - 1) * 0.5) for kernel in kernel_sizes
        )

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        groups = [t.split(self.heads_per_group, dim=1) for t in (qkv[0] * self.scale, qkv[1], qkv[2])]
        settings = zip(*groups, self.rpb, self.kernel_sizes, self.dilations)
        out = torch.cat([self.attend(*group) for group in settings], dim=1)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(-2))

    def attend(self, query, key, value, rpb, kernel_size, dilation):
        weights = natten2dqkrpb(query, key, rpb, kernel_size, dilation).softmax(dim=-1)
        return natten2dav(weights, value, kernel_size, dilation)


class Block(nn.Module):
    """Tokens whose mean and variance come from the style, attention, an MLP, colours."""

    def __init__(self, dim, style, attention):
        super().__init__()
        self.norm = nn.InstanceNorm2d(dim)
        self.styles = nn.ModuleList(nn.Linear(style, 2 * dim) for _ in range(2))
        self.attention = attention(dim, kernel_sizes=[3, 5], dilations=[3, 2], heads_per_group=2)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.colours = nn.Linear(dim, 3)

    def modulated(self, x, style, which):
        gain, shift = self.styles[which](style)[:, None, None].chunk(2, dim=-1)
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * (1 + gain) + shift

    def forward(self, x, style):
        x = x + self.attention(self.modulated(x, style, 0))
        return self.colours(x + self.mlp(self.modulated(x, style, 1)))


def build(attention=HydraAttention):
    natten.use_fused_na(True)
    natten.use_autotuner(forward_pass=True, backward_pass=True)
    return Block(16, 6, attention)
