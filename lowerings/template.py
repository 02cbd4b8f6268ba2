# SPDX-License-Identifier: MIT
"""The fused forward as a C++ template: the CPU engine with its neighbours' code in it.

The engine walks tiles; wherever it wants the query (key, value) of a token it calls code that Inductor generated from the
ops that produce it, and whenever an output (or a log-sum-exp) of a token is ready it calls code generated from the ops that
follow. Both are loops over the head dim of one token, so that dilation, strides, borders, sub-boxes and ranks are the
engine's business alone. Tokens that exist in memory, and an output that nothing follows, go without calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sympy
import torch

from natten_ops.lowerings._compat import (
    CppTemplate,
    LocalBufferContext,
    cexpr_index,
    get_export_declaration,
    hints,
    ir,
    parallel_num_threads,
    parse_expr_with_index_symbols,
)
from natten_ops.lowerings.engine import engine_text
from natten_ops.lowerings.pairs import PairedToken

SOURCE = (Path(__file__).parent / "templates" / "forward.cpp.jinja").read_text()
BATCH_AT, HEAD_AT, Z_AT, Y_AT, X_AT = parse_expr_with_index_symbols(["batch_at", "head_at", "z_at", "y_at", "x_at"])
ELEMENTS = {
    torch.float64: "double", torch.float32: "float", torch.float16: "natten::float16", torch.bfloat16: "natten::bfloat16",
}  # fmt: skip
# Bits of MapKind (csrc/cpu/tiled/scores.h) that occur: without stride and dilation neighbours see neighbours.
DENSE_MAPS, ALL_MAPS = 0b00111, 0b11111


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The op's settings with all lists full; lengths of the global grid and origins may be symbolic."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    scale: float
    lengths: Sequence[Any]
    q_origin: Sequence[Any]
    kv_origin: Sequence[Any]

    def maps(self) -> int:
        return DENSE_MAPS if max(*self.stride, *self.dilation) == 1 else ALL_MAPS


def token_index(rank: int, *rest: Any) -> list[Any]:
    """The place of a token in a tensor [batch, axes.., heads, ..rest]."""
    return [BATCH_AT, *(Z_AT, Y_AT, X_AT)[3 - rank :], HEAD_AT, *rest]


class TokenStore:
    """How what is ready of one token leaves the kernel: plain, through the epilogue that was fused, or both.

    Ops that follow write where the plain output would lie (the scheduler fuses no others), but may call that place by
    another name: a reshape or a permutation of its size.
    """

    def __init__(self, buffer_name: str, out: Any, epilogue: Sequence[Any], keep_plain: bool) -> None:
        self.buffer_name, self.out, self.epilogue = buffer_name, out, list(epilogue)
        self.source, self.destination = out, self.epilogue[-1] if self.epilogue else out
        self.keep_plain = keep_plain or not self.epilogue
        if self.epilogue and self.keep_plain:  # the plain store becomes a first epilogue that copies
            self.source = ir.Buffer(name=f"{out.get_name()}_token", layout=out.get_layout())
            copy = ir.Pointwise(
                device=out.get_device(), dtype=out.get_dtype(), ranges=list(out.get_size()),
                inner_fn=self.source.make_loader(),
            )  # fmt: skip
            self.epilogue.insert(0, ir.ComputedBuffer(name=out.get_name(), layout=out.get_layout(), data=copy))

    def kernel_outputs(self) -> dict[str, Any]:
        outputs = [self.out] * self.keep_plain + [self.destination] * bool(self.epilogue)
        return {f"{self.buffer_name}_{i}": node for i, node in enumerate(outputs)}

    def emit(self, kernel: Any, rank: int, dtype: torch.dtype) -> str:
        """Loops over the elements of one token, from the engine's row to memory; empty if the engine writes itself."""
        if not self.epilogue:
            return ""
        size = list(self.out.get_size())
        row = size[rank + 2 :] or [sympy.Integer(1)]  # a log-sum-exp is a row of one

        def full(index: Sequence[Any]) -> list[Any]:
            return token_index(rank, *index[: len(size) - rank - 2])

        kernel.define_buffer(self.buffer_name, row, dtype)  # the engine's, named alike: not allocated here
        layout = self.destination.get_layout()
        strides = ir.FlexibleLayout.contiguous_strides(size)
        offset = layout.offset + sum(at * stride for at, stride in zip(token_index(rank), strides))
        token = ir.FixedLayout(layout.device, layout.dtype, row, [sympy.Integer(1)], offset)
        reindexers = [_to_node(node, size, full) for node in self.epilogue]
        target = ir.ReinterpretView(data=self.destination, layout=token)
        return kernel.store_output(
            target, kernel.local_buffers[self.buffer_name], self.source, self.epilogue, reindexers=reindexers
        )


