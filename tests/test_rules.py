# SPDX-License-Identifier: MIT
"""What makes the ops good citizens: schemas, opcheck, fake kernels, autocast, FLOPs, merging."""

import math

import pytest
import torch
from expecttest import assert_expected_inline
from samples import DTYPES, EMPTY, NAMED, Problem, differentiable, run
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import natten_ops
from natten_ops import flops
from natten_ops.geometry.masks import dense_mask
from natten_ops.ops import fused

ALL = {**NAMED, **EMPTY}


def test_schemas_are_frozen():
    """Later versions may add defaulted arguments, overloads and ops; a saved program must load for ever."""
    schemas = torch._C._jit_get_all_schemas()
    own = sorted(str(s) for s in schemas if s.name.startswith("natten::") and not s.name.startswith("natten::_"))
    assert_expected_inline(
        "\n".join(own),
        """\
natten::merge_attentions(Tensor[] outputs, Tensor[] lses) -> (Tensor out, Tensor lse)
natten::na1d(Tensor query, Tensor key, Tensor value, int[1] kernel_size, int[1] stride=[1], int[1] dilation=[1], bool[1] is_causal=[False], float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None, Tensor? key_mask=None) -> Tensor
natten::na2d(Tensor query, Tensor key, Tensor value, int[2] kernel_size, int[2] stride=1, int[2] dilation=1, bool[2] is_causal=[False, False], float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None, Tensor? key_mask=None) -> Tensor
natten::na3d(Tensor query, Tensor key, Tensor value, int[3] kernel_size, int[3] stride=1, int[3] dilation=1, bool[3] is_causal=[False, False, False], float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None, Tensor? key_mask=None) -> Tensor
natten::na_av(Tensor attn, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, *, Tensor? additional_values=None) -> Tensor
natten::na_av_backward(Tensor grad, Tensor attn, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, Tensor? additional_values, bool[] needed) -> (Tensor grad_attn, Tensor grad_value, Tensor grad_additional_values)
natten::na_qk(Tensor query, Tensor key, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, *, Tensor? rpb=None, Tensor? additional_keys=None) -> Tensor
natten::na_qk_backward(Tensor grad, Tensor query, Tensor key, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, Tensor? rpb, Tensor? additional_keys, bool[] needed) -> (Tensor grad_query, Tensor grad_key, Tensor grad_rpb, Tensor grad_additional_keys)
natten::neighborhood_attention_jagged(Tensor query, Tensor key, Tensor value, Tensor offsets, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None) -> (Tensor out, Tensor lse)
natten::neighborhood_attention_jagged_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor offsets, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float? scale, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, bool[] needed) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, Tensor grad_additional_keys, Tensor grad_additional_values)
natten::neighborhood_attention_lse(Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None, Tensor? key_mask=None, SymInt[] q_origin=[], SymInt[] kv_origin=[], SymInt[] extent=[], int backend=0) -> (Tensor out, Tensor lse)
natten::neighborhood_attention_lse_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float? scale, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, Tensor? key_mask, SymInt[] q_origin, SymInt[] kv_origin, SymInt[] extent, int backend, bool[] needed, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, Tensor grad_additional_keys, Tensor grad_additional_values)""",  # noqa: E501
    )


@pytest.mark.parametrize("name", ALL)
def test_opcheck_of_the_primitive_and_its_backward(name):
    problem = ALL[name]
    inputs, settings = problem.make(torch.float32), problem.settings()
    inputs = inputs._replace(query=inputs.query.requires_grad_(), value=inputs.value.requires_grad_())
    fused._call_forward(settings, inputs, lambda op, *args, **kwargs: opcheck(op, args, kwargs))
    out, lse = (t.detach() for t in run(inputs, problem))
    saved = [torch.randn_like(out), torch.zeros_like(lse), out, lse, *inputs]
    needed = [True, True, False, True, True, False]
    fused._call_backward((settings, needed, True), saved, lambda op, *args: opcheck(op, args))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_opcheck_of_the_composites(rank):
    query, key, value = (t.requires_grad_() for t in torch.randn(3, 1, *(5, 4, 3)[:rank], 2, 4).unbind(0))
    op = getattr(torch.ops.natten, f"na{rank}d").default
    opcheck(op, (query, key, value, [3] * rank))
    rpb = torch.randn(2, *[5] * rank, requires_grad=True)
    opcheck(op, (query, key, value, [3] * rank, [1] * rank, [1] * rank, [True] * rank, 0.3), {"rpb": rpb})


