# SPDX-License-Identifier: MIT
"""The demo's pictures: predictions, what a query sees on a photograph, and what the trained heads look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from demo_model import Classifier
from sklearn.datasets import load_sample_images
from torch import Tensor

import natten_ops
from natten_ops.tools.show import QUERY_COLOUR, draw_on_image, new_figure, visible_keys

DPI = 110
PHOTO_TOKENS = (20, 30)  # of a 427 x 640 photograph: about 21 pixels each


def draw_predictions(images: Tensor, labels: Tensor, logits: Tensor, path: Path) -> None:
    """A grid of test images with the predicted digit: every wrong one first (framed), then right ones."""
    sure, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).long()
    # Wrong ones first, and of those the surest first; right ones as they come.
    order = torch.argsort(right * 2 - (1 - right) * sure, stable=True)
    columns, rows = 8, 4
    figure, axes = new_figure(columns, rows, width=1.15, height=1.4)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_color("#bbbbbb")
    for axis, i in zip(axes, order.tolist()):
        axis.imshow(images[i, 0].cpu().numpy(), cmap="gray_r", interpolation="nearest")
        wrong = not right[i]
        text = f"{predicted[i]}, is {labels[i]}" if wrong else f"{predicted[i]}"
        axis.set_title(text, fontsize=11, color=QUERY_COLOUR if wrong else "black", weight="bold" if wrong else None)
    mistakes = int((1 - right).sum())
    figure.suptitle(
        f"Predicted digits: {mistakes} of {len(images)} test images are wrong (orange), the others right", fontsize=11
    )
    figure.savefig(path, dpi=DPI)


def draw_photo_windows(path: Path) -> None:
    """One query of each photograph with a plain and a dilated window, and one at a border."""
    photos = load_sample_images().images  # a Chinese palace and a dahlia
    inside, borders = (11, 14), ((0, 2), (19, 21))
    figure, axes = new_figure(columns=3, rows=len(photos), width=4.2, height=3.05)
    pictures = iter(axes)
    for photo, border in zip(photos, borders):
        cases: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
            ("kernel_size=7", inside, {"kernel_size": 7}),
            ("kernel_size=7, dilation=2", inside, {"kernel_size": 7, "dilation": 2}),
            ("kernel_size=7 at a border: the window shifts inward", border, {"kernel_size": 7}),
        ]
        for title, query, geometry in cases:
            draw_on_image(photo, PHOTO_TOKENS, query, next(pictures), title, **geometry)
    figure.suptitle("What one token (orange frame) of a photograph sees: 49 tokens in every case", fontsize=12)
    figure.savefig(path, dpi=DPI)


def attention_weights(layer: Any, tokens: Tensor) -> Tensor:
    """Weights `[y, x, heads, key y, key x]` of a NeighborhoodAttention2D on `tokens` `[1, y, x, channels]`.

    Attention of one-hot values: where the value of key j is the unit vector e_j, the output of query i is its row of
    weights. No formula of the layer is repeated, so what is drawn is what the layer does.
    """
    height, width = tokens.shape[1:3]
    query, key, _ = layer.qkv(tokens).unflatten(-1, (3, layer.num_heads, layer.head_dim)).unbind(-3)
    one_hot = torch.eye(height * width, dtype=tokens.dtype, device=tokens.device)
    value = one_hot.reshape(1, height, width, 1, -1).expand(-1, -1, -1, layer.num_heads, -1)
    weights = natten_ops.na2d(
        query,
        key,
        value,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        dilation=layer.dilation,
        is_causal=layer.is_causal,
        scale=layer.qk_scale,
        rpb=layer.rpb,
    )
    return weights[0].unflatten(-1, (height, width))


def draw_attention(model: Classifier, image: Tensor, label: int, path: Path) -> None:
    """For one digit and one query on its ink: the weights of every head of the first stage's two blocks."""
    layers = [block.attention for block in model.fine]
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0])) for layer in layers]
    with torch.no_grad():
        model(image[None])
        weights = [attention_weights(layer, tokens).cpu() for layer, tokens in zip(layers, seen)]
    for hook in hooks:
        hook.remove()
    _draw_heads(image[0].cpu(), label, layers, weights, path)


def _draw_heads(image: Tensor, label: int, layers: list[Any], weights: list[Tensor], path: Path) -> None:
    """One row a layer: the window, then the weights of each head on the same colour scale."""
    tokens = tuple(weights[0].shape[:2])
    query = _inky_token(image, tokens)
    ink = 1 - (image + 0.6) / 2
    chosen = [layer_weights[query] for layer_weights in weights]
    top = max(float(w.max()) for w in chosen)
    heads = layers[0].num_heads
    figure, axes = new_figure(columns=1 + heads, rows=len(layers), width=2.8, height=2.75)
    drawn = None
    for row, layer in enumerate(layers):
        geometry = {"kernel_size": layer.kernel_size, "dilation": layer.dilation}
        first, *others = axes[row * (1 + heads) : (row + 1) * (1 + heads)]
        title = f"its window: kernel_size={layer.kernel_size[0]}, dilation={layer.dilation[0]}"
        draw_on_image(ink.numpy(), tokens, query, first, title, **geometry)
        window = visible_keys(tokens, query, **geometry)
        for head, axis in enumerate(others):
            drawn = _draw_weights(axis, ink, chosen[row][head], window, query, top)
            axis.set_title(f"head {head + 1}", fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.6, label="attention weight", pad=0.01)
    figure.suptitle(
        f"Where one token (orange) of a {label} looks after training: plain block above, dilated below", fontsize=11
    )
    figure.savefig(path, dpi=DPI)


def _draw_weights(axis: Any, ink: Tensor, weights: Tensor, window: Tensor, query: tuple[int, int], top: float) -> Any:
    """The weights as coloured cells over a pale digit; the query in an orange frame."""
    height, width = window.shape
    extent = (0, width, height, 0)
    axis.imshow(0.75 + 0.25 * ink.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    shown = weights.masked_fill(~window, float("nan"))  # nothing is drawn where nothing is seen
    cells = axis.pcolormesh(shown.numpy(), cmap=_blues(), vmin=0, vmax=top)
    y, x = query
    axis.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color=QUERY_COLOUR, linewidth=2)
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0), aspect="equal")
    return cells


def _blues() -> Any:
    """Blues without its palest fifth, so that a small weight can be told from no weight."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Blues"](torch.linspace(0.2, 1.0, 256).numpy()))


def _inky_token(image: Tensor, tokens: tuple[int, ...]) -> tuple[int, int]:
    """The token with the most ink, of those near the middle, where windows are whole."""
    middle = torch.nn.functional.adaptive_avg_pool2d(image[None], tokens)[0, 5:11, 5:11]
    y, x = divmod(int(middle.argmax()), middle.shape[1])
    return y + 5, x + 5
