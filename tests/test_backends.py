# SPDX-License-Identifier: MIT
"""The records of facts: true of the library, the one rule of choice, the table in the README made from them; memory used up."""

import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from dense import errors_of_torch, worst
from samples import NAMED, expected, run
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import natten_ops
from natten_ops import backends
from natten_ops.ops import fused
from natten_ops.ops._register import telling_of_memory

README = Path(__file__).parents[1] / "README.md"


def test_ids_are_those_of_the_library():
    """The op takes 0 and the ids of the CPU backends, and nothing else."""
    inputs = NAMED["plain"].make(torch.float32)
    known = {b.id for b in backends.BACKENDS if b.id is not None and "cpu" in (b.devices or ())}
    for number in range(-1, 20):
        settings = NAMED["plain"].settings()._replace(backend=number)
        if number == 0 or number in known:
            fused._call_forward(settings, inputs)
        else:
            with pytest.raises(RuntimeError, match=f"backend={number} cannot run on CPU"):
                fused._call_forward(settings, inputs)


ON_CPU = [b for b in backends.BACKENDS if b.devices is None or "cpu" in b.devices]


@pytest.mark.parametrize("backend", ON_CPU, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", backends.ALL_DTYPES, ids=str)
def test_facts_are_true(backend, dtype):
    """A backend runs forward and backward in each dtype that its record names."""
    inputs = NAMED["plain"].make(dtype)
    assert (backend.why_not(backends.Problem("cpu", dtype)) == []) == (dtype in backend.dtypes)
    if dtype not in backend.dtypes:
        return
    trains = "cpu" not in backend.output_only
    query = inputs.query.requires_grad_(trains)
    out = natten_ops.na2d(query, inputs.key, inputs.value, kernel_size=(3, 5), backend=backend.name)
    if trains:
        out.sum().backward()
        assert backend.backward and query.grad is not None
    if backend.name == "flex" and dtype.itemsize == 2:  # it rounds its weights, as torch's own op does
        error, _ = errors_of_torch(inputs, NAMED["plain"], torch.ones_like(out))
        assert worst(out, expected(inputs, NAMED["plain"])[0]) <= 2 * error
    else:
        torch.testing.assert_close(out, run(inputs, NAMED["plain"])[0])


def test_choice_takes_the_first_without_a_reason():
    assert backends.choose(backends.Problem("cpu", torch.float32)).name == "cpu-tiled"
    assert backends.choose(backends.Problem("cpu", torch.float32, scale=-1.0)).name == "cpu-general"
    with pytest.raises(ValueError) as error:
        backends.choose(backends.Problem("xpu", torch.float32))
    for part in ("xpu", "cpu-general: runs on cpu tensors", 'backend="reference"'):
        assert part in str(error.value)


def test_cuda_without_the_cuda_library_says_so():
    with pytest.raises(ValueError, match="libnatten_ops_cuda.so"):
        backends.choose(backends.Problem("cuda", torch.float16))


def test_names_are_unique_and_ids_too():
    ids = [b.id for b in backends.BACKENDS if b.id is not None]
    assert len(set(backends.NAMES)) == len(backends.BACKENDS) and len(set(ids)) == len(ids) and 0 not in ids


def test_the_table_in_the_readme_is_made_from_the_records():
    assert backends.table() in README.read_text(), (
        "run: python -c 'from natten_ops import backends; print(backends.table())'"
    )


class Backends(TorchDispatchMode):
    """The backend ids that the primitive is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.natten.neighborhood_attention_lse.default:
            self.seen.append((kwargs or {}).get("backend", 0))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def precision(request):
    """torch's flag for products of float32 on CUDA devices, for one test."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize("precision", ["ieee", "tf32"], indirect=True)
def test_torchs_flag_for_products_chooses_tf32(precision, monkeypatch):
    """The composites and the functions heed it where that backend takes the tensors; the primitive does as it is told."""
    monkeypatch.setattr(backends._library, "has_cuda_kernels", True)
    with FakeTensorMode(), Backends() as mode:
        for dtype, head_dim in ((torch.float32, 64), (torch.float32, 12), (torch.float16, 64)):
            tokens = torch.empty(1, 8, 8, 2, head_dim, device="cuda", dtype=dtype)
            torch.ops.natten.na2d(tokens, tokens, tokens, [3, 3])
    number = backends.PREFER_TF32 if precision == "tf32" else 0
    assert mode.seen == [number, number, 0]


def test_a_graph_holds_the_flag_for_products():
    def number(tokens):
        return tokens + (5 if backends._torch_allows_tf32() else 0)

    assert torch.compile(number, fullgraph=True, backend="eager")(torch.zeros(())) == 0


# ---- what the log says of CUDA tensors -----------------------------------------------------------------------------


@pytest.fixture
def says(monkeypatch, caplog):
    """The line that the log has of a call; the tensors are fake, as if kernels and a device were here."""
    monkeypatch.setattr(backends._library, "has_cuda_kernels", True)
    monkeypatch.setattr(backends, "runs_here", lambda tensor: True)

    def line(make, **settings):
        caplog.clear()
        with FakeTensorMode(), caplog.at_level(logging.DEBUG, logger="natten_ops"):
            tokens = make()
            extras = {name: value() if callable(value) else value for name, value in settings.items()}
            natten_ops.neighborhood_attention(tokens, tokens, tokens, **extras)
        return caplog.messages[-1]

    return line


def fake(*shape, dtype=torch.float16):
    return lambda: torch.empty(shape, dtype=dtype, device="cuda")


def shifted():
    """Rows that begin 8 bytes behind multiples of 16."""
    return torch.empty(9 * 2 * 8 + 4, dtype=torch.float16, device="cuda").as_strided((1, 9, 2, 8), (144, 16, 8, 1), 4)


HUGE = 2**31
ROWS = "takes rows that begin at multiples of 16 bytes and lie densely: call contiguous()"
SCALE = "takes scales that are positive and finite as float32, not "
ONE, ENTRIES = {"kernel_size": 1}, {"rpb": fake(1, 2 * HUGE - 1), "kernel_size": HUGE}
PADS = {"additional_keys": fake(1, HUGE, 1, 8), "additional_values": fake(1, HUGE, 1, 8), "kernel_size": 1}
REFUSED = {
    "misaligned": (shifted, ONE, ROWS),
    "strided": (lambda: fake(1, 9, 2, 16)().as_strided((1, 9, 2, 8), (288, 32, 16, 2)), ONE, ROWS),
    "samples": (fake(HUGE, 9, 1, 8), ONE, "takes fewer than 2147483648 samples or heads, not 2147483648"),
    "tokens": (fake(1, HUGE, 1, 8), ONE, "takes fewer than 2147482623 tokens on an axis, not 2147483648"),
    "window": (fake(1, HUGE, 1, 8), {"kernel_size": 2**25}, "takes fewer than 33554431 tokens in a window, not 33554432"),
    "additional": (fake(1, 9, 1, 8), PADS, "takes fewer than 2147482623 additional tokens, not 2147483648"),
    "bias": (fake(1, HUGE, 1, 8), ENTRIES, "takes fewer than 2147483647 entries in a head's bias table, not 4294967295"),
    "small scale": (fake(1, 9, 1, 8), {**ONE, "scale": 1e-50}, SCALE + "1e-50"),
    "large scale": (fake(1, 9, 1, 8), {**ONE, "scale": 1e39}, SCALE + "1e+39"),
    "negative scale": (fake(1, 9, 1, 8), {**ONE, "scale": -1.0}, "takes positive scales, not -1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_log_says_why_tensor_cores_do_not_run_a_problem(says, name):
    make, settings, reason = REFUSED[name]
    line = says(make, **settings)
    assert line.startswith("cuda-general runs float16 tensors on cuda; ")
    assert reason in line.partition("; cuda-mma ")[2].partition("; cuda-mma-tf32 ")[0]
    with FakeTensorMode(), pytest.raises(ValueError, match=re.escape(reason)):
        extras = {name: value() if callable(value) else value for name, value in settings.items()}
        natten_ops.neighborhood_attention(*[make()] * 3, backend="cuda-mma", **extras)


@pytest.mark.parametrize("precision", ["ieee", "tf32"], indirect=True)
def test_the_log_names_what_runs_with_torchs_flag(says, precision):
    line = says(fake(1, 9, 2, 8, dtype=torch.float32), kernel_size=3)
    if precision == "tf32":
        assert line.startswith("cuda-mma-tf32 runs float32 tensors on cuda") and "; cuda-mma takes float16" in line
    else:
        assert line.startswith("cuda-general runs float32 tensors on cuda")
        assert line.endswith("; cuda-mma-tf32 runs only when named, or where torch allows tf32 in products")
    line = says(fake(1, 9, 2, 12, dtype=torch.float32), kernel_size=3)
    assert line.startswith("cuda-general runs float32")
    assert line.endswith("; cuda-mma-tf32 takes head dims that are multiples of 8, 8 to 128, not (12, 12)")
    assert says(fake(1, 9, 2, 8), kernel_size=3).startswith("cuda-mma runs float16 tensors on cuda")


def test_the_log_says_that_the_hopper_forward_must_be_named(says):
    line = says(fake(1, 9, 2, 64), kernel_size=3)
    assert line.startswith("cuda-mma runs float16 tensors on cuda")
    assert line.endswith("; cuda-wgmma runs only when named: no GPU has run it yet")
    line = says(fake(1, 90, 2, 64), kernel_size=3, dilation=9)
    assert line.endswith("; cuda-wgmma takes dilations up to 8, what TMA can step over, not 9")


def test_a_named_backend_tells_every_reason(monkeypatch):
    monkeypatch.setattr(backends._library, "has_cuda_kernels", True)
    monkeypatch.setattr(backends, "runs_here", lambda tensor: True)
    reasons = (
        "takes head dims that are multiples of 64, 64 to 128, not (8, 8)", "takes no bias table",
        "takes no additional tokens", "takes keys and values whose heads lie within a token's stride",
    )  # fmt: skip
    with FakeTensorMode():
        query = fake(2, 9, 2, 8)()
        key = query.as_strided(query.shape, (144, 8, 4096, 1))
        extras = {"rpb": fake(2, 5)(), "additional_keys": fake(2, 4, 2, 8)(), "additional_values": fake(2, 4, 2, 8)()}
        with pytest.raises(ValueError) as caught:
            natten_ops.neighborhood_attention(query, key, query, kernel_size=3, backend="cuda-wgmma", **extras)
    assert all(f"it {reason}" in str(caught.value) for reason in reasons)


# ---- what is known to work comes first -----------------------------------------------------------------------------


def untested_before_tested(records):
    """Pairs of kernels that may be chosen, of one device, of which the first has run on no GPU and the second has."""
    may_be_chosen = [b for b in records if not b.named_only or b.tf32]
    kernels = [b for b in may_be_chosen if b.id is not None and "cuda" in (b.devices or ())]
    untested = {b.name for b in kernels if "no GPU yet" in b.verified_on}
    pairs = itertools.combinations([b.name for b in kernels], 2)
    return [(first, second) for first, second in pairs if first in untested and second not in untested]


def test_what_has_run_on_a_gpu_is_preferred_to_what_has_not():
    assert untested_before_tested(backends.BACKENDS) == []
    tested = [b._replace(verified_on="H200" if b.name == "cuda-general" else b.verified_on) for b in backends.BACKENDS]
    untested = ["cuda-mma", "cuda-mma-tf32"]
    assert untested_before_tested(tested) == [(name, "cuda-general") for name in untested]


# ---- a CUDA torch without our CUDA library -------------------------------------------------------------------------


def test_the_advice_names_the_nvcc_that_fits(monkeypatch, tmp_path):
    library, broken = backends._library, tmp_path / "libnatten_ops_cuda.so"
    broken.write_text("no library")
    monkeypatch.setattr(library, "has_cuda_kernels", False)
    nvcc = "an nvcc of the major version of {} or an older one, at least 12, on the path and run `make cuda`"
    of_13 = nvcc.format("CUDA 13, torch's,")
    for cuda, found, why, advice in (
        (None, None, "is a build without CUDA", "; install a CUDA build of torch, then put " + nvcc.format("torch's CUDA")),
        ("13.0", None, "CMake found no nvcc of a version that fits", "; put " + of_13),
        ("13.0", str(broken), "cannot be loaded", "; put " + of_13),
    ):  # fmt: skip
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(library, "_find", lambda name, found=found: found)
        path, reason = library._load_cuda()
        monkeypatch.setattr(library, "_why_no_cuda", reason)
        assert path is None and why in reason
        assert reason in library.why_no_cuda_kernels() and advice in library.why_no_cuda_kernels()
    monkeypatch.setattr(library, "has_cuda_kernels", True)
    assert library.why_no_cuda_kernels() == ""


# ---- memory used up ------------------------------------------------------------------------------------------------


class Failing(TorchDispatchMode):
    """Every op of ours fails as the library's allocations do below torch 2.13."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "natten":
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_running_out_of_memory_is_torchs_own_error(device):
    """Whatever class the library's allocation failed with; other errors, and those of other devices, stay what they are."""
    with FakeTensorMode():
        tokens = torch.empty(1, 9, 2, 4, device=device)

    def failing(error):
        def call():
            raise error

        return telling_of_memory(tokens, call)

    text = "CUDA out of memory. Tried to allocate"
    for error in (RuntimeError(text), torch.OutOfMemoryError(text), RuntimeError("CUDA refused a kernel")):
        expected = torch.OutOfMemoryError if device == "cuda" and "memory" in str(error) else type(error)
        with pytest.raises(RuntimeError, match=str(error)) as caught:
            failing(error)()
        assert caught.type is expected
    assert telling_of_memory(tokens, lambda: 3)() == 3


@pytest.mark.parametrize("op", ["fused", "qk", "av"])
@pytest.mark.parametrize("is_cuda", [True, False])
def test_every_function_tells_of_memory_forward_and_backward(op, is_cuda, monkeypatch):
    """CPU tensors that say they are on a CUDA device: autograd runs."""
    shape = (1, 9, 2, 4) if op == "fused" else (1, 2, 9, 4)
    query, key, value = torch.randn(3, *shape).requires_grad_().unbind(0)
    attn = torch.randn(1, 2, 9, 3, requires_grad=True)
    call = {
        "fused": lambda: natten_ops.na1d(query, key, value, kernel_size=3),
        "qk": lambda: natten_ops.na1d_qk(query, key, kernel_size=3),
        "av": lambda: natten_ops.na1d_av(attn, value, kernel_size=3),
    }[op]
    out = call().sum()
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    for attempt in (call, out.backward):
        with Failing(), pytest.raises(RuntimeError, match="out of memory") as caught:
            attempt()
        assert caught.type is (torch.OutOfMemoryError if is_cuda else RuntimeError)
