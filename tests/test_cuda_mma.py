# SPDX-License-Identifier: MIT
"""The tensor-core kernels under emulation: numbers, no findings, the same bits in any order; their tiles' waste."""

import ctypes
import dataclasses
import math
import re

import emulated
import pytest
import torch
from dense import worst
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import EMPTY, NAMED, Problem, differentiable, in_double, problems

from natten_ops import _problem, backends, reference
from natten_ops.geometry.params import axis_window

GENERAL, MMA, TF32 = (backends.by_name(name).id for name in ("cuda-general", "cuda-mma", "cuda-mma-tf32"))
HALVES = (torch.float16, torch.bfloat16)


def fitting(problem, head_dim=None, value_dim=None):
    """The problem with head dims that the tensor cores take."""
    round_up = lambda n: None if n is None else (n + 7) // 8 * 8  # noqa: E731
    dims = {"head_dim": head_dim or round_up(problem.head_dim), "value_dim": value_dim or round_up(problem.value_dim)}
    scale = None if problem.scale == 0 else problem.scale
    return dataclasses.replace(problem, transposed=False, scale=scale, **dims)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_named_problems(name, dtype):
    emulated.compare(fitting(NAMED[name]), dtype, MMA)


@st.composite
def fitting_problems(draw):
    problem = draw(problems())
    return fitting(problem, draw(st.sampled_from([8, 16, 24, 40])), draw(st.sampled_from([None, 8, 32])))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(problem=fitting_problems())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_problem(dtype, problem):
    emulated.compare(problem, dtype, MMA)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(problem=fitting_problems())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_problem_long(dtype, problem):
    emulated.compare(problem, dtype, MMA)


@pytest.mark.parametrize("name", NAMED)
def test_named_problems_in_tf32(name):
    emulated.compare(fitting(NAMED[name]), torch.float32, TF32)


@given(problem=fitting_problems())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_problem_in_tf32(problem):
    emulated.compare(problem, torch.float32, TF32)


@pytest.mark.parametrize("dims", [(16, 16), (32, 24), (64, 64), (128, 72), (72, 256), (256, 256)], ids=str)
def test_every_head_dim_of_the_table(dims):
    """Each has its own instantiation: columns of a box, boxes in memory, numbers that a block sums."""
    problem = Problem((9, 10), (4, 5), batch=1, heads=2, group=2, additional=3, head_dim=dims[0], value_dim=dims[1])
    emulated.compare(problem, torch.float16, MMA)
    if max(dims) <= 128:
        emulated.compare(problem, torch.float32, TF32)


FULL = {
    "long line": Problem((300,), (170,), batch=1, heads=1),
    "causal line": Problem((260,), (150,), is_causal=(True,), batch=1, heads=1),
    "square": Problem((25, 25), (16, 16), batch=1, heads=1),
    "strided": Problem((24, 24), (12, 8), stride=(8, 8), batch=1, heads=1),
    "blocked": Problem((16, 16), (8, 8), stride=(8, 8), batch=1, heads=1),
    "dilated": Problem((40, 26), (9, 6), dilation=(2, 3), batch=1, heads=1),
    "volume": Problem((6, 9, 10), (4, 5, 6), is_causal=(True, False, False), batch=1, heads=1),
    "many additional": Problem((20,), (3,), additional=150, batch=1, heads=1),
    "box": Problem((60, 50), (20, 15), box=((11, 3), (30, 20)), batch=1, heads=1),
    "biased": Problem((20, 20), (9, 12), rpb=True, is_causal=(False, True), batch=1, heads=1),
    "masked": Problem((20, 20), (9, 12), mask=True, batch=1, heads=2, group=2),
}


@pytest.mark.parametrize("name", FULL)
def test_several_tiles_with_boxes_that_need_no_mask(name):
    emulated.compare(fitting(FULL[name], head_dim=16), torch.float16, MMA)


