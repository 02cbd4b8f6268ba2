# SPDX-License-Identifier: MIT
"""Neighborhood attention as PyTorch operators: see README.md and `help(natten_ops.na2d)`."""

import importlib.metadata

from natten_ops import compat, export, nn
from natten_ops._library import library_path, show_config
from natten_ops.functional import (
    merge_attentions,
    na1d,
    na1d_av,
    na1d_qk,
    na2d,
    na2d_av,
    na2d_qk,
    na3d,
    na3d_av,
    na3d_qk,
    neighborhood_attention,
)
from natten_ops.geometry.block_masks import block_mask, tile_permute, tile_unpermute, tiled_block_mask
from natten_ops.geometry.masks import mask_mod

__version__ = importlib.metadata.version("natten-ops")

__all__ = [
    "block_mask",
    "compat",
    "export",
    "library_path",
    "mask_mod",
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
    "nn",
    "show_config",
    "tile_permute",
    "tile_unpermute",
    "tiled_block_mask",
]