def _to_node(node: Any, size: list[Any], full: Any) -> Any:
    """Index of a token's element -> index of an epilogue node."""
    order = ir.get_stride_order(hints(node.get_stride()))  # 0 = innermost
    outer_first = list(reversed(ir.stride_order2fill_order(order)))
    reshape = ir.View.dynamic_reshape_indexer([node.get_size()[i] for i in outer_first], size)
    permute = ir.same_reorder([len(order) - 1 - position for position in order])
    return lambda index: permute(reshape(full(index)))


def _by_source(outs: Sequence[Any], epilogue: Sequence[Any]) -> list[list[Any]]:
    """What follows each output, directly or not; what follows both belongs to the first, which is ready last."""
    owner = {out.get_name(): i for i, out in enumerate(outs)}
    for node in epilogue:
        followed = [owner[name] for name in node.get_read_names() if name in owner]
        if followed:
            owner[node.get_name()] = min(followed)
    for node in reversed(epilogue):  # what follows neither, such as random numbers, goes with its reader
        name = node.get_name()
        if name not in owner:
            owner[name] = next(owner[reader.get_name()] for reader in epilogue if name in reader.get_read_names())
    return [[node for node in epilogue if owner[node.get_name()] == i] for i in range(len(outs))]


class ForwardTemplate(CppTemplate):
    """One fused forward. `tensors` are the op's inputs by the name of their field in csrc/problem.h; `producers` compute
    those of the query, key and value that are not among them, and `extra` are the buffers that they read."""

    def __init__(
        self,
        layout: Any,
        geometry: Geometry,
        tensors: dict[str, Any],
        producers: dict[str, Any],
        extra: Sequence[Any],
    ) -> None:
        inputs = [*tensors.values(), *extra]
        super().__init__("neighborhood_attention", inputs, layout, parallel_num_threads())
        self.geometry, self.tensors, self.producers, self.extra = geometry, tensors, producers, extra

    @property
    def rank(self) -> int:
        return len(self.geometry.kernel_size)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.layout.dtype == torch.float64 else torch.float32

    def render(
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: Any = None,
        epilogue_nodes: Any = None,
        tiling: Sequence[int] = (),
        **_: Any,
    ) -> str:
        # The first rendering (for benchmarking) has no template node.
        outs = getattr(template_buffer_node, "outputs", None) or [template_buffer_node or self.output_node]
        following = _by_source(outs, epilogue_nodes or [])
        stores = [
            TokenStore(name, out, nodes, bool(flag_template_buffer_has_other_users))
            for name, out, nodes in zip(("out_buf", "lse_buf"), outs, following)
        ]
        outputs = {name: node for store in stores for name, node in store.kernel_outputs().items()}
        aliases = {s.out.get_name(): s.destination.get_name() for s in stores if not s.keep_plain}
        inputs = {**self.tensors, **{f"token_input{i}": node for i, node in enumerate(self.extra)}}
        definition = kernel.def_kernel(inputs=inputs, outputs=outputs, aliases=aliases)  # names tensors and sizes
        printer = _Printer(kernel)
        epilogues = [store.emit(kernel, self.rank, self.sum_dtype) for store in stores]
        return _parsed().render(
            header=self.header().getvalue(), engine=engine_text(), export_declaration=get_export_declaration(),
            definition=definition, prologues={name: self._emit(kernel, name) for name in self.producers},
            epilogue=epilogues[0], lse_epilogue=epilogues[1] if len(epilogues) > 1 else "", threads=self.num_threads,
            tensors=self._rows(printer, stores), tiling=tiling, **self._numbers(printer),
        )  # fmt: skip

    def _emit(self, kernel: Any, name: str) -> str:
        """Loops that compute one token's query, key or value."""
        producer, row = self.producers[name], f"{name}_buf"
        kernel.define_buffer(row, [producer.get_size()[-1]], self.sum_dtype)
        paired = PairedToken.of(producer, lambda element: token_index(self.rank, element))
        if paired is not None:
            return paired.emit(kernel, row, self.sum_dtype)
        buffer = kernel.local_buffers[row]
        with LocalBufferContext(kernel.args) as scope:
            scope.add_local_buffer(buffer)
            return kernel.store_pointwise_nodes(
                buffer, [producer], reindexers=[lambda index: token_index(self.rank, *index)]
            )

    def _rows(self, printer: _Printer, stores: Sequence[TokenStore]) -> dict[str, dict[str, Any]]:
        """Pointers and strides of csrc/problem.h, of inputs and of what the engine stores itself."""
        rank = self.rank
        tensors = {name: printer.rows(node, *SHAPES[name](rank)) for name, node in self.tensors.items()}
        for field, store in zip(("out", "lse"), stores):
            if not store.epilogue:
                tensors[field] = printer.rows(store.out, *SHAPES[field](rank))
        return tensors

    def _numbers(self, printer: _Printer) -> dict[str, Any]:
        g, size, key = self.geometry, self.layout.size, self.tensors.get("key") or self.producers["key"]
        rank, head_dim = self.rank, key.get_size()[-1]
        additional = self.tensors["additional_keys"].get_size()[1] if "additional_keys" in self.tensors else 0
        known = int(additional) if isinstance(additional, (int, sympy.Integer)) else -1
        pad = 3 - rank
        one = {
            "length": 1,
            "kernel": 1,
            "stride": 1,
            "dilation": 1,
            "causal": "false",
            "query_tokens": 1,
            "key_tokens": 1,
        }
        axes = [{**one, "q_origin": 0, "kv_origin": 0, "unknown": False}] * pad
        for axis in range(rank):
            axes.append({
                "length": printer.number(g.lengths[axis]), "kernel": g.kernel_size[axis], "stride": g.stride[axis],
                "dilation": g.dilation[axis], "causal": "true" if g.is_causal[axis] else "false",
                "query_tokens": printer.number(size[1 + axis]), "key_tokens": printer.number(key.get_size()[1 + axis]),
                "q_origin": printer.number(g.q_origin[axis]), "kv_origin": printer.number(g.kv_origin[axis]),
                "number": axis, "unknown": not isinstance(g.lengths[axis], (int, sympy.Integer)),
            })  # fmt: skip
        rpb = self.tensors.get("rpb")
        return {
            "batch": printer.number(size[0]), "heads": printer.number(size[rank + 1]), "axes": axes,
            "heads_kv": printer.number(key.get_size()[rank + 1]), "head_dim": printer.number(head_dim),
            "value_dim": printer.number(size[-1]), "additional": printer.number(additional), "scale": repr(g.scale),
            "rpb_wide": "true" if rpb is not None and rpb.get_dtype() != self.layout.dtype else "false",
            "element": ELEMENTS[self.layout.dtype],
            "given": [printer.number(size[-1]), g.maps(), known, *sorted(set(g.kernel_size))],
        }  # fmt: skip


