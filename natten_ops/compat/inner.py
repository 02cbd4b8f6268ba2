# SPDX-License-Identifier: MIT
"""What models took from inside of natten beside its documented names: autograd functions, FLOP handles, helpers, a logger."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natten_ops.compat import functions
from natten_ops.compat.errors import ConstraintError
from natten_ops.compat.rows import LEVELS, Place, Row, function_of, value_of


def with_apply(row: Row, place: Place) -> type:
    """The class that stood for an autograd function: its `apply` is the function; our ops have derivatives of their own."""
    function = function_of(row, place)
    return type(
        place.name, (), {"apply": staticmethod(function), "__doc__": function.__doc__, "__module__": place.module}
    )


def qk_flop(place: Place, *, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """FLOPs, two a multiply-add, of a node of a traced graph from queries to logits; for fvcore's `set_op_handle`."""
    return 2 * math.prod(outputs[0].type().sizes()) * int(inputs[0].type().sizes()[-1])


def av_flop(place: Place, *, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """FLOPs, two a multiply-add, of a node of a traced graph from weights to sums; for fvcore's `set_op_handle`."""
    return 2 * math.prod(inputs[0].type().sizes()) * int(outputs[0].type().sizes()[-1])


def check_additional_keys(place: Place, *, input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """How many additional tokens there are, which must fit `[batch, heads, *spatial, dim]`; 0 for None."""
    if additional_keys is None:
        return 0
    batch, heads, dim = input_tensor.shape[0], input_tensor.shape[1], input_tensor.shape[-1]
    have = list(additional_keys.shape)
    if len(have) != 4 or have[:2] != [batch, heads] or have[-1] != dim:
        raise ConstraintError(f"additional tokens have shape {have}; give [{batch}, {heads}, tokens, {dim}]")
    return have[2]


def check_additional_values(
    place: Place, *, attn_tensor: Tensor, additional_values: Tensor | None, value: Tensor, expected_attn_weights: int
) -> int:
    """The same for values; the weights have so many slots beside those of the window."""
    count = check_additional_keys(place, input_tensor=value, additional_keys=additional_values)
    if attn_tensor.shape[-1] != expected_attn_weights + count:
        raise ConstraintError(
            f"attn has {attn_tensor.shape[-1]} slots a query; give {expected_attn_weights} of the window and {count} more"
        )
    return count


def make_attn_tensor_from_input(place: Place, *, input_tensor: Tensor, attention_dim: int) -> Tensor:
    """An empty tensor of the input's shape but for its last dim."""
    shape = (*input_tensor.shape[:-1], attention_dim)
    return torch.empty(
        shape, device=input_tensor.device, dtype=input_tensor.dtype, requires_grad=input_tensor.requires_grad
    )


def get_logger(place: Place, *, name: str) -> logging.Logger:
    """The logger of that name, with the handlers that its process gives it."""
    return logging.getLogger(name)


_AT_015, _AT_017 = ("0.15",), ("0.17",)
_HOME, _UTILS, _FLOPS = "natten.functional", "natten.utils natten.utils.tensor", "natten.flops"
_QK, _AV = "NeighborhoodAttention{n}DQKAutogradFunction", "NeighborhoodAttention{n}DAVAutogradFunction"

ROWS: tuple[Row, ...] = (
    *(
        row
        for level, windows in (("0.14", "dilation"), ("0.14.5", "kernel_size, dilation"))
        for row in (
            Row("NATTEN{n}DQKRPBFunction", _HOME, (level,), f"query, key, rpb, {windows}", functions.qk, (1, 2), with_apply),
            Row("NATTEN{n}DAVFunction", _HOME, (level,), f"attn, value, {windows}", functions.av, (1, 2), with_apply),
        )
    ),
    *(  # 0.15.0 had no additional tokens
        row
        for ranks, windows in (((1, 2), "kernel_size, dilation"), ((3,), "kernel_size_d, kernel_size, dilation_d, dilation"))
        for row in (
            Row(
                _QK, _HOME, _AT_015, f"query, key, bias, additional_keys, {windows}", functions.qk, ranks, with_apply,
                f"query, key, bias, {windows}",
            ),
            Row(
                _AV, _HOME, _AT_015, f"attn, value, additional_values, {windows}", functions.av, ranks, with_apply,
                f"attn, value, {windows}",
            ),
        )
    ),
    Row(
        _QK, _HOME, _AT_017, "query, key, rpb, additional_keys, kernel_size, dilation, is_causal", functions.qk, (1, 2, 3),
        with_apply,
    ),
    Row(
        _AV, _HOME, _AT_017, "attn, value, additional_values, kernel_size, dilation, is_causal", functions.av, (1, 2, 3),
        with_apply,
    ),
    Row("qk_rpb_flop qk_1d_rpb_flop", _FLOPS, LEVELS[:2], "inputs, outputs", qk_flop),
    Row("av_flop av_1d_flop", _FLOPS, LEVELS[:2], "inputs, outputs", av_flop),
    Row("qk_{n}d_rpb_flop", _FLOPS, LEVELS[2:4], "inputs, outputs", qk_flop, (1, 2, 3)),
    Row("av_{n}d_flop", _FLOPS, LEVELS[2:4], "inputs, outputs", av_flop, (1, 2, 3)),
    Row("check_additional_keys", _UTILS, LEVELS[2:4], "input_tensor, additional_keys", check_additional_keys),
    Row(
        "check_additional_values", _UTILS, LEVELS[2:4], "attn_tensor, additional_values, value, expected_attn_weights",
        check_additional_values,
    ),
    Row("make_attn_tensor_from_input", _UTILS, LEVELS[2:4], "input_tensor, attention_dim", make_attn_tensor_from_input),
    Row("NoneType", "natten.utils natten.utils.typing", _AT_015, "", type(None), make=value_of),
    Row("get_logger", "natten.utils.log", LEVELS[3:], "name", get_logger),
)  # fmt: skip
