# SPDX-License-Identifier: MIT
"""The records of facts: true of the library, the one rule of choice, and the table in the README made from them."""

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


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_torchs_flag_for_products_chooses_tf32(precision, monkeypatch, request):
    """The composites and the functions heed it where that backend takes the tensors; the primitive does as it is told."""
    monkeypatch.setattr(backends._library, "has_cuda_kernels", True)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    request.addfinalizer(lambda: setattr(matmul, "fp32_precision", before))
    matmul.fp32_precision = precision
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
