# SPDX-License-Identifier: MIT
"""Neighborhood attention as PyTorch operators: see README.md and `help(natten_ops.na2d)`."""

import importlib.metadata

from natten_ops import nn
from natten_ops._library import library_path, show_config
from natten_ops.functional import merge_attentions, na1d, na2d, na3d, neighborhood_attention

__version__ = importlib.metadata.version("natten-ops")

__all__ = [
    "library_path",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "nn",
    "show_config",
]
