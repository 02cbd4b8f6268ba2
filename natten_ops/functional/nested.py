# SPDX-License-Identifier: MIT
"""Nested tensors: samples of different spatial sizes in one call.

Lines in torch's jagged layout go to an op of their own, in eager and compiled code; grids in its strided layout, and
lines in two halves, are attended to sample after sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natten_ops.geometry.params import NAParams
from natten_ops.ops.arguments import autocast_tensor, lse_dtype
from natten_ops.ops.jagged import check_jagged

Named = Sequence[tuple[str, Any]]


def any_nested(*tensors: Any) -> bool:
    """Whether some of them are nested tensors; a loop, because a call of `any` would take longer than the check."""
    for tensor in tensors:  # noqa: SIM110
        if getattr(tensor, "is_nested", False):
            return True
    return False


def check_nested(nested: Named, dense: Named, either: Named = ()) -> None:
    """Raise ValueError or TypeError unless the first are nested alike and those of `dense`, where there are any, dense."""
    for name, tensor in dense:
        if isinstance(tensor, Tensor) and tensor.is_nested:
            raise ValueError(f"{name} is a nested tensor; it must be dense, one for all samples or one row a sample")
    for name, tensor in nested:
        if not isinstance(tensor, Tensor) or not tensor.is_nested:
            kind = "a dense tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            others = [other for other, t in (*nested, *either) if any_nested(t)]
            raise ValueError(f"{name} is {kind} and {', '.join(others)} nested; nest all of {[n for n, _ in nested]}")
    first, leader = nested[0]
    for name, tensor in nested:
        if tensor.layout != leader.layout:
            raise ValueError(f"{name} is nested as {tensor.layout}, {first} as {leader.layout}; use one layout")


def _check_sizes(named: Named, parts: Sequence[Sequence[Tensor]], axes: slice) -> None:
    """Every sample has one spatial size in all tensors."""
    first, leaders = named[0][0], parts[0]
    for (name, _), samples in zip(named, parts):
        if len(samples) != len(leaders):
            raise ValueError(f"{name} has {len(samples)} samples, {first} {len(leaders)}; they must be equal")
        for i, (sample, leader) in enumerate(zip(samples, leaders)):
            if sample.shape[axes] != leader.shape[axes]:
                raise ValueError(
                    f"{name} has {list(sample.shape[axes])} tokens in sample {i}, {first} {list(leader.shape[axes])}; "
                    "they must be equal"
                )


def _check_rows(named: Named, samples: int) -> None:
    """Tensors with one row a sample, nested or not, and samples at all."""
    if samples == 0:
        raise ValueError("a nested tensor without samples; give at least one")
    for name, tensor in named:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            kind = "a tensor without dimensions" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise TypeError(f"{name} is {kind}; give a tensor with one row a sample, or None")
        if tensor.size(0) != samples:  # strided nested tensors have no shape
            raise ValueError(f"{name} has {tensor.size(0)} rows for {samples} samples; give one a sample")


def _naming(sample: int, call: Callable[[], Any]) -> Any:
    """The call's result; a mistake in it names the sample."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        raise type(error)(f"sample {sample}: {error}") from error


# ---- fused ---------------------------------------------------------------------------------------------------------


