# SPDX-License-Identifier: MIT
"""Run a packaged model in a process of its own: `python demo_reload.py PACKAGE IMAGES LOGITS`.

No model code is imported: the package holds the compiled graph, and `import natten_ops` brings the operators.
"""

from __future__ import annotations

import sys

import torch

import natten_ops  # noqa: F401  (defines torch.ops.natten, which the package calls)


def main() -> None:
    """Load the package, run the images of one file, write the logits to another."""
    package, images, logits = sys.argv[1:]
    model = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        torch.save(model(torch.load(images)), logits)


if __name__ == "__main__":
    main()
