# SPDX-License-Identifier: MIT
"""The rules of the compiler's workshop: any problem becomes code, sizes and options may be symbols, caches see every rule."""

import importlib.metadata
from pathlib import Path
from unittest import mock

import pytest
import torch
from compiling import compile_and_compare, found, fresh_compiler, image, skeleton  # noqa: F401 (a fixture)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from samples import DTYPES, problems
from test_fusion import all_in_one
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.async_compile import AsyncCompile

import natten_ops
from natten_ops import lowerings


@given(several=st.lists(problems(), min_size=20, max_size=20))
@settings(max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
def test_any_problem_becomes_code(several):
    """Three hundred problems, with neighbours and without, are lowered and written as C++, which no compiler sees."""
    torch._dynamo.reset()
    before = found()[0]
    with mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None):
        all_in_one([(problem, DTYPES[i % 4]) for i, problem in enumerate(several)])
    assert found()[0] - before > len(several) // 2  # the others are the kernel's: scales that are not positive


def test_outputs_of_one_number_a_head_keep_what_follows_them_apart():
    """As many numbers as their log-sum-exp has; what reads both follows the output."""
    query, key = image(2)
    value = torch.randn(2, 9, 12, 4, 1)

    def attend(query, key, value):
        out, lse = natten_ops.na2d(query * 0.5, key, value, kernel_size=3, return_lse=True)
        return out * -2, lse * 4, out.squeeze(-1) * lse

    compile_and_compare(attend, query, key, value)


@pytest.mark.parametrize("look", [lambda lse: lse, lambda lse: (lse * 2).logsumexp(1)])
def test_a_log_sum_exp_without_its_output(look):
    """The scheduler has removed the output by the time a template would ask where it lies: a call."""
    compile_and_compare(
        lambda q, k, v: look(natten_ops.na2d(q * 2, k, v, kernel_size=3, return_lse=True)[1]), *image(3)
    )
    assert found()[0] == 0


def cached(query, cache, value, total):
    out, lse = natten_ops.na2d(query * 2, cache, value, kernel_size=3, return_lse=True)
    cache.copy_(cache.roll(-1, 1))
    return out * 2, lse


def in_part(query, cache, value, total):
    out, lse = natten_ops.na2d(query, cache * 0.5, value, kernel_size=3, return_lse=True)
    cache[:, :1] = 0
    return out, lse


def apart(query, cache, value, total):
    out, lse = natten_ops.na2d(query * 2, cache, value, kernel_size=3, return_lse=True)
    total.add_(out)
    return lse


@pytest.mark.parametrize("step, templates", [(cached, 0), (in_part, 0), (apart, 1)])
def test_what_is_written_to_after_the_attention(step, templates):
    """A cache that is moved on: torch's templates of two outputs let nobody wait for them, so it is a call then."""
    torch._dynamo.reset()
    before, given = found()[0], image(4)
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        tensors = [tensor.clone() for tensor in given]
        with torch.no_grad():
            results.append((function(*tensors), tensors))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert found()[0] - before == templates


def test_windows_of_a_million_tokens_and_broadcast_tokens():
    """A window larger than any tile goes to the kernel; a key that is one token for all is read where it lies."""
    line = torch.randn(1, 1_000_000, 1, 1)

    @torch.compile(fullgraph=True)
    def attend(x):
        box = {"q_origin": [5], "kv_origin": [0], "extent": [1_000_000]}
        return natten_ops.neighborhood_attention(x[:, :1] * 2, x, x, kernel_size=1_000_000, **box)

    with torch.no_grad():
        weights = (line[0, 0, 0, 0] * 2 * line[0, :, 0, 0]).double().softmax(0)
        torch.testing.assert_close(attend(line).item(), (weights * line[0, :, 0, 0]).sum().item(), atol=1e-4, rtol=1e-3)
    query, value = image(2)
    one = torch.randn(1, 1, 1, 4, 16).expand_as(query)
    compile_and_compare(lambda q, k, v: natten_ops.na2d(q * 2, k, v, kernel_size=3), query, one, value)
    assert found()[0] == 1


