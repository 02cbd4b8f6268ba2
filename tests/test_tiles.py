# SPDX-License-Identifier: MIT
"""Tiles: problems of more than one strip, range or chunk, against the general kernels, which know no tiles."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from samples import DTYPES, NAMED, Problem, differentiable, expected, problems, run, with_tensors
from test_ops import compare

import natten_ops
from natten_ops import backends

TILED, GENERAL = (backends.by_name(name).id for name in ("cpu-tiled", "cpu-general"))

LARGE = {
    "strips": Problem((3, 300), (2, 7), batch=1),
    "strips_of_groups": Problem((2, 290), (1, 5), dilation=(1, 37), heads=4, group=2),
    "strips_that_share_keys": Problem((700,), (300,), batch=1, heads=1, head_dim=4),
    "causal_strips": Problem((400,), (130,), is_causal=(True,), batch=1, additional=3, mask=True),
    "ranges": Problem((150, 20), (5, 3), dilation=(2, 1), batch=1, rpb=True),
    "strided_ranges": Problem((130, 140), (6, 4), stride=(4, 3), is_causal=(True, False), batch=1, heads=1),
    "colours": Problem((60, 280), (3, 5), batch=1, heads=1, head_dim=17, value_dim=40, additional=19, mask=True),
    "planes": Problem((6, 40, 50), (3, 4, 5), dilation=(2, 1, 1), is_causal=(False, True, False), batch=1, rpb=True),
    "turned": Problem((200, 6), (9, 3), dilation=(3, 2), rpb=True, mask=True, value_dim=5),
    "turned_volume": Problem((90, 4, 7), (5, 2, 3), stride=(2, 1, 3), batch=1),
    "large_window": Problem((40, 44), (31, 29), head_dim=16, batch=1, heads=1),
    "box": Problem((90, 300), (5, 7), dilation=(4, 3), box=((11, 20), (70, 210)), mask=True, batch=1),
    "heads_together": Problem(
        (64, 300), (3, 5), heads=8, group=2, head_dim=16, batch=1, additional=3, rpb=True, mask=True
    ),
    "wide_heads": Problem((9, 20), (3, 5), head_dim=130, value_dim=80),
}
# Windows whose keys exceed the scratch: met in parts, along one axis or more.
PARTS = {
    "planes": Problem((9, 16, 18), (7, 13, 15), head_dim=64, batch=1, heads=1),
    "rows": Problem((44, 50), (41, 43), head_dim=48, batch=1, heads=1),
    "line": Problem((6000,), (5000,), head_dim=12, batch=1, heads=1),
    "causal_line": Problem((3001,), (2500,), is_causal=(True,), head_dim=50, batch=1, heads=1, additional=3),
    "causal": Problem((42, 47), (39, 31), is_causal=(True, True), head_dim=64, batch=1, heads=1, mask=True),
    "strided": Problem((50, 54), (40, 45), stride=(40, 7), head_dim=64, batch=1, heads=1),
    "causal_strided": Problem((37, 64), (33, 44), stride=(5, 9), is_causal=(True, True), head_dim=64, batch=1, heads=1),
    "dilated": Problem((81, 90), (39, 28), dilation=(2, 3), head_dim=64, batch=1, heads=1, additional=5, mask=True),
    "groups": Problem((3, 2500), (1, 800), dilation=(3, 3), head_dim=80, batch=1, heads=1),
    "box": Problem((60, 60), (41, 43), head_dim=64, batch=1, heads=1, box=((5, 11), (50, 47))),
    "box_of_groups": Problem((2400,), (300,), dilation=(8,), box=((40,), (21,)), head_dim=300, batch=1, heads=1),
    "shared_heads": Problem((30, 40), (27, 31), heads=4, group=2, head_dim=110, value_dim=20, batch=2, mask=True),
    "wide_heads": Problem((6, 9), (3, 5), head_dim=1300, value_dim=700),
}


def everything(problem, backend, dtype=torch.float64):
    """out, lse and all gradients."""
    inputs = problem.make(dtype)
    leaves = [t.detach().requires_grad_() for t in differentiable(inputs)]
    out, lse = run(with_tensors(inputs, leaves), problem, backend)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (out, lse)]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, grads)]


@pytest.mark.parametrize("name", LARGE)
def test_tiles_equal_the_general_kernels(name):
    for have, want in zip(everything(LARGE[name], TILED), everything(LARGE[name], GENERAL)):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_windows_equal_the_general_kernels(name):
    problem = PARTS[name]
    inputs, bound = problem.make(torch.float64), backends.by_name("cpu-tiled").max_tile_bytes
    whole = backends.describe(inputs, *problem.geometry(), problem.scale, whole=True)
    parts = backends.describe(inputs, *problem.geometry(), problem.scale)
    assert parts.tile_bytes <= bound < whole.tile_bytes
    for have, want in zip(everything(problem, TILED), everything(problem, GENERAL)):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)


SMALL_PARTS = Problem(
    (7, 20), (5, 7), head_dim=1500, value_dim=40, batch=1, heads=1, mask=True, additional=2, is_causal=(False, True)
)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_parts_of_windows_in_low_precision(dtype):
    """As exact as torch's own op, like whole windows (test_ops)."""
    tile = backends.describe(SMALL_PARTS.make(dtype), *SMALL_PARTS.geometry(), None)
    assert not backends.by_name("cpu-tiled").why_not(tile)
    compare(SMALL_PARTS, dtype)


