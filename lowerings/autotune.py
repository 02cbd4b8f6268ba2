# SPDX-License-Identifier: MIT
"""What competes under `max_autotune`: the template with other tilings, and the call of the eager kernel.

Inductor times each alone, without what follows the attention, and fuses that with a template only. Choices share their
inputs, so there is a competition only where no token is computed inside, and nobody asks for the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import config

from natten_ops.geometry.params import NAParams
from natten_ops.lowerings._compat import ExternKernelChoice, V

# Queries of a strip, rows of a block, heads together, bytes of a chunk: shorter strips, and larger chunks, than geometry
# gives (csrc/cpu/tiled/tiling.h). Candidates: what they are worth is what the competition finds out.
TILINGS = ((64, 4, 1, 48 << 10), (128, 4, 1, 96 << 10))


def call_kernel(
    *tensors: torch.Tensor,
    names: Sequence[str],
    lists: Sequence[Sequence[Any]],
    scale: float,
    box: Sequence[Sequence[int]],
) -> torch.Tensor:
    """The eager kernel's output; `names` says which argument each tensor is."""
    given = dict(zip(names, tensors))
    main = [given.pop(name) for name in ("query", "key", "value")]
    origins = dict(zip(("q_origin", "kv_origin", "extent"), map(list, box)))
    attend = torch.ops.natten.neighborhood_attention_lse
    out, _ = attend(*main, *map(list, lists), scale, **given, **origins)
    return out


_CALL = ExternKernelChoice(call_kernel, name="natten_ops_call_kernel", has_out_variant=False)


def is_asked_for(inputs: Sequence[Any]) -> bool:
    """Packed inputs are one buffer under several names, which the competition cannot make up."""
    separate = len({node.get_name() for node in inputs}) == len(inputs)
    return bool(config.max_autotune and separate and not V.graph.cpp_wrapper and not V.graph.aot_mode)


def append_choices(
    choices: list[Any], template: Any, params: NAParams, scale: float, box: Sequence[Sequence[int]]
) -> None:
    for tiling in TILINGS:
        template.maybe_append_choice(choices, tiling=tiling)
    names = tuple(template.tensors)
    settings = {"lists": tuple(map(tuple, params)), "scale": scale, "box": tuple(map(tuple, box))}
    choices.append(_CALL.bind(template.input_nodes, template.layout, names=names, **settings))
