# SPDX-License-Identifier: MIT
"""torch.export: strict or not, dynamic sizes, the op kept in the graph, saved and loaded elsewhere, for CUDA too."""

import subprocess
import sys

import pytest
import torch
from halves import halved, make
from samples import DTYPES, EMPTY, NAMED, differentiable, with_tensors
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import natten_ops
from natten_ops.functional.fused import neighborhood_attention
from natten_ops.ops import fused, unfused_arguments
from natten_ops.ops.arguments import lse_dtype


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


@pytest.mark.parametrize("strict", [False, True])
def test_programs_made_under_autocast(strict):
    """It must be on where the program runs too, as torch asks of every program; a region inside of the model need not."""
    model, x = Model().eval(), torch.randn(2, 9, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(model, (x,), dynamic_shapes=DYNAMIC, strict=strict)
        x = torch.randn(3, 12, 7, 16)
        have, want = program.module()(x), model(x)
    assert have.dtype == torch.bfloat16
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("strict", [False, True])
def test_saved_programs_load_in_a_fresh_process(strict, tmp_path):
    model, program = exported(strict)
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


# ---- CUDA tensors on a machine without CUDA --------------------------------------------------------------------------
# A CPU build of torch exports programs of fake CUDA tensors, but autograd ends the process: it asks for the device's streams. So
# backwards are traced by make_fx as the ops that autograd would call; that it calls them is the same on every device.

ALL = {**NAMED, **EMPTY}


@pytest.fixture
def cuda_kernels(monkeypatch):
    monkeypatch.setattr(natten_ops._library, "has_cuda_kernels", True)


def on_cuda(record):
    """The tensors of a record as fake ones on a CUDA device, with the strides that they have."""
    moved = [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in record
    ]
    return type(record)(*moved)


def facts(tensors):
    return [(tuple(t.shape), t.dtype, t.device.type) for t in tensors]


def shaped_as(tensors):
    """What gradients of these are."""
    return [(tuple(t.shape), t.dtype, "cuda") for t in tensors]


def called(graph):
    """Names of our ops in a graph, in order."""
    return [str(node.target).split(".")[1] for node in graph.nodes if "natten." in str(node.target)]


class Attention(torch.nn.Module):
    """A problem as a program."""

    def __init__(self, problem, inputs, return_lse):
        super().__init__()
        self.problem, self.inputs, self.return_lse = problem, inputs, return_lse

    def forward(self, mask, *leaves):
        i, s = with_tensors(self.inputs, leaves)._replace(key_mask=mask), self.problem.settings()
        box = {"q_origin": s.q_origin, "kv_origin": s.kv_origin, "extent": s.extent}
        return neighborhood_attention(
            *i[:3], *s[:5], i.additional_keys, i.additional_values, rpb=i.rpb, key_mask=i.key_mask,
            return_lse=self.return_lse, **box,
        )  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_programs_for_cuda_are_exported(name, cuda_kernels):
    problem, dtype = NAMED[name], torch.float16
    real = problem.make(dtype)
    shape = (*real.query.shape[:-1], real.value.shape[-1])
    want = [(shape, dtype, "cuda"), (shape[:-1], torch.float32, "cuda")]
    for return_lse in (False, True):
        with FakeTensorMode():
            inputs = on_cuda(real)
            program = torch.export.export(
                Attention(problem, inputs, return_lse), (inputs.key_mask, *differentiable(inputs))
            )
            lowered = program.run_decompositions()
        for graph in (program.graph, lowered.graph):
            outputs = [node.meta["val"] for node in graph.output_node().args[0]]
            assert facts(outputs) == want[: 1 + return_lse]
        assert called(lowered.graph) == ["neighborhood_attention_lse"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_fused_op_is_traced_forward_and_backward(name, dtype, cuda_kernels):
    problem = ALL[name]
    settings = problem.settings()

    def step(inputs):
        out, lse = fused._call_forward(settings, inputs)
        grads = torch.empty_like(out), torch.empty_like(lse)
        needed = [getattr(inputs, name) is not None for name in fused.GRADIENTS]
        return out, lse, *fused._call_backward((settings, needed, True), [*grads, out, lse, *inputs])

    with FakeTensorMode():
        inputs = on_cuda(problem.make(dtype))
        graph = make_fx(step)(inputs).graph
        out, lse, *gradients = (node.meta["val"] for node in graph.output_node().args[0])
    assert called(graph) == [fused.FORWARD, fused.BACKWARD]
    shape = (*inputs.query.shape[:-1], inputs.value.shape[-1])
    assert facts([out, lse]) == [(shape, dtype, "cuda"), (shape[:-1], lse_dtype(inputs.query), "cuda")]
    by_name = dict(zip(fused.GRADIENTS, gradients))
    present = [by_name[name] for name in inputs._fields[:-1] if getattr(inputs, name) is not None]
    assert facts(present) == shaped_as(differentiable(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_halves_are_traced_forward_and_backward(name, dtype, cuda_kernels):
    problem = halved(ALL[name])
    lists, u = problem.lists(), unfused_arguments

    def step(t):
        of_qk, of_av = [t.query, t.key, t.rpb, t.additional_keys], [t.attn, t.value, t.additional_values]
        attn, out = u.call_qk(lists, of_qk), u.call_av(lists, of_av)
        needs = [[tensor is not None for tensor in tensors] for tensors in (of_qk, of_av)]
        grads = torch.empty_like(attn), torch.empty_like(out)
        gradients = u.call_qk_backward((lists, needs[0]), [grads[0], *of_qk])
        return attn, out, *gradients, *u.call_av_backward((lists, needs[1]), [grads[1], *of_av])

    with FakeTensorMode():
        tensors = on_cuda(make(problem, dtype))
        graph = make_fx(step)(tensors).graph
        attn, out, *gradients = (node.meta["val"] for node in graph.output_node().args[0])
    assert called(graph) == ["na_qk", "na_av", "na_qk_backward", "na_av_backward"]
    assert facts([attn, out]) == shaped_as([tensors.attn, tensors.value])
    t = tensors
    inputs = [t.query, t.key, t.rpb, t.additional_keys, t.attn, t.value, t.additional_values]
    assert facts(g for g, i in zip(gradients, inputs) if i is not None) == shaped_as(i for i in inputs if i is not None)
