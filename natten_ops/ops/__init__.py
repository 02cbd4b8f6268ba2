# SPDX-License-Identifier: MIT
"""The rules of every op (fake, autograd, autocast, vmap, FLOPs), one file per op family; importing registers them."""

from natten_ops.ops import fused, jagged, merge, tracing, unfused

__all__ = ["fused", "jagged", "merge", "tracing", "unfused"]
