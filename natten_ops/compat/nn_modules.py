# SPDX-License-Identifier: MIT
"""The modules of every level: those of `natten_ops.nn` with the constructor, attributes and padding of the level.

Parameters have the names and shapes of natten's, so a checkpoint of any level loads into any other and into
`natten_ops.nn`, as long as both have a bias table or none. Attributes are the level's too, and what they hold counts:
subclasses read them, and set others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natten_ops import nn
from natten_ops.compat.errors import constraint
from natten_ops.compat.rows import LEVELS, Binder, Place, Row, parse
from natten_ops.geometry.params import integer

BASES = {1: nn.NeighborhoodAttention1D, 2: nn.NeighborhoodAttention2D, 3: nn.NeighborhoodAttention3D}
PADDED = LEVELS[: LEVELS.index("0.17")]
# Arguments of the releases whose names differ from ours, and those that have no effect.
RENAMED = {"dim": "embed_dim", "bias": "rel_pos_bias"}
WITHOUT_EFFECT = ("use_experimental_ops",)
# What a printed module tells of those that its level has.
SHOWN = ("head_dim", "num_heads", "kernel_size", "kernel_size_d", "stride", "dilation", "dilation_d", "is_causal")


def class_of(row: Row, place: Place) -> type[torch.nn.Module]:
    """The module class of a row; names of one row at one level are one class."""
    return _class(place.level, place.rank, place.module, row.parameters)


@functools.cache
def _class(level: str, rank: int, module: str, parameters: str) -> type[torch.nn.Module]:
    """Our module, constructed as this level does; padded before 0.17."""
    name, signature = f"NeighborhoodAttention{rank}D", parse(parameters)
    binder = Binder.of(f"{name}() of natten {level}", signature)
    base, padded = BASES[rank], level in PADDED
    shown = [name for name in SHOWN if name == "head_dim" or name in signature.parameters]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = binder.bind(args, kwargs)
            ours = _our_arguments(arguments)
            base.__init__(self, **ours)
        except (ValueError, TypeError) as error:
            raise constraint(error) from error
        if "attn_drop" in arguments and self.attn_drop is None:
            self.attn_drop = torch.nn.Dropout(0.0)
        vars(self).update(_attributes(self, arguments, ours, padded))

    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            return _run_padded(base, self, x) if padded else base.forward(self, x)
        except (ValueError, TypeError) as error:
            raise constraint(error) from error

    def extra_repr(self: Any) -> str:
        parts = [f"{key}={getattr(self, key)}" for key in shown]
        biased = {"bias", "rel_pos_bias"} & set(signature.parameters)
        return ", ".join([*parts, f"rel_pos_bias={self.rpb is not None}"] if biased else parts)

    text = f"`natten_ops.nn.{base.__name__}` as natten {level} constructs it: {name}{signature}."
    if padded:
        text += " Inputs shorter than kernel_size * dilation are padded with zeros at the end, and the output cropped."
    members = {"__init__": __init__, "forward": forward, "extra_repr": extra_repr, "__signature__": signature}
    hooks = {"_windows": _windows_of_numbers if padded else base._windows, "_scale": lambda self: self.scale}
    names = {"__doc__": text, "__module__": module, "__qualname__": name}
    return type(name, (base,), {**members, **hooks, **names})


def _our_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """This level's constructor arguments as those of `natten_ops.nn`."""
    found = {RENAMED.get(name, name): value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
    for name, default in (("stride", 1), ("dilation", 1), ("is_causal", False)):
        if name in found and found[name] is None:
            found[name] = default
    for name in ("kernel_size", "dilation"):  # 3-D modules of 0.15 give the first axis apart
        depth = found.pop(f"{name}_d", None)
        if depth is not None:
            found[name] = (depth, found[name], found[name])
    # As some models have it: natten read a scale that is false as None, and torch's Dropout takes False for 0.
    for name, value in (("qk_scale", None), ("attn_drop", 0.0), ("proj_drop", 0.0)):
        if found.get(name) is False:
            found[name] = value
    return found


def _attributes(module: Any, arguments: dict[str, Any], ours: dict[str, Any], padded: bool) -> dict[str, Any]:
    """What the modules of this level had beside their parameters and the settings that are as in `natten_ops.nn`."""
    found: dict[str, Any] = {"scale": module.head_dim**-0.5 if module.qk_scale is None else module.qk_scale}
    if "use_experimental_ops" in arguments:
        found |= {"use_experimental_ops": arguments["use_experimental_ops"], "attn_drop_rate": arguments["attn_drop"]}
    if "embed_dim" in arguments:
        found |= {"na_dim": module.rank, "expected_input_tensor_rank": module.rank + 2}
    if not padded:
        return found
    # One number for all axes, except for the first of a volume; a tuple stays one.
    for name in ("kernel_size", "dilation"):
        given = 1 if arguments[name] is None else arguments[name]
        found[name] = given if isinstance(given, Sequence) else integer(name, given)
        if module.rank == 3:
            found[f"{name}_d"] = integer(name, ours[name][0] if isinstance(ours[name], Sequence) else ours[name])
    for axis in ("", "_d") if module.rank == 3 else ("",):
        kernel_size, dilation = found[f"kernel_size{axis}"], found[f"dilation{axis}"]
        if isinstance(kernel_size, int) and isinstance(dilation, int):
            found[f"window_size{axis}"] = kernel_size * dilation
    return found


def _windows_of_numbers(module: Any) -> dict[str, Any]:
    """The settings of the ops from attributes of 0.14 to 0.15."""

    def of_axes(name: str) -> Any:
        value = getattr(module, name)
        return (getattr(module, f"{name}_d"), value, value) if module.rank == 3 and isinstance(value, int) else value

    return {"kernel_size": of_axes("kernel_size"), "dilation": of_axes("dilation")}


def _run_padded(base: Any, module: Any, x: Tensor) -> Tensor:
    """Zeros after the tokens up to the dilated kernel; they are attended to like tokens, as they were in natten."""
    if not isinstance(x, Tensor) or x.dim() != base.rank + 2:
        return base.forward(module, x)  # refuses it with its sentence
    lengths = x.shape[1:-1]
    settings = ((value,) * base.rank if isinstance(value, int) else value for value in module._windows().values())
    spans = [kernel * dilation for kernel, dilation in zip(*settings)]
    if all(length >= span for length, span in zip(lengths, spans)):
        return base.forward(module, x)
    widths = [0, 0]
    for length, span in zip(reversed(lengths), reversed(spans)):
        widths += [0, max(0, span - length)]
    out: Tensor = base.forward(module, torch.nn.functional.pad(x, widths))
    for axis, length in enumerate(lengths):
        out = out.narrow(axis + 1, 0, length)
    return out
