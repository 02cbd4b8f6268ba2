# SPDX-License-Identifier: MIT
"""The counter where users are served: every function normalises its arguments, checks them, and calls one op."""

from natten_ops import ops  # noqa: F401  (registers the rules)
from natten_ops.functional.fused import merge_attentions, na1d, na2d, na3d, neighborhood_attention
from natten_ops.functional.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk
from natten_ops.ops.arguments import checked_scale

__all__ = [
    "checked_scale",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_attention",
]
