# SPDX-License-Identifier: MIT
"""A block of an hourglass diffusion transformer in the manner of k-diffusion: the fused function if there is one.

Queries and keys are normalised and rotated, so that the scale is 1; a condition modulates the norm.
"""

import math

import torch
from torch import nn

try:
    import natten
except ImportError:
    natten = None

INPUT_SHAPES = [(2, 8, 6, 24), (2, 5)]


def rotate(x, angles):
    """Axial rotary embedding of the first half of the channels; the others stay."""
    turned, kept = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    left, right = turned.chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine, kept], dim=-1)


class SelfAttention(nn.Module):
    """Cosine-similarity attention with a learned scale a head."""

    def __init__(self, dim, heads, kernel_size):
        super().__init__()
        if natten is None:
            raise ModuleNotFoundError("neighborhood attention needs natten")
        self.heads, self.kernel_size = heads, kernel_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.scale = nn.Parameter(torch.full([heads], 10.0))
        self.out = nn.Linear(dim, dim, bias=False)
        count = dim // heads // 8
        self.register_buffer("frequencies", torch.linspace(0, math.log(10), count).exp() * math.pi)

    def angles(self, rows, columns):
        y, x = (torch.linspace(-1, 1, n).to(self.frequencies) for n in (rows, columns))
        y, x = (axis[..., None] * self.frequencies for axis in (y[:, None], x[None, :]))
        return torch.cat(torch.broadcast_tensors(y, x), dim=-1)[:, :, None]

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        factor = self.scale.sqrt()[:, None]
        angles = self.angles(*x.shape[1:3])
        query, key = (rotate(nn.functional.normalize(t, dim=-1) * factor, angles) for t in (query, key))
        return self.out(self.attend(query, key, value).flatten(-2))

    def attend(self, query, key, value):
        if natten.has_fused_na():
            return natten.functional.na2d(query, key, value, self.kernel_size, scale=1.0)
        query, key, value = (t.permute(0, 3, 1, 2, 4) for t in (query, key, value))
        weights = natten.functional.na2d_qk(query, key, self.kernel_size).softmax(dim=-1)
        return natten.functional.na2d_av(weights, value, self.kernel_size).permute(0, 2, 3, 1, 4)


class Block(nn.Module):
    """x + attention(rms norm of x, scaled by the condition), then a gated MLP likewise."""

    def __init__(self, dim, condition, attention):
        super().__init__()
        self.scales = nn.Linear(condition, 2 * dim, bias=False)
        self.norm = nn.RMSNorm(dim, elementwise_affine=False)
        self.attention = attention(dim, 3, 5)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x, condition):
        first, second = (self.scales(condition)[:, None, None] + 1).chunk(2, dim=-1)
        x = x + self.attention(self.norm(x) * first)
        values, gates = self.up(self.norm(x) * second).chunk(2, dim=-1)
        return x + self.down(values * nn.functional.gelu(gates))


def build(attention=SelfAttention):
    return Block(24, 5, attention)
