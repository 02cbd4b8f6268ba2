# SPDX-License-Identifier: MIT
"""Programs without `natten` ops: the numbers of the ops, every size, no natten_ops where they run, and ONNX."""

import doctest
import subprocess
import sys

import pytest
import torch
from halves import halved, make
from samples import EMPTY, NAMED, Problem, differentiable, run, with_tensors
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import natten_ops
from natten_ops import _library
from natten_ops.export import decompositions
from natten_ops.ops import fused
from natten_ops.reference import Inputs

DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC}


class Attention(torch.nn.Module):
    """The primitive with the settings of a problem."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self, *tensors):
        return run(Inputs(*tensors), self.problem)


class Image(torch.nn.Module):
    """A biased, dilated and causal attention between linear layers."""

    def __init__(self):
        super().__init__()
        windows = {"kernel_size": (3, 2), "dilation": (1, 2), "is_causal": (True, False)}
        self.attention = natten_ops.nn.NeighborhoodAttention2D(16, 2, rel_pos_bias=True, **windows)

    def forward(self, x):
        return self.attention(x).relu()


IMAGES = [(1, 3, 4, 16), (3, 5, 11, 16), (2, 17, 8, 16)]  # from the smallest grid that the windows allow


def targets(program):
    """The ops of a program; those of autocast regions and the like as well."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for m in modules for node in m.graph.nodes if node.op == "call_function"}


def decomposed(model, inputs, dynamic_shapes=None, table=None):
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
    assert any("natten" in target for target in targets(program))
    program = program.run_decompositions(decompositions() if table is None else table)
    assert not any("natten" in target for target in targets(program))
    return program


@pytest.fixture(scope="module")
def dynamic():
    torch.manual_seed(0)
    model = Image().eval()
    return model, decomposed(model, (torch.randn(2, 6, 7, 16),), (DYNAMIC,))


def entry(op, *args, **kwargs):
    return decompositions()[op](*args, **kwargs)


def test_the_table_has_every_op_and_is_new_each_time():
    names = {op.name().removeprefix("natten::") for op in decompositions()}
    # Not jagged attention: how many tokens a sample has is data, which no graph can look at.
    assert names == {name for name in _library.OWN_OPS if not name.startswith("_") and "jagged" not in name}
    decompositions().clear()
    assert decompositions()


def test_autocast_regions_keep_their_casts():
    class Region(torch.nn.Module):
        def forward(self, query, key, value):
            with torch.autocast("cpu", torch.bfloat16):
                return natten_ops.na1d(query, key, value, kernel_size=3)

    inputs = torch.randn(3, 2, 9, 2, 8).unbind()
    have, want = decomposed(Region(), inputs).module()(*inputs), Region()(*inputs)
    assert have.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("name", NAMED)
def test_every_problem_has_the_numbers_of_the_op(name):
    problem = NAMED[name]
    inputs = problem.make(torch.float64)
    program = decomposed(Attention(problem), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), run(inputs, problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMED, *EMPTY])
def test_every_dtype_and_empty_inputs(name, dtype):
    problem = {**NAMED, **EMPTY}[name]
    inputs = problem.make(dtype)
    have = fused._call_forward(problem.settings(), inputs, entry)
    want = run(inputs, problem)
    torch.testing.assert_close(have, want)  # dtypes too
    # Accumulated in float32 like the op: both are a rounding of the same numbers.
    torch.testing.assert_close(have[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "everything", "volume", "box"])
def test_gradients_decompose_too(name):
    problem = NAMED[name]
    inputs = problem.make(torch.float64)
    tensors = [t.requires_grad_() for t in differentiable(inputs)]

    def gradients(*given):
        out, lse = run(with_tensors(inputs, given), problem)
        return torch.autograd.grad(out.sin().sum() + lse.cos().sum(), given)

    graph = make_fx(gradients, decomposition_table=decompositions())(*tensors)
    assert "natten" not in graph.code
    torch.testing.assert_close(graph(*tensors), gradients(*tensors))


def test_gradients_that_are_not_needed_are_empty():
    problem = NAMED["everything"]
    inputs = problem.make()
    out, lse = run(inputs, problem)
    settings = problem.settings(), [False, True, False, False, True, False], True
    have = fused._call_backward(settings, [out, None, out, lse, *inputs], entry)
    torch.testing.assert_close(have, fused._call_backward(settings, [out, None, out, lse, *inputs]))


