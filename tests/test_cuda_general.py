# SPDX-License-Identifier: MIT
"""The general CUDA kernels under emulation: numbers against the reference, no findings, the same bits in any order."""

import dataclasses
import math

import emulated
import pytest
import torch
from dense import worst
from halves import av, finite, halved, make, present, qk, replaced
from halves import in_double as halves_in_double
from hypothesis import given, settings
from samples import DTYPES, EMPTY, NAMED, Problem, problems

from natten_ops import backends, reference

ALL = {**NAMED, **EMPTY}
GENERAL = backends.by_name("cuda-general").id


def compare(problem, dtype):
    emulated.compare(problem, dtype, GENERAL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_named_problems(name, dtype):
    compare(ALL[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_problem(dtype, problem):
    compare(problem, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_problem_long(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("dims", [(32, 33), (64, 65), (128, 129), (300, 1), (1, 300)], ids=str)
def test_head_dims_at_the_bounds_of_registers(dims):
    """A lane has one, two or four numbers of a row; longer rows are summed in pieces."""
    head_dim, value_dim = dims
    problem = Problem((5, 4), (3, 2), heads=2, group=2, batch=1, head_dim=head_dim, value_dim=value_dim, additional=2)
    compare(problem, torch.float32)
    compare(problem, torch.float16)


def test_windows_of_more_than_a_chunk_and_many_queries_of_a_key():
    compare(Problem((7, 6, 5), (5, 6, 3), batch=1, heads=1), torch.float32)
    compare(Problem((90,), (70,), is_causal=(True,), batch=1, heads=2, group=2, rpb=True), torch.float32)


def test_rows_that_lie_badly_are_read_one_number_at_a_time():
    """Neither an odd storage offset nor odd strides may be read sixteen bytes at once."""
    problem = NAMED["plain"]
    inputs = problem.make(torch.float16)
    odd = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in inputs[:3]]
    wide = [torch.cat([t, t[..., :1]], dim=-1)[..., :-1] for t in inputs[:3]]
    want = emulated.forward(inputs, problem, GENERAL)
    for tensors in (odd, wide):
        for have, expect in zip(
            emulated.forward(inputs._replace(**dict(zip(inputs._fields, tensors))), problem, GENERAL), want
        ):
            assert torch.equal(have, expect)


def test_nan_spreads_to_those_who_see_it_and_no_further():
    """Also where all that a query sees is NaN; what is masked may hold NaN."""
    problem = Problem((9,), (3,), batch=1, heads=1, head_dim=4)
    inputs = problem.make(torch.float32)
    inputs.key[0, 4] = math.nan
    out, lse = emulated.forward(inputs, problem, GENERAL)
    assert torch.isnan(out).any(-1)[0, :, 0].tolist() == [3 <= i <= 5 for i in range(9)]
    assert torch.isnan(lse)[0, :, 0].tolist() == [3 <= i <= 5 for i in range(9)]
    inputs.query[0, 0] = math.nan
    assert torch.isnan(emulated.forward(inputs, problem, GENERAL)[0][0, 0]).all()
    masked = inputs._replace(query=torch.ones_like(inputs.query), key_mask=torch.arange(9)[None] != 4)
    masked.value[0, 4] = math.nan
    outputs = emulated.forward(masked, problem, GENERAL)
    gradients = emulated.backward((torch.ones_like(outputs[0]), None), outputs, masked, problem, backend=GENERAL)
    assert all(torch.isfinite(t).all() for t in [*outputs, *gradients])


# ---- unfused ---------------------------------------------------------------------------------------------------------


class Emulated:
    """na_qk and na_av as `halves` calls them."""

    def __getattr__(self, name):
        def run(*args, **kwargs):
            return emulated.call(name, *args, **kwargs)[0]

        return run


def compare_halves(problem, dtype, monkeypatch):
    problem = halved(problem)
    tensors = make(problem, dtype)
    exact = halves_in_double(tensors)
    monkeypatch.setattr("halves.ops", ops := Emulated())
    attn, out = qk(tensors, problem, ops), av(tensors, problem, ops)
    want_attn, want_out = qk(exact, problem, reference), av(exact, problem, reference)
    assert torch.equal(attn == -math.inf, want_attn == -math.inf)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for have, want in ((finite(attn), finite(want_attn)), (out, want_out)):
        assert have.dtype == dtype
        assert worst(have, want) <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0)
    leaves = [t.requires_grad_() for t in present(exact)]
    again = replaced(exact, leaves)
    outputs = finite(qk(again, problem, reference)), av(again, problem, reference)
    grads = [torch.randn_like(t).to(dtype) for t in outputs]
    truths = replaced(exact, torch.autograd.grad(outputs, leaves, [g.double() for g in grads]))
    lists, t = problem.lists(), tensors
    of_qk = emulated.call("na_qk_backward", grads[0], t.query, t.key, *lists, t.rpb, t.additional_keys, [True] * 4)
    of_av = emulated.call("na_av_backward", grads[1], t.attn, t.value, *lists, t.additional_values, [True] * 3)
    wanted = [truths.query, truths.key, truths.rpb, truths.additional_keys]
    wanted += [truths.attn, truths.value, truths.additional_values]
    for have, want in zip([*of_qk, *of_av], wanted):
        if want is not None:
            assert worst(have, want) <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_named_halves(name, dtype, monkeypatch):
    compare_halves(ALL[name], dtype, monkeypatch)


@given(problem=problems())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_halves(problem):
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare_halves(dataclasses.replace(problem, batch=1), torch.float32, monkeypatch)


# ---- fronts -----------------------------------------------------------------------------------------------------------


def test_the_front_takes_the_ids_of_cuda_kernels_only():
    problem = dataclasses.replace(NAMED["line"], head_dim=64)
    known = [b for b in backends.BACKENDS if b.id is not None and "cuda" in (b.devices or ())]
    for backend in known:
        for dtype in backend.dtypes:
            emulated.forward(problem.make(dtype), problem, backend=backend.id)
    inputs = problem.make(torch.float16)
    for number in (1, 2, max(b.id for b in known) + 1, -1):
        with pytest.raises(RuntimeError, match="cannot run on CUDA tensors"):
            emulated.forward(inputs, problem, backend=number)


@pytest.mark.parametrize("backend", ["cuda-general", "cuda-mma"])
def test_rows_more_than_32_bits_apart(backend):
    """Offsets are 64-bit: tokens that lie 2^31 numbers from each other. Pages between them are never touched."""
    step, problem = 2**31 + 64, Problem((3,), (2,), batch=1, heads=1, head_dim=8)
    inputs = problem.make(torch.float16)
    far = [
        torch.empty(2 * step + 8, dtype=torch.float16).as_strided(t.shape, (8, step, 8, 1)).copy_(t) for t in inputs[:3]
    ]
    apart = inputs._replace(**dict(zip(inputs._fields, far)))
    number = backends.by_name(backend).id
    outputs = emulated.forward(inputs, problem, number)
    grads = torch.ones_like(outputs[0]), None
    results = [
        *emulated.forward(apart, problem, number),
        *emulated.backward(grads, outputs, apart, problem, backend=number)[:3],
    ]
    expect = [*outputs, *emulated.backward(grads, outputs, inputs, problem, backend=number)[:3]]
    assert all(torch.equal(have, want) for have, want in zip(results, expect))


@pytest.mark.parametrize("backend", ["cuda-general", "cuda-mma"])
def test_a_launch_that_fails_is_reported_with_its_problem(backend):
    problem = dataclasses.replace(NAMED["dilated"], head_dim=8)
    inputs, halves = problem.make(torch.float16), make(halved(problem), torch.float16)
    number, lists = backends.by_name(backend).id, problem.lists()
    out, lse = emulated.forward(inputs, problem, number)
    sentence = (
        "at a kernel for 2 x 1 x 9 x 11 float16 queries, 2 heads of 8 and 8, kernel size 1 x 4 x 3, dilation 1 x 2 x 3: "
        "too many resources"
    )
    of_qk = torch.zeros_like(halves.attn), halves.query, halves.key, *lists, None, None, [True] * 4
    calls = (
        lambda: emulated.forward(inputs, problem, number),
        lambda: emulated.backward((out, lse), (out, lse), inputs, problem, backend=number),
        lambda: emulated.call("na_qk", halves.query, halves.key, *lists),
        lambda: emulated.call("na_qk_backward", *of_qk),
    )
    for call, part in zip(calls, (sentence, sentence, "float16 queries", "float16 queries")):
        with emulated.device(error="too many resources"), pytest.raises(RuntimeError, match=part):
            call()
    assert torch.equal(emulated.forward(inputs, problem, number)[0], out)