def test_opcheck_of_merging():
    outputs, lses = (
        list(torch.randn(3, 1, 4, 2, 8, requires_grad=True).unbind(0)),
        list(torch.randn(3, 1, 4, 2).unbind(0)),
    )
    opcheck(torch.ops.natten.merge_attentions.default, (outputs, lses))


@pytest.mark.parametrize("name", ALL)
def test_fake_kernels_tell_shapes_dtypes_and_strides(name):
    problem = ALL[name]
    for dtype in DTYPES:
        inputs = problem.make(dtype)
        real = run(inputs, problem)
        with FakeTensorMode() as mode:
            fake = run(type(inputs)(*[None if t is None else mode.from_tensor(t) for t in inputs]), problem)
        for have, want in zip(fake, real):
            assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())


def test_raw_ops_broadcast_ints():
    query, key, value = torch.randn(3, 1, 6, 6, 2, 4).unbind(0)
    raw = torch.ops.natten.na2d(query, key, value, 3, 1, 2, [True, True])
    assert torch.equal(raw, natten_ops.na2d(query, key, value, kernel_size=3, dilation=2, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_follows_the_active_dtype(dtype, compiled):
    problem = NAMED["everything"]
    inputs = problem.make(torch.float32)
    leaves = [t.requires_grad_() for t in differentiable(inputs)]

    def step(*_):
        return natten_ops.na2d(
            inputs.query, inputs.key, inputs.value, problem.kernel_size, 1, problem.dilation, problem.is_causal,
            problem.scale, inputs.additional_keys, inputs.additional_values, rpb=inputs.rpb, key_mask=inputs.key_mask,
        )  # fmt: skip

    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with torch.autocast("cpu", dtype=dtype):
        out = function(*leaves)
        nested = None
        with torch.autocast("cpu", enabled=False):
            nested = step()
    assert out.dtype == dtype and nested.dtype == torch.float32
    assert torch.equal(out, run(inputs._replace(**_cast(inputs, dtype)), problem)[0])
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert gradient.dtype == leaf.dtype == torch.float32


def _cast(inputs, dtype):
    names = ("query", "key", "value", "additional_keys", "additional_values")
    return {name: getattr(inputs, name).to(dtype) for name in names}


def test_autocast_unifies_mixed_inputs_and_leaves_float64():
    query, key, value = torch.randn(3, 1, 6, 2, 4).unbind(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert natten_ops.na1d(query, key.bfloat16(), value, kernel_size=3).dtype == torch.bfloat16
        assert natten_ops.na1d(query.double(), key.double(), value.double(), kernel_size=3).dtype == torch.float64


def pairs_by_brute_force(problem):
    params, box = problem.geometry()
    window = dense_mask(params, *problem.shapes(), box).sum().item()
    queries = math.prod(problem.shapes()[0])
    return problem.batch * problem.heads * window, problem.batch * problem.heads * queries * (problem.additional or 0)


@pytest.mark.parametrize("name", NAMED)
def test_flops_count_visible_pairs_exactly(name):
    problem = NAMED[name]
    inputs = problem.make(torch.float32)
    leaves = [t.requires_grad_() for t in differentiable(inputs)]
    window, extra = pairs_by_brute_force(problem)
    dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    with FlopCounterMode(display=False) as counter:
        out, _ = run(inputs, problem)
    assert counter.get_total_flops() == 2 * (window + extra) * (dim + value_dim)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), leaves)
    assert counter.get_total_flops() == 2 * (window + extra) * (3 * dim + 2 * value_dim)


def test_flops_of_a_symbolic_causal_axis_do_not_fail():
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    sizes = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    real = torch.empty(1, 20, 2, 4)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        query = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
        assert isinstance(query.shape[1], torch.SymInt)
        with FlopCounterMode(display=False) as counter:
            natten_ops.na1d(query, query, query, kernel_size=3, is_causal=True)
        assert int(counter.get_total_flops()) == 2 * 2 * 20 * 3 * 8


def test_flops_of_frozen_keys_are_less():
    params = Problem((8, 8), (3, 3)).params()
    shape, all_needed = (1, 8, 8, 2, 4), (True,) * 6
    full = flops.backward_flops(shape, shape, params, all_needed)
    frozen = flops.backward_flops(shape, shape, params, (True, False, False, True, True, True))
    assert (full, frozen) == (2 * 2 * 64 * 9 * 20, 2 * 2 * 64 * 9 * 12)


def test_raw_merging_refuses_lists_that_do_not_pair():
    out, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2)
    for outputs, lses in (([out], [lse, lse]), ([out, out], [lse]), ([], []), ([out, out[:, :1]], [lse, lse])):
        with pytest.raises((ValueError, RuntimeError), match="outputs"):
            torch.ops.natten.merge_attentions(outputs, lses)


