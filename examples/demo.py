# SPDX-License-Identifier: MIT
"""Neighborhood attention on real images, from training to a compiled package: `python examples/demo.py`.

Trains a small classifier of handwritten digits twice from the same weights and batches, eagerly and under
`torch.compile(fullgraph=True)`; exports it with a dynamic batch; packages it with AOTInductor and runs the package in a
fresh process; compares all outputs; and writes a report with pictures. Exit code 1 if an accuracy or a parity fails.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from demo_model import BATCH_SIZE, Classifier, Data, load_data, predict, train, training_step
    from demo_pictures import draw_attention, draw_photo_windows, draw_predictions

    import natten_ops
    from natten_ops import backends
    from natten_ops.tools import why
    from natten_ops.tools.show import new_figure
except ImportError as error:
    sys.exit(f"the demo cannot start: {error}. Install with: pip install 'natten-ops[demo]' (or run `make demo`)")

MINIMUM_ACCURACY = 0.97
PARITY_TOLERANCE = 1e-4  # logits are of order 10, so this is about 1e-5 of them: float32 rounding
TIMED_ROUNDS = 15
PARITY_IMAGES = 61  # no power of two and no example size, so that the batch is seen to be dynamic


class Trained(NamedTuple):
    """One of the two trainings: accuracy on the test images and the seconds it took, compilation included."""

    accuracy: float
    seconds: float


class StepTimes(NamedTuple):
    """Median milliseconds, of a training step (forward and backward) and of a forward alone."""

    training: float
    forward: float


def main() -> int:
    """Train, export, package, compare, report."""
    options = parse_options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data = load_data(options.seed, options.device, options.quick)
    torch.manual_seed(options.seed)
    eager = Classifier().to(options.device)
    compiled = copy.deepcopy(eager)
    compiled_call = torch.compile(compiled, fullgraph=True)
    epochs = 1 if options.quick else options.epochs
    trainings = {
        "eager": run_training("eager", eager, eager, data, epochs, options.seed),
        "compiled": run_training("compiled", compiled, compiled_call, data, epochs, options.seed),
    }
    print("measuring a step of each ...", flush=True)
    times = measure_steps({"eager": eager, "compiled": compiled_call}, data, 3 if options.quick else TIMED_ROUNDS)
    compiled.load_state_dict(eager.state_dict())  # from here on all five forms have the same weights
    outputs = deploy(eager, compiled_call, data.test_images[:PARITY_IMAGES], out)
    print("drawing ...", flush=True)
    draw(eager, data, out)
    differences = parity(outputs)
    seconds = time.perf_counter() - started
    report = report_text(options, epochs, trainings, times, differences, data, seconds)
    (out / "report.md").write_text(report)
    return summary(options, trainings, times, differences, out, seconds)


def parse_options() -> argparse.Namespace:
    """The command line; a device that no backend serves ends here, with the reason."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights, split and batches (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of each training (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="of model and data (default %(default)s)")
    parser.add_argument("--out", default="demo_out", help="folder for everything written (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few images and one epoch; accuracy is not judged")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs {options.epochs} must be at least 1")
    try:
        device = torch.device(options.device)
        backends.choose(backends.Problem(device.type, torch.float32))
        torch.empty(1, device=device)
        new_figure()
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: --device {options.device}: {error}\n")
    return options


# ---- train and measure ---------------------------------------------------------------------------------------------


def run_training(
    name: str, weights: Classifier, model: Callable[[Tensor], Tensor], data: Data, epochs: int, seed: int
) -> Trained:
    """Train, then judge on the test images."""
    started = time.perf_counter()
    train(model, weights, data, epochs, seed, name)
    seconds = time.perf_counter() - started
    weights.eval()
    right = predict(model, data.test_images).argmax(-1) == data.test_labels
    return Trained(right.float().mean().item(), seconds)