@functools.cache
def _parsed() -> Any:
    """Parsing takes longer than filling in, which happens twice a kernel."""
    return ForwardTemplate._template_from_string(SOURCE)


def _like_query(rank: int) -> tuple[int | None, list[int], int | None, int | None]:
    return 0, list(range(1, rank + 1)), rank + 1, rank + 2


# Which dimension of each tensor is the batch, which are its axes (the last ones of three), the head and the head dim.
SHAPES: dict[str, Any] = {
    **dict.fromkeys(("query", "key", "value", "out"), _like_query),
    "lse": lambda rank: (0, list(range(1, rank + 1)), rank + 1, None),
    "key_mask": lambda rank: (0, list(range(1, rank + 1)), None, None),
    "rpb": lambda rank: (None, list(range(1, rank + 1)), 0, None),
    **dict.fromkeys(("additional_keys", "additional_values"), lambda rank: (0, [1], 2, 3)),
}


class _Printer:
    """Numbers and tensors as the kernel's C++ says them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def number(self, expression: Any) -> str:
        return cexpr_index(self.kernel.rename_indexing(sympy.sympify(expression)))

    def rows(self, node: Any, batch: int | None, axes: list[int], head: int | None, dim: int | None) -> dict[str, Any]:
        strides = [self.number(stride) for stride in node.get_stride()]
        pick = [None] * (3 - len(axes)) + axes

        def stride(at: int | None) -> str:
            return "0" if at is None else strides[at]

        return {
            "pointer": f"&{self.kernel.index(node, [0] * len(strides))}",
            "batch": stride(batch), "tokens": [stride(at) for at in pick], "head": stride(head), "dim": stride(dim),
        }  # fmt: skip