def attend(
    inputs: Any, params: NAParams, scale: float | None, backend: str | None, attend_dense: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """out and lse of nested inputs; `attend_dense(inputs)` gives both of a dense batch."""
    named = list(zip(inputs._fields, inputs))
    check_nested(named[:3], named[3:])
    if inputs.key_mask is not None:
        raise ValueError("key_mask beside nested tensors, which hold no padding to mask; leave it out")
    if inputs.query.layout == torch.jagged:
        if backend is not None:
            raise ValueError(f"backend={backend!r} with jagged tensors, whose op chooses itself; leave it out")
        return _attend_lines(inputs, params, scale)
    parts = [tensor.unbind() for tensor in inputs[:3]]
    _check_sizes(named[:3], parts, slice(0, params.rank))
    _check_rows(named[3:5], len(parts[0]))
    results = []
    for i, rows in enumerate(zip(*parts)):
        extras = [None if t is None else t[i : i + 1] for t in inputs[3:5]]
        sample = type(inputs)(*(row[None] for row in rows), *extras, inputs.rpb)
        results.append(_naming(i, functools.partial(attend_dense, sample)))
    outs, lses = ([part[0] for part in parts] for parts in zip(*results))
    return torch.nested.as_nested_tensor(outs), torch.nested.as_nested_tensor(lses)


def _attend_lines(inputs: Any, params: NAParams, scale: float | None) -> tuple[Tensor, Tensor]:
    query, key, value, additional_keys, additional_values, rpb, _ = inputs
    if params.rank != 1:
        raise ValueError(
            f"torch's jagged layout has one ragged dimension and {params.rank}-D samples have {params.rank}; "
            "nest them with layout=torch.strided"
        )
    offsets = lines_of("query", query)
    for name, tensor in (("key", key), ("value", value)):
        _check_offsets(name, tensor, lines_of(name, tensor), offsets)
    values = [tensor.values() for tensor in (query, key, value)]
    if not torch.compiler.is_compiling():
        _check_lengths(_bounds_of("query", query), params)
    offsets = offsets.long().contiguous()  # torch takes int32 too
    device = values[0].device.type
    seen = [*values, additional_keys, additional_values]
    if torch.is_autocast_enabled(device):
        seen = [autocast_tensor(t, torch.get_autocast_dtype(device), device) for t in seen]
    if rpb is not None:
        rpb = rpb.to(lse_dtype(seen[0]))
    check_jagged(seen[0], seen[1], seen[2], offsets, params, seen[3], seen[4], rpb)
    out, lse = torch.ops.natten.neighborhood_attention_jagged(
        *values, offsets, *params, scale, additional_keys, additional_values, rpb=rpb
    )
    return like_lines(out, query), like_lines(lse, query)


def has_holes(lines: Any) -> bool:
    """Whether there are tokens between the samples of a jagged tensor."""
    return lines.lengths() is not None


def lines_of(name: str, tensor: Any, heads_first: bool = False) -> Any:
    """The offsets of a jagged tensor whose values are dense lines; heads first, they are those of a transposed one."""
    axes = "heads, tokens" if heads_first else "tokens, heads"
    if tensor.dim() != 4:
        raise ValueError(f"{name} is a jagged tensor of {tensor.dim()} dims; give [samples, {axes}, head dim]")
    ragged, steps = tensor._ragged_idx, []
    if has_holes(tensor):
        steps = ["transpose(1, 2)", "contiguous()"] if ragged == 2 else ["contiguous()"]
        ragged = 1
    if ragged != 1 + heads_first:
        steps.append("transpose(1, 2)")
    if steps:
        what = f"ragged in dim {tensor._ragged_idx}" + (", with holes" if has_holes(tensor) else "")
        raise ValueError(
            f"{name} is {what}; give [samples, {axes}, head dim], ragged in its tokens and without holes: "
            f"{name}.{'.'.join(steps)}"
        )
    return tensor.offsets()


def _bounds_of(name: str, tensor: Any) -> list[int]:
    """The offsets as numbers. torch takes any that somebody made; samples would be cut out of other samples."""
    bounds, tokens = tensor.offsets().tolist(), tensor._values.shape[tensor._ragged_idx - 1]
    if not bounds:
        raise ValueError(f"{name} has offsets without entries; give [samples + 1]")
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        if end < begin:
            raise ValueError(f"{name} has offsets[{i + 1}]={end} after offsets[{i}]={begin}; they must not descend")
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"{name} has offsets from {bounds[0]} to {bounds[-1]}; they must go from 0 to {tokens}, the number of its tokens"
        )
    return bounds


def like_lines(values: Tensor, like: Any) -> Tensor:
    """A jagged tensor of those values with the samples of another one, so that both fit into one expression."""
    return torch.nested.nested_tensor_from_jagged(
        values,
        offsets=like.offsets(),
        min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )


