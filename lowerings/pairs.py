# SPDX-License-Identifier: MIT
"""Tokens whose elements are computed two by two, such as rotary embeddings of interleaved pairs.

Element by element such an expression asks of each index whether it is even, and halves it: Inductor makes scalar code of
that. Here it becomes two expressions in the number of the pair, one for each of its elements. What they read in steps of
two is copied to local rows first, the two rows of results are joined last, and all between is Inductor's vector code.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._inductor.dependencies import extract_read_writes
from torch._inductor.ops_handler import WrapperHandler
from torch.utils._sympy.functions import ModularIndexing

from natten_ops.lowerings._compat import LocalBufferContext, V, cexpr_index, ir

# Head dims: below, there is no vector of 16 bytes to fill; above, the local rows would take much of a stack.
_LEAST, _MOST = 8, 1024
_INTEGERS = (torch.int32, torch.int64)
_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _is_multiple(index: Any) -> bool:
    """Whether an index is the rest of a division that leaves none; torch 2.13 simplifies sums so, but no product."""
    if not isinstance(index, ModularIndexing):
        return False
    base, divisor, modulus = index.args
    return bool(sympy.expand(base / (divisor * modulus)).is_integer)


class _OneOfEachPair(WrapperHandler):
    """Inductor's ops on expressions in one variable: reads in steps of two are taken from local rows where there are some,
    and choices that do not depend on the variable are made."""

    def __init__(self, inner: Any, variable: Any, length: int, rows: dict[tuple[str, Any], str]) -> None:
        super().__init__(inner)
        self.variable, self.length, self.rows = variable, length, rows
        self.linear = True  # all indices so far
        self.steps: set[Any] = set()  # of reads; those that are not linear have None
        self.in_steps_of_two: list[tuple[str, Any]] = []  # (tensor, start), where it is safe to read them beforehand
        self._computed: set[Any] = set()  # symbols of indices that are read from memory
        # Around what is traced now: what they hide may not exist. (In emission what is masked has a handler of its own.)
        self._masks = 0
        self._varying: dict[int, Any] = {}  # values that follow from the variable as a number
        self._known: dict[int, tuple[Any, int]] = {}  # id -> (value, the number it is); keeps the values, so the ids

    def load(self, name: str, index: Any) -> Any:
        start, step = self._linear_form(index)
        self.steps.add(step)
        if step == 2 and (name, start) in self.rows:
            return self._inner.load(self.rows[name, start], self.variable)
        if step == 2 and not self._masks and not self._computed & start.free_symbols:
            self.in_steps_of_two.append((name, start))
        return self._inner.load(name, index)

    def masked(self, mask: Any, body: Any, other: Any) -> Any:
        # A border within the row is read element by element, and in pairs more slowly: tried by hand, 1.1 and 2 times.
        self.linear = self.linear and id(mask) not in self._varying
        self._masks += 1
        value = self._inner.masked(mask, body, other)
        self._masks -= 1
        return value

    def index_expr(self, index: Any, dtype: torch.dtype) -> Any:
        start, step = self._linear_form(index)
        if step == 0 and start.is_Integer:
            return self.constant(int(start), dtype)
        value = self._inner.index_expr(index, dtype)
        if step != 0:
            self._varying[id(value)] = value
        return value

    def constant(self, number: Any, dtype: torch.dtype) -> Any:
        value = self._inner.constant(number, dtype)
        if isinstance(number, int) and dtype in (torch.bool, *_INTEGERS):
            self._known[id(value)] = value, number
        return value

    def where(self, condition: Any, if_true: Any, if_false: Any) -> Any:
        if id(condition) in self._known:
            return if_true if self._known[id(condition)][1] else if_false
        return self._inner.where(condition, if_true, if_false)

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        numbers = [self._known[id(arg)][1] for arg in args if id(arg) in self._known]
        if name in _COMPARISONS and len(numbers) == 2:
            return self.constant(bool(_COMPARISONS[name](*numbers)), torch.bool)
        value = super()._default(name, args, kwargs)
        if name == "indirect_indexing":
            self._computed.add(value)
        if any(id(arg) in self._varying for arg in args):
            self._varying[id(value)] = value
        if name == "to_dtype" and numbers and args[1] in _INTEGERS:
            self._known[id(value)] = value, numbers[0]
        return value

    def _linear_form(self, index: Any) -> tuple[Any, Any]:
        """(start, step) of an index that is linear in the variable."""
        index = sympy.sympify(index)
        if not index.has(self.variable):
            return index, 0
        if not isinstance(index, sympy.Expr):  # a condition
            self.linear = False
            return index, None
        index = index.replace(_is_multiple, lambda _: sympy.S.Zero)
        index = sympy.expand(V.graph.sizevars.simplify_with_ranges(index, {self.variable: sympy.Integer(self.length)}))
        start = index.subs(self.variable, 0)
        step = index.coeff(self.variable)
        if sympy.expand(index - start - step * self.variable) != 0:
            self.linear, step = False, None
        return start, step


class PairedToken:
    """One token, a pair of its elements at a time. `at(element)` is the index of an element of the token in `producer`."""

    def __init__(self, producer: Any, at: Callable[[Any], list[Any]], in_steps_of_two: list[tuple[str, Any]]) -> None:
        self.producer, self.at, self.in_steps_of_two = producer, at, in_steps_of_two
        self.pairs = int(producer.get_size()[-1]) // 2

    @classmethod
    def of(cls, producer: Any, at: Callable[[Any], list[Any]]) -> PairedToken | None:
        """None if Inductor's vectors take the producer as it is, or if pairs do not make it simpler."""
        size = producer.get_size()[-1]
        if not isinstance(size, (int, sympy.Integer)) or size % 2 or not _LEAST <= size <= _MOST:
            return None
        if _traced(producer, at, int(size)).linear:
            return None
        traces = [_traced(producer, functools.partial(_of_pair, at, i), int(size) // 2) for i in (0, 1)]
        if not all(trace.linear for trace in traces):
            return None
        return cls(producer, at, list(dict.fromkeys(read for trace in traces for read in trace.in_steps_of_two)))

    def emit(self, kernel: Any, out: str, dtype: torch.dtype) -> str:
        """C++ that computes the token to the row `out`, whose name the local rows share."""
        rows: dict[tuple[str, Any], str] = {}
        lines = []
        with LocalBufferContext(kernel.args) as scope:

            def local_row(name: str, row_dtype: torch.dtype) -> str:  # Inductor wants "buf" in names that it stores to
                lines.append(kernel.define_stack_allocated_buffer(name, [self.pairs], row_dtype))
                scope.add_local_buffer(kernel.local_buffers[name])
                return name

            for n, (name, start) in enumerate(self.in_steps_of_two):
                row = rows[name, start] = local_row(f"{out}_every_second{n}", V.graph.get_dtype(name))
                place = f"{kernel.args.input(name)}[{cexpr_index(kernel.rename_indexing(start))}]"
                lines.append(f"natten::take_every_second(&{place}, {self.pairs}, {row});")
            first, second = (local_row(f"{out}_paired{i}", dtype) for i in (0, 1))
            nodes = [self._element(i, rows) for i in (0, 1)]
            layout = kernel.local_buffers[first].get_layout()
            nodes[0] = ir.ComputedBuffer(name=first, layout=layout, data=nodes[0])
            lines.append(kernel.store_pointwise_nodes(kernel.local_buffers[second], nodes))
        return "\n".join([*lines, f"natten::join_pairs({first}, {second}, {self.pairs}, {out});"])

    def _element(self, i: int, rows: dict[tuple[str, Any], str]) -> Any:
        load = self.producer.make_loader()

        def compute(index: Any) -> Any:
            (pair,) = index
            with V.set_ops_handler(_OneOfEachPair(V.get_ops_handler(), pair, self.pairs, rows)):
                return load(_of_pair(self.at, i, pair))

        like = self.producer
        return ir.Pointwise(device=like.get_device(), dtype=like.get_dtype(), ranges=[self.pairs], inner_fn=compute)


def reads_along_rows(producer: Any, at: Callable[[Any], list[Any]]) -> bool:
    """Whether a token's elements are read from memory in their order or against it, or are one: not from a tensor that has
    channels, or heads, further apart."""
    return _traced(producer, at, producer.get_size()[-1]).steps <= {0, 1, -1, None}


def _of_pair(at: Callable[[Any], list[Any]], i: int, pair: Any) -> list[Any]:
    """The index of element i of a pair."""
    return at(2 * pair + i)


def _traced(producer: Any, at: Callable[[Any], list[Any]], length: int) -> _OneOfEachPair:
    """The accesses of the producer, asked for its elements at(0 .. length)."""
    handlers = []
    load = producer.make_loader()

    def compute(index: Any) -> Any:
        handlers.append(_OneOfEachPair(V.get_ops_handler(), index[0], length, {}))
        with V.set_ops_handler(handlers[0]):
            return load(at(index[0]))

    extract_read_writes(compute, [sympy.Integer(length)])
    return handlers[0]
