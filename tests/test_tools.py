# SPDX-License-Identifier: MIT
"""tools: exact texts of `show` and `why`, pictures that are files, a command line that complains in one line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline

from natten_ops import backends
from natten_ops.geometry.masks import dense_mask
from natten_ops.geometry.params import make_params
from natten_ops.tools import draw_all_windows, draw_on_image, draw_window, show, visible_keys, why

GEOMETRIES = [
    ((11,), {"kernel_size": 4, "stride": 3}),
    ((13,), {"kernel_size": 3, "dilation": 4, "is_causal": True}),
    ((6, 7), {"kernel_size": (3, 2), "dilation": (2, 3)}),
    ((6, 5), {"kernel_size": 4, "stride": (2, 3), "is_causal": (True, False)}),
    ((3, 4, 5), {"kernel_size": (2, 3, 5), "is_causal": (True, False, False)}),
]


def tools(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "natten_ops.tools", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("spatial_shape, geometry", GEOMETRIES)
def test_windows_are_those_of_the_dense_mask(spatial_shape, geometry):
    mask = dense_mask(make_params(len(spatial_shape), **geometry), spatial_shape, spatial_shape)
    for row, query in zip(mask, torch.cartesian_prod(*map(torch.arange, spatial_shape)).reshape(len(mask), -1)):
        window = visible_keys(spatial_shape, query.tolist(), **geometry)
        assert torch.equal(window.flatten(), row)
        text = show(spatial_shape, query.tolist(), **geometry)
        grid = "".join(line[4:] for line in text.splitlines()[1:])
        assert grid.count("#") + grid.count("Q") == row.sum() and grid.count("Q") == 1


def test_show_one_axis():
    assert_expected_inline(
        show((12,), (9,), kernel_size=6, stride=3),
        """\
12 tokens, kernel_size 6, stride 3: query 9 sees 6 keys
    012345678901
    ......###Q##""",
    )


def test_show_causal():
    assert_expected_inline(
        show((12,), (7,), kernel_size=3, dilation=3, is_causal=True),
        """\
12 tokens, kernel_size 3, dilation 3, causal: query 7 sees 3 keys
    012345678901
    .#..#..Q....""",
    )


def test_show_dilation():
    assert_expected_inline(
        show((7, 9), (3, 4), kernel_size=3, dilation=(2, 3)),
        """\
7 x 9 tokens, kernel_size 3, dilation (2, 3): query (3, 4) sees 9 keys
    012345678
  0 .........
  1 .#..#..#.
  2 .........
  3 .#..Q..#.
  4 .........
  5 .#..#..#.
  6 .........""",
    )


def test_show_border():
    assert_expected_inline(
        show((4, 6), (0, 5), kernel_size=3),
        """\
4 x 6 tokens, kernel_size 3: query (0, 5) sees 9 keys
    012345
  0 ...##Q
  1 ...###
  2 ...###
  3 ......""",
    )


def test_show_slices():
    assert_expected_inline(
        show((3, 2, 4), (1, 0, 0), kernel_size=(2, 2, 3), is_causal=(True, False, False)),
        """\
3 x 2 x 4 tokens, kernel_size (2, 2, 3), causal (True, False, False): query (1, 0, 0) sees 12 keys
z = 0
    0123
  0 ###.
  1 ###.
z = 1
    0123
  0 Q##.
  1 ###.""",
    )


def test_why_names_the_choice_and_the_work():
    text = why((56, 56), heads=4, head_dim=32, kernel_size=7)
    assert_expected_inline(
        "\n".join(text.splitlines()[:4]),
        """\
problem  56 x 56 tokens, kernel_size 7
         batch 1, 4 heads of 32, float32 tensors on cpu
window   49 keys a query on average, 1.6 % of the 3136 tokens
work     forward 78.7 MFLOP, backward 197 MFLOP""",
    )
    chosen = backends.choose(backends.Problem("cpu", torch.float32))
    assert f"chosen   {chosen.name}: " in text
    assert "compiled as one kernel with its neighbours; backward: a call" in text
    assert 'reference: also able, but only when named: backend="reference"' in text
    assert all(f"{backend.name}: " in text for backend in backends.BACKENDS)


def test_why_counts_causal_windows():
    assert "window   2 keys a query on average, 67 % of the 3 tokens" in why((3,), kernel_size=3, is_causal=True)