@pytest.mark.parametrize("name", EMPTY)
def test_empty_problems_by_choice(name):
    for problem in (EMPTY[name], fitting(EMPTY[name])):
        emulated.compare(problem, torch.float16, 0)


# Every path in the dtype that tells most of it, the error that it may make of a gradient, and what it makes of a problem.
PATHS = {
    "cuda-general": (GENERAL, torch.float64, 1e-12, lambda problem: problem),
    "cuda-mma": (MMA, torch.float16, 4e-3, fitting),
    "cuda-mma-tf32": (TF32, torch.float32, 4e-3, fitting),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["everything", "strided", "box"])
def test_gradients_of_both_outputs_and_of_the_lse_alone(name, path):
    number, dtype, tolerance, shaped = PATHS[path]
    problem = shaped(NAMED[name])
    inputs = problem.make(dtype)
    outputs = emulated.forward(inputs, problem, number)
    grad_lse = torch.randn_like(outputs[1]) * torch.isfinite(outputs[1])
    for grad_out in (torch.randn_like(outputs[0]), None):
        grads = torch.zeros_like(outputs[0]) if grad_out is None else grad_out, grad_lse
        exact = reference.backward(*(g.double() for g in grads), in_double(inputs), *problem.geometry(), problem.scale)
        have = emulated.backward((grad_out, grad_lse), outputs, inputs, problem, backend=number)
        for gradient, truth in zip(emulated.gradients_of(inputs, have), differentiable(exact)):
            assert worst(gradient, truth) <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", range(6))
def test_one_gradient_alone_has_the_same_bits(which, path):
    number, dtype, _, shaped = PATHS[path]
    problem = shaped(NAMED["everything"])
    inputs = problem.make(dtype)
    outputs = emulated.forward(inputs, problem, number)
    grads = torch.randn_like(outputs[0]), torch.randn_like(outputs[1])
    together = emulated.backward(grads, outputs, inputs, problem, backend=number)
    alone = emulated.backward(grads, outputs, inputs, problem, needed=[i == which for i in range(6)], backend=number)
    assert torch.equal(alone[which], together[which])
    assert all(alone[i].numel() == 0 for i in range(6) if i != which)


def test_packed_projections_are_read_in_place():
    problem = Problem((9, 7), (3, 5), heads=4, group=2, head_dim=16, packed=True)
    inputs = problem.make(torch.float16)
    assert not inputs.query.is_contiguous()
    for have, want in zip(
        emulated.forward(inputs, problem, MMA),
        emulated.forward(
            inputs._replace(**{n: getattr(inputs, n).contiguous() for n in ("query", "key", "value")}), problem, MMA
        ),
    ):
        assert torch.equal(have, want)


def test_what_the_mask_hides_may_be_nan():
    problem = Problem((9,), (3,), batch=1, heads=1, head_dim=8)
    inputs = problem.make(torch.float16)._replace(key_mask=torch.arange(9)[None] != 4)
    for tensor in inputs[1:3]:
        tensor[0, 4] = torch.nan
    outputs = emulated.forward(inputs, problem, MMA)
    gradients = emulated.backward((torch.ones_like(outputs[0]), None), outputs, inputs, problem, backend=MMA)
    assert all(torch.isfinite(t).all() for t in [*outputs, *gradients])


def by_record(inputs, problem):
    """The reasons that the record of cuda-mma has against a problem, as if it lay on a device."""
    described = backends.describe(list(inputs), *problem.geometry(), problem.scale)
    aligned = all(_problem.is_aligned(tensor) for tensor in inputs[:3])
    return backends.by_name("cuda-mma").why_not(described._replace(device="cuda", aligned=aligned))