def measure_steps(models: dict[str, Callable[[Tensor], Tensor]], data: Data, rounds: int) -> dict[str, StepTimes]:
    """Median times of the models, warmed up and taking turns, so that a busy moment of the machine hits all of them."""
    images, labels = data.train_images[:BATCH_SIZE], data.train_labels[:BATCH_SIZE]
    work: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
        "training": lambda model: training_step(model, images, labels),
        "forward": lambda model: predict(model, images),
    }
    medians: dict[str, dict[str, float]] = {name: {} for name in models}
    for kind, run in work.items():
        taken: dict[str, list[float]] = {name: [] for name in models}
        for turn, (name, model) in itertools.product(range(rounds + 2), models.items()):
            _wait(images)
            started = time.perf_counter()
            run(model)
            _wait(images)
            if turn >= 2:
                taken[name].append(time.perf_counter() - started)
        for name, values in taken.items():
            medians[name][kind] = 1e3 * statistics.median(values)
    return {name: StepTimes(**values) for name, values in medians.items()}


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


# ---- export, package, compare --------------------------------------------------------------------------------------


def deploy(eager: Classifier, compiled: Callable[[Tensor], Tensor], images: Tensor, out: Path) -> dict[str, Tensor]:
    """Logits of the same images by five forms of the same weights, the last from a package in a fresh process."""
    eager.eval()
    outputs = {"eager": predict(eager, images), "compiled": predict(compiled, images)}
    print("exporting ...", flush=True)
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(eager, (images[:4],), dynamic_shapes=({0: batch},), strict=False)
    outputs["exported"] = predict(exported.module(), images)
    torch.export.save(exported, out / "classifier_exported.pt2")
    reloaded = torch.export.load(out / "classifier_exported.pt2")
    outputs["export reloaded"] = predict(reloaded.module(), images)
    print("packaging with AOTInductor (compiles C++, about half a minute) ...", flush=True)
    package = torch._inductor.aoti_compile_and_package(reloaded, package_path=str(out / "classifier_aoti.pt2"))
    outputs["package, fresh process"] = run_package(package, images, out)
    return outputs


def run_package(package: str, images: Tensor, out: Path) -> Tensor:
    """Logits by the package in a Python process that has never seen the model."""
    images_file, logits_file = out / "images.pt", out / "logits.pt"
    torch.save(images, images_file)
    script = Path(__file__).with_name("demo_reload.py")
    command = [sys.executable, str(script), package, str(images_file), str(logits_file)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"the package did not run in a fresh process:\n{finished.stderr}")
    logits: Tensor = torch.load(logits_file)
    for file in (images_file, logits_file):
        file.unlink()
    return logits


