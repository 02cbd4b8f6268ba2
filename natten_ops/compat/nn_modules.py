# SPDX-License-Identifier: MIT
"""The modules of every level: those of `natten_ops.nn` with the constructor of the level, and its padding.

Parameters have the names and shapes of natten's, so a checkpoint of any level loads into any other and into
`natten_ops.nn`, as long as both have a bias table or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natten_ops import nn
from natten_ops.compat.errors import constraint
from natten_ops.compat.rows import LEVELS, Binder, Place, Row, parse

BASES = {1: nn.NeighborhoodAttention1D, 2: nn.NeighborhoodAttention2D, 3: nn.NeighborhoodAttention3D}
PADDED = LEVELS[: LEVELS.index("0.17")]
# Arguments of the releases whose names differ from ours, and those that have no effect.
RENAMED = {"dim": "embed_dim", "bias": "rel_pos_bias"}
WITHOUT_EFFECT = ("use_experimental_ops",)


def class_of(row: Row, place: Place) -> type[torch.nn.Module]:
    """The module class of a row: our module, constructed as this level does; padded before 0.17."""
    signature = parse(row.parameters)
    binder = Binder.of(f"{place.name}() of natten {place.level}", signature)
    base, padded = BASES[place.rank], place.level in PADDED

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            base.__init__(self, **_our_arguments(binder.bind(args, kwargs)))
        except (ValueError, TypeError) as error:
            raise constraint(error) from error

    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            return _run_padded(base, self, x) if padded else base.forward(self, x)
        except (ValueError, TypeError) as error:
            raise constraint(error) from error

    text = f"`natten_ops.nn.{base.__name__}` as natten {place.level} constructs it: {place.name}{signature}."
    if padded:
        text += " Inputs shorter than kernel_size * dilation are padded with zeros at the end, and the output cropped."
    members = {"__init__": __init__, "forward": forward, "scale": property(_scale), "__signature__": signature}
    names = {"__doc__": text, "__module__": place.module, "__qualname__": place.name}
    return type(place.name, (base,), {**members, **names})


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
    return found


def _run_padded(base: Any, module: Any, x: Tensor) -> Tensor:
    """Zeros after the tokens up to the dilated kernel; they are attended to like tokens, as they were in natten."""
    if not isinstance(x, Tensor) or x.dim() != base.rank + 2:
        return base.forward(module, x)  # refuses it with its sentence
    lengths = x.shape[1:-1]
    spans = [kernel * dilation for kernel, dilation in zip(module.kernel_size, module.dilation)]
    if all(length >= span for length, span in zip(lengths, spans)):
        return base.forward(module, x)
    widths = [0, 0]
    for length, span in zip(reversed(lengths), reversed(spans)):
        widths += [0, max(0, span - length)]
    out: Tensor = base.forward(module, torch.nn.functional.pad(x, widths))
    for axis, length in enumerate(lengths):
        out = out.narrow(axis + 1, 0, length)
    return out


def _scale(module: Any) -> float:
    """The factor of the dot products that the module uses."""
    scale: float = module.head_dim**-0.5 if module.qk_scale is None else module.qk_scale
    return scale