def test_a_problem_that_does_not_fit_is_refused_by_name_and_taken_by_choice():
    problem = NAMED["plain"]
    odd = Problem((7, 9), (3, 5), head_dim=12)
    shifted = problem.make(torch.float16)
    storage = torch.empty(shifted.key.numel() + 4, dtype=torch.float16)[4:]
    shifted = shifted._replace(key=storage.view(shifted.key.shape).copy_(shifted.key))
    misfits = {
        "takes float16": (problem, problem.make(torch.float32)),
        "multiples of 8": (odd, odd.make(torch.float16)),
        "multiples of 16 bytes": (problem, shifted),
    }
    for reason, (case, inputs) in misfits.items():
        assert reason in refused(inputs, case)
        assert any(reason in text for text in by_record(inputs, case))


def refused(inputs, problem, backend=MMA):
    """What a named backend says of a problem that choice gives to the general path."""
    with pytest.raises(RuntimeError, match=r"use 0 \(choose\) or 3 \(cuda-general\)") as caught:
        emulated.forward(inputs, problem, backend)
    chosen, general = (emulated.forward(inputs, problem, number) for number in (0, GENERAL))
    assert all(torch.equal(a, b) for a, b in zip(chosen, general))
    return str(caught.value)


def test_a_device_that_is_too_old_or_too_small_takes_the_general_path():
    problem = Problem((9, 7), (3, 5), batch=1, heads=1, head_dim=256)
    inputs = problem.make(torch.float16)
    with emulated.device(capability=75):
        assert "takes devices of compute capability 8.0 and up" in refused(inputs, problem)
    with emulated.device(shared_bytes=64 << 10):
        assert "takes more shared memory than a block of this device has" in refused(inputs, problem)
    with emulated.device(capability=86, shared_bytes=99 << 10):  # the least of all devices
        emulated.compare(problem, torch.float16, MMA)
        emulated.compare(dataclasses.replace(problem, head_dim=128), torch.float32, TF32)


# ---- tiles -------------------------------------------------------------------------------------------------------------

# (axes of length, kernel, dilation) -> slots visited a pair of query and visible key: the best that other tilings of 64
# queries reach, with boxes of any shape and number of keys.
WASTE = {
    ((8192, 511, 1),): 1.12,
    ((32768, 2048, 1),): 1.03,
    ((56, 7, 1), (56, 7, 1)): 4.90,
    ((128, 31, 1), (128, 31, 1)): 1.50,
    ((256, 13, 4), (256, 13, 4)): 2.31,
    ((256, 80, 1), (256, 80, 1)): 1.14,
    ((30, 18, 1), (48, 24, 1), (80, 24, 1)): 1.43,
    ((16, 5, 1), (32, 5, 1), (32, 5, 1)): 3.58,
}


def plan_of(axes, key_rows=False, rows=64, most=64):
    """Shapes of a row tile and of a column box, on three axes of (length, kernel, stride, dilation, causal)."""
    numbers = (ctypes.c_int64 * 15)(*(number for axis in axes for number in axis))
    plan = (ctypes.c_int64 * 6)()
    emulated.library().natten_tile_plan(numbers, int(key_rows), rows, most, plan)
    return list(plan[:3]), list(plan[3:])