@pytest.mark.parametrize("name", ["plain", "biased", "strided", "volume", "no_additional", "no_batch"])
def test_both_halves_and_their_gradients_decompose(name):
    """The backward ops too: ATen alone, the numbers of the kernels; what is not needed is empty."""
    problem = halved({**NAMED, **EMPTY}[name])
    tensors, lists = make(problem), problem.lists()
    query, key, attn, value, rpb, keys, values = tensors
    natten = torch.ops.natten
    calls = {
        natten.na_qk.default: ((query, key, *lists), {"rpb": rpb, "additional_keys": keys}),
        natten.na_av.default: ((attn, value, *lists), {"additional_values": values}),
        natten.na_qk_backward.default: ((attn, query, key, *lists, rpb, keys, [True, False, True, True]), {}),
        natten.na_av_backward.default: ((query, attn, value, *lists, values, [True, True, False]), {}),
    }
    for op, (args, kwargs) in calls.items():
        have, want = decompositions()[op](*args, **kwargs), op(*args, **kwargs)
        torch.testing.assert_close(have, want)
        for ours, theirs in zip(have, want) if isinstance(have, tuple) else [(have, want)]:
            assert ours.is_contiguous() and theirs.is_contiguous()  # a program may view it


def test_gradients_of_halves_keep_what_is_hidden_inert():
    """NaN in one causal query reaches the keys that it sees, and no other: as in the kernels."""
    query, key = torch.randn(2, 1, 1, 6, 3).unbind()
    query[0, 0, 0] = torch.nan
    lists, natten = ([3], [1], [1], [True]), torch.ops.natten
    attn = torch.randn(1, 1, 6, 3)
    for op, args in (
        (natten.na_qk_backward.default, (attn, query, key, *lists, None, None, [True] * 4)),
        (natten.na_av_backward.default, (query, attn, key, *lists, None, [True] * 3)),
    ):
        torch.testing.assert_close(decompositions()[op](*args), op(*args), equal_nan=True)


@pytest.mark.parametrize("any_size", [False, True])
def test_a_layer_that_shows_its_weights_decomposes(any_size):
    class Shown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = natten_ops.nn.NeighborhoodAttention2D(16, 2, (3, 2), is_causal=(True, False))

        def forward(self, x):
            out, weights = self.layer(x, return_attention=True)
            return out, weights.amax(-1)

    model = Shown().eval()
    shapes = (DYNAMIC,) if any_size else None
    program = decomposed(model, (torch.randn(2, 6, 7, 16),), shapes)
    for size in IMAGES if any_size else [(2, 6, 7, 16)]:
        x = torch.randn(size)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_decomposed_program_trains(dynamic):
    model, program = dynamic
    x = torch.randn(2, 8, 5, 16)
    program.module()(x).sin().sum().backward()
    have = {name: parameter.grad for name, parameter in program.state_dict.items()}
    model(x).sin().sum().backward()
    torch.testing.assert_close(have, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_one_program_serves_every_size(dynamic):
    model, program = dynamic
    for shape in IMAGES:
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x))
    with pytest.raises(Exception, match="4"):  # columns: 2 keys with dilation 2
        program.module()(torch.randn(1, 3, 3, 16))


def test_core_aten():
    table = torch.export.default_decompositions()
    table.update(decompositions())
    problem = NAMED["everything"]
    inputs = problem.make(torch.float32)
    program = decomposed(Attention(problem), tuple(inputs), table=table)
    assert "aten.matmul.default" not in targets(program)
    torch.testing.assert_close(program.module()(*inputs), run(inputs, problem))


class Merged(torch.nn.Module):
    """A sub-box of a grid and additional tokens, merged with a dilated attention: options that show the primitive."""

    def forward(self, x, tokens):
        rows = x[:, : x.shape[1] - 2]
        extent = [x.shape[1], x.shape[2]]
        near = natten_ops.neighborhood_attention(
            rows, x, x, kernel_size=3, q_origin=[0, 0], kv_origin=[0, 0], extent=extent, return_lse=True
        )
        extra = {"additional_keys": tokens, "additional_values": tokens}
        far = natten_ops.na2d(x, x, x, kernel_size=2, dilation=2, return_lse=True, **extra)
        return natten_ops.merge_attentions([near[0], far[0][:, :-2]], [near[1], far[1][:, :-2]])


def test_boxes_additional_tokens_and_merging_at_every_size():
    inputs = torch.randn(2, 7, 8, 2, 4), torch.randn(2, 3, 2, 4)
    program = decomposed(Merged(), inputs, (DYNAMIC, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}))
    for shape, count in (((1, 4, 4, 2, 4), 1), ((3, 11, 6, 2, 4), 9)):
        x, tokens = torch.randn(shape), torch.randn(shape[0], count, 2, 4)
        torch.testing.assert_close(program.module()(x, tokens), Merged()(x, tokens))