def test_why_says_what_generated_code_lacks():
    text = why((64, 64), head_dim=64, kernel_size=63)
    assert "chosen   cpu-tiled" in text
    assert "compiled as a call: generated code keeps the keys and scores of a tile in cache" in text


def test_why_knows_scales():
    text = why((8, 8), kernel_size=3, scale=-1.0)
    assert "chosen   cpu-general" in text and "compiled as a call" in text and "scale" in text


def test_why_says_what_must_be_named(monkeypatch):
    monkeypatch.setattr(backends._library, "has_cuda_kernels", True)
    text = why((64, 64), head_dim=64, kernel_size=7, dtype=torch.float16, device="cuda")
    assert "chosen   cuda-mma: " in text
    assert 'cuda-wgmma: also able, but only when named: backend="cuda-wgmma"' in text
    text = why((128,), head_dim=64, kernel_size=7, dilation=9, dtype=torch.float16, device="cuda")
    assert "cuda-wgmma: cannot: takes dilations up to 8" in text


def test_why_gives_reasons():
    text = why((8,), kernel_size=3, device="mps")
    assert "chosen   none: no kernel of this version runs the problem" in text
    assert "cpu-general: cannot: runs on cpu tensors, not on mps" in text


@pytest.mark.parametrize(
    "query, geometry, message",
    [
        ((5, 9), {"kernel_size": 3}, r"query\[1\]=9 is outside of the grid; give 0 to 7"),
        ((5,), {"kernel_size": 3}, "1 coordinates for 2 spatial axes"),
        ((5, 5), {"kernel_size": 3, "dilation": 3}, r"spans 9 > 8 tokens on axis 0"),
    ],
)
def test_mistakes_are_value_errors(query, geometry, message):
    with pytest.raises(ValueError, match=message):
        show((8, 8), query, **geometry)


def test_pictures_are_files(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    figures = {
        "row": draw_window((12,), (3,), kernel_size=5),
        "grid": draw_window((12, 12), (3, 3), kernel_size=5, dilation=2),
        "slice": draw_window((4, 6, 6), (1, 2, 3), kernel_size=3),
        "axis": draw_all_windows(12, kernel_size=4, is_causal=True),
        "image": draw_on_image(torch.rand(30, 40, 3).numpy(), (6, 8), (0, 7), kernel_size=3),
    }
    for name, figure in figures.items():
        path = tmp_path / f"{name}.png"
        figure.savefig(path)
        assert path.stat().st_size > 1000 and path.read_bytes().startswith(b"\x89PNG"), name


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'natten-ops\[demo\]'"):
        draw_window((12,), (3,), kernel_size=5)


def test_command_line(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    shown = tools("show", "--shape", "9,9", "--kernel-size", "3,2", "--query", "4,4", "--causal", "true,false")
    assert shown.returncode == 0
    assert shown.stdout.rstrip() == show((9, 9), (4, 4), kernel_size=(3, 2), is_causal=(True, False))
    explained = tools("why", "--shape", "12x12", "--kernel-size", "3", "--dtype", "bfloat16", "--heads", "2")
    assert explained.returncode == 0
    assert explained.stdout.rstrip() == why((12, 12), heads=2, kernel_size=3, dtype=torch.bfloat16)
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    draw_window((12, 12), (3, 3), kernel_size=5).savefig(photo)
    options = ["--shape", "8x8", "--kernel-size", "3", "--query", "1,1", "--image", str(photo), "--out", str(out)]
    drawn = tools("show", *options)
    assert drawn.returncode == 0, drawn.stderr
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("show --shape 8 --kernel-size 9 --query 1", "spans 9 > 8 tokens on axis 0"),
        ("show --shape a --kernel-size 9 --query 1", "'a' is no list of integers; write 7, 7,5 or 12x16"),
        ("show --shape 8x8 --kernel-size 3 --query 1,1 --image missing.png --out out.png", "missing.png"),
        ("show --shape 8x8 --kernel-size 3 --query 1,1 --image photo.png", "--image needs --out FILE"),
        ("why --shape 8 --kernel-size 3 --device nowhere", "nowhere"),
        ("what", "invalid choice: 'what'"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    if message == "missing.png":
        pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    done = tools(*arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if not re.match(r"[A-Z]\d{4} .* torch/", line)]  # torch warns too
    assert message in done.stderr and len(ours) == 1, done.stderr
