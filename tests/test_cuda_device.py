# SPDX-License-Identifier: MIT
"""The CUDA kernels on a CUDA device: the numbers of the emulated ones, streams, graphs, devices, memory.

Skipped where there is none; `python -m bench.gpu` runs it before it measures anything.
"""

import dense
import pytest
import torch
from dense import worst
from halves import av, finite, halved, make, present, qk, replaced
from halves import in_double as halves_in_double
from hypothesis import given, settings
from samples import DTYPES, EMPTY, NAMED, Problem, differentiable, in_double, problems, run, with_tensors
from test_cuda_hopper import LONG, PLACES
from test_cuda_hopper import fitting as fitting_boxes
from test_cuda_hopper import fitting_problems as fitting_problems_of_boxes
from test_cuda_mma import FULL, HALVES, PATHS, fitting, fitting_problems

import natten_ops
from natten_ops import backends, reference

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and natten_ops._library.has_cuda_kernels),
    reason="needs a CUDA device and libnatten_ops_cuda.so",
)
GENERAL, MMA, TF32, WGMMA = (
    backends.by_name(name).id for name in ("cuda-general", "cuda-mma", "cuda-mma-tf32", "cuda-wgmma")
)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a device of compute capability 9.0",
)


def compare(problem, dtype, backend=0, placed=lambda inputs: inputs):
    """Outputs and gradients of a backend on the device."""

    def attend(inputs, grad_out):
        on_device = inputs._replace(**{n: t.cuda() for n, t in inputs._asdict().items() if t is not None})
        on_device = placed(on_device)
        leaves = [t.detach().requires_grad_() for t in differentiable(on_device)]
        out, lse = run(with_tensors(on_device, leaves), problem, backend)
        gradients = torch.autograd.grad(out, leaves, grad_out.cuda())
        return out.cpu(), lse.cpu(), [gradient.cpu() for gradient in gradients]

    dense.compare(problem, dtype, attend, cuda=True, tf32=backend == TF32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", {**NAMED, **EMPTY})
def test_named_problems(name, dtype):
    compare({**NAMED, **EMPTY}[name], dtype, GENERAL)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", {**NAMED, **FULL})
def test_named_problems_on_tensor_cores(name, dtype):
    for head_dim in (16, 64, 128, 256):
        compare(fitting({**NAMED, **FULL}[name], head_dim=head_dim), dtype, MMA)


@pytest.mark.parametrize("name", {**NAMED, **FULL})
def test_named_problems_in_tf32(name):
    for head_dim in (16, 64, 128):
        compare(fitting({**NAMED, **FULL}[name], head_dim=head_dim), torch.float32, TF32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_problem(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(problem=fitting_problems())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_problem_on_tensor_cores(dtype, problem):
    compare(problem, dtype, MMA)


@given(problem=fitting_problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_problem_in_tf32(problem):
    compare(problem, torch.float32, TF32)


@on_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", {**NAMED, **LONG})
def test_named_problems_on_hopper(name, dtype):
    for head_dim in (64, 128):
        compare(fitting_boxes({**NAMED, **LONG}[name], head_dim=head_dim), dtype, WGMMA)


@on_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(drawn=fitting_problems_of_boxes())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_problem_on_hopper(dtype, drawn):
    problem, place = drawn
    compare(problem, dtype, WGMMA, PLACES[place])


@on_hopper
@pytest.mark.parametrize("dilation", range(2, 9))
def test_every_dilation_on_hopper(dilation):
    line = Problem((90 * dilation + 1,), (80,), dilation=(dilation,), batch=1, heads=1)
    compare(fitting_boxes(line), torch.float16, WGMMA)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["everything", "strided", "box"])
def test_gradients_of_the_lse_with_and_without_those_of_the_output(name, path):
    backend, dtype, tolerance, shaped = PATHS[path]
    problem = shaped(NAMED[name])
    inputs = problem.make(dtype)
    on_device = inputs._replace(**{n: t.cuda() for n, t in inputs._asdict().items() if t is not None})
    leaves = [t.detach().requires_grad_() for t in differentiable(on_device)]
    out, lse = run(with_tensors(on_device, leaves), problem, backend)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse) * torch.isfinite(lse)
    for outputs, grads in (((out, lse), (grad_out, grad_lse)), ((lse,), (grad_lse,))):
        have = torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
        of_out = grad_out if len(grads) == 2 else torch.zeros_like(out)
        exact = reference.backward(
            of_out.cpu().double(), grad_lse.cpu().double(), in_double(inputs), *problem.geometry(), problem.scale
        )
        for gradient, truth in zip(have, differentiable(exact)):
            assert worst(gradient.cpu(), truth) <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", {**NAMED, **EMPTY})
def test_halves(name, dtype):
    """Both outputs, and every gradient of both."""
    problem = halved({**NAMED, **EMPTY}[name])
    tensors = make(problem, dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    gradients, results = [torch.randn(t.shape).to(dtype) for t in (tensors.attn, tensors.value)], []
    for device, source, module in (("cuda", tensors, torch.ops.natten), ("cpu", halves_in_double(tensors), reference)):
        leaves = [t.to(device).detach().requires_grad_() for t in present(source)]
        placed = replaced(source, leaves)
        outputs = finite(qk(placed, problem, module)), av(placed, problem, module)
        grads = [given.to(t) for given, t in zip(gradients, outputs)]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for have, want in zip(*results):
        assert have.dtype == dtype
        assert worst(have.cpu(), want) <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0)


def large(dtype=torch.bfloat16):
    return torch.randn(3, 2, 40, 40, 4, 64, device="cuda", dtype=dtype).unbind(0)


def test_the_same_bits_in_every_run():
    leaves = [t.clone().requires_grad_() for t in large()]
    grad = torch.randn_like(leaves[0])
    runs = [torch.autograd.grad(natten_ops.na2d(*leaves, kernel_size=13), leaves, grad) for _ in range(3)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(again, runs[0]))


@pytest.mark.parametrize("backend", [None, pytest.param("cuda-wgmma", marks=on_hopper)])
def test_a_graph_replays_forward_and_backward(backend):
    query, key, value = (t.clone().requires_grad_() for t in large())
    grad = torch.randn_like(query)

    def step():
        out = natten_ops.na2d(query, key, value, kernel_size=7, backend=backend)
        return (out, *torch.autograd.grad(out, (query, key, value), grad))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_kernels_run_on_the_current_stream():
    """A stream that is busy for long delays them: the default stream would not."""
    query, key, value = large()
    want = natten_ops.na2d(query, key, value, kernel_size=7)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(1e8))
        later = query * 1
        out = natten_ops.na2d(later, key, value, kernel_size=7)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_counts_not_the_current_one():
    query, key, value = (t.to("cuda:1") for t in large())
    assert torch.cuda.current_device() == 0
    out = natten_ops.na2d(query, key, value, kernel_size=7)
    assert out.device.index == 1
    assert torch.equal(out.cpu(), natten_ops.na2d(*(t.to("cuda:0") for t in (query, key, value)), kernel_size=7).cpu())


def test_out_of_memory_is_torchs_error():
    free, _ = torch.cuda.mem_get_info()
    line = torch.empty(1, 1, 1, 8, device="cuda", dtype=torch.float16)
    huge = line.expand(1, free // 8, 1, 8)  # its output takes twice what is free
    with pytest.raises(torch.OutOfMemoryError):
        natten_ops.na1d(huge, huge, huge, kernel_size=1)


def test_offsets_beyond_32_bits():
    """Rows that begin more than 2^31 numbers into their tensor."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GiB of device memory")
    packed = torch.randn(1, 1 << 16, 3, 1, 1 << 14, device="cuda", dtype=torch.float16)[..., :64]
    query, key, value = packed.unbind(2)
    out = natten_ops.na1d(query, key, value, kernel_size=5)
    tail = [t[:, -64:].contiguous() for t in (query, key, value)]
    torch.testing.assert_close(out[:, -32:], natten_ops.na1d(*tail, kernel_size=5)[:, -32:])


def test_mixed_devices_are_refused():
    query, key, value = large()
    with pytest.raises(ValueError, match="device"):
        natten_ops.na2d(query, key.cpu(), value, kernel_size=7)


@pytest.mark.parametrize("backend", [MMA, pytest.param(WGMMA, marks=on_hopper)])
def test_big_windows_against_problem_of_parts(backend):
    """A window of thousands of keys: many boxes, nearly all of them without a mask."""
    problem = Problem((64, 64), (49, 40), batch=1, heads=1, head_dim=64)
    compare(problem, torch.bfloat16, backend)