def boxes_of_axis(length, kernel, dilation, rows, columns):
    """Boxes over all row tiles of an axis, by the windows of each group's queries."""
    total = 0
    for group in range(dilation):
        count = len(range(group, length, dilation))
        for first in range(0, count, rows):
            begin = axis_window(group + dilation * first, length, kernel, 1, dilation, False)[1]
            last = min(first + rows, count) - 1
            end = axis_window(group + dilation * last, length, kernel, 1, dilation, False)[2]
            total += -(-(end - begin) // columns)
    return total


@pytest.mark.parametrize("axes", WASTE, ids=str)
def test_tiles_waste_no_more_than_the_best_of_64_queries(axes):
    three = [(1, 1, 1)] * (3 - len(axes)) + list(axes)
    rows, columns = plan_of([(length, kernel, 1, dilation, 0) for length, kernel, dilation in three])
    visited, pairs = 64, 1
    for axis, of_rows, of_columns in zip(three, rows, columns):
        visited *= boxes_of_axis(*axis, of_rows, of_columns) * of_columns
        pairs *= axis[0] * axis[1]
    assert math.prod(columns) <= 64 and round(visited / pairs, 2) <= WASTE[axes]


# ---- what the kernels are given ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda-mma", "cuda-mma-tf32"])
def test_gradients_come_as_they_come(backend):
    """Expanded after a sum, strided after a permutation, or of the log-sum-exp alone."""
    number, dtype = backends.by_name(backend).id, torch.float16 if backend == "cuda-mma" else torch.float32
    problem = Problem((9, 7), (3, 5), head_dim=16)
    inputs = problem.make(dtype)
    out, lse = outputs = emulated.forward(inputs, problem, number)
    for grad in (torch.ones((), dtype=dtype).expand(out.shape), torch.randn_like(out).mT.contiguous().mT):
        have = emulated.backward((grad, None), outputs, inputs, problem, backend=number)
        want = emulated.backward((grad.contiguous(), None), outputs, inputs, problem, backend=number)
        assert all(torch.equal(a, b) for a, b in zip(have, want))
    grad_lse = torch.randn_like(lse)
    have = emulated.backward((None, grad_lse), outputs, inputs, problem, backend=number)
    want = emulated.backward((None, grad_lse), outputs, inputs, problem, backend=GENERAL)
    assert all(torch.equal(a, b) for a, b in zip(have, want))


def test_tf32_is_preferred_where_it_fits():
    for head_dim, chosen in ((16, "cuda-mma-tf32"), (12, "cuda-general")):
        problem = Problem((9, 7), (3, 5), head_dim=head_dim)
        inputs = problem.make(torch.float32)
        have = emulated.forward(inputs, problem, backends.PREFER_TF32)
        want = emulated.forward(inputs, problem, backends.by_name(chosen).id)
        assert all(torch.equal(a, b) for a, b in zip(have, want))


HUGE = 2**31
EXTREME = {
    "ends of huge grids": Problem((HUGE - 2000,), (100,), box=((HUGE - 2090,), (90,)), batch=1, heads=1, head_dim=8),
    "few of many dilation groups": Problem(
        (2**30, 2**30), (1, 1), dilation=(2**29, 2**28), box=((2**29 + 5, 7), (3, 20)), batch=1, heads=1, head_dim=8
    ),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_grids(name):
    problem = EXTREME[name]
    inputs = problem.make(torch.float16)
    mma, plain = (emulated.forward(inputs, problem, number) for number in (MMA, GENERAL))
    torch.testing.assert_close(mma[0], plain[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(mma[1], plain[1], atol=1e-4, rtol=0)


def test_what_32_bits_do_not_hold_is_refused():
    line = Problem((6,), (3,), batch=1, heads=1, head_dim=8)
    inputs = line.make(torch.float16)
    many = torch.zeros(1, 1, 1, 8, dtype=torch.float16).expand(1, HUGE + 1, 1, 8)
    cases = {
        "takes fewer than 2.31 tokens": (
            dataclasses.replace(line, spatial=(HUGE - 2,), box=((HUGE - 8,), (6,))), inputs._replace(
                key=torch.zeros(1, 7, 1, 8, dtype=torch.float16), value=torch.zeros(1, 7, 1, 8, dtype=torch.float16)
            ),
        ),
        "takes fewer than 2.31 additional": (line, inputs._replace(additional_keys=many, additional_values=many)),
        "takes scales that are positive": (dataclasses.replace(line, scale=1e-50), inputs),
    }  # fmt: skip
    for reason, (problem, tensors) in cases.items():
        with pytest.raises(RuntimeError, match=reason):
            emulated.forward(tensors, problem, MMA)
        (text,) = [text for text in by_record(tensors, problem) if "not loaded" not in text]
        assert text.startswith("takes fewer than 21474") or re.match(reason, text)
