# SPDX-License-Identifier: MIT
"""Tokens that are joined from two halves, as rotary embeddings are spelled, without a concatenation.

Inductor writes every concatenation to memory. Along the head dim of a query, key or value it becomes a choice between the
halves, element by element: computed where the query is packed, or in the one kernel that writes the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._inductor.fx_passes import post_grad
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, register_graph_pattern

FORWARD = torch.ops.natten.neighborhood_attention_lse.default
_ATEN = torch.ops.aten
_MOST_STEPS = 32  # from a concatenation to the attention


def join(first: Any, second: Any) -> Any:
    """torch.cat([first, second], -1) of halves of one shape."""
    is_first = torch.arange(2, device=first.device)[:, None] == 0
    return torch.where(is_first, first.unsqueeze(-2), second.unsqueeze(-2)).flatten(-2)


def _users_within_reach(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    """(user, what it uses) along chains of single users."""
    for _ in range(_MOST_STEPS):
        if len(node.users) != 1:
            return
        (user,) = node.users
        yield user, node
        node = user


def joins_tokens(match: Match) -> bool:
    """Whether a concatenation is of two halves of the head dim on their way to an attention."""
    node: Any = match.output_node()
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    shape = node.meta["val"].shape
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (-1, len(shape) - 1):
        return False
    halves = [part.meta["val"] for part in parts]
    if node.meta["val"].device.type != "cpu" or any(isinstance(n, torch.SymInt) for n in (h.shape[-1] for h in halves)):
        return False
    if halves[0].shape != halves[1].shape or halves[0].dtype != halves[1].dtype:
        return False
    return any(user.target is FORWARD and used in user.args[:3] for user, used in _users_within_reach(node))


def register() -> None:
    """Called once, when the workshop opens."""

    def check(match: Match) -> bool:
        return joins_tokens(match)  # looked up anew: bench.compiled takes it away

    pattern = CallFunctionVarArgs(_ATEN.cat.default)

    @register_graph_pattern(pattern, extra_check=check, pass_dict=post_grad.pass_patterns[0])
    def replace(match: Match, parts: Any, dim: int = 0) -> None:
        match.replace_by_example(join, list(parts))