def test_parts_of_windows_and_numbers_that_are_none():
    """NaN in what nobody sees is inert, NaN and inf in what somebody sees reach just those; rows without keys are 0."""
    problem = dataclasses.replace(SMALL_PARTS, additional=None)
    inputs = problem.make(torch.float32)
    mask = inputs.key_mask.clone()
    mask[0, :, 8:] = True
    mask[0, :, :4] = False  # causal along x: the first queries see nothing
    key, value = (t.masked_fill(~mask[..., None, None], math.nan) for t in (inputs.key, inputs.value))
    value[0, 3, 12, 0, 1], value[0, 2, 17, 0, 0] = math.nan, math.inf
    dirty = inputs._replace(key=key, value=value, key_mask=mask)
    have, want = run(dirty, problem, TILED), run(dirty, problem, GENERAL)
    assert (have[0][0, :, :4] == 0).all() and (have[1][0, :, :4] == -math.inf).all()
    assert have[0].isnan().any() and have[0].isinf().any()
    for a, b in zip(have, want):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_parts_of_windows_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(everything(PARTS["rows"], TILED, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results):
        assert all(torch.equal(first, other) for other in others)


@given(problem=problems())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_parts_of_any_problem_equal_the_general_kernels(problem):
    """Head dims so large that small windows come in parts."""
    problem = dataclasses.replace(problem, head_dim=1500, rpb=False)
    tile = backends.describe(problem.make(torch.float64), *problem.geometry(), problem.scale)
    if not backends.by_name("cpu-tiled").why_not(tile):
        for have, want in zip(everything(problem, TILED), everything(problem, GENERAL)):
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10, equal_nan=True)


