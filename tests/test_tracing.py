# SPDX-License-Identifier: MIT
"""Models under `torch.jit.trace`: one node for each call, the same numbers at other sizes, gradients, save and load."""

import io

import pytest
import torch
from torch import nn

import natten_ops
from natten_ops.nn import NeighborhoodAttention2D

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")


def nodes(traced):
    """The kinds of the ops of ours in a traced module."""
    return [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("natten::")]


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def test_a_traced_layer_takes_other_sizes_trains_and_survives_saving():
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(12, 3, (3, 4), dilation=(1, 2), is_causal=[True, False], rel_pos_bias=True)
    traced = torch.jit.trace(layer, torch.randn(1, 6, 8, 12))
    assert nodes(traced) == ["natten::neighborhood_attention_lse"]
    other = torch.randn(2, 9, 11, 12)
    assert torch.equal(traced(other), layer(other))
    (want,) = torch.autograd.grad(layer(other).square().sum(), [layer.rpb])
    (have,) = torch.autograd.grad(traced(other).square().sum(), [layer.rpb])
    assert torch.equal(have, want)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(other), layer(other))


FUSED, FIRST = torch.Size([1, 7, 6, 2, 4]), torch.Size([1, 2, 7, 6, 4])
LISTS = [3, 2], [1, 2], [2, 1], [True, False]
CALLS = {
    "na2d": (lambda q: torch.ops.natten.na2d(q, q, q, *LISTS), FUSED),
    "neighborhood_attention_lse": (
        lambda q: natten_ops.neighborhood_attention(
            q[:, 2:4], q, q, 3, q_origin=[2, 0], kv_origin=[0, 0], extent=[7, 6], additional_keys=q[:, 0],
            additional_values=q[:, 1], scale=0.3, return_lse=True),
        FUSED,
    ),
    "na_qk": (lambda q: torch.ops.natten.na_qk(q, q, *LISTS, additional_keys=q[:, :, 0]), FIRST),
    "na_av": (lambda q: torch.ops.natten.na_av(q.repeat(1, 1, 1, 1, 2)[..., :6], q, *LISTS), FIRST),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_each_op_is_one_node_with_its_arguments(name):
    function, shape = CALLS[name]
    traced = torch.jit.trace(Calls(function), torch.randn(shape))
    assert nodes(traced) == [f"natten::{name}"]
    query = torch.randn(3, *shape[1:])
    torch.testing.assert_close(traced(query), function(query), rtol=0, atol=0)


def test_an_error_leaves_tracing_as_it_was():
    query = torch.randn(1, 6, 2, 4)
    bad = Calls(lambda q: torch.ops.natten.na1d(q, q, q, [9]))
    with pytest.raises((RuntimeError, ValueError), match="kernel_size"):
        torch.jit.trace(bad, query)
    assert not torch.jit.is_tracing()
    good = torch.jit.trace(Calls(lambda q: torch.ops.natten.na1d(q, q, q, [3])), query)
    assert nodes(good) == ["natten::na1d"]
