# SPDX-License-Identifier: MIT
"""`python -m natten_ops.tools why | show`: the functions of this folder from a shell."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from natten_ops import tools
from natten_ops._command_line import OneLineParser
from natten_ops.backends import ALL_DTYPES
from natten_ops.geometry.masks import checked_params
from natten_ops.tools.show import new_figure

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ALL_DTYPES}
EXAMPLES = """examples:
  python -m natten_ops.tools why --shape 56x56 --kernel-size 7 --heads 4 --head-dim 32
  python -m natten_ops.tools show --shape 12x12 --kernel-size 5 --query 3,3 --dilation 2
  python -m natten_ops.tools show --shape 16 --kernel-size 6 --query 9 --stride 3 --causal
  python -m natten_ops.tools show --shape 12x16 --kernel-size 5 --query 0,3 --image photo.png --out window.png
  python -m natten_ops.tools show --shape 12x16 --kernel-size 5 --query 0,3 --image photo.png --attention map.pt --out map.png
"""


def integers(text: str) -> tuple[int, ...]:
    """`12x16`, `12,16` or `12` as a tuple of ints."""
    if not re.fullmatch(r"-?\d+([x,]-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers; write 7, 7,5 or 12x16")
    return tuple(int(part) for part in re.split("[x,]", text))


def flags(text: str) -> tuple[bool, ...]:
    """`true`, or one `true` or `false` an axis with commas between them, as a tuple of bools."""
    words = text.lower().split(",")
    if not set(words) <= {"true", "false"}:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of flags; write true, or true,false")
    return tuple(word == "true" for word in words)


def parser() -> argparse.ArgumentParser:
    """The command line of both tools."""
    top = OneLineParser(
        "python -m natten_ops.tools", description="Look at neighborhood attention: who computes it, who sees whom.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="why | show")
    why = commands.add_parser("why", help="the backend that runs a problem, the others' reasons, the FLOPs")
    show = commands.add_parser("show", help="the window of a query, as text or as a picture")
    for command in (why, show):
        command.add_argument("--shape", type=integers, required=True, metavar="YxX", help="tokens of each axis")
        command.add_argument("--kernel-size", type=integers, required=True, metavar="K", help="one, or one an axis")
        command.add_argument("--stride", type=integers, default=(1,), metavar="S", help="one, or one an axis")
        command.add_argument("--dilation", type=integers, default=(1,), metavar="D", help="one, or one an axis")
        command.add_argument(
            "--causal", type=flags, nargs="?", const=(True,), default=(False,), metavar="FLAGS",
            help="alone: every axis; or true,false for each axis",
        )  # fmt: skip
    why.add_argument("--batch", type=int, default=1, help="samples (default %(default)s)")
    why.add_argument("--heads", type=int, default=1, help="query heads (default %(default)s)")
    why.add_argument("--head-dim", type=int, default=32, help="channels of a head (default %(default)s)")
    why.add_argument("--scale", type=float, help="of the logits (default head_dim ** -0.5)")
    why.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default %(default)s)")
    why.add_argument("--device", default="cpu", help="of the tensors, need not be present (default %(default)s)")
    show.add_argument("--query", type=integers, required=True, metavar="Y,X", help="its coordinates, in tokens")
    show.add_argument("--out", metavar="FILE", help="write a picture instead of text")
    show.add_argument("--image", metavar="FILE", help="draw on this image (2-D, with --out)")
    show.add_argument(
        "--attention", metavar="FILE",
        help="with --image: draw these weights, a tensor [heads, y, x, slots] that torch.save wrote",
    )  # fmt: skip
    show.add_argument("--head", type=int, metavar="H", help="with --attention: one head instead of the mean of all")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit code 2."""
    options = parser().parse_args(arguments)
    try:
        print(_why(options) if options.command == "why" else _show(options))
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"python -m natten_ops.tools {options.command}: {line}", file=sys.stderr)
        return 2
    return 0


def _geometry(options: argparse.Namespace) -> dict[str, Any]:
    def one_or_all(values: tuple[Any, ...]) -> Any:
        return values[0] if len(values) == 1 else values

    names = {"kernel_size": options.kernel_size, "stride": options.stride, "dilation": options.dilation}
    return {name: one_or_all(values) for name, values in {**names, "is_causal": options.causal}.items()}


def _why(options: argparse.Namespace) -> str:
    return tools.why(
        options.shape, options.heads, options.head_dim, **_geometry(options),
        batch=options.batch, scale=options.scale, dtype=DTYPES[options.dtype], device=torch.device(options.device),
    )  # fmt: skip


def _show(options: argparse.Namespace) -> str:
    geometry = _geometry(options)
    for name, needed in (("image", "out"), ("attention", "image"), ("head", "attention")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise ValueError(f"--{name} needs --{needed} FILE")
    if options.out is None:
        return tools.show(options.shape, options.query, **geometry)
    if options.image is None:
        figure = tools.draw_window(options.shape, options.query, **geometry)
    elif options.attention is not None:
        weights = _read_attention(options.attention, options.shape, geometry)
        figure = tools.draw_attention(_read_image(options.image), weights, options.query, options.head, **geometry)
    else:
        figure = tools.draw_on_image(_read_image(options.image), options.shape, options.query, **geometry)
    figure.savefig(options.out, dpi=150)
    return f"wrote {options.out}"


def _read_attention(path: str, spatial_shape: Sequence[int], geometry: dict[str, Any]) -> torch.Tensor:
    """The saved map, if it is one of this grid and kernel."""
    wanted = [*spatial_shape, math.prod(checked_params(spatial_shape, **geometry).kernel_size)]
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the reader of pickles fails in many ways on a file of something else
        kind = type(error).__name__
        raise ValueError(
            f"--attention {path} cannot be read ({kind}); give a tensor [heads, y, x, slots] that torch.save wrote"
        ) from error
    if not isinstance(weights, torch.Tensor):
        raise ValueError(f"--attention {path} holds a {type(weights).__name__}; save one tensor [heads, y, x, slots]")
    if list(weights.shape[1:]) != wanted:
        # More slots would pass for additional tokens, and a picture of another kernel would be drawn.
        raise ValueError(
            f"--attention {path} has shape {list(weights.shape)}, and --shape with --kernel-size asks for "
            f"[heads, {', '.join(map(str, wanted))}]; give the settings of the map, and no slots of additional tokens"
        )
    return weights


def _read_image(path: str) -> Any:
    new_figure()  # complains in our words if matplotlib is missing
    from matplotlib.image import imread

    return imread(path)


if __name__ == "__main__":
    sys.exit(main())
