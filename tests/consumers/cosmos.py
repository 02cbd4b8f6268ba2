# SPDX-License-Identifier: MIT
"""A video block in the manner of Cosmos: the rank-generic function on 6-D tensors, and one softmax over a neighborhood
and a text made by merging two attentions.
"""

from natten.functional import attention as dense_attention
from natten.functional import merge_attentions, neighborhood_attention_generic
from torch import nn

INPUT_SHAPES = [(2, 4, 6, 8, 16), (2, 5, 16)]


class VideoAttention(nn.Module):
    """Frames are causal, windows of rows and columns are shared by `stride` queries; the text is seen by all."""

    def __init__(self, dim, heads, kernel_size, stride, dilation, is_causal):
        super().__init__()
        self.heads, self.windows, self.is_causal = heads, (kernel_size, stride, dilation), is_causal
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.query_norm, self.key_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)

    def forward(self, video, text):
        query = self.query_norm(self.query(video).unflatten(-1, (self.heads, -1)))
        keys = [self.key_norm(self.key(t).unflatten(-1, (self.heads, -1))) for t in (video, text)]
        values = [self.value(t).unflatten(-1, (self.heads, -1)) for t in (video, text)]
        return self.proj(self.attend(query, keys, values).flatten(-2))

    def attend(self, query, keys, values):
        near, near_lse = neighborhood_attention_generic(
            query, keys[0], values[0], *self.windows, is_causal=self.is_causal, return_lse=True
        )
        flat = query.flatten(1, -3)
        text, text_lse = dense_attention(flat, keys[1], values[1], return_lse=True)
        outputs, lses = [near.flatten(1, -3), text], [near_lse.flatten(1, -2), text_lse]
        merged, _ = merge_attentions(outputs, lses, torch_compile=False)
        return merged.reshape(query.shape)


class Block(nn.Module):
    """Attention and MLP, each behind a norm; the denoised video."""

    def __init__(self, attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = attention(16, 2, (3, 4, 5), (1, 2, 1), (1, 1, 1), (True, False, False))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 16))

    def forward(self, video, text):
        video = video + self.attention(self.norm1(video), text)
        return video + self.mlp(self.norm2(video))


def build(attention=VideoAttention):
    return Block(attention)
