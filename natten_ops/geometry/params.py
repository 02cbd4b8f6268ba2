# SPDX-License-Identifier: MIT
"""The window of a query, the queries of a key, and every check on a neighborhood-attention geometry.

`csrc/geometry.h` is the C++ twin of the formulas here; `tests/test_geometry.py` holds the two together bit for bit.
The formulas take their minimum, maximum and selection from an `Arithmetic`, so that one text serves Python ints,
SymInts (a builtin `min` of a SymInt would be a guard and a recompile) and tensors of coordinates.

Source: Hassani et al., "Neighborhood Attention Transformer" (2023); stride and causal masks as in "Generalized
Neighborhood Attention" (2025); restated and extended to sub-boxes in `docs/semantics.md`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

AXIS_NAMES = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x")}
MAX_EXTENT = 2**62  # beyond it the C++ twin's integers would overflow


class Arithmetic(NamedTuple):
    """The three operations in which ints, SymInts and tensors differ."""

    minimum: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]


INTEGERS = Arithmetic(min, max, lambda condition, yes, no: yes if condition else no)


def group_length(length: Any, dilation: int, group: Any) -> Any:
    """Tokens of one dilation group: ceil((length - group) / dilation)."""
    return (length - group + dilation - 1) // dilation


def axis_window(
    index: Any, length: Any, kernel: int, stride: int, dilation: int, causal: bool, ops: Arithmetic = INTEGERS
) -> tuple[Any, Any, Any]:
    """(group, start, end): query `index` sees the keys group + dilation * t for start <= t < end."""
    group, position = index % dilation, index // dilation
    count = group_length(length, dilation, group)
    first_of_stride = position // stride * stride
    if causal:
        leader = ops.minimum(first_of_stride + stride - 1, count - 1)
        return group, ops.maximum(leader - kernel + 1, leader * 0), position + 1
    leader = ops.minimum(first_of_stride + stride // 2, count - 1)
    start = ops.minimum(ops.maximum(leader - kernel // 2, leader * 0), count - kernel)
    return group, start, start + kernel


def axis_inverse_window(
    key: Any, length: Any, kernel: int, stride: int, dilation: int, causal: bool, ops: Arithmetic = INTEGERS
) -> tuple[Any, Any, Any]:
    """(group, first, last): key `key` is seen by the queries group + dilation * i for first <= i <= last."""
    group, position = key % dilation, key // dilation
    final = group_length(length, dilation, group) - 1
    if causal:
        last = (position + kernel) // stride * stride - 1
        return group, position, ops.where(position + kernel - 1 >= final, final, last)
    lead = kernel // 2 - stride // 2
    before = position - kernel + 1
    first = ops.minimum(-(-(before + lead) // stride), final // stride) * stride
    last = ops.minimum((position + lead) // stride * stride + stride - 1, final)
    return (
        group,
        ops.where(before <= 0, before * 0, first),
        ops.where(position >= final + 1 - kernel, final, last),
    )


def axis_keys_needed(
    origin: Any, count: Any, length: Any, kernel: int, stride: int, dilation: int, causal: bool
) -> tuple[Any, Any]:
    """[first, stop): the smallest range of keys that holds the windows of queries [origin, origin + count)."""
    if count == 0:
        return origin, origin
    # Starts and ends grow with the query inside a dilation group, so the first and last query of each group decide.
    reach = min(dilation, count)
    first = min(g + dilation * s for g, s, _ in _windows(origin, reach, length, kernel, stride, dilation, causal))
    tail = origin + count - reach
    stop = max(g + dilation * (e - 1) for g, _, e in _windows(tail, reach, length, kernel, stride, dilation, causal))
    return first, stop + 1


def _windows(origin: Any, count: Any, *axis: Any) -> list[tuple[Any, Any, Any]]:
    return [axis_window(origin + i, *axis) for i in range(count)]


class NAParams(NamedTuple):
    """Kernel size, stride, dilation (tokens) and causal flag of each axis: what attends to what, and nothing else."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes: 1, 2 or 3."""
        return len(self.kernel_size)

    def axis(self, axis: int) -> tuple[int, int, int, bool]:
        """(kernel, stride, dilation, causal) of one axis, in the order in which the axis functions take them."""
        return self.kernel_size[axis], self.stride[axis], self.dilation[axis], self.is_causal[axis]

    def window(self, axis: int, index: Any, length: Any) -> tuple[Any, Any, Any]:
        """`axis_window` of this geometry."""
        return axis_window(index, length, *self.axis(axis))

    def inverse_window(self, axis: int, key: Any, length: Any) -> tuple[Any, Any, Any]:
        """`axis_inverse_window` of this geometry."""
        return axis_inverse_window(key, length, *self.axis(axis))

    def check_extent(self, extent: Sequence[Any]) -> None:
        """Raise ValueError unless every dilated kernel fits into the grid."""
        for axis, length in enumerate(extent):
            kernel, dilation = self.kernel_size[axis], self.dilation[axis]
            if kernel * dilation > length:
                raise ValueError(
                    f"kernel_size[{axis}]={kernel} with dilation[{axis}]={dilation} spans {kernel * dilation} > "
                    f"{length} tokens on axis {axis}; lower one of them, or pad the grid"
                )


