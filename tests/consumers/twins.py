# SPDX-License-Identifier: MIT
"""What the attention of each consumer is on natten_ops: the fused functions and the modules, never natten.

A twin has the projections of the consumer's own attention and another `attend`; or it is a module of `natten_ops.nn`.
"""

import natten_ops
from natten_ops import nn


def heads_first(function, query, key, value, *arguments, **settings):
    """A heads-last function on heads-first tensors."""
    query, key, value = (t.movedim(1, -2) for t in (query, key, value))
    return function(query, key, value, *arguments, **settings).movedim(-2, 1)


def scaled_and_biased(self, query, key, value):
    """Dinat, allin1, AgileFormer: a query that is scaled already, a bias table, windows of the layer."""
    settings = {"kernel_size": self.kernel_size, "dilation": self.dilation, "scale": 1.0, "rpb": self.rpb}
    return heads_first(natten_ops.neighborhood_attention, query, key, value, **settings)


def unit_scale(self, query, key, value):
    """HDiT: heads last, the scale is in the norms."""
    return natten_ops.na2d(query, key, value, kernel_size=self.kernel_size, scale=1.0)


def group_of_heads(self, query, key, value, rpb, kernel_size, dilation):
    """StyleNAT: the windows of the group."""
    settings = {"kernel_size": kernel_size, "dilation": dilation, "scale": 1.0, "rpb": rpb}
    return heads_first(natten_ops.na2d, query, key, value, **settings)


def volume(self, query, key, value):
    """physicsnemo: 3-D, the default scale."""
    return natten_ops.na3d(query, key, value, kernel_size=self.kernel_size, dilation=self.dilation)


def video_and_text(self, query, keys, values):
    """Cosmos: the text as additional tokens of one attention in place of a merge of two."""
    kernel_size, stride, dilation = self.windows
    extra = {"additional_keys": keys[1], "additional_values": values[1]}
    windows = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": self.is_causal}
    return natten_ops.na3d(query, keys[0], values[0], **windows, **extra)


def classifier_module(rel_pos_bias):
    """NAT: the module, with the bias that was on by default in the first releases."""

    def module(dim, num_heads, kernel_size, dilation, qkv_bias, qk_scale, attn_drop, proj_drop):
        return Padded2D(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation or 1,
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )

    return module


class Padded2D(nn.NeighborhoodAttention2D):
    """The module on grids smaller than its window: zeros below and to the right, cropped off afterwards."""

    def forward(self, x):
        rows, columns = x.shape[1:3]
        needed = [kernel * dilation for kernel, dilation in zip(self.kernel_size, self.dilation)]
        grid = x.new_zeros(x.shape[0], max(rows, needed[0]), max(columns, needed[1]), x.shape[3])
        grid[:, :rows, :columns] = x
        return super().forward(grid)[:, :rows, :columns]


def trajectory_module(dim, heads, kernel_size):
    """Forecast-MAE: the module with its bias."""
    return nn.NeighborhoodAttention1D(dim, heads, kernel_size, rel_pos_bias=True)