@pytest.mark.parametrize("training", [False, True])
def test_five_shapes_make_at_most_two_graphs_in_inductor(training):
    """Guards of the lowerings count too; batch 1 may add a graph."""
    counter = CompileCounterWithBackend("inductor")

    def block(q, k, v):
        return natten_ops.na2d(q * 2, k, v, kernel_size=3, dilation=2) * 3

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for most, shapes in ((2, [(2, 8, 9), (3, 12, 10), (4, 16, 9), (2, 11, 23), (5, 7, 8)]), (3, [(1, 9, 13)])):
        for shape in shapes:
            tensors = [t.requires_grad_(training) for t in torch.randn(3, *shape, 2, 8).unbind()]
            have, want = compiled(*tensors), block(*tensors)
            torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
            if training:
                gradients = (torch.autograd.grad(out.sin().sum(), tensors) for out in (have, want))
                torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
        assert counter.frame_count <= most


def test_the_number_of_additional_tokens_may_change():
    q, k, v = image(3)

    def attend(q, k, v, tokens):
        return natten_ops.na2d(q * 2, k, v, kernel_size=3, additional_keys=tokens, additional_values=tokens) + q

    compiled = torch.compile(attend, fullgraph=True)
    with torch.no_grad():
        for count in (3, 5, 2, 9):
            tokens = torch.randn(2, count, 4, 16)
            torch.testing.assert_close(compiled(q, k, v, tokens), attend(q, k, v, tokens), atol=1e-4, rtol=1e-4)
    assert found()[0] == 2  # three tokens, then any number of them


def test_dropout_behind_the_attention_is_in_its_kernel():
    q, k, v = image(3, rows=30, columns=30)

    def attend(q, k, v):
        return torch.nn.functional.dropout(natten_ops.na2d(q, k, v, kernel_size=3), 0.25)

    with torch.no_grad():
        have, want = torch.compile(attend, fullgraph=True)(q, k, v), natten_ops.na2d(q, k, v, kernel_size=3)
    kept = have != 0
    torch.testing.assert_close(have, torch.where(kept, want / 0.75, 0.0), atol=1e-4, rtol=1e-4)
    assert found() == (1, 2) and abs(kept.float().mean().item() - 0.75) < 0.01


def test_merging_is_one_kernel_each_way():
    outs, lses = torch.randn(2, 2, 9, 12, 4, 16).unbind(), torch.randn(2, 2, 9, 12, 4).unbind()

    def merge(*tensors):
        return natten_ops.merge_attentions(tensors[:2], tensors[2:])

    (source,) = compile_and_compare(merge, *outs, *lses)
    assert skeleton(source).splitlines().count("kernel") == 1 and "call" not in skeleton(source)
    leaves = [t.clone().requires_grad_() for t in (*outs, *lses)]
    wanted = [
        torch.autograd.grad(sum(t.sin().sum() for t in f(*leaves)), leaves) for f in (merge, torch.compile(merge))
    ]
    torch.testing.assert_close(*wanted, atol=1e-4, rtol=1e-4)


def salt_with(edited, monkeypatch):
    """The salt if the file of that name had another text."""
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"edited" * (self.name == edited))
    changed = lowerings.salt()
    monkeypatch.undo()
    return changed


@pytest.mark.parametrize(
    "name",
    ["template.py", "fused.py", "forward.cpp.jinja", "_problem.py", "backends.py", "params.py", "_compiler.py"],
)
def test_caches_see_every_rule(name, monkeypatch):
    assert salt_with("nothing", monkeypatch) == lowerings.salt() != salt_with(name, monkeypatch)


def test_caches_see_the_compiler(monkeypatch):
    """A kernel that was cached beside a new compiler is not given to an old one, nor the call to a new one."""
    before = lowerings.salt()
    monkeypatch.setattr(lowerings._compiler, "why_not_here", lambda: "too old")
    assert lowerings.salt() != before


def test_caches_see_the_version(monkeypatch):
    before = lowerings.salt()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "another")
    assert lowerings.salt() != before