@pytest.mark.parametrize("hidden", ["causal", "masked"])
def test_what_is_hidden_is_inert(hidden):
    problem = Problem((7,), (3,), is_causal=(hidden == "causal",), mask=hidden == "masked")
    inputs = problem.make()
    want = run(inputs, problem)
    if hidden == "masked":
        for tensor in (inputs.key, inputs.value):
            tensor[~inputs.key_mask] = torch.nan
        torch.testing.assert_close(fused._call_forward(problem.settings(), inputs, entry), want)
    else:
        for tensor in (inputs.key, inputs.value):
            tensor[:, 4:] = torch.nan
        out, lse = fused._call_forward(problem.settings(), inputs, entry)
        torch.testing.assert_close((out[:, :4], lse[:, :4]), (want[0][:, :4], want[1][:, :4]))
        assert out[:, 4:].isnan().all()


def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient():
    problem = Problem((5,), (3,), mask=True)
    inputs = problem.make()
    inputs.key_mask.zero_()
    tensors = [t.requires_grad_() for t in differentiable(inputs)]
    out, lse = fused._call_forward(problem.settings(), inputs, entry)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    for gradient in torch.autograd.grad(out.sum() + lse.exp().sum(), tensors):
        assert gradient.eq(0).all()


LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
inputs, want = torch.load(sys.argv[2])
for x, y in zip(inputs, want):
    torch.testing.assert_close(program.module()(x), y)
assert not [name for name in sys.modules if name.startswith("natten")] and not hasattr(torch.ops.natten, "na2d")
print("loaded and equal")
"""


def fresh(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saved_programs_run_without_natten_ops(dynamic, tmp_path):
    model, program = dynamic
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [torch.randn(shape) for shape in IMAGES]
    with torch.no_grad():
        torch.save((inputs, [model(x) for x in inputs]), tmp_path / "samples.pt")
    assert "loaded and equal" in fresh(LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "samples.pt"))


IMPORTS = """
import sys, natten_ops
natten_ops.export.decompositions()
print([name for name in ("onnx", "onnxscript", "onnxruntime", "torch._inductor") if name in sys.modules])
"""


def test_importing_costs_neither_onnx_nor_inductor():
    assert fresh(IMPORTS) == "[]\n"


# ---- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnxruntime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="ONNX takes the extra: pip install 'natten-ops[onnx]'")
    return pytest.importorskip("onnxruntime", reason="ONNX takes the extra: pip install 'natten-ops[onnx]'")


def onnx_session(onnxruntime, program):
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} == {""}, "the standard's ops alone"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *tensors: [
        torch.from_numpy(out) for out in session.run(None, {n: t.numpy() for n, t in zip(names, tensors)})
    ]


def test_onnx_serves_every_size(onnxruntime, dynamic):
    model, program = dynamic
    session = onnx_session(onnxruntime, program)
    for shape in IMAGES:
        x = torch.randn(shape)
        torch.testing.assert_close(session(x)[0], model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["line", "everything", "volume"])
def test_onnx_of_one_size_and_every_option(onnxruntime, name):
    problem = NAMED[name]
    inputs = problem.make(torch.float32)
    session = onnx_session(onnxruntime, decomposed(Attention(problem), tuple(inputs)))
    have = session(*[t for t in inputs if t is not None])
    torch.testing.assert_close(tuple(have), run(inputs, problem), rtol=1e-4, atol=1e-4)


def test_onnx_of_volumes_in_float16_at_every_size(onnxruntime):
    problem = Problem((8, 7, 6), (3, 2, 3), dilation=(2, 1, 2), is_causal=(True, False, False))
    sizes = {dim: Dim.DYNAMIC for dim in range(4)}
    program = decomposed(Attention(problem), tuple(problem.make(torch.float16)[:3]), ((sizes, sizes, sizes),))
    session = onnx_session(onnxruntime, program)
    for batch, spatial in ((1, (6, 2, 6)), (3, (11, 5, 9))):
        inputs = Problem(spatial, problem.kernel_size, batch=batch).make(torch.float16)
        out, lse = run(inputs, problem)
        have = session(*inputs[:3])
        torch.testing.assert_close(have[0], out, rtol=0, atol=2e-3)  # a rounding in float16
        torch.testing.assert_close(have[1], lse, rtol=1e-4, atol=1e-4)


def test_the_examples_of_the_module_run(onnxruntime):
    result = doctest.testmod(natten_ops.export)
    assert result.attempted > 5 and result.failed == 0