@given(problem=problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_problem_equals_the_general_kernels(problem):
    tile = backends.describe(problem.make(torch.float64), *problem.geometry(), problem.scale)
    if not backends.by_name("cpu-tiled").why_not(tile):
        for have, want in zip(everything(problem, TILED), everything(problem, GENERAL)):
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", ["plain", "everything", "volume", "one_dim"])
@pytest.mark.parametrize("level", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_numbers(level, name, tmp_path):
    """A lower instruction set in a process of its own, against this process."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_tiles as t\n"
        "torch.save([t.everything(t.NAMED[sys.argv[2]], t.TILED, d) for d in t.DTYPES], sys.argv[3])"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    path = tmp_path / "results.pt"
    environment = {**os.environ, "NATTEN_OPS_CPU_CAPABILITY": level}
    subprocess.run([sys.executable, "-c", program, here, name, path], env=environment, check=True, timeout=300)
    for dtype, results in zip(DTYPES, torch.load(path)):
        for have, want in zip(results, everything(NAMED[name], TILED, dtype)):
            torch.testing.assert_close(have, want)


def test_scratch_does_not_grow_with_the_image():
    def tile(length, dtype=torch.float32):
        tensor = torch.empty((), dtype=dtype).expand(1, length, length, 2, 64)
        problem = Problem((length, length), (7, 7))
        return backends.describe([tensor] * 3 + [None] * 4, *problem.geometry(), None).tile_bytes

    for dtype in DTYPES:
        sizes = [tile(length, dtype) for length in (256, 512, 4096, 30_000)]
        assert max(sizes) <= 1.1 * min(sizes) and max(sizes) <= 2 << 20


def test_named_tiles_never_fall_back():
    """What the tiled kernels do not take raises with the reason, in the op and in Python; unnamed it runs."""
    too_large = Problem((7,), (3,), head_dim=10_000, batch=1, heads=1)
    bound = backends.by_name("cpu-tiled").max_tile_bytes  # the library's is problem.h's: one number
    for problem, word in (
        (Problem((7,), (3,), scale=-1.0), "positive scales"),
        (too_large, "the head dim is too large"),
    ):
        inputs = problem.make(torch.float32)
        with pytest.raises(
            RuntimeError, match=f"backend=2 .cpu-tiled. cannot run this problem.* at most {bound} bytes"
        ):
            run(inputs, problem, TILED)
        described = backends.describe(inputs, *problem.geometry(), problem.scale)
        with pytest.raises(ValueError, match=word):
            backends.require("cpu-tiled", described)
        assert backends.choose(described).name == "cpu-general"
        assert torch.equal(run(inputs, problem)[0], run(inputs, problem, GENERAL)[0])


@pytest.mark.parametrize("name", NAMED)
def test_python_and_the_library_choose_alike(name):
    inputs = NAMED[name].make(torch.float32)
    chosen = backends.choose(backends.describe(inputs, *NAMED[name].geometry(), NAMED[name].scale))
    assert torch.equal(run(inputs, NAMED[name])[1], run(inputs, NAMED[name], chosen.id)[1])


@pytest.mark.parametrize("backend", [TILED, GENERAL])
def test_tiny_and_huge_numbers(backend):
    """Denormal inputs, logits of 1e4 and rows of -inf bias."""
    problem = Problem((6, 40), (3, 7), batch=1, rpb=True)
    inputs = problem.make(torch.float32)
    for factor in (1e-40, 1e2):
        scaled = inputs._replace(query=inputs.query * factor, key=inputs.key * factor)
        have, want = run(scaled, problem, backend), expected(scaled, problem)
        torch.testing.assert_close(have[0].double(), want[0], atol=2e-3 if factor > 1 else 1e-5, rtol=1e-3)
        torch.testing.assert_close(have[1].double(), want[1], atol=1e-4, rtol=1e-5)
    inputs.rpb[0, 2] = -torch.inf
    for have, want in zip(run(inputs, problem, backend), expected(inputs, problem)):
        torch.testing.assert_close(have.double(), want, atol=1e-5, rtol=1e-5)


def test_naming_tiles_heeds_no_default_device():
    """The choice asks for shapes with tensors of its own, which must not follow torch's default device."""
    query = torch.randn(1, 9, 2, 8)
    want = natten_ops.na1d(query, query, query, kernel_size=3)
    with torch.device("meta"):
        assert torch.equal(natten_ops.na1d(query, query, query, kernel_size=3, backend="cpu-tiled"), want)


def test_no_memory_for_scratch_says_so():
    """A head dim of a million takes 134 MB a row block of the general kernels; the child may take 64 MB more."""
    program = (
        "import resource, torch, natten_ops\n"
        "q = torch.zeros(1, 3, 1, 2**20, dtype=torch.float64)\n"
        "natten_ops.na1d(q[..., :4], q[..., :4], q[..., :4], kernel_size=3, backend='cpu-general')\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))\n"
        "try: natten_ops.na1d(q, q, q, kernel_size=3, backend='cpu-general')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "natten: out of memory for" in done.stdout, done.stdout + done.stderr
