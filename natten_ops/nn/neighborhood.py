# SPDX-License-Identifier: MIT
"""Multi-head neighborhood attention as a module: projections around one op; one body for all ranks."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natten_ops import functional
from natten_ops.functional.nested import has_holes, on_values, split_heads
from natten_ops.geometry.params import integer, make_params

RPB_STD = 0.02  # of the truncated normal that initialises a bias table, as in Swin and NAT


_DOC = """proj(na(qkv(x))): multi-head self-attention of every token to its {rank}-D neighborhood.

Args:
    embed_dim: channels of input and output; a multiple of num_heads.
    num_heads: query heads.
    kernel_size, stride, dilation, is_causal: as in `natten_ops.na{rank}d`, in tokens.
    rel_pos_bias: train a bias table `[num_heads, 2 * kernel_size - 1 an axis]` (stride 1 only).
    num_kv_heads: key/value heads, a divisor of num_heads; None means num_heads.
    qkv_bias: bias of the query/key/value projection.
    qk_scale: factor of the dot products; None means head_dim ** -0.5.
    attn_drop: dropout probability of the attention weights, 0 to 1. Above 0, training runs the unfused ops, which keep
        the weights in memory, and with num_kv_heads < num_heads copies of keys and values.
    proj_drop: dropout probability after the output projection, 0 to 1.
    device, dtype: of the parameters.

Shape:
    `[batch, {axes}, embed_dim]` in and out. With `forward(x, return_attention=True)` also the attention map, the weights
    before dropout: `[batch, num_heads, {axes}, prod(kernel_size)]`, slots row-major as in `natten_ops.na{rank}d_qk`.

Raises:
    ValueError, TypeError: settings that do not fit, with the way out.

Source: Hassani et al., "Neighborhood Attention Transformer", 2023.

Example:
    >>> import torch, natten_ops
    >>> layer = natten_ops.nn.NeighborhoodAttention{rank}D(64, num_heads=4, kernel_size=3, rel_pos_bias=True)
    >>> layer(torch.randn(1, {example}, 64)).shape
    torch.Size([1, {example}, 64])
"""


class _NeighborhoodAttention(nn.Module):
    """One body for all ranks; `rank` is set by the subclasses, which carry the documentation."""

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        rel_pos_bias: bool = False,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dim, num_heads = integer("embed_dim", embed_dim), integer("num_heads", num_heads)
        num_kv_heads = None if num_kv_heads is None else integer("num_kv_heads", num_kv_heads)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} is no positive multiple of num_heads={num_heads}; change one of them"
            )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}; change one of them")
        params = make_params(self.rank, kernel_size, stride, dilation, is_causal)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kernel_size, self.stride, self.dilation, self.is_causal = params
        self.qk_scale = functional.checked_scale(qk_scale)
        channels = (num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(embed_dim, channels, bias=qkv_bias, device=device, dtype=dtype)
        self.register_parameter("rpb", None)
        if rel_pos_bias:
            if any(step != 1 for step in self.stride):
                raise ValueError(f"rel_pos_bias needs stride 1, and stride={self.stride}; drop one of them")
            table = [2 * kernel - 1 for kernel in self.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *table, device=device, dtype=dtype))
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        attn_drop = _probability("attn_drop", attn_drop)
        self.attn_drop = nn.Dropout(attn_drop) if attn_drop else None  # one that is never called is a warning of fvcore
        self.proj_drop = nn.Dropout(_probability("proj_drop", proj_drop))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew; the projections as `nn.Linear` draws them."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=RPB_STD)

    def forward(self, x: Tensor, return_attention: bool = False) -> Any:
        """`[batch, *spatial, embed_dim]` to the same; with return_attention, (that, attention map)."""
        if not isinstance(x, Tensor):
            raise TypeError(f"input is a {type(x).__name__}; give a torch.Tensor")
        if x.is_nested and (x.layout != torch.jagged or self.rank > 1):
            raise ValueError(
                f"input is nested as {x.layout}; give a dense tensor, or, to the 1-D module, lines nested as torch.jagged"
            )
        if x.is_nested and has_holes(x):
            raise ValueError("input has holes between its lines; give input.contiguous()")
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            axes = ", ".join(f"axis {axis}" for axis in range(self.rank))
            raise ValueError(f"input has shape {list(x.shape)}; give [batch, {axes}, embed_dim={self.embed_dim}]")
        heads = self.qkv(x).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        # Views: the kernels read the packed projection in place.
        query, key, value = split_heads(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads])
        attention_map = None
        if return_attention or self._drops():
            out, attention_map = self._attend_unfused(query, key, value)
        else:
            scale, windows = self._scale(), self._windows()
            out = functional.neighborhood_attention(query, key, value, **windows, scale=scale, rpb=self.rpb)
        projected = self.proj_drop(self.proj(out.flatten(-2)))
        return (projected, attention_map) if return_attention else projected

    def _windows(self) -> dict[str, Any]:
        """The settings of the ops; subclasses may keep them elsewhere."""
        settings = ("kernel_size", "stride", "dilation", "is_causal")
        return {name: getattr(self, name) for name in settings}

    def _scale(self) -> float | None:
        return self.qk_scale

    def _drops(self) -> bool:
        """Whether weights are dropped now: by the Dropout, or by what took its place."""
        drop: Any = self.attn_drop
        if drop is None or isinstance(drop, nn.Identity):
            return False
        return not isinstance(drop, nn.Dropout) or (drop.training and drop.p > 0)

    def _attend_unfused(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same attention with its weights in memory, which dropout and onlookers need."""
        scale, windows, group = self._scale(), self._windows(), self.num_heads // self.num_kv_heads
        if group > 1:
            key, value = (on_values(lambda t: t.repeat_interleave(group, dim=-2), t) for t in (key, value))
        query, key, value = (tokens.movedim(-2, 1) for tokens in (query, key, value))
        qk, av = getattr(functional, f"na{self.rank}d_qk"), getattr(functional, f"na{self.rank}d_av")
        logits = qk(query * (self.head_dim**-0.5 if scale is None else scale), key, **windows, rpb=self.rpb)
        weights = on_values(lambda t: t.softmax(dim=-1), logits)
        drop: Any = self.attn_drop
        dropped = on_values(drop, weights) if self._drops() else weights
        return av(dropped, value, **windows).movedim(1, -2), weights

    def extra_repr(self) -> str:
        """The settings that differ from the defaults, for `print(model)`."""
        parts = [f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        for name, plain in (("stride", 1), ("dilation", 1), ("is_causal", False)):
            if any(value != plain for value in getattr(self, name)):
                parts.append(f"{name}={getattr(self, name)}")
        if self.rpb is not None:
            parts.append("rel_pos_bias=True")
        if self.qk_scale is not None:
            parts.append(f"qk_scale={self.qk_scale}")
        return ", ".join(parts)


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number from 0 to 1")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}={value} is no probability; give a number from 0 to 1")
    return number


def _of_rank(rank: int) -> type[_NeighborhoodAttention]:
    axes = ", ".join(("z", "y", "x")[-rank:])
    doc = _DOC.format(rank=rank, axes=axes, example=", ".join(["8"] * rank))
    name = f"NeighborhoodAttention{rank}D"
    return type(
        name, (_NeighborhoodAttention,), {"rank": rank, "__doc__": doc, "__module__": __name__, "__qualname__": name}
    )


NeighborhoodAttention1D = _of_rank(1)
NeighborhoodAttention2D = _of_rank(2)
NeighborhoodAttention3D = _of_rank(3)
