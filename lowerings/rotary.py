# SPDX-License-Identifier: MIT
"""Rotary embeddings in spellings that Inductor would not fuse, rewritten on their way to an attention.

Inductor writes every concatenation to memory. Of two halves of the head dim it becomes a choice between them, element by
element: computed where tokens are packed, or in the one kernel that writes them. And Inductor has no code for complex
numbers, so a product of complex pairs becomes the real products that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._inductor.fx_passes import post_grad
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, register_graph_pattern

from natten_ops.lowerings.fused import FORWARD, replace_node

_ATEN = torch.ops.aten
_MOST_STEPS = 32  # from the attention back


def join(first: Any, second: Any) -> Any:
    """torch.cat([first, second], -1) of halves of one shape."""
    is_first = torch.arange(2, device=first.device)[:, None] == 0
    return torch.where(is_first, first.unsqueeze(-2), second.unsqueeze(-2)).flatten(-2)


def turn(pairs: Any, table: Any) -> Any:
    """view_as_real(view_as_complex(pairs) * table)."""
    real, imaginary = pairs.unbind(-1)
    cosine, sine = torch.view_as_real(table).unbind(-1)
    is_real = torch.arange(2, device=pairs.device) == 0
    products = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    return torch.where(is_real, *(t.unsqueeze(-1) for t in products))


def _sources(tokens: Iterable[Any]) -> Iterator[Any]:
    """What tokens are made of, as far as nothing else uses it."""
    for _ in range(_MOST_STEPS):
        tokens = [node for node in dict.fromkeys(tokens) if len(node.users) == 1]
        yield from tokens
        tokens = [parent for node in tokens for parent in node.all_input_nodes]


def rewriting(node: Any) -> tuple[Callable[..., Any], list[Any]] | None:
    """(function, nodes) to put in place of a node, or None."""
    if node.target is _ATEN.cat.default:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return (join, list(parts)) if _are_halves(parts, dim) else None
    if node.target is _ATEN.view_as_real.default:
        product: Any = node.args[0]
        if product.target is not _ATEN.mul.Tensor or len(product.users) != 1:
            return None
        for pairs, table in (product.args, product.args[::-1]):
            if getattr(pairs, "target", None) is _ATEN.view_as_complex.default and isinstance(table, torch.fx.Node):
                return (turn, [pairs.args[0], table]) if table.meta["val"].is_complex() else None
    return None


def _are_halves(parts: Any, dim: Any) -> bool:
    """Whether two parts of one shape are joined along the last dimension, whose size is known."""
    if len(parts) != 2:
        return False
    first, second = (part.meta["val"] for part in parts)
    if dim not in (-1, first.dim() - 1) or any(isinstance(t.shape[-1], torch.SymInt) for t in (first, second)):
        return False
    return bool(first.shape == second.shape and first.dtype == second.dtype)


def register() -> None:
    """Called once, when the workshop opens."""

    # The attention is what is matched: torch's matcher passes over nodes with complex inputs.
    @register_graph_pattern(CallFunctionVarArgs(FORWARD), pass_dict=post_grad.pass_patterns[0])
    def rewrite_tokens(match: Match, *_args: Any, **_kwargs: Any) -> None:
        attention: Any = match.output_node()
        if attention.args[0].meta["val"].device.type != "cpu":
            return
        for node in list(_sources(attention.args[:3])):
            found = rewriting(node)  # looked up anew: bench.compiled takes it away
            if found is not None:
                replace_node(node, *found)
