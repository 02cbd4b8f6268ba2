# SPDX-License-Identifier: MIT
"""Attention without neighborhoods, dense or packed, and merging: `attention` and `merge_attentions` of natten 0.20 on.

Without a log-sum-exp, dense attention is torch's `scaled_dot_product_attention`. With one, or packed, it is our op with
a window of the whole sequence; its log-sum-exp differentiates, so what is merged has the gradients of the whole.
Causal: query i sees the keys 0 to i of its sequence, also where there are more or fewer keys than queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from natten_ops import functional
from natten_ops.compat.errors import ConstraintError, ConstraintTypeError
from natten_ops.compat.functions import our_backend
from natten_ops.compat.rows import Place, Row, function_of
from natten_ops.geometry.params import integer

TILING = (
    "backend=None, q_tile_size=None, kv_tile_size=None, backward_q_tile_size=None, backward_kv_tile_size=None, "
    "backward_kv_splits=None, backward_use_pt_reduction=False, run_persistent_kernel=True, kernel_schedule=None, "
    "torch_compile=False, return_lse=False"
)
VARLEN = (
    "seqlens_Q=None, seqlens_KV=None, cumulative_seqlen_Q=None, cumulative_seqlen_KV=None, max_seqlen_Q=None, "
    "max_seqlen_KV=None"
)


def _attention(
    place: Place,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    kernel_schedule: object = None,
    return_lse: bool = False,
    **tuning: object,
) -> Any:
    """Attention of all queries to all keys: softmax(scale * q.k) . v, heads last, dense or packed.

    Args:
        query: `[batch, tokens, heads, head_dim]`, float64, float32, float16 or bfloat16.
        key: `[batch, tokens_kv, heads_kv, head_dim]`; heads must be a multiple of heads_kv.
        value: `[batch, tokens_kv, heads_kv, value_dim]`.
        is_causal: query i sees the keys 0 to i.
        scale: factor of the dot products; None means head_dim ** -0.5.
        seqlens_Q, seqlens_KV: ints `[sequences]`: the tensors are one batch of sequences, one after the other. Not
            under `torch.compile(fullgraph=True)`, for sizes are read from them.
        cumulative_seqlen_Q, cumulative_seqlen_KV: ints `[sequences + 1]`, where each sequence starts, and the end.
        max_seqlen_Q, max_seqlen_KV: tokens of the longest sequence; with the cumulative lengths.
        backend, tile sizes, schedules, torch_compile: no effect on results.
        return_lse: also return the log-sum-exp of every row.

    Returns:
        `[batch, tokens, heads, value_dim]`; with return_lse also `[batch, tokens, heads]` in float32 (float64 for
        float64). A query without keys has output 0 and log-sum-exp -inf.

    Raises:
        ConstraintError: what is wrong, its value, the bound and the way out.

    Example:
        >>> import torch
        >>> from natten_ops import compat
        >>> query, key, value = torch.randn(3, 1, 7, 4, 32).unbind(0)
        >>> lengths = torch.tensor([3, 4])
        >>> packed = compat.attention(query, key, value, seqlens_Q=lengths, seqlens_KV=lengths)
        >>> torch.testing.assert_close(packed[:, :3], compat.attention(query[:, :3], key[:, :3], value[:, :3]))
    """
    ours = our_backend(backend, kernel_schedule)
    if not isinstance(is_causal, bool):
        raise ConstraintTypeError(
            f"is_causal={is_causal!r} is a {type(is_causal).__name__}; give True or False (scale= is another argument)"
        )
    scale = functional.checked_scale(scale)
    _check_shapes(query, key, value)
    cumulative, longest = (cumulative_seqlen_Q, cumulative_seqlen_KV), (max_seqlen_Q, max_seqlen_KV)
    packing = _packing(query, key, (seqlens_Q, seqlens_KV), cumulative, longest)
    if packing is not None:
        out, lse = _packed(query, key, value, *packing, is_causal=is_causal, scale=scale, backend=ours)
    elif return_lse or ours is not None:
        out, lse = _whole(query, key, value, is_causal=is_causal, scale=scale, backend=ours)
    else:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _whole(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) by our op: one window as long as the sequence; missing keys are padded and hidden."""
    tokens, keys = query.shape[1], key.shape[1]
    length = max(tokens, keys, 1)
    if keys < length:
        if mask is None:
            mask = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        key, value = (pad(tensor, [0, 0, 0, 0, 0, length - keys]) for tensor in (key, value))
        mask = pad(mask, [0, length - keys])
    box: dict[str, Any] = {"q_origin": (0,), "kv_origin": (0,), "extent": (length,)} if tokens < length else {}
    found: tuple[Tensor, Tensor] = functional.neighborhood_attention(
        query, key, value, length, key_mask=mask, return_lse=True, **box, **settings
    )
    return found


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Sequences apart in a batch, padded to the longest; no size is read from a tensor, so graphs do not break."""
    places, lengths = [], []
    for starts, most, tokens in zip(cumulative, longest, (query.shape[1], key.shape[1])):
        places.append(starts[:-1, None] + torch.arange(most, device=starts.device))
        places[-1] = places[-1].clamp(max=max(tokens - 1, 0))
        lengths.append(starts.diff())
    if query.shape[1] == 0 or key.shape[1] == 0:
        return _whole(query, key, value, **settings)
    q, k, v = query[0][places[0]], key[0][places[1]], value[0][places[1]]
    mask = torch.arange(longest[1], device=key.device) < lengths[1][:, None]
    out, lse = _whole(q, k, v, mask, **settings)
    token = torch.arange(query.shape[1], device=query.device)
    sequence = torch.searchsorted(cumulative[0], token, right=True) - 1
    position = token - cumulative[0][sequence]
    return out[sequence, position][None], lse[sequence, position][None]


def _packing(
    query: Tensor, key: Tensor, lengths: Sequence[Any], cumulative: Sequence[Any], longest: Sequence[Any]
) -> tuple[Any, Any] | None:
    """(cumulative lengths, longest lengths) of packed sequences, or None for a dense batch; checked."""
    given = [value is not None for value in (*lengths, *cumulative, *longest)]
    if not any(given):
        return None
    if given not in ([True] * 2 + [False] * 4, [False] * 2 + [True] * 4):
        raise ConstraintError(
            "packed sequences take seqlens_Q and seqlens_KV, or cumulative_seqlen_Q, cumulative_seqlen_KV, "
            "max_seqlen_Q and max_seqlen_KV; give all of one kind and none of the other"
        )
    if query.shape[0] != 1:
        raise ConstraintError(f"query has batch {query.shape[0]}; packed sequences are one batch: flatten them into it")
    tensors, names = (lengths, "seqlens_{}") if lengths[0] is not None else (cumulative, "cumulative_seqlen_{}")
    for name, tensor in zip(("Q", "KV"), tensors):
        if not isinstance(tensor, Tensor) or tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConstraintTypeError(f"{names.format(name)} is a {kind}; give a tensor of ints")
    if tensors[0].dim() != 1 or tensors[0].shape != tensors[1].shape or len(tensors[0]) < (tensors is cumulative):
        raise ConstraintError(
            f"{names.format('Q')} has shape {list(tensors[0].shape)}, {names.format('KV')} {list(tensors[1].shape)}; "
            f"give one entry a sequence in both, and one more where they are cumulative"
        )
    if lengths[0] is not None:
        return _cumulative(query, key, lengths)
    if not torch.compiler.is_compiling():  # a graph cannot look at values
        for name, starts, most, tokens in zip(("Q", "KV"), cumulative, longest, (query, key)):
            _check_lengths(name, starts, integer(f"max_seqlen_{name}", most), tokens.shape[1])
    return tuple(starts.long() for starts in cumulative), tuple(longest)


def _check_lengths(name: str, starts: Tensor, most: int, tokens: int) -> None:
    steps = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != tokens or bool((steps < 0).any()):
        raise ConstraintError(
            f"cumulative_seqlen_{name}={starts.tolist()} must grow from 0 to the {tokens} tokens that there are"
        )
    if len(steps) and int(steps.max()) > most:
        raise ConstraintError(f"max_seqlen_{name}={most} is less than the longest sequence, {int(steps.max())} tokens")


def _cumulative(query: Tensor, key: Tensor, lengths: Sequence[Tensor]) -> tuple[Any, Any]:
    starts, longest = [], []
    for name, count, tensor in zip(("Q", "KV"), lengths, (query, key)):
        if int(count.sum()) != tensor.shape[1] or bool((count < 0).any()):
            raise ConstraintError(
                f"seqlens_{name}={count.tolist()} must be of the {tensor.shape[1]} tokens that there are"
            )
        sums = pad(count.cumsum(0), [1, 0])  # of int64
        starts.append(sums.int() if count.dtype == torch.int32 else sums)
        longest.append(int(count.max()) if len(count) else 0)
    return tuple(starts), tuple(longest)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ConstraintTypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
        if tensor.dim() != 4:
            raise ConstraintError(f"{name} has shape {list(tensor.shape)}; give [batch, tokens, heads, dim]")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ConstraintError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}; make them alike"
            )
    pairs = (
        ("batch", "key", key.shape[0], "query", query.shape[0]),
        ("batch", "value", value.shape[0], "query", query.shape[0]),
        ("head dim", "key", key.shape[3], "query", query.shape[3]),
        ("token count", "value", value.shape[1], "key", key.shape[1]),
        ("head count", "value", value.shape[2], "key", key.shape[2]),
    )
    for what, name, size, other, expected in pairs:
        if size != expected:
            raise ConstraintError(f"{name} has {what} {size}, {other} {expected}; they must be equal")
    if query.shape[2] != key.shape[2] and (key.shape[2] == 0 or query.shape[2] % key.shape[2]):
        raise ConstraintError(f"query has {query.shape[2]} heads, key {key.shape[2]}; give a multiple of key's")


def _merge(place: Place, *, outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], **tuning: object) -> Any:
    """Merge attentions of the same queries over disjoint keys, weighted by their log-sum-exps; any number of them.

    Gradients flow to every output and every log-sum-exp. `torch_compile` and `use_autograd_fix` have no effect.

    Args:
        outputs: tensors `[batch, .., heads, value_dim]` of one shape and dtype.
        lse_tensors: their log-sum-exps `[batch, .., heads]`, float32 or float64.

    Returns:
        (output, log-sum-exp); at level 0.20 the output alone, as those releases did.

    Raises:
        ConstraintError: empty or unequal lists, shapes that do not fit.

    Example:
        >>> import torch
        >>> from natten_ops import compat
        >>> query, key, value = torch.randn(3, 1, 8, 4, 32).unbind(0)
        >>> halves = [compat.attention(query, k, v, return_lse=True) for k, v in zip(key.split(4, 1), value.split(4, 1))]
        >>> out, lse = compat.merge_attentions(*zip(*halves))
        >>> torch.testing.assert_close(out, compat.attention(query, key, value))
    """
    merged = functional.merge_attentions(outputs, lse_tensors)
    return merged[0] if place.level == "0.20" else merged


def generate_varlen_parameters(
    place: Place, *, query: Tensor, key: Tensor, value: Tensor, seqlens_Q: Any, seqlens_KV: Any
) -> tuple[Any, Any, int, int]:
    """(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV) of packed sequences; reads tensors."""
    _check_shapes(query, key, value)
    packing = _packing(query, key, (seqlens_Q, seqlens_KV), (None, None), (None, None))
    return (None, None, 0, 0) if packing is None else (*packing[0], *packing[1])


_QKV = "query, key, value"
_AT_020, _AT_021 = ("0.20",), ("0.21",)
_ATTENTION, _MERGE = "attention", "merge_attentions"
_HOME = "natten natten.functional"

ROWS: tuple[Row, ...] = (
    # 0.20, 0.21.0 and 0.21.1 had the scale in the fourth place; what came later is taken by keyword there.
    Row(_ATTENTION, _HOME, _AT_020, f"{_QKV}, scale=None, {TILING}, *, is_causal=False, {VARLEN}", _attention),
    Row(_ATTENTION, _HOME, _AT_021, f"{_QKV}, is_causal=False, scale=None, {VARLEN}, {TILING}", _attention),
    Row(_MERGE, _HOME, _AT_020, "outputs, lse_tensors, torch_compile=True, *, use_autograd_fix=True", _merge),
    Row(_MERGE, _HOME, _AT_021, "outputs, lse_tensors, torch_compile=True, use_autograd_fix=True", _merge),
    Row(
        "generate_varlen_parameters", "natten.utils.varlen", _AT_021, f"{_QKV}, seqlens_Q=None, seqlens_KV=None",
        generate_varlen_parameters,
    ),
)  # fmt: skip

attention, merge_attentions = (
    function_of(row, Place("0.21", 0, row.names, "natten_ops.compat")) for row in (ROWS[1], ROWS[3])
)
