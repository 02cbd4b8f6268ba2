# SPDX-License-Identifier: MIT
"""The demo: its pieces on few images, and (slow) a whole quick run that ends with a package in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

for module in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"the demo needs {module}, of the extra demo")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def demo_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo_model
    import demo_pictures

    return demo_model, demo_pictures


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_training_moves_the_model(demo_modules):
    model_module, _ = demo_modules
    data = model_module.load_data(seed=0, device="cpu", quick=True)
    torch.manual_seed(0)
    model = model_module.Classifier()
    before = model.fine[1].attention.rpb.detach().clone()
    model_module.train(model, model, data, epochs=1, seed=0, name="eager")
    assert not torch.equal(before, model.fine[1].attention.rpb)
    assert model_module.predict(model, data.test_images).shape == (len(data.test_images), model_module.CLASSES)


def test_attention_weights_are_a_distribution_over_the_window(demo_modules):
    from natten_ops.tools import visible_keys

    model_module, pictures = demo_modules
    layer = model_module.Block(32, 5, dilation=3).attention
    with torch.no_grad():
        weights = pictures.attention_weights(layer, torch.randn(1, 16, 16, 32))
    assert weights.shape == (16, 16, layer.num_heads, 16, 16)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(16, 16, layer.num_heads))
    window = visible_keys((16, 16), (2, 9), kernel_size=5, dilation=3)
    assert torch.equal(weights[2, 9] > 0, window.expand_as(weights[2, 9]))


def test_pictures_are_files(demo_modules, tmp_path):
    model_module, pictures = demo_modules
    data = model_module.load_data(seed=0, device="cpu", quick=True)
    model = model_module.Classifier()
    logits = model_module.predict(model, data.test_images)
    pictures.draw_predictions(data.test_images, data.test_labels, logits, tmp_path / "predictions.png")
    pictures.draw_attention(model, data.test_images[0], int(data.test_labels[0]), tmp_path / "attention.png")
    pictures.draw_photo_windows(tmp_path / "photo_windows.png")
    assert all((tmp_path / f"{n}.png").stat().st_size > 5000 for n in ("predictions", "attention", "photo_windows"))


@pytest.mark.parametrize(
    "arguments, message",
    [(["--epochs", "0"], "--epochs 0 must be at least 1"), (["--device", "meta"], "--device meta")],
)
def test_mistakes_are_told(arguments, message, tmp_path):
    done = run_demo(*arguments, "--out", str(tmp_path))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_quick_run(tmp_path):
    done = run_demo("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "accuracy eager" in done.stdout
    files = {file.name for file in tmp_path.iterdir()}
    packages = {"classifier_exported.pt2", "classifier_aoti.pt2"}
    assert files == {"report.md", "predictions.png", "photo_windows.png", "attention.png"} | packages
