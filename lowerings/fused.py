# SPDX-License-Identifier: MIT
"""The fused op in Inductor: an extern call of the eager kernel.

Inductor's own fallback makes the same call, but writes the defaults of absent lists into the node, and AOTInductor's
executor then finds None in place of an empty list (torch 2.13: it skips lists of length 0). Left out, they get the
schema's default there. `backend` must stay: the executor counts the ints. The fallback also copies queries, keys and
values out of a packed projection, which this call reads in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import fallback_handler, register_lowering

FORWARD = torch.ops.natten.neighborhood_attention_lse.default
_extern_call = fallback_handler(FORWARD, add_to_fallback_set=False)


def _lower_forward(*args: Any, backend: int = 0, **kwargs: Any) -> Any:
    given = {
        name: value for name, value in kwargs.items() if not (isinstance(value, (list, tuple)) and len(value) == 0)
    }
    return _extern_call(*args, **given, backend=backend)


def register() -> None:
    """Called once, when the workshop opens."""
    register_lowering(FORWARD, type_promotion_kind=None)(_lower_forward)
