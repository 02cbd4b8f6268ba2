# SPDX-License-Identifier: MIT
"""A block in the manner of AgileFormer: attention over a neighborhood whose keys and values are sampled at learned
offsets from the grid.
"""

import torch
from natten.functional import na2d_av, na2d_qk_with_bias
from torch import nn

INPUT_SHAPES = [(2, 8, 9, 11)]


class DeformableNeighborhoodAttention(nn.Module):
    """Keys and values of the feature map moved by offsets that the queries ask for; channels first."""

    def __init__(self, dim, heads, kernel_size, dilation):
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.query, self.key, self.value, self.out = (nn.Conv2d(dim, dim, 1) for _ in range(4))
        self.offsets = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.GELU(), nn.Conv2d(dim, 2, 1))
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1) * 0.5)

    def moved(self, x, query):
        rows, columns = x.shape[-2:]
        y, x_axis = (torch.linspace(-1, 1, n).to(x) for n in (rows, columns))
        grid = torch.stack(torch.broadcast_tensors(x_axis[None, :], y[:, None]), dim=-1)
        offsets = self.offsets(query).permute(0, 2, 3, 1).tanh() / 4
        return nn.functional.grid_sample(x, grid + offsets, padding_mode="border", align_corners=True)

    def split_heads(self, x):
        return x.unflatten(1, (self.heads, -1)).permute(0, 1, 3, 4, 2)

    def forward(self, x):
        query = self.query(x)
        moved = self.moved(x, query)
        query, key, value = (self.split_heads(t) for t in (query, self.key(moved), self.value(moved)))
        out = self.attend(query * query.shape[-1] ** -0.5, key, value)
        return self.out(out.permute(0, 1, 4, 2, 3).flatten(1, 2))

    def attend(self, query, key, value):
        scores = na2d_qk_with_bias(query, key, self.rpb, self.kernel_size, self.dilation)
        return na2d_av(scores.softmax(dim=-1), value, self.kernel_size, self.dilation)


class Block(nn.Module):
    """Attention between 1 x 1 convolutions, a convolutional MLP, the map of the logits."""

    def __init__(self, attention):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, 8) for _ in range(2))
        self.attention = attention(8, 2, 3, 2)
        self.mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GELU())
        self.down = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(self.mlp(self.norms[1](x)))


def build(attention=DeformableNeighborhoodAttention):
    return Block(attention)