def test_second_derivatives_inside_autocast_stay_in_float32():
    """An autocast region around backward() must not turn the formulas' einsums into 16-bit ones."""
    query, key, value = (t.bfloat16().requires_grad_() for t in torch.randn(3, 1, 8, 2, 16).unbind(0))
    results = []
    for enabled in (False, True):
        (gradient,) = torch.autograd.grad(
            natten_ops.na1d(query, key, value, kernel_size=3).float().sin().sum(), query, create_graph=True
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(gradient.float().sin().sum(), key)[0])
    torch.testing.assert_close(*results)


def test_the_reference_backend_follows_autocast_too():
    query, key, value = torch.randn(3, 1, 8, 2, 16).unbind(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = natten_ops.na1d(query, key, value, kernel_size=3, backend="reference")
        want = natten_ops.na1d(query, key, value, kernel_size=3)
    assert have.dtype == torch.bfloat16
    torch.testing.assert_close(have, want)


def test_vmap_over_nothing():
    query, tables = torch.randn(0, 1, 8, 2, 4), torch.randn(0, 2, 5)
    assert torch.vmap(lambda q: natten_ops.na1d(q, q, q, kernel_size=3))(query).shape == query.shape
    gradient = torch.func.grad(lambda q: natten_ops.na1d(q, q, q, kernel_size=3).sum())
    assert torch.vmap(gradient)(query).shape == query.shape
    attend = torch.vmap(lambda q, rpb: natten_ops.na1d(q, q, q, kernel_size=3, rpb=rpb))
    assert attend(query, tables).shape == query.shape


def test_merging_is_differentiable_and_guards_dead_rows():
    outputs = torch.randn(3, 2, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 2, 5, 2, dtype=torch.float64)
    lses[:2, 0, 0] = lses[:, 1, 1] = -math.inf
    lses.requires_grad_()
    out, lse = natten_ops.merge_attentions(outputs.unbind(0), lses.unbind(0))
    assert (out[1, 1] == 0).all() and (lse[1, 1] == -math.inf).all()
    torch.testing.assert_close(out[0, 0], outputs[2, 0, 0])
    alive = torch.isfinite(lse)
    gradients = torch.autograd.grad((out.sin().sum() + lse[alive].sum()), (outputs, lses))
    assert all(torch.isfinite(g).all() for g in gradients)
    weights = torch.softmax(lses.detach(), 0)[:, alive]
    torch.testing.assert_close(out[alive], (weights[..., None] * outputs.detach()[:, alive]).sum(0))
    live = [outputs.detach()[:, :, 2:].clone().requires_grad_(), lses.detach()[:, :, 2:].clone().requires_grad_()]

    def function(o, el):
        return natten_ops.merge_attentions(o.unbind(0), el.unbind(0))

    torch.autograd.gradcheck(function, live, check_forward_ad=True)
    torch.autograd.gradgradcheck(function, live)


def test_merging_two_is_the_formula_of_the_docs():
    """o = o0 - sigmoid(l1 - l0) (o0 - o1), l = logaddexp(l0, l1); the output keeps a 16-bit dtype."""
    (a, b), (la, lb) = torch.randn(2, 1, 6, 2, 4).bfloat16().unbind(0), torch.randn(2, 1, 6, 2).unbind(0)
    out, lse = natten_ops.merge_attentions([a, b], [la, lb])
    want = a.float() - torch.sigmoid(lb - la)[..., None] * (a.float() - b.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want.bfloat16())
    torch.testing.assert_close(lse, torch.logaddexp(la, lb))


def test_no_op_forbids_cuda_graphs():
    for name in ("neighborhood_attention_lse", "neighborhood_attention_lse_backward", "na2d", "merge_attentions"):
        assert torch.Tag.cudagraph_unsafe not in getattr(torch.ops.natten, name).default.tags


def test_autocast_of_cuda_follows_its_own_dtype():
    """Shapes and dtypes only: fake CUDA tensors under the CUDA autocast key. No GPU has run this."""
    with FakeTensorMode():
        query = torch.empty(1, 8, 2, 4, device="cuda")
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        try:
            torch.set_autocast_enabled("cuda", True)
            for dtype in (torch.float16, torch.bfloat16):
                torch.set_autocast_dtype("cuda", dtype)
                assert natten_ops.na1d(query, query, query, kernel_size=3).dtype == dtype
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
