# SPDX-License-Identifier: MIT
"""The demo's data (scikit-learn's handwritten digits), its model and its training loop: plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from natten_ops.nn import NeighborhoodAttention2D

IMAGE_SIZE = 32  # pixels; the data set has 8 x 8
CLASSES = 10
HEAD_DIM = 16
BATCH_SIZE = 32
LEARNING_RATE = 4e-3  # the peak of a one-cycle schedule
TEST_IMAGES = 389  # of 1797; the 1408 left are 44 whole batches
QUICK_IMAGES = 64  # of each half, for a run that only shows that everything works


class Data(NamedTuple):
    """Images `[n, 1, 32, 32]`, float32, about zero mean, and their labels `[n]`, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(seed: int, device: str, quick: bool) -> Data:
    """The digits, enlarged bilinearly and split at random."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear") * 2 - 0.6
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    if quick:
        test, train = test[:QUICK_IMAGES], train[:QUICK_IMAGES]
    return Data(*(t.to(device) for t in (images[train], labels[train], images[test], labels[test])))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens stay `[batch, y, x, channels]` throughout."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.attention = NeighborhoodAttention2D(
            channels, num_heads=channels // HEAD_DIM, kernel_size=kernel_size, dilation=dilation, rel_pos_bias=True
        )
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


class Classifier(nn.Module):
    """Patches -> two blocks on 16 x 16 tokens -> two blocks on 8 x 8 tokens -> mean -> ten logits.

    In each stage one block looks at near keys and one, dilated, at far ones: 5 keys an axis with 3 tokens between them
    span the 16 tokens of the first stage, and 3 keys with 2 between them most of the second.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        size = IMAGE_SIZE // 2
        self.embed = nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(size, size, channels))
        self.fine = nn.Sequential(Block(channels, 5, dilation=1), Block(channels, 5, dilation=3))
        self.shrink = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1)
        self.coarse = nn.Sequential(Block(2 * channels, 3, dilation=1), Block(2 * channels, 3, dilation=2))
        self.norm = nn.LayerNorm(2 * channels)
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.fine(self.embed(images).permute(0, 2, 3, 1) + self.position)
        tokens = self.coarse(self.shrink(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        logits: Tensor = self.head(self.norm(tokens).mean((1, 2)))
        return logits


def train(model: Callable[[Tensor], Tensor], weights: nn.Module, data: Data, epochs: int, seed: int, name: str) -> None:
    """Train in place; `model` is what is called (eager or compiled), `weights` the module whose parameters move."""
    optimizer = torch.optim.AdamW(weights.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    batches = len(data.train_images) // BATCH_SIZE
    total_steps = epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total_steps, pct_start=0.2)
    shuffle = torch.Generator().manual_seed(seed)  # the same batches for every model
    weights.train()
    with tqdm(total=epochs * batches, desc=f"train {name:<8}", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.train_images), generator=shuffle)
            for chosen in order[: batches * BATCH_SIZE].split(BATCH_SIZE):
                loss = training_step(model, data.train_images[chosen], data.train_labels[chosen])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def training_step(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Loss of one batch, and its gradients."""
    loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
    loss.backward()
    return loss.detach()


def predict(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Logits `[n, 10]`, without gradients."""
    with torch.no_grad():
        return model(images)
