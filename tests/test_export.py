# SPDX-License-Identifier: MIT
"""torch.export: strict or not, dynamic sizes, the op kept in the graph, saved and loaded elsewhere."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import natten_ops


class Model(torch.nn.Module):
    """Two attentions, dilated and biased, between linear layers."""

    def __init__(self):
        super().__init__()
        self.first = natten_ops.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
        self.second = natten_ops.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, dilation=2)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((1, 2)))


DYNAMIC = ({0: Dim("batch", min=1, max=64), 1: Dim("rows", min=6, max=256), 2: Dim("columns", min=6, max=256)},)


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def exported(strict):
    torch.manual_seed(0)
    model = Model().eval()
    return model, torch.export.export(model, (torch.randn(2, 9, 8, 16),), dynamic_shapes=DYNAMIC, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_op_and_serves_every_size(strict):
    model, program = exported(strict)
    assert targets(program).count("natten.na2d.default") == 2
    for shape in ((1, 6, 6, 16), (3, 17, 9, 16), (2, 8, 30, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x))


def test_decompositions_show_the_primitive():
    model, program = exported(False)
    lowered = program.run_decompositions()
    assert targets(lowered).count("natten.neighborhood_attention_lse.default") == 2
    assert not any("na2d" in target for target in targets(lowered))
    x = torch.randn(3, 7, 11, 16)
    torch.testing.assert_close(lowered.module()(x), model(x))


def test_options_that_need_the_primitive_export_as_the_primitive():
    class WithLse(torch.nn.Module):
        def forward(self, x):
            near = natten_ops.na1d(x, x, x, kernel_size=3, return_lse=True)
            far = natten_ops.na1d(x, x, x, kernel_size=3, dilation=2, return_lse=True)
            return natten_ops.merge_attentions([near[0], far[0]], [near[1], far[1]])

    x = torch.randn(2, 12, 2, 4)
    program = torch.export.export(WithLse(), (x,), dynamic_shapes=({0: Dim("batch"), 1: Dim("tokens", min=6)},))
    assert targets(program).count("natten.neighborhood_attention_lse.default") == 2
    assert targets(program).count("natten.merge_attentions.default") == 1
    y = torch.randn(3, 20, 2, 4)
    for have, want in zip(program.module()(y), WithLse()(y)):
        torch.testing.assert_close(have, want)


LOAD = """
import sys, torch, natten_ops
program = torch.export.load(sys.argv[1])
inputs, want = torch.load(sys.argv[2])
for x, y in zip(inputs, want):
    torch.testing.assert_close(program.module()(x), y)
print("loaded and equal")
"""


def test_saved_programs_load_in_a_fresh_process(tmp_path):
    model, program = exported(False)
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [torch.randn(1, 6, 8, 16), torch.randn(4, 20, 7, 16)]
    with torch.no_grad():
        torch.save((inputs, [model(x) for x in inputs]), tmp_path / "samples.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "samples.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "loaded and equal" in done.stdout, done.stderr


def test_sizes_below_the_window_are_refused_by_the_exported_program():
    _, program = exported(False)
    with pytest.raises(Exception, match="6"):
        program.module()(torch.randn(1, 5, 8, 16))


def test_export_of_a_program_for_cuda_needs_no_cuda():
    """Fake CUDA tensors stay allowed: a program can be exported for a machine that this one is not."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1, 8, 8, 2, 4, device="cuda")
        assert natten_ops.na2d(x, x, x, kernel_size=3).device.type == "cuda"