class Box(NamedTuple):
    """Where the query and key/value tensors lie in a global grid of `extent` tokens an axis (semantics, section 4)."""

    q_origin: tuple[Any, ...]
    kv_origin: tuple[Any, ...]
    extent: tuple[Any, ...]

    def check_bounds(self, q_shape: Sequence[Any], kv_shape: Sequence[Any]) -> None:
        """Raise ValueError unless both boxes lie in the grid."""
        for axis, length in enumerate(self.extent):
            boxes = (
                ("q_origin", self.q_origin[axis], q_shape[axis]),
                ("kv_origin", self.kv_origin[axis], kv_shape[axis]),
            )
            if length > MAX_EXTENT:
                raise ValueError(f"extent[{axis}]={length} is more than {MAX_EXTENT}; give a smaller grid")
            for name, origin, count in boxes:
                if count > length:
                    tensor = "query" if name == "q_origin" else "key"
                    raise ValueError(
                        f"extent[{axis}]={length} is less than the {count} tokens of {tensor}; give the whole grid's"
                    )
                if origin < 0 or origin + count > length:
                    raise ValueError(
                        f"{name}[{axis}]={origin} with {count} tokens leaves the grid of extent[{axis}]={length}; "
                        f"{name}[{axis}] must lie in [0, {length - count}]"
                    )

    def check_cover(self, params: NAParams, q_shape: Sequence[Any], kv_shape: Sequence[Any]) -> None:
        """Raise ValueError unless the keys cover every query's window."""
        for axis, length in enumerate(self.extent):
            start, stop = axis_keys_needed(self.q_origin[axis], q_shape[axis], length, *params.axis(axis))
            have, count = self.kv_origin[axis], kv_shape[axis]
            if stop > start and (start < have or stop > have + count):
                raise ValueError(
                    f"the queries [{self.q_origin[axis]}, {self.q_origin[axis] + q_shape[axis]}) on axis {axis} see keys "
                    f"[{start}, {stop}), but key and value hold only [{have}, {have + count}); "
                    f"pass keys and values for the whole range, or fewer queries"
                )


def make_params(
    rank: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> NAParams:
    """Broadcast the four settings over the axes and check each; raises ValueError or TypeError."""
    params = NAParams(
        _per_axis("kernel_size", kernel_size, rank),
        _per_axis("stride", stride, rank),
        _per_axis("dilation", dilation, rank),
        _flags("is_causal", is_causal, rank),
    )
    for axis in range(rank):
        kernel, stride_ = params.kernel_size[axis], params.stride[axis]
        if stride_ > kernel:
            raise ValueError(
                f"stride[{axis}]={stride_} exceeds kernel_size[{axis}]={kernel}: queries between two windows would lose "
                f"their own neighborhood; use a stride of 1 to {kernel}"
            )
    return params


def _per_axis(name: str, value: Any, rank: int) -> tuple[int, ...]:
    if type(value) is int and value >= 1:  # the common case, once for all axes
        return (value,) * rank
    values = tuple(integer(f"{name}[{axis}]", entry) for axis, entry in enumerate(_broadcast(name, value, rank, "int")))
    for axis, number in enumerate(values):
        if number < 1:
            raise ValueError(f"{name}[{axis}]={number} must be at least 1")
    return values


def integer(name: str, value: Any) -> int:
    """The int that `value` is; a bool or a float is a TypeError."""
    check_integer(name, value)
    try:
        return operator.index(value)
    except TypeError:  # arrays have the protocol, and are no integers unless they have one entry
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give an int") from None


def check_integer(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is an int or a SymInt (which `integer` would make concrete)."""
    if type(value) is int:  # the common case: asking for the protocol took 20 us a call
        return
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give an int")


def _flags(name: str, value: Any, rank: int) -> tuple[bool, ...]:
    if type(value) is bool:
        return (value,) * rank
    values = _broadcast(name, value, rank, "bool")
    for axis, flag in enumerate(values):
        # numpy has bools of its own; Dynamo of torch 2.11 cannot trace a type's name, and need not for a plain bool
        if not isinstance(flag, bool) and type(flag).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name}[{axis}]={flag!r} is a {type(flag).__name__}; give True or False")
    return tuple(bool(flag) for flag in values)


def _broadcast(name: str, value: Any, rank: int, kind: str) -> tuple[Any, ...]:
    if type(value) is int or isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(
            f"{name}={tuple(value)} has {len(value)} entries for {rank} spatial axes; give one {kind} or {rank} of them"
        )
    return tuple(value)


def make_box(
    rank: int, q_origin: Sequence[Any] | None, kv_origin: Sequence[Any] | None, extent: Sequence[Any] | None
) -> Box | None:
    """A Box, or None where all three are absent or empty (the tensors are the whole grid)."""
    given = {"q_origin": q_origin, "kv_origin": kv_origin, "extent": extent}
    for name, value in given.items():
        if value is not None and (isinstance(value, (str, bytes)) or not isinstance(value, Sequence)):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give one int for each of the {rank} axes")
    empty = [name for name, value in given.items() if not value]
    if len(empty) == 3:
        return None
    if empty:
        raise ValueError(
            f"a sub-box needs q_origin, kv_origin and extent; {' and '.join(empty)} missing: give all three or none"
        )
    assert q_origin is not None and kv_origin is not None and extent is not None
    for name, entries in (("q_origin", q_origin), ("kv_origin", kv_origin), ("extent", extent)):
        if len(entries) != rank:
            raise ValueError(f"{name}={tuple(entries)} has {len(entries)} entries for {rank} spatial axes; give {rank}")
        for axis, entry in enumerate(entries):
            check_integer(f"{name}[{axis}]", entry)
    for axis, length in enumerate(extent):
        if length < 1:
            raise ValueError(f"extent[{axis}]={length} must be at least 1")
    return Box(tuple(q_origin), tuple(kv_origin), tuple(extent))
