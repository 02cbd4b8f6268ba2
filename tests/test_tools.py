# SPDX-License-Identifier: MIT
"""tools: exact texts of `show` and `why`, pictures that are files, a command line that complains in one line."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline

from natten_ops import backends
from natten_ops.geometry.masks import dense_mask
from natten_ops.geometry.params import make_params
from natten_ops.tools import draw_all_windows, draw_attention, draw_on_image, draw_window, show, visible_keys, why
from natten_ops.tools.show import new_figure

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
        ((5,), {"kernel_size": 3}, "1 coordinates for 2 spatial axes; give 2"),
        ((5, 5), {"kernel_size": 3, "dilation": 3}, r"spans 9 > 8 tokens on axis 0"),
    ],
)
def test_mistakes_are_value_errors(query, geometry, message):
    with pytest.raises(ValueError, match=message):
        show((8, 8), query, **geometry)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: show((8, 8), 4, kernel_size=3), "query=4 is a int; give one int for each of the 2 axes"),
        (lambda: show((8, 8), "ab", kernel_size=3), "query='ab' is a str; give one int for each of the 2 axes"),
        (lambda: show((8, 8), (4, 4.5), kernel_size=3), r"query\[1\]=4.5 is a float; give an int"),
        (lambda: show((8, 8), torch.tensor([0.5, 1]), kernel_size=3), r"query\[0\]=0.5 is a float; give an int"),
        (lambda: draw_all_windows("a", kernel_size=3), "length='a' is a str; give an int"),
        (lambda: why((8,), heads=2.5, kernel_size=3), "heads=2.5 is a float; give an int"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_an_axis_without_tokens_is_refused():
    with pytest.raises(ValueError, match="spans 3 > 0 tokens on axis 0"):
        draw_all_windows(0, kernel_size=3)


def test_tensors_are_queries_too():
    assert torch.equal(
        visible_keys((6, 7), torch.tensor([2, 3]), kernel_size=3), visible_keys((6, 7), (2, 3), kernel_size=3)
    )
    assert show((6, 7), torch.tensor([2, 3]), kernel_size=3) == show((6, 7), (2, 3), kernel_size=3)


def test_pictures_can_be_pickled():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    figure = draw_window((12,), (3,), kernel_size=5)
    assert pickle.loads(pickle.dumps(figure)).axes[0].get_title() == figure.axes[0].get_title()


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


@pytest.mark.parametrize(
    "image, grey",
    [
        (torch.full((16, 24), 0.9), 0.9),
        (torch.full((16, 24, 1), 0.3, dtype=torch.float64), 0.3),
        (torch.full((16, 24), 128, dtype=torch.uint8), 128 / 255),
        (torch.ones(16, 24, dtype=torch.bool), 1.0),
    ],
)
def test_greys_are_drawn_as_they_are(image, grey):
    """Not stretched to the image's own darkest and lightest."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    drawn = draw_on_image(image.numpy(), (4, 6), (1, 1), kernel_size=3).axes[0].images[0]
    assert drawn.to_rgba(drawn.get_array())[3, 5, :3] == pytest.approx([grey] * 3, abs=0.005)


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.rand(3, 16, 24), r"image has shape \[3, 16, 24\]; give an array \[height, width\] or .* channels last"),
        (torch.rand(16, 0), r"image has shape \[16, 0\]"),
        (torch.linspace(-1, 2, 384).view(16, 24), r"image has values from -1 to 2; give floats in \[0, 1\] or bytes"),
        (torch.full((16, 24), 256, dtype=torch.int32), "image has values from 256 to 256"),
        (torch.full((16, 24), float("nan")), "image has values from nan to nan"),
        ("photo.png", "image is a str; give an array"),
        (torch.rand(16, 24).bfloat16(), r"give image.detach\(\).float\(\), or an array"),
        (torch.rand(16, 24).requires_grad_(), r"give image.detach\(\).float\(\), or an array"),
        (torch.rand(16, 24).to(torch.complex64), "image has dtype torch.complex64; give floats"),
        (np.full((16, 24), "a"), "image has dtype <U1; give floats"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        draw_on_image(image, (4, 6), (1, 1), kernel_size=3)


LONG = {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (2, 3), "is_causal": (True, False)}
LONG_3D = {"kernel_size": (3, 2, 3), "stride": (1, 2, 1), "dilation": (1, 3, 2), "is_causal": (True, False, False)}


@pytest.mark.parametrize("dpi", [90, 150])
@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_window((12, 16), (6, 14), **LONG),
        lambda: draw_window((5, 6, 7), (3, 0, 6), **LONG_3D),
        lambda: draw_all_windows(30, kernel_size=5, stride=3, dilation=2, is_causal=True),
        lambda: draw_on_image(torch.rand(96, 128, 3).numpy(), (12, 16), (6, 14), **LONG),
        lambda: draw_attention(torch.rand(96, 128).numpy(), torch.rand(2, 12, 16, 6), (6, 14), **LONG),
        lambda: draw_window((12, 12), (3, 3), title="one word and another " * 5 + "(in all (4, 5))", kernel_size=5),
    ],
)
def test_titles_and_labels_are_not_cut(draw, dpi):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    figure = draw()
    figure.set_dpi(dpi)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert not re.search(r"\([\w, ]+,\n|(size|stride|dilation|causal)\n", axes.get_title())
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        box = text.get_window_extent()
        inside = 0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert inside or not text.get_text(), text


def test_titles_keep_to_their_column():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra demo")
    figure, pictures = new_figure(columns=3)
    for picture in pictures:
        draw_window((12, 16), (6, 14), picture, **LONG)
    figure.draw_without_rendering()
    boxes = [picture.title.get_window_extent() for picture in pictures]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


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
