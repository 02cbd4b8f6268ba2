# SPDX-License-Identifier: MIT
"""Attention maps on the grid: the weights of a window where its keys lie, over an image, by function and by command."""

import pytest
import torch

import natten_ops
from natten_ops.nn import NeighborhoodAttention2D
from natten_ops.reference import Inputs
from natten_ops.tools import attention_on_grid, draw_attention
from natten_ops.tools.__main__ import main

GEOMETRY = {"kernel_size": (3, 4), "dilation": (2, 1), "is_causal": (False, True)}


def weights_of(rows=8, columns=9, **geometry):
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(8, 2, **(geometry or GEOMETRY)).double()
    x = torch.randn(1, rows, columns, 8, dtype=torch.float64)
    return layer(x, return_attention=True)[1][0]


@pytest.mark.parametrize("geometry", [GEOMETRY, {"kernel_size": 4, "stride": 2}])
def test_weights_lie_where_their_keys_are(geometry):
    """Values that say where they are, weighted: the mean place, by the op and by the grid."""
    weights = weights_of(**geometry)
    rows, columns = weights.shape[1:3]
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).double()
    value = places.expand(1, 2, rows, columns, 2)
    want = natten_ops.na2d_av(weights[None], value, **geometry)[0]
    for query in [(0, 0), (3, 5), (rows - 1, columns - 1)]:
        grid = attention_on_grid(weights, query, **geometry)
        torch.testing.assert_close(grid.sum((1, 2)), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(torch.einsum("hyx,yxc->hc", grid, places), want[(slice(None), *query)])


def test_slots_of_additional_tokens_are_left_out():
    query, key = torch.randn(2, 1, 2, 6, 4).unbind()
    weights = natten_ops.na1d_qk(query, key, kernel_size=3, additional_keys=torch.randn(1, 2, 5, 4)).softmax(-1)
    grid = attention_on_grid(weights[0], (2,), kernel_size=3)
    torch.testing.assert_close(grid.sum(-1), weights[0, :, 2, :3].sum(-1))


def test_the_picture_is_brightest_at_the_largest_weight():
    pytest.importorskip("matplotlib", reason="pictures need the extra natten-ops[demo]")
    weights = weights_of(kernel_size=5)
    figure = draw_attention(torch.ones(32, 36, 3).numpy(), weights, (4, 4), head=1, kernel_size=5)
    veil = torch.tensor(figure.axes[0].images[1].get_array()[..., 3])
    grid = attention_on_grid(weights, (4, 4), kernel_size=5)[1]
    assert veil.argmin() == grid.argmax() and veil[grid == 0].min() == pytest.approx(0.75)
    assert "head 1" in figure.axes[0].get_title()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head": "a"}, TypeError, "head='a' is a str; give an int"),
        ({"head": True}, TypeError, "head=True is a bool; give an int"),
        ({"head": 0.5}, TypeError, "head=0.5 is a float; give an int"),
        ({"head": -1}, ValueError, "head=-1 is not there; give 0 to 1, or None"),
        ({"query": (4, 4)}, ValueError, "attention_map gives query=(4, 4) a weight of nan; give finite weights"),
        ({"query": (0, 0)}, ValueError, "attention_map gives query=(0, 0) a weight of inf; give finite weights"),
        ({"image": torch.rand(3, 32, 36).numpy()}, ValueError, "image has shape [3, 32, 36]; give an array"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, error, message):
    pytest.importorskip("matplotlib", reason="pictures need the extra natten-ops[demo]")
    weights = weights_of()
    weights[1, 4, 4, 0], weights[0, 0, 0, 0] = float("nan"), float("inf")
    given = {"image": torch.rand(32, 36).numpy(), "attention_map": weights, "query": (2, 2), **GEOMETRY}
    draw_attention(**given)  # what is wrong with other queries is not in the picture
    with pytest.raises(error) as caught:
        draw_attention(**{**given, **change})
    assert message in str(caught.value)


def test_the_command_draws_a_saved_map(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib.image", reason="pictures need the extra natten-ops[demo]")
    image, saved, out = tmp_path / "image.png", tmp_path / "map.pt", tmp_path / "out.png"
    matplotlib.imsave(image, torch.rand(40, 45, 3).numpy())
    torch.save(weights_of(), saved)
    command = ["show", "--shape", "8x9", "--kernel-size", "3,4", "--dilation", "2,1", "--causal", "false,true"]
    command += ["--query", "2,3", "--out", str(out)]
    assert main([*command, "--image", str(image), "--attention", str(saved)]) == 0
    assert out.stat().st_size > 5000
    for more, message in (
        (["--attention", str(saved)], "--attention needs --image"),
        (["--image", str(image), "--head", "0"], "--head needs --attention"),
        (["--image", str(image), "--attention", str(saved), "--head", "2"], "head=2 is not there; give 0 to 1"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "cannot be read (UnpicklingError); give a tensor [heads, y, x, slots] that torch.save wrote"),
        ({"map": torch.ones(2)}, "holds a dict; save one tensor [heads, y, x, slots]"),
        (torch.rand(2, 8, 9, 25), "has shape [2, 8, 9, 25], and --shape with --kernel-size asks for [heads, 8, 9, 9]"),
        (torch.rand(2, 9, 8, 9), "has shape [2, 9, 8, 9], and"),
        (torch.full((2, 8, 9, 9), float("nan")), "query=(2, 3) a weight of nan; give finite weights"),
    ],
)
def test_the_command_refuses_other_files(tmp_path, capsys, saved, message):
    matplotlib = pytest.importorskip("matplotlib.image", reason="pictures need the extra natten-ops[demo]")
    image, path, out = tmp_path / "image.png", tmp_path / "map.pt", tmp_path / "out.png"
    matplotlib.imsave(image, torch.rand(40, 45, 3).numpy())
    if saved is None:
        path = image
    else:
        torch.save(saved, path)
    command = ["show", "--shape", "8x9", "--kernel-size", "3", "--query", "2,3", "--out", str(out)]
    assert main([*command, "--image", str(image), "--attention", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": (8, 0)}, ValueError, "query[0]=8 is outside of the grid; give 0 to 7"),
        ({"kernel_size": (3, 5)}, ValueError, "attention_map has 12 slots and kernel_size=(3, 5) 15"),
        ({"attention_map": torch.rand(4, 5)}, ValueError, "attention_map is [4, 5]; give a tensor [heads"),
        (
            {"attention_map": torch.rand(0, 8, 9, 12)},
            ValueError,
            "attention_map is [0, 8, 9, 12]; give a tensor [heads",
        ),
        ({"attention_map": Inputs._fields}, TypeError, "attention_map is a tuple; give a tensor [heads"),
        (
            {"attention_map": torch.nested.nested_tensor([torch.rand(2, 8, 9, 12)], layout=torch.jagged)},
            TypeError,
            "attention_map is a nested tensor; give a tensor [heads",
        ),
    ],
)
def test_mistakes_say_what_is_wrong(change, error, message):
    with pytest.raises(error) as caught:
        attention_on_grid(**{"attention_map": weights_of(), "query": (0, 0), **GEOMETRY, **change})
    assert message in str(caught.value)