def parity(outputs: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """Largest absolute difference of every pair of outputs."""
    pairs = itertools.combinations(outputs.items(), 2)
    return {(one, other): (a - b).abs().max().item() for (one, a), (other, b) in pairs}


# ---- report --------------------------------------------------------------------------------------------------------


def draw(model: Classifier, data: Data, out: Path) -> None:
    """All pictures of the report."""
    logits = predict(model, data.test_images)
    draw_predictions(data.test_images, data.test_labels, logits, out / "predictions.png")
    draw_photo_windows(out / "photo_windows.png")
    index = int((data.test_labels == 3).nonzero()[0])
    draw_attention(model, data.test_images[index], 3, out / "attention.png")


def parity_table(differences: dict[tuple[str, str], float]) -> list[str]:
    """The pairs as a Markdown triangle."""
    names = list(dict.fromkeys(name for pair in differences for name in pair))
    lines = ["| | " + " | ".join(names[1:]) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for one in names[:-1]:
        cells = [f"{differences[one, other]:.1e}" if (one, other) in differences else "" for other in names[1:]]
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    return lines


REPORT = """# Neighborhood attention on handwritten digits

{about}

## Two trainings from the same weights and batches

| | test accuracy | training, s (compilation included) | training step, ms | forward of {batch}, ms |
|---|---:|---:|---:|---:|
{rows}
| eager / compiled | | | {training_ratio} | {forward_ratio} |

A training step is forward, loss and backward of one batch. Times are medians, taken in turns after warm-up, of this
machine in this minute; the ratio is what to look at.

![Predictions](predictions.png)

## One model in five forms

Largest absolute difference of the logits of {images} test images, all with the weights of the eager training
(tolerance {tolerance:.0e}):

{parity}

Exported with a dynamic batch: `classifier_exported.pt2` (`torch.export.load`). Compiled ahead of time:
`classifier_aoti.pt2` (`torch._inductor.aoti_load_package`, after `import natten_ops`).

## What a token sees

![Windows on two photographs](photo_windows.png)

At a border the window shifts inward: it keeps its size. Photographs of scikit-learn's `load_sample_images`.

![Attention weights of a digit](attention.png)

## What computes it

The dilated block of the first stage (`natten_ops.tools.why`):

```
{problem}
```
"""


def report_text(
    options: argparse.Namespace,
    epochs: int,
    trainings: dict[str, Trained],
    times: dict[str, StepTimes],
    differences: dict[tuple[str, str], float],
    data: Data,
    seconds: float,
) -> str:
    """report.md."""
    parameters = sum(p.numel() for p in Classifier().parameters())
    rows = [
        f"| {name} | {100 * t.accuracy:.1f} % | {t.seconds:.0f} | {times[name].training:.1f} | {times[name].forward:.1f} |"
        for name, t in trainings.items()
    ]
    training_ratio, forward_ratio = (f"{a / b:.2f}" for a, b in zip(times["eager"], times["compiled"]))
    about = (
        f"{len(data.train_images)} training and {len(data.test_images)} test images of 32 x 32 pixels; a model of "
        f"{parameters} parameters: two stages, each one plain and one dilated block; {epochs} epochs, seed "
        f"{options.seed}. The whole run took {seconds:.0f} s on {options.device}, {torch.get_num_threads()} threads "
        f"(natten_ops {natten_ops.__version__}, torch {torch.__version__}, Python {platform.python_version()})."
    )
    return REPORT.format(
        about=about,
        batch=BATCH_SIZE,
        rows="\n".join(rows),
        training_ratio=training_ratio,
        forward_ratio=forward_ratio,
        images=PARITY_IMAGES,
        tolerance=PARITY_TOLERANCE,
        parity="\n".join(parity_table(differences)),
        problem=why((16, 16), heads=2, head_dim=16, kernel_size=5, dilation=3, batch=BATCH_SIZE, device=options.device),
    )


def summary(
    options: argparse.Namespace,
    trainings: dict[str, Trained],
    times: dict[str, StepTimes],
    differences: dict[tuple[str, str], float],
    out: Path,
    seconds: float,
) -> int:
    """Print the results and judge them: the exit code."""
    accuracies = {name: trained.accuracy for name, trained in trainings.items()}
    ratio = times["eager"].training / times["compiled"].training
    worst = max(differences.values())
    print(f"\naccuracy {', '.join(f'{name} {100 * a:.1f} %' for name, a in accuracies.items())}")
    print(f"training step eager / compiled {ratio:.2f}, largest difference of five forms {worst:.1e}, {seconds:.0f} s")
    for file in ("report.md", "predictions.png", "photo_windows.png", "attention.png"):
        print(f"  {out / file}")
    for file in ("classifier_exported.pt2", "classifier_aoti.pt2"):
        print(f"  {out / file}")
    failures = [
        f"accuracy of {n} is below {MINIMUM_ACCURACY:.0%}" for n, a in accuracies.items() if a < MINIMUM_ACCURACY
    ]
    failures = [] if options.quick else failures
    if worst > PARITY_TOLERANCE:
        failures.append(f"the forms differ by {worst:.1e}, more than {PARITY_TOLERANCE:.0e}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
