# SPDX-License-Identifier: MIT
"""The numbers of the fused op: outputs, log-sum-exp and all gradients against the float64 reference."""

import dataclasses
import functools
import math

import dense
import pytest
import torch
from dense import dense_attention, worst
from hypothesis import given, settings
from samples import DTYPES, EMPTY, NAMED, Problem, differentiable, expected, in_double, problems, run, with_tensors

import natten_ops
from natten_ops import backends, reference

GENERAL = backends.by_name("cpu-general").id


def gradients(inputs, problem, grad_out, grad_lse, backend=0):
    """Gradients of the op for every differentiable input."""
    leaves = [t.detach().requires_grad_() for t in differentiable(inputs)]
    outputs = run(with_tensors(inputs, leaves), problem, backend)
    alive = torch.isfinite(outputs[1].detach())
    return torch.autograd.grad(outputs, leaves, [grad_out, grad_lse * alive])


def compare(problem, dtype, seed=0):
    """Outputs and gradients of the chosen and of the general kernels."""

    def attend(backend, inputs, grad_out):
        out, lse = run(inputs, problem, backend)
        return out, lse, gradients(inputs, problem, grad_out, torch.zeros_like(lse), backend)

    ways = (functools.partial(attend, backend) for backend in (0, GENERAL))
    dense.compare(problem, dtype, *ways, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_named_problems(name, dtype):
    compare(NAMED[name], dtype)


@given(problem=problems())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_problem_in_float64(problem):
    compare(problem, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@given(problem=problems())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_problem_in_low_precision(dtype, problem):
    compare(problem, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
@settings(max_examples=1500, deadline=None, derandomize=True)
def test_any_problem_long(dtype, problem):
    compare(problem, dtype)


def test_torch_yardstick_equals_the_reference():
    for name, problem in NAMED.items():
        inputs = problem.make()
        assert worst(dense_attention(inputs, problem), expected(inputs, problem)[0]) < 1e-12, name


@pytest.mark.parametrize("name", NAMED)
def test_gradients_through_both_outputs(name):
    problem = NAMED[name]
    inputs = problem.make()
    out, lse = expected(inputs, problem)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) * torch.isfinite(lse)
    have = gradients(inputs, problem, grad_out, grad_lse)
    want = reference.backward(grad_out, grad_lse, inputs, *problem.geometry(), problem.scale)
    for gradient, truth in zip(have, differentiable(want)):
        torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("dim", [1, 24, 80, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_dim(dim, dtype):
    compare(Problem((6, 7), (3, 5), head_dim=dim, value_dim=dim, batch=1), dtype)


def test_windows_longer_than_a_chunk():
    """More than 512 keys a query go through the online softmax in several chunks, with and without additional ones."""
    compare(Problem((30, 25), (27, 23), head_dim=4, batch=1, mask=True, additional=700), torch.float64)
    compare(Problem((1500,), (1201,), is_causal=(True,), heads=1, head_dim=4, batch=1, rpb=True), torch.float32)


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(name):
    problem = EMPTY[name]
    inputs = problem.make()
    out, lse = run(inputs, problem)
    assert out.shape == (*inputs.query.shape[:-1], inputs.value.shape[-1]) and lse.shape == inputs.query.shape[:-1]
    for gradient, tensor in zip(gradients(inputs, problem, out, lse), differentiable(inputs)):
        assert gradient.shape == tensor.shape and torch.isfinite(gradient).all()


def test_full_window_is_full_attention():
    query, key, value = torch.randn(3, 2, 6, 5, 3, 16).unbind(0)
    have = natten_ops.na2d(query, key, value, kernel_size=(6, 5))
    heads = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).view_as(query)
    torch.testing.assert_close(have, want)


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    problem = dataclasses.replace(NAMED["plain"], mask=True)
    inputs = problem.make()._replace(key_mask=torch.zeros(2, 7, 9, dtype=torch.bool))
    out, lse = run(inputs, problem)
    assert (out == 0).all() and (lse == -math.inf).all()
    leaves = [t.requires_grad_() for t in differentiable(inputs)]
    for gradient in torch.autograd.grad(run(inputs, problem)[0].sum(), leaves):
        assert (gradient == 0).all()


def test_rows_of_infinite_bias_see_nothing():
    problem = NAMED["biased"]
    inputs = problem.make()
    inputs = inputs._replace(rpb=torch.full_like(inputs.rpb, -math.inf))
    out, lse = run(inputs, problem)
    assert (out == 0).all() and (lse == -math.inf).all()
    for gradient in gradients(inputs, problem, torch.ones_like(out), torch.zeros_like(lse)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_are_inert_whatever_they_hold(dtype):
    problem = dataclasses.replace(NAMED["everything"], additional=None)
    clean = problem.make(dtype)
    hidden = ~clean.key_mask[..., None, None]
    dirty = clean._replace(key=clean.key.masked_fill(hidden, math.nan), value=clean.value.masked_fill(hidden, math.inf))
    for have, want in zip(run(dirty, problem), run(clean, problem)):
        assert torch.equal(have, want)
    grad = torch.ones_like(run(clean, problem)[0])
    zero = torch.zeros_like(run(clean, problem)[1])
    for have, want in zip(gradients(dirty, problem, grad, zero), gradients(clean, problem, grad, zero)):
        assert torch.equal(have, want)


def test_a_nan_reaches_only_those_who_see_it():
    problem = Problem((9, 9), (3, 3), batch=2)
    inputs = problem.make(torch.float32)
    inputs.key[0, 4, 4, 1] = math.nan
    broken = run(inputs, problem)[0].isnan().any(-1)
    want = torch.zeros_like(broken)
    want[0, 3:6, 3:6, 1] = True
    assert torch.equal(broken, want)
    for bad in (math.inf, -math.inf):
        inputs.key[0, 4, 4, 1] = bad
        assert torch.isfinite(run(inputs, problem)[0][~want]).all()


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_inputs_cost_nothing_and_change_nothing(frozen):
    problem = NAMED["everything"]
    inputs = problem.make()
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(differentiable(inputs))]
    out, lse = run(inputs, problem)
    wanted = [t for i, t in enumerate(leaves) if i != frozen]
    have = torch.autograd.grad(out.sum(), wanted)
    full = reference.backward(torch.ones_like(out), None, in_double(inputs), *problem.geometry(), problem.scale)
    for gradient, truth in zip(have, [t for i, t in enumerate(differentiable(full)) if i != frozen]):
        torch.testing.assert_close(gradient, truth)


def test_gradients_that_are_not_needed_are_empty():
    problem = NAMED["everything"]
    inputs, settings_ = problem.make(), problem.settings()
    out, lse = run(inputs, problem)
    from natten_ops.ops import fused

    for chosen in range(6):
        needed = [i == chosen for i in range(6)]
        grads = fused._call_backward((settings_, needed, True), [out, None, out, lse, *inputs])
        assert [g.numel() > 0 for g in grads] == needed


def test_wide_bias_beside_16_bit_inputs():
    for dtype in (torch.float16, torch.bfloat16):
        problem = NAMED["biased"]
        inputs = problem.make(dtype)
        wide = inputs._replace(rpb=inputs.rpb.float().requires_grad_())
        out, _ = run(wide, problem)
        assert torch.equal(out, run(inputs, problem)[0])
        (gradient,) = torch.autograd.grad(out.sum(), wide.rpb)
        assert gradient.dtype == torch.float32


def test_strides_beyond_32_bits():
    """Element offsets above 2**31, without touching the memory between."""
    shape, far = (2, 4, 5, 2, 8), 2**31 + 8
    storage = [torch.empty(far + 400, dtype=torch.bfloat16) for _ in range(3)]
    dense = [torch.randn(shape).bfloat16() for _ in range(3)]
    views = [s.as_strided(shape, (far, 80, 16, 8, 1)).copy_(t) for s, t in zip(storage, dense)]
    assert torch.equal(natten_ops.na2d(*views, kernel_size=3), natten_ops.na2d(*dense, kernel_size=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_at_huge_logits(dtype):
    """Both backward passes see the forward's logits bit for bit, so no weight exceeds 1 however large they are."""
    problem = Problem((40,), (9,), head_dim=24, batch=1, scale=0.3)
    inputs = problem.make(dtype)
    inputs = inputs._replace(query=inputs.query * 3e4, key=inputs.key * 3e4)
    out, lse = run(inputs, problem)
    assert lse.abs().max() > 1e8
    weight = torch.autograd.grad(
        run(inputs._replace(value=(v := inputs.value.clone().requires_grad_())), problem)[0].sum(), v
    )
    assert weight[0].min() >= 0 and weight[0].max() <= 9 * (1 + 1e-5)  # a key is seen by at most nine queries
    for gradient in gradients(inputs, problem, torch.ones_like(out), torch.zeros_like(lse)):
        assert torch.isfinite(gradient).all()


def test_a_row_that_sees_nothing_is_zero_beside_a_nan_value():
    problem = NAMED["biased"]
    inputs = problem.make()
    value = inputs.value.clone()
    value[0, 2, 2] = math.nan
    out, _ = run(inputs._replace(rpb=torch.full_like(inputs.rpb, -math.inf), value=value), problem)
    assert (out == 0).all()


def test_scratch_of_a_thread_is_small_whatever_the_image():
    """The general path: the function takes no sizes because the scratch does not depend on them."""
    assert torch.ops.natten._cpu_scratch_bytes(32, 32) < 2**17
    assert torch.ops.natten._cpu_scratch_bytes(300, 300) < 2**20


def test_expanded_and_overlapping_inputs():
    query = torch.randn(1, 6, 6, 1, 8).expand(3, 6, 6, 4, 8)
    have = natten_ops.na2d(query, query, query, kernel_size=3)
    assert torch.equal(have, natten_ops.na2d(*[query.contiguous()] * 3, kernel_size=3))


def test_sub_boxes_equal_the_whole():
    problem = Problem((13, 11), (4, 3), stride=(3, 1), dilation=(2, 3), is_causal=(True, False))
    whole = problem.make()
    out, lse = run(whole, problem)
    for origin, shape in (((0, 0), (5, 11)), ((5, 2), (8, 7)), ((12, 10), (1, 1)), ((3, 4), (0, 5))):
        part = dataclasses.replace(problem, box=(origin, shape))
        rows = tuple(slice(o, o + n) for o, n in zip(origin, shape))
        keys = tuple(slice(first, stop) for first, stop in part.key_range())
        inputs = whole._replace(
            query=whole.query[(slice(None), *rows)],
            key=whole.key[(slice(None), *keys)],
            value=whole.value[(slice(None), *keys)],
        )
        for have, want in zip(run(inputs, part), (out, lse)):
            torch.testing.assert_close(have, want[(slice(None), *rows)])


@given(problem=problems())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_merging_two_halves_is_the_whole(problem):
    """Keys split by a mask in two: the merged halves are the attention to all."""
    problem = dataclasses.replace(problem, mask=True, additional=None)
    inputs = problem.make()
    left = torch.rand(inputs.key_mask.shape) > 0.5
    halves = [run(inputs._replace(key_mask=inputs.key_mask & part), problem) for part in (left, ~left)]
    merged = natten_ops.merge_attentions(*zip(*halves))
    for have, want in zip(merged, run(inputs, problem)):
        torch.testing.assert_close(have, want)
