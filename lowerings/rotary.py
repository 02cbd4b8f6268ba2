# SPDX-License-Identifier: MIT
"""Rotary embeddings in spellings that Inductor would not fuse, rewritten on their way to an attention, and their gradients
on the way back.

Inductor writes every concatenation to memory. Of two halves of the head dim it becomes a choice between them, element by
element: computed where tokens are packed, or in the one kernel that writes them. The gradient of a half, or of every other
element, is put among zeros by a scatter, which Inductor looks up under a mask: it becomes a choice too. And Inductor has no
code for complex numbers, so a product of complex pairs becomes the real products that it stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._inductor.fx_passes import post_grad
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, register_graph_pattern

from natten_ops.lowerings._compat import pick_vec_isa
from natten_ops.lowerings.fused import FORWARD, replace_node
from natten_ops.ops.fused import backward_op

_ATEN = torch.ops.aten
_MOST_STEPS = 32  # from the attention back, or from its gradients on
# What lies beyond a matrix product is no rotation.
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN.convolution.default}


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


def half_alone(half: Any, which: int) -> Any:
    """The first (0) or second half of a dimension, the other one zeros."""
    is_here = torch.arange(2, device=half.device)[:, None] == which
    return torch.where(is_here, half.unsqueeze(-2), 0).flatten(-2)


def every_other_alone(part: Any, which: int) -> Any:
    """The even (0) or odd elements of a dimension, between them zeros."""
    is_here = torch.arange(2, device=part.device) == which
    return torch.where(is_here, part.unsqueeze(-1), 0).flatten(-2)


def _sources(tokens: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """What tokens are made of, as far as nothing else computes with it, and whether it need not be in memory: a backward's
    tokens are saved."""
    found = [(node, True) for node in tokens]
    for _ in range(_MOST_STEPS):
        readers = {node: [user for user in node.users if user.op != "output"] for node, _ in found}
        found = [
            (node, inside and len(node.users) == 1) for node, inside in dict.fromkeys(found) if len(readers[node]) == 1
        ]
        yield from found
        found = [
            (parent, inside)
            for node, inside in found
            if node.target not in _PRODUCTS
            for parent in node.all_input_nodes
        ]


def _made_of(gradients: Iterable[Any], width: Any) -> Iterator[tuple[Any, bool]]:
    """What is made of the gradients of tokens, all of it in memory: rows of tokens, or of the part of them that is rotated."""
    seen: dict[Any, None] = {}
    for _ in range(_MOST_STEPS):
        users = (user for node in gradients if node.target not in _PRODUCTS for user in node.users)
        gradients = dict.fromkeys(user for user in users if user not in seen)
        seen |= gradients
    for node in seen:
        tensor = node.meta.get("val")
        last = tensor.shape[-1] if isinstance(tensor, torch.Tensor) and tensor.dim() else None
        if isinstance(last, int) and isinstance(width, int) and last > 0 and width % last == 0:
            yield node, False


def rewriting(node: Any, inside: bool) -> tuple[Callable[..., Any], list[Any]] | None:
    """(function, nodes) to put in place of a node, or None. Of what is not computed inside the attention but written, Inductor
    has vector code where halves are whole vectors; other halves it joins and scatters as fast by itself, pairs it joins so,
    and complex products it leaves to torch, which are faster."""
    if node.target is _ATEN.cat.default:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return (join, list(parts)) if _are_halves(parts, dim) and (inside or _are_vectors(parts[0])) else None
    if node.target is _ATEN.slice_scatter.default:
        return None if inside else _alone(*node.args)
    if inside and node.target is _ATEN.view_as_real.default:
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
    return bool(first.shape == second.shape and first.dtype == second.dtype and first.is_floating_point())


def _are_vectors(half: Any) -> bool:
    """Whether halves begin where Inductor's vectors do, which have more elements if all have 16 bits."""
    isa, tensor = pick_vec_isa(), half.meta["val"]
    dtype = tensor.dtype if tensor.dtype.itemsize == 2 else torch.float
    return bool(isa) and tensor.shape[-1] % isa.nelements(dtype) == 0


def _alone(
    zeros: Any, part: Any, dim: int = 0, start: Any = 0, _end: Any = None, step: int = 1
) -> tuple[Callable[..., Any], list[Any]] | None:
    """The scatter of a half, or of every other element, of the last dimension into zeros."""
    whole, some = (node.meta["val"] for node in (zeros, part))
    if zeros.target is not _ATEN.full.default or zeros.args[1] != 0:
        return None
    if whole.dtype != some.dtype or not some.is_floating_point() or dim not in (-1, whole.dim() - 1):
        return None
    if isinstance(whole.shape[-1], torch.SymInt) or 2 * some.shape[-1] != whole.shape[-1]:
        return None
    if step == 2 and start in (0, 1):
        return functools.partial(every_other_alone, which=start), [part]
    if step == 1 and start in (0, some.shape[-1]) and _are_vectors(part):
        return functools.partial(half_alone, which=int(start > 0)), [part]
    return None


def _rewrite(nodes: Iterable[tuple[Any, bool]]) -> None:
    """All of them; but of what is written no choice within a choice (a rotated half), which would be scalar code."""
    places = dict(nodes)
    chosen = [node for node, inside in places.items() if rewriting(node, inside) is not None]
    widths = {node.meta["val"].shape[-1] for node in chosen if not places[node]}
    for node in chosen:
        way = rewriting(node, places[node])  # anew: what it reads may have been rewritten by now
        if way is not None and (places[node] or len(widths) == 1):
            replace_node(node, *way)


def register() -> None:
    """Called once, when the workshop opens."""

    # The attention is what is matched: torch's matcher passes over nodes with complex inputs.
    @register_graph_pattern(CallFunctionVarArgs(FORWARD), pass_dict=post_grad.pass_patterns[0])
    def rewrite_tokens(match: Match, *_args: Any, **_kwargs: Any) -> None:
        attention: Any = match.output_node()
        if attention.args[0].meta["val"].device.type != "cpu":
            return
        _rewrite(_sources(attention.args[:3]))

    @register_graph_pattern(CallFunctionVarArgs(backward_op), pass_dict=post_grad.pass_patterns[0])
    def rewrite_gradients(match: Match, *_args: Any, **_kwargs: Any) -> None:
        attention: Any = match.output_node()
        query = attention.args[4].meta["val"]
        if query.device.type == "cpu":
            _rewrite(_made_of([attention], query.shape[-1]))