def on_values(call: Callable[[Tensor], Tensor], tensor: Any) -> Tensor:
    """`call(tensor)` of what looks along the last dim alone, or the last two heads last; of jagged lines on their values.

    Of jagged tensors that are ragged in dim 2, torch 2.13's own dropout and repetition raise, and its softmax in the backward.
    """
    if not tensor.is_nested:
        return call(tensor)
    if tensor._ragged_idx == 2:  # heads first
        return on_values(call, tensor.transpose(1, 2)).transpose(1, 2)
    return like_lines(call(tensor.values()), tensor)


def split_heads(tensor: Any, sizes: Sequence[int]) -> list[Tensor]:
    """Consecutive heads, views of `[.., heads, head dim]`; the backward of torch 2.13's own split of lines crashes."""
    if not tensor.is_nested:
        return list(tensor.split(sizes, dim=-2))
    return [like_lines(values, tensor) for values in tensor.values().split(sizes, dim=-2)]


def _check_offsets(name: str, tensor: Any, offsets: Tensor, expected: Tensor) -> None:
    if offsets is expected:
        return
    if torch.compiler.is_compiling() and offsets.shape == expected.shape:  # what they hold is known when it runs
        torch._assert_async((offsets == expected).all(), f"{name} has samples of other lengths than query")
        return
    if offsets.shape != expected.shape:
        raise ValueError(
            f"{name} has {offsets.shape[0] - 1} samples, query {expected.shape[0] - 1}; they must be equal"
        )
    for i, (have, want) in enumerate(zip(_lengths(_bounds_of(name, tensor)), _lengths(expected.tolist()))):
        if have != want:
            raise ValueError(f"{name} has {have} tokens in sample {i}, query {want}; they must be equal")


def _check_lengths(bounds: Sequence[int], params: NAParams) -> None:
    for i, length in enumerate(_lengths(bounds)):
        _naming(i, functools.partial(params.check_extent, [length]))


def _lengths(bounds: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in zip(bounds, bounds[1:])]


# ---- in two halves -------------------------------------------------------------------------------------------------


def by_halves(nested: Named, rows: Named, shared: Named, rank: int, call: Callable[..., Tensor]) -> Tensor:
    """`call(sample of each, row of each)` over the samples; `shared` is one for all of them.

    Heads come first, so lines are ragged in dim 2. Rows are nested too where their samples have tokens of their own.
    """
    check_nested(nested, shared, rows)
    jagged = nested[0][1].layout == torch.jagged
    if jagged and torch.compiler.is_compiling():
        raise ValueError("the unfused ops take jagged tensors in eager code only; use na1d, or dense tensors")
    parts: list[list[Any]] = [_samples_of(name, tensor) for name, tensor in nested]
    _check_sizes(nested, parts, slice(1, 1 + rank))
    _check_rows(rows, len(parts[0]))
    for name, tensor in rows:
        parts.append([None] * len(parts[0]) if tensor is None else _samples_of(name, tensor))
        if jagged and tensor is not None:
            _check_one_width(name, parts[-1])
    outs = []
    for i, sample in enumerate(zip(*parts)):
        batch = [None if t is None else t[None] for t in sample]
        outs.append(_naming(i, functools.partial(call, *batch))[0])
    if not jagged:
        return torch.nested.as_nested_tensor(outs)
    like = nested[0][1].transpose(1, 2)
    return like_lines(torch.cat([out.transpose(0, 1) for out in outs]), like).transpose(1, 2)


def _samples_of(name: str, tensor: Any) -> list[Any]:
    """The samples of a nested or dense tensor; torch cannot unbind jagged ones that are ragged in dim 2."""
    if tensor.layout != torch.jagged:
        return list(tensor.unbind())
    lines_of(name, tensor, heads_first=True)
    bounds = _bounds_of(name, tensor)
    values = tensor.transpose(1, 2).values()  # [tokens, heads, ..]
    return [values[a:b].transpose(0, 1) for a, b in zip(bounds, bounds[1:])]


def _check_one_width(name: str, samples: Sequence[Tensor]) -> None:
    """The slots of the logits are a dense dim of a jagged tensor, whose only ragged one is that of the tokens."""
    counts = [sample.shape[-2] for sample in samples]
    for i, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"{name} has {count} tokens in sample {i}, {counts[0]} in sample 0; beside jagged tensors they must be "
                "equal; nest everything with layout=torch.strided for other numbers"
            )
