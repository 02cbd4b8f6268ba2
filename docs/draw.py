# SPDX-License-Identifier: MIT
"""Draws the pictures of semantics.md from the code itself: `python docs/draw.py` writes docs/images/*.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_sample_image

import natten_ops
from natten_ops.tools import draw_attention
from natten_ops.tools.show import draw_all_windows, draw_window, new_figure

IMAGES = Path(__file__).parent / "images"
DPI = 90

# One row of pictures: (title, geometry) of a 1-D axis, drawn with a row for every query.
AXES: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "borders": (
        12,
        [
            ("odd: kernel_size=5", {"kernel_size": 5}),
            ("even: kernel_size=4", {"kernel_size": 4}),
            ("everything: kernel_size=12", {"kernel_size": 12}),
        ],
    ),
    "stride": (
        12,
        [
            ("kernel_size=6, stride=2", {"kernel_size": 6, "stride": 2}),
            ("kernel_size=6, stride=3", {"kernel_size": 6, "stride": 3}),
            ("blocks: kernel_size=6, stride=6", {"kernel_size": 6, "stride": 6}),
        ],
    ),
    "dilation": (
        14,
        [
            ("kernel_size=3, dilation=2", {"kernel_size": 3, "dilation": 2}),
            ("kernel_size=3, dilation=3", {"kernel_size": 3, "dilation": 3}),
            ("kernel_size=3, dilation=4", {"kernel_size": 3, "dilation": 4}),
        ],
    ),
    "causal": (
        12,
        [
            ("causal, kernel_size=5", {"kernel_size": 5, "is_causal": True}),
            ("causal, kernel_size=5, stride=3", {"kernel_size": 5, "stride": 3, "is_causal": True}),
            ("causal, kernel_size=4, dilation=3", {"kernel_size": 4, "dilation": 3, "is_causal": True}),
        ],
    ),
}

# One row of pictures: (title, query, geometry) on a grid of 12 x 12 tokens.
GRIDS: dict[str, list[tuple[str, tuple[int, int], dict[str, Any]]]] = {
    "windows": [
        ("inside", (6, 5), {"kernel_size": 5}),
        ("at an edge", (6, 0), {"kernel_size": 5}),
        ("in a corner", (11, 10), {"kernel_size": 5}),
    ],
    "product": [
        ("kernel_size=(3, 7)", (6, 5), {"kernel_size": (3, 7)}),
        ("kernel_size=3, dilation=(2, 4)", (6, 5), {"kernel_size": 3, "dilation": (2, 4)}),
        ("kernel_size=5, is_causal=(True, False)", (6, 5), {"kernel_size": 5, "is_causal": (True, False)}),
    ],
}


def draw_weights() -> None:
    """Patches of a photograph attend to those like them: their principal components are queries and keys."""
    photograph = load_sample_image("flower.jpg")[40:424, 100:484]
    patches = torch.tensor(photograph).float().unfold(0, 16, 16).unfold(1, 16, 16).flatten(2)
    patches = ((patches - patches.mean((0, 1))) / patches.std((0, 1))).flatten(0, 1)
    torch.manual_seed(0)
    components = patches @ torch.pca_lowrank(patches, 16)[2]
    tokens = (components / components.std()).view(1, 1, 24, 24, 16)
    weights = natten_ops.na2d_qk(tokens * 0.3, tokens, kernel_size=9).softmax(-1)
    title = "24 x 24 tokens, kernel_size=9: patches like that of the query weigh most"
    draw_attention(photograph, weights[0], (12, 9), title=title, kernel_size=9).savefig(
        IMAGES / "attention.png", dpi=DPI
    )


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for name, (length, axis_cases) in AXES.items():
        figure, axes = new_figure(columns=len(axis_cases))
        for picture, (title, geometry) in zip(axes, axis_cases):
            draw_all_windows(length, picture, title, **geometry)
        figure.savefig(IMAGES / f"{name}.png", dpi=DPI)
    draw_weights()
    for name, grid_cases in GRIDS.items():
        figure, axes = new_figure(columns=len(grid_cases))
        for picture, (title, query, geometry) in zip(axes, grid_cases):
            draw_window((12, 12), query, picture, title, **geometry)
        figure.savefig(IMAGES / f"{name}.png", dpi=DPI)


if __name__ == "__main__":
    main()
