# SPDX-License-Identifier: MIT
"""The fused op in Inductor: the CPU engine as a template that fuses, or an extern call of the eager kernel."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import sympy
import torch
from torch import Tensor
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.pattern_matcher import fwd_only
from torch._inductor.virtualized import ops
from torch._subclasses.fake_tensor import unset_fake_temporarily

from natten_ops import _compiler, backends
from natten_ops.geometry.params import Box, NAParams, make_box, make_params
from natten_ops.lowerings import autotune
from natten_ops.lowerings._compat import V, empty_strided, hints, ir, select
from natten_ops.lowerings.pairs import PairedToken, reads_along_rows
from natten_ops.lowerings.template import ForwardTemplate, Geometry, token_index

FORWARD = torch.ops.natten.neighborhood_attention_lse.default
_fallback = fallback_handler(FORWARD, add_to_fallback_set=False)
# What writing keys to memory and reading them back costs, in ops of their producer on one number; where they come in pairs, of
# which Inductor makes scalar code, writing takes longer. Ops times packings above the first, at which computing keys anew lost
# against writing them, on one thread: 5 to 14 lost, up to 3.3 won, 4 was even; pairs still won at 15 (bench.compiled keys).
OPS_OF_A_PASS, OPS_OF_A_PASS_OF_PAIRS = 4, 16
_ATEN = torch.ops.aten
_SAME_NUMBERS = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN.permute.default, _ATEN.transpose.int, _ATEN.unsqueeze.default,
    _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.alias.default,
}  # fmt: skip


def _extern_call(*args: Any, backend: int = 0, **kwargs: Any) -> Any:
    """The eager kernel, reading packed projections in place.

    Inductor's own fallback copies them, and writes the defaults of absent lists into the node, in place of which
    AOTInductor's executor then finds None (torch 2.13: it skips lists of length 0). Left out, they get the schema's
    default there. `backend` must stay: the executor counts the ints.
    """
    given = {
        name: value for name, value in kwargs.items() if not (isinstance(value, (list, tuple)) and len(value) == 0)
    }
    return _fallback(*args, **given, backend=backend)


def _lower_forward(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: Any = None,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    key_mask: Any = None,
    q_origin: Sequence[Any] = (),
    kv_origin: Sequence[Any] = (),
    extent: Sequence[Any] = (),
    backend: int = 0,
) -> Any:
    params = make_params(len(kernel_size), kernel_size, stride, dilation, is_causal)
    inputs = (query, key, value, additional_keys, additional_values, rpb, key_mask)
    box = (q_origin, kv_origin, extent)
    if why_not_template(inputs, params, scale, box, backend) is not None:
        extras = {"rpb": rpb, "key_mask": key_mask, "q_origin": q_origin, "kv_origin": kv_origin, "extent": extent}
        lists = (kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values)
        return _extern_call(query, key, value, *lists, backend=backend, **extras)
    return _lower_to_template(inputs, params, scale, box)


# ---- the choice ----------------------------------------------------------------------------------------------------


def why_not_template(
    inputs: Sequence[Any], params: NAParams, scale: Any, box: Sequence[Sequence[Any]], backend: int
) -> str | None:
    """The reason for the extern call, or None: those of `backends.why_not_inlined`, and what only a graph knows."""
    query, key, value = inputs[:3]
    if query.get_device().type != "cpu":
        return "the template is C++"
    if backend not in (0, backends.by_name("cpu-tiled").id):
        return f"backend {backend} was named"
    if scale is not None and not isinstance(scale, (int, float)):
        return "the scale is symbolic"
    sizes = [*query.get_size(), *key.get_size(), value.get_size()[-1]]
    if len(box[2]) and not all(isinstance(n, (int, sympy.Integer)) for n in (*sizes, *box[0], *box[1], *box[2])):
        return "sub-boxes of symbolic size are checked when they run, by the kernel"
    if any(V.graph.sizevars.statically_known_equals(size, 0) for size in sizes):
        return "a tensor is empty"
    if _is_used(1) and not _is_used(0):
        return "of a template of two outputs the first one must be used"
    if _is_used(1) and _is_written_later(V.graph.current_node):
        return "what it reads is written to later, and torch lets nobody wait for a template of two outputs but its readers"
    reasons = backends.why_not_inlined(_described(inputs, params, scale, make_box(params.rank, *box)))
    return "; ".join(reasons) if reasons else _compiler.why_not_here()


def _described(inputs: Sequence[Any], params: NAParams, scale: float | None, box: Box | None) -> backends.Problem:
    """The problem at its likely sizes; the window, which is what limits tiles, is not symbolic."""
    with unset_fake_temporarily():
        return backends.describe(_shells(inputs), params, box, scale, whole=True)


def _shells(inputs: Sequence[Any]) -> list[Tensor | None]:
    """Tensors of the likely sizes, of one number each."""
    shapes = [None if t is None else (hints(t.get_size()), t.get_dtype()) for t in inputs]
    return [
        None if s is None else torch.empty((), dtype=s[1], device="cpu").expand([max(n, 1) for n in s[0]])
        for s in shapes
    ]


def _times_packed(inputs: Sequence[Any], params: NAParams, box: Sequence[Sequence[Any]]) -> float:
    """How often the engine packs a key of the problem at its likely sizes, on average."""
    with unset_fake_temporarily():
        shells = _shells(inputs)
        lists = [list(entry) for entry in params], [hints(entry) for entry in box]
        ask = torch.ops.natten._cpu_tiled_times_packed
        return float(ask(*shells[:3], *lists[0], *shells[3:], *lists[1], True))


# ---- the template --------------------------------------------------------------------------------------------------


def _lower_to_template(inputs: Sequence[Any], params: NAParams, scale: float | None, box: Sequence[Any]) -> Any:
    query, key, value, additional_keys, additional_values, rpb, key_mask = inputs
    rank, sizes = params.rank, V.graph.sizevars
    device, dtype = query.get_device(), query.get_dtype()
    head_dim, value_dim = sizes.guard_int(query.get_size()[-1]), sizes.guard_int(value.get_size()[-1])
    size = [*query.get_size()[:-1], value_dim]
    zeros = [0] * rank
    geometry = Geometry(
        *params,
        scale=float(head_dim**-0.5 if scale is None else scale),
        lengths=box[2] or size[1 : 1 + rank],
        q_origin=box[0] or zeros,
        kv_origin=box[1] or zeros,
    )
    rows = {"query": (query, head_dim), "key": (key, head_dim), "value": (value, value_dim)}
    producers = _inlined(rows, lambda: _times_packed(inputs, params, box))
    more = {"rpb": rpb, "key_mask": key_mask}
    more |= {"additional_keys": additional_keys, "additional_values": additional_values}
    given = {name: tokens for name, (tokens, _) in rows.items() if name not in producers} | more
    tensors = {name: _readable(t) for name, t in given.items() if t is not None}
    read = {name for producer in producers.values() for name in producer.get_read_names()}
    extra = [V.graph.get_buffer(name) for name in sorted(read)]
    layout = ir.FixedLayout(device, dtype, size)
    template = ForwardTemplate(layout, geometry, tensors, producers, extra)
    choices: list[Any] = []
    template.maybe_append_choice(choices)
    if not producers and not _is_used(1) and autotune.is_asked_for(template.input_nodes):
        autotune.append_choices(choices, template, params, geometry.scale, box)
    out = select("neighborhood_attention", choices, template.input_nodes, layout)
    lse_dtype = template.sum_dtype
    if not _is_used(1):
        return out, empty_strided(size[:-1], None, dtype=lse_dtype, device=device)  # dead, never allocated
    buffer = out.data.data
    layouts = layout, ir.FixedLayout(device, lse_dtype, size[:-1])
    buffer.outputs = [ir.MultiOutput(part, buffer, [(tuple, i)]) for i, part in enumerate(layouts)]
    buffer.layout = ir.MultiOutputLayout(device=device)
    return tuple(ir.TensorBox.create(output) for output in buffer.outputs)


def _readable(tensor: Any) -> Any:
    """A tensor in memory; views of it, such as a part of a packed projection, stay views."""
    return ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(tensor))


def _inlined(rows: dict[str, tuple[Any, int]], times_packed: Callable[[], float]) -> dict[str, Any]:
    """What computes the query, key and value where they are packed, of those that are not in memory."""
    producers = {name: _producer(*row) for name, row in rows.items() if not ir.is_storage_and_layout(row[0])}
    times = functools.cache(times_packed)
    for name, node in zip(rows, V.graph.current_node.args):
        if name not in producers:
            continue
        way = way_of(producers[name])
        anew = name == "query" or not (_is_read_elsewhere(node) or (times() - 1) * way.ops > way.ops_of_a_pass)
        if not (anew and way.in_rows):
            del producers[name]
    return producers


class Way(NamedTuple):
    """How a producer of tokens can be computed in the attention, a row of a token at a time."""

    in_rows: bool  # no element by element from places that lie apart
    ops: int  # on a number
    ops_of_a_pass: int


def way_of(producer: Any) -> Way:
    rank = len(producer.get_size()) - 3

    def at(element: Any) -> list[Any]:
        return token_index(rank, element)

    with mock.patch.object(ir.FlexibleLayout, "allow_indexing", True):  # as Inductor does to look into expressions
        in_pairs = PairedToken.of(producer, at) is not None
        in_rows = in_pairs or reads_along_rows(producer, at)
    ops_of_a_pass = OPS_OF_A_PASS_OF_PAIRS if in_pairs else OPS_OF_A_PASS
    return Way(in_rows, producer.inner_fn_opcount().num_ops, ops_of_a_pass)


def _is_read_elsewhere(node: Any) -> bool:
    """Whether tokens have users beside the attention, so that they will be in memory anyway."""
    while isinstance(node, torch.fx.Node):
        if len(node.users) > 1:
            return True
        node = node.args[0] if node.target in _SAME_NUMBERS else None
    return False


def _producer(tokens: Any, dim: int) -> Any:
    """Tokens, whatever computes them, as one expression in the type of sums; nothing is written to memory."""
    dtype = torch.float64 if tokens.get_dtype() == torch.float64 else torch.float32
    load = tokens.make_loader()
    return ir.Pointwise(
        device=tokens.get_device(),
        dtype=dtype,
        ranges=[*tokens.get_size()[:-1], dim],
        inner_fn=lambda index: ops.to_dtype(load(index), dtype),
    )


def _is_used(output: int) -> bool:
    users = V.graph.current_node.users
    return any(user.target is not operator.getitem or user.args[1] == output for user in users)


def _is_written_later(node: Any) -> bool:
    """Whether tensors that the node's inputs are made of are written to after it, as a cache that is moved on is."""
    written: set[Any] = set()
    later = node.next
    while later.op != "root":
        written.update(_written_by(later))
        later = later.next
    seen: set[Any] = set()
    waiting = list(node.all_input_nodes) if written else []
    while waiting:
        source = waiting.pop()
        if source not in seen:
            seen.add(source)
            waiting += source.all_input_nodes
    return not written.isdisjoint(seen)


def _written_by(node: Any) -> Iterator[Any]:
    """What an op changes in place, and what that is a view of."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        changed = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        while isinstance(changed, torch.fx.Node):
            yield changed
            is_view = isinstance(changed.target, torch._ops.OpOverload) and changed.target.is_view
            changed = changed.args[0] if is_view else None


def replace_node(node: Any, function: Callable[..., Any], arguments: list[Any]) -> Any:
    """In the graph, `function` of `arguments` (nodes) instead of a node; returns its result's."""
    with V.fake_mode:
        traced = fwd_only(function, [argument.meta["val"] for argument in arguments])
    places: Any = traced.graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(traced.graph, dict(zip(places, arguments)))
    node.replace_all_uses_with(result)
    erase_unused(node)
    return result


def erase_unused(node: Any) -> None:
    """The node and what only it used: dead calls would be made, and a dead reader would have tokens written to memory."""
    if isinstance(node, torch.fx.Node) and node.op == "call_function" and not node.users:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            erase_unused(source)


def register() -> None:
    """Called once, when the workshop opens."""
    register_lowering(FORWARD, type_promotion_kind=None)(_lower_forward)
