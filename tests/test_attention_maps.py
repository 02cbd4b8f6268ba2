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
    ("change", "message"),
    [
        ({"query": (8, 0)}, "query[0]=8 is outside of the grid; give 0 to 7"),
        ({"kernel_size": (3, 5)}, "attention_map has 12 slots and kernel_size=(3, 5) 15"),
        ({"attention_map": torch.rand(4, 5)}, "attention_map is [4, 5]; give a tensor [heads"),
        ({"attention_map": Inputs._fields}, "attention_map is tuple"),
    ],
)
def test_mistakes_say_what_is_wrong(change, message):
    with pytest.raises(ValueError) as caught:
        attention_on_grid(**{"attention_map": weights_of(), "query": (0, 0), **GEOMETRY, **change})
    assert message in str(caught.value)
