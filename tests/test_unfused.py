# SPDX-License-Identifier: MIT
"""The unfused ops: numbers against the reference and against fused attention, every rule, every derivative."""

import math
import os
import subprocess
import sys

import pytest
import torch
from dense import worst
from expecttest import assert_expected_inline
from halves import av, both, halved, in_double, make, ops, present, qk, replaced
from hypothesis import given, settings
from samples import DTYPES, EMPTY, NAMED, Problem, problems
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import natten_ops
from natten_ops import reference

ALL = {**NAMED, **EMPTY}


def gradients(halves, problem, module):
    """Of a random projection of both outputs by every tensor."""
    leaves = [t.detach().requires_grad_() for t in present(halves)]
    total = 0
    for output in both(replaced(halves, leaves), problem, module):
        projection = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        projection = (8 * projection).round() / 8  # the output's gradient, which is of its dtype, without rounding
        total = total + (output.double() * projection).sum()
    return torch.autograd.grad(total, leaves)


def tolerance(dtype, expected):
    """Sums in float32 (float64) and one rounding to the dtype."""
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    return scale * {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2 * torch.finfo(dtype).eps)


def assert_right(problem, dtype):
    problem = halved(problem)
    halves = make(problem, dtype)
    exact = in_double(halves)
    hidden = qk(exact, problem, reference) == -math.inf
    assert torch.equal(qk(halves, problem) == -math.inf, hidden)
    for have, want in zip(both(halves, problem, ops), both(exact, problem, reference)):
        assert have.dtype == dtype and have.is_contiguous()
        assert worst(have, want) <= tolerance(dtype, want)
    for have, want in zip(gradients(halves, problem, ops), gradients(exact, problem, reference)):
        assert have.dtype == dtype and have.shape == want.shape
        assert worst(have, want) <= tolerance(dtype, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_named_problems(name, dtype):
    assert_right(ALL[name], dtype)


@given(problem=problems())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_problem(problem):
    for dtype in (torch.float64, torch.float32):
        assert_right(problem, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_problems(dtype):
    @given(problem=problems())
    @settings(max_examples=1500, deadline=None, derandomize=True)
    def check(problem):
        assert_right(problem, dtype)

    check()


@pytest.mark.parametrize("size", [(70, 5), (3, 130), (200,), (40, 40)])
def test_sizes_of_several_tiles(size):
    """More than one strip, chunk and range of rows; axes that are turned."""
    for causal in (False, True):
        kernel = tuple(min(n, 5) for n in size)
        causals = (causal,) * len(size)
        assert_right(Problem(size, kernel, is_causal=causals, rpb=True, additional=20, head_dim=18), torch.float32)
        assert_right(Problem(size, kernel, stride=tuple(k - 1 for k in kernel), head_dim=4), torch.float32)


@pytest.mark.parametrize("name", [n for n, p in NAMED.items() if not p.mask and p.box is None and p.group == 1])
def test_halves_make_the_fused_attention(name):
    problem = halved(NAMED[name])
    halves = make(problem)
    scaled = halves._replace(query=halves.query * problem.head_dim**-0.5)
    weights = qk(scaled, problem).softmax(-1)
    have = av(halves._replace(attn=weights), problem)
    want = reference.forward(problem.make(), *problem.geometry(), None)[0]
    torch.testing.assert_close(have.movedim(1, -2), want)


def test_slots_are_row_major_and_additional_tokens_last():
    """By hand: the middle query of a 3x3 grid sees it whole; keys are their own numbers."""
    key = torch.arange(9.0).view(1, 1, 3, 3, 1)
    extra = torch.tensor([100.0, 200.0]).view(1, 1, 2, 1)
    attn = natten_ops.na2d_qk(torch.ones_like(key), key, kernel_size=3, additional_keys=extra)
    assert attn[0, 0, 1, 1].tolist() == [*range(9), 100, 200]
    causal = natten_ops.na2d_qk(torch.ones_like(key), key, kernel_size=2, is_causal=(True, False))
    assert causal[0, 0, 0, 2].tolist() == [1, 2, -math.inf, -math.inf]


def test_what_is_not_seen_takes_part_in_nothing():
    """NaN in a slot of the weights that a causal query does not see reaches nobody; nor does its gradient."""
    problem = Problem((5, 6), (3, 2), is_causal=(True, True), additional=1)
    halves = make(problem)
    hidden = qk(halves, problem) == -math.inf
    poisoned = halves._replace(attn=halves.attn.masked_fill(hidden, math.nan))
    assert torch.equal(av(poisoned, problem), av(halves, problem))
    clean = [g for g in ops.na_qk_backward(halves.attn, *halves[:2], *problem.lists(), None, halves[5], [True] * 4)]
    dirty = [g for g in ops.na_qk_backward(poisoned.attn, *halves[:2], *problem.lists(), None, halves[5], [True] * 4)]
    for have, want in zip(dirty, clean):
        assert torch.equal(have, want)
    table = torch.full((2, 5, 3), math.inf, dtype=torch.float64)  # its tangent, in forward mode
    _, slope = torch.func.jvp(lambda rpb: qk(halves._replace(rpb=rpb), problem), (torch.ones_like(table),), (table,))
    assert (slope[hidden] == 0).all()
    of_attn = ops.na_av_backward(halves.value, *poisoned[2:4], *problem.lists(), halves[6], [True] * 3)[0]
    assert (of_attn[hidden] == 0).all()


def test_results_do_not_depend_on_threads():
    problem = Problem((30, 31), (5, 5), rpb=True, additional=3, head_dim=16)
    halves, results = make(problem, torch.float32), []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append([*both(halves, problem, ops), *gradients(halves, problem, ops)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for have, want in zip(other, results[0]):
            assert torch.equal(have, want)


def everything(name, dtype):
    """Both halves and all gradients of a named problem, for a process with another instruction set."""
    problem = halved(NAMED[name])
    halves = make(problem, dtype)
    return [*both(halves, problem, ops), *gradients(halves, problem, ops)]


@pytest.mark.parametrize("name", ["biased", "everything", "volume"])
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_numbers(level, name, tmp_path):
    """A lower instruction set in a process of its own, against this process."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_unfused as t\n"
        "torch.save([t.everything(sys.argv[2], d) for d in t.DTYPES], sys.argv[3])"
    )
    path = tmp_path / "results.pt"
    environment = {**os.environ, "NATTEN_OPS_CPU_CAPABILITY": level}
    command = [sys.executable, "-c", program, os.path.dirname(os.path.abspath(__file__)), name, path]
    subprocess.run(command, env=environment, check=True, timeout=300)
    for dtype, results in zip(DTYPES, torch.load(path)):
        for have, want in zip(results, everything(name, dtype)):
            torch.testing.assert_close(have, want)


# ---- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_opcheck(name):
    problem = halved(ALL[name])
    halves = make(problem, torch.float32)
    lists = problem.lists()
    query, key, attn, value, rpb, keys, values = (None if t is None else t.requires_grad_() for t in halves)
    opcheck(ops.na_qk.default, (query, key, *lists), {"rpb": rpb, "additional_keys": keys})
    opcheck(ops.na_av.default, (attn, value, *lists), {"additional_values": values})
    opcheck(ops.na_qk_backward.default, (attn.detach(), query, key, *lists, rpb, keys, [True, True, False, True]))
    opcheck(ops.na_av_backward.default, (query.detach(), attn, value, *lists, values, [False, True, True]))


@pytest.mark.parametrize("name", ALL)
def test_fake_kernels_tell_shapes_dtypes_and_strides(name):
    problem = halved(ALL[name])
    for dtype in DTYPES:
        halves = make(problem, dtype)
        with FakeTensorMode() as mode:
            fake = replaced(halves, [mode.from_tensor(t) for t in present(halves)])
            told = qk(fake, problem), av(fake, problem)
        for have, want in zip(told, (qk(halves, problem), av(halves, problem))):
            assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_but_the_bias_table(dtype):
    problem = NAMED["everything"]
    halves = make(problem, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        have = natten_ops.na2d_qk(*halves[:2], *problem.lists(), additional_keys=halves.additional_keys, rpb=halves.rpb)
        out = natten_ops.na2d_av(halves.attn.to(dtype), halves.value, *problem.lists(), halves.additional_values)
    cast = replaced(halves, [t.to(dtype) for t in present(halves)])
    assert have.dtype == out.dtype == dtype
    assert torch.equal(have, qk(cast._replace(rpb=halves.rpb), halved(problem)))
    assert torch.equal(out, av(cast, halved(problem)))


# ---- derivatives ---------------------------------------------------------------------------------------------------


def test_compiled_with_dynamic_sizes_and_gradients():
    """One graph for all sizes, no break."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(query, key, value):
        weights = natten_ops.na2d_qk(query, key, kernel_size=3, dilation=2).softmax(-1)
        return natten_ops.na2d_av(weights, value, kernel_size=3, dilation=2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for size in ((6, 7), (9, 8), (12, 10)):
        tensors = [t.requires_grad_() for t in torch.randn(3, 2, 2, *size, 4).unbind(0)]
        results = [(f(*tensors), torch.autograd.grad(f(*tensors).sin().sum(), tensors)) for f in (compiled, step)]
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_windows_that_exceed_the_scratch_of_fused_tiles():
    """A window of the whole line: plain matrix products."""
    query, key, value, other = torch.randn(4, 1, 1, 2000, 512).unbind(0)
    lists = Problem((2000,), (2000,)).lists()
    weights = ops.na_qk(query, key, *lists) / 2000
    torch.testing.assert_close(weights, query @ key.mT / 2000)
    torch.testing.assert_close(ops.na_av(weights, value, *lists), weights @ value)
    of_query, of_key, *_ = ops.na_qk_backward(weights, query, key, *lists, None, None, [True] * 4)
    torch.testing.assert_close(of_query, weights @ key)
    torch.testing.assert_close(of_key, weights.mT @ query)
    of_attn, of_value, _ = ops.na_av_backward(other, weights, value, *lists, None, [True] * 3)
    torch.testing.assert_close(of_attn, other @ value.mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_value, weights.mT @ other)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_sentences():
    """What is wrong, the value, the bound and the way out; the raw ops name the argument."""
    query = torch.randn(1, 2, 6, 8, 4)
    attn = torch.rand(1, 2, 6, 8, 9)
    qk_, av_ = natten_ops.na2d_qk, natten_ops.na2d_av
    nine = [3, 3], [1, 1], [1, 1], [False, False]
    calls = {
        "kernel": lambda: qk_(query, query, kernel_size=9),
        "stride": lambda: qk_(query, query, kernel_size=3, stride=4),
        "float": lambda: qk_(query, query, kernel_size=3.0),
        "numbers": lambda: qk_(query, query, kernel_size=torch.tensor([3, 3])),
        "rank": lambda: natten_ops.na1d_qk(query, query, kernel_size=3),
        "heads last": lambda: qk_(query, query.movedim(1, -2), kernel_size=3),
        "dtype": lambda: qk_(query, query.double(), kernel_size=3),
        "ints": lambda: qk_(query.long(), query.long(), kernel_size=3),
        "array": lambda: qk_(query.numpy(), query, kernel_size=3),
        "table": lambda: qk_(query, query, kernel_size=3, rpb=torch.zeros(2, 3, 3)),
        "strided table": lambda: qk_(query, query, kernel_size=3, stride=2, rpb=torch.zeros(2, 5, 5)),
        "additional": lambda: qk_(query, query, kernel_size=3, additional_keys=torch.zeros(1, 5, 2, 4)),
        "slots": lambda: av_(attn, query, kernel_size=5),
        "slots and tokens": lambda: av_(attn, query, kernel_size=3, additional_values=torch.zeros(1, 2, 1, 4)),
        "batch": lambda: av_(attn.expand(2, -1, -1, -1, -1), query, kernel_size=3),
        "none": lambda: av_(attn, None, kernel_size=3),
        "sparse": lambda: av_(attn.to_sparse(), query, kernel_size=3),
        "meta": lambda: av_(attn, query.to("meta"), kernel_size=3),
        "gradient": lambda: ops.na_av_backward(query.to("meta"), attn, query, *nine, None, [True] * 3),
        "raw": lambda: ops.na_qk(query, query, [9, 3], [1, 1], [1, 1], [False, False]),
        "raw list": lambda: ops.na_av(attn, query, [3], [1, 1], [1, 1], [False, False]),
        "raw needed": lambda: ops.na_av_backward(query, attn, query, [3, 3], [1, 1], [1, 1], [False] * 2, None, [True]),
    }
    found = []
    for name, call in calls.items():
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            call()
        found.append(f"{name}: {str(caught.value).split('natten: ')[-1]}")
    assert_expected_inline(
        "\n".join(found),
        """\
kernel: kernel_size[0]=9 with dilation[0]=1 spans 9 > 6 tokens on axis 0; lower one of them, or pad the grid
stride: stride[0]=4 exceeds kernel_size[0]=3: queries between two windows would lose their own neighborhood; use a stride of 1 to 3
float: kernel_size[0]=3.0 is a float; give an int
numbers: kernel_size[0]=tensor([3, 3]) is a Tensor; give an int
rank: query has shape [1, 2, 6, 8, 4]; unfused 1-D neighborhood attention takes 4 dims, heads first: [batch, heads, axis 0, head dim]
heads last: key has shape [1, 6, 8, 2, 4], expected [1, 2, 6, 8, 4]: the shape of query
dtype: key has dtype torch.float64, query torch.float32; cast them to one dtype
ints: query has dtype torch.int64; cast it to one of float64, float32, float16, bfloat16
array: query is a ndarray; give a torch.Tensor
table: rpb has shape [2, 3, 3], expected [2, 5, 5]: [heads, 2 * kernel_size - 1 an axis]
strided table: rpb is defined for stride 1 only, and stride[0]=2; drop one of them
additional: additional_keys has shape [1, 5, 2, 4], expected [1, 2, 2, 4]: [batch, heads, tokens, head dim], heads first
slots: attn has shape [1, 2, 6, 8, 9], expected [1, 2, 6, 8, 25]: [batch, heads, the value's axes, window slots + additional tokens]
slots and tokens: attn has shape [1, 2, 6, 8, 9], expected [1, 2, 6, 8, 10]: [batch, heads, the value's axes, window slots + additional tokens]
batch: attn has shape [2, 2, 6, 8, 9], expected [1, 2, 6, 8, 9]: [batch, heads, the value's axes, window slots + additional tokens]
none: value is None; give a torch.Tensor
sparse: attn is a torch.sparse_coo tensor; give a dense one: attn.to_dense()
meta: attn is on cpu, value on meta; move them to one device
gradient: grad is on meta, the forward's inputs on cpu; move them to one device
raw: kernel_size[0]=9 with dilation[0]=1 spans more than the 6 tokens on axis 0
raw list: kernel_size has 1 entries for 2 spatial axes
raw needed: needed has 1 entries, expected 3""",  # noqa: E501
    )
