# SPDX-License-Identifier: MIT
"""The life of the ops under `torch.jit.trace`, which raises for lists of bools; fvcore counts FLOPs on such traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natten_ops.ops._register import LIBRARY

TRACED_OPS = ("neighborhood_attention_lse", "na1d", "na2d", "na3d", "na_qk", "na_av")
_C: Any = torch._C  # the stubs leave out half of what torch.jit itself uses


def _recorder(op: Any) -> Callable[..., Any]:
    """A Tracer kernel that writes the call as one node into the graph being traced, then runs it untraced."""
    schema = op._schema

    def record(*args: Any, **kwargs: Any) -> Any:
        state = _C._get_tracing_state()
        graph = state.graph()
        given = dict(zip((argument.name for argument in schema.arguments), args)) | kwargs
        values = [_graph_value(graph, a, given.get(a.name, a.default_value)) for a in schema.arguments]
        node = graph.insertNode(graph.create(schema.name, values, len(schema.returns)))
        _C._set_tracing_state(None)  # also switches this kernel off
        try:
            results = op(*args, **kwargs)
        finally:
            _C._set_tracing_state(state)
        for value, tensor in zip(node.outputs(), results if isinstance(results, tuple) else (results,)):
            value.inferTypeFrom(tensor)
            _C._set_value_trace(tensor, value)
        return results

    return record


def _graph_value(graph: Any, argument: Any, given: Any) -> Any:
    if isinstance(given, Tensor):
        return _C._get_value_trace(given)
    if not isinstance(given, (list, tuple)):
        return graph.insertConstant(given)
    entries = [graph.insertConstant(entry) for entry in given]
    (value,) = graph.insertNode(graph.create("prim::ListConstruct", entries, 1)).outputs()
    value.setType(argument.type)
    return value


for name in TRACED_OPS:
    LIBRARY.impl(name, _recorder(getattr(torch.ops.natten, name).default), "Tracer")
