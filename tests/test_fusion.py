# SPDX-License-Identifier: MIT
"""What the compiler makes of the fused op: which kernels, what is in them, and the same numbers as ever."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compiling import compile_and_compare, contractions_of, found, fresh_compiler, image, rope, skeleton  # noqa: F401 (a fixture)
from expecttest import assert_expected_inline
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from samples import DTYPES, EMPTY, NAMED, Problem, expected, problems, run
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import natten_ops
from natten_ops.reference import Inputs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


# ---- numbers -------------------------------------------------------------------------------------------------------


def all_in_one(chosen):
    """Problems (with dtypes) in one graph, whose kernels are compiled side by side: its results, and their inputs.

    Every other problem has neighbours before and behind, whose arithmetic is exact; they are taken off the results.
    """
    inputs = [problem.make(dtype) for problem, dtype in chosen]

    def every(*groups):
        results = []
        for i, (group, (problem, _)) in enumerate(zip(groups, chosen)):
            tensors = Inputs(*group)
            if i % 2:
                out, lse = run(scaled(tensors), problem)
                results.append((out * -2, lse * 4))
            else:
                results.append(run(tensors, problem))
        return results

    with torch.no_grad():
        results = torch.compile(every, fullgraph=True, dynamic=False)(*inputs)
    for i in range(1, len(chosen), 2):
        inputs[i] = scaled(inputs[i])
        results[i] = results[i][0] / -2, results[i][1] / 4
    return results, inputs


def scaled(inputs):
    return inputs._replace(query=inputs.query * 0.5, key=inputs.key * 2, value=inputs.value * -0.5)


def compare_all(chosen):
    """The same, against the reference."""
    for (out, lse), tensors, (problem, dtype) in zip(*all_in_one(chosen), chosen):
        want, want_lse = expected(tensors, problem)
        torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(lse.double(), want_lse, atol=limit, rtol=limit)


@pytest.mark.parametrize("part", [0, 1])
def test_every_option_is_the_templates(part):
    """With neighbours for half of them in each part, without for the other half."""
    names = list(NAMED)[: len(NAMED) // 2 * 2]
    names = [*names[part::2], *names[1 - part :: 2]] if part else names
    compare_all([(NAMED[name], DTYPES[(i // 2 + part) % 4]) for i, name in enumerate(names)])
    assert found()[0] == len(names) and found()[1] >= len(names) // 2


def test_empty_tensors_and_scales_that_are_not_positive_go_to_the_kernels():
    negative = Problem((7,), (3,), scale=-0.5)
    compare_all([(problem, torch.float32) for problem in (*EMPTY.values(), negative)])
    assert found()[0] == 1  # no additional token is no empty tensor of the core


def test_a_window_too_large_for_tiles_goes_to_the_kernel():
    x = torch.randn(1, 66, 66, 1, 64)
    (source,) = compile_and_compare(lambda x: natten_ops.na2d(x * 2, x, x, kernel_size=65), x)
    assert "torch.ops.natten.neighborhood_attention_lse" in source and found() == (0, 0)


@given(several=st.lists(problems(), min_size=8, max_size=8))
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
def test_any_problem(several):
    torch._dynamo.reset()
    compare_all([(problem, DTYPES[i % 4]) for i, problem in enumerate(several)])


@pytest.mark.slow
@seed(1)
@given(several=st.lists(problems(), min_size=20, max_size=20))
@settings(max_examples=15, deadline=None, database=None)
def test_any_problem_long(several):
    torch._dynamo.reset()
    compare_all([(problem, DTYPES[i % 4]) for i, problem in enumerate(several)])


# ---- what fuses ----------------------------------------------------------------------------------------------------


def gated(q, k, v, gate, residual, cosine, sine):
    attended = natten_ops.na2d(rope(q, cosine, sine), rope(k, cosine, sine), v, kernel_size=5)
    return (attended * torch.sigmoid(gate) + residual).bfloat16()


def test_a_rotated_gated_block_is_one_kernel():
    """Rotated queries and keys, attention, gate, residual and cast."""
    q, k, v, gate, residual = image(5)
    angles = torch.randn(2, 9, 12, 1, 16)
    (source,) = compile_and_compare(gated, q, k, v, gate, residual, *angles.unbind(), tolerance=1e-2)
    assert found() == (1, 1)
    assert source.count("async_compile.cpp_pybinding") == 1 and "torch.ops.natten" not in source
    assert source.count("empty_strided_cpu(") == 1  # the result
    inside = source[source.index("const auto compute_query") : source.index("const auto hooks")]
    for part in re.split("const auto (?:compute_key|take_out)", inside):
        assert "at::vec::Vectorized" in part


def test_structure_of_a_block_in_inference_and_training():
    """A rotated and gated block: what is allocated and run, in its order."""
    tensors = image(5, rows=6, columns=7, heads=2, dim=8)
    angles = torch.randn(2, 6, 7, 1, 8).unbind()
    (inference,) = compile_and_compare(gated, *tensors, *angles, tolerance=1e-2)
    assert_expected_inline(
        skeleton(inference),
        """\
new bfloat16 [2, 6, 7, 2, 8]
attention and its neighbours""",
    )
    leaves = [t.requires_grad_() for t in tensors]

    def step(*arguments):
        value = torch.compile(gated, fullgraph=True, dynamic=False)(*arguments).float().sum()
        return torch.autograd.grad(value, leaves)

    _, (forward, backward) = run_and_get_code(step, *leaves, *angles)
    assert_expected_inline(
        skeleton(forward),
        """\
new float32 [2, 6, 7, 2, 8]
new float32 [2, 6, 7, 2, 8]
kernel
new bfloat16 [2, 6, 7, 2, 8]
new float32 [2, 6, 7, 2, 8]
new float32 [2, 6, 7, 2]
attention and its neighbours""",
    )  # the rotated tokens are saved, and with them the output and its log-sum-exp: nothing of tokens x window
    assert_expected_inline(
        "\n".join(step for step in skeleton(backward).splitlines() if "new" not in step),
        """\
kernel
call neighborhood_attention_lse_backward
kernel""",
    )


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump to read the compiled kernel")
def test_multiplications_and_additions_are_contracted(tmp_path):
    """Inductor forbids it for its own loops (-ffp-contract=off); without it the engine is 15 % slower."""
    with torch._inductor.utils.fresh_cache(dir=tmp_path):
        q, k, v = image(3)
        compile_and_compare(lambda q, k, v: natten_ops.na2d(q, k, v, kernel_size=5), q, k, v)
        (library,) = [path for path in Path(tmp_path).rglob("*.so") if b"natten" in path.read_bytes()]
        assert contractions_of(library) > 200


def heads_first(x):
    return x.permute(0, 3, 1, 2, 4)


FUSES = {  # name: (function of q, k, v, g; kernels behind the template that it swallows)
    "residual and activation": (lambda a, q, g: torch.nn.functional.gelu(a * 0.5 + q), 1),
    "flattened heads": (lambda a, q, g: a.flatten(3) * g.flatten(3), 1),
    "flattened tokens": (lambda a, q, g: a.reshape(2, 108, 64) + g.reshape(2, 108, 64), 1),
    "heads first": (lambda a, q, g: heads_first(a) * heads_first(g) + heads_first(q), 1),
    "plain output used too": (lambda a, q, g: (a, a * g), 1),
    "cast": (lambda a, q, g: a.to(torch.float16), 1),
    "per channel and per token": (lambda a, q, g: a * g[0, 0, 0, 0] + g[..., :1], 1),
    "reduction": (lambda a, q, g: a.sum(-1), 0),
    "norm": (lambda a, q, g: torch.nn.functional.layer_norm(a, [16]), 0),
    "softmax": (lambda a, q, g: a.softmax(-1), 0),
    "matrix product": (lambda a, q, g: q.flatten(3) + a.flatten(3) @ g.flatten()[:4096].view(64, 64), 0),
    "another shape halfway": (lambda a, q, g: (a * 2).flatten(3) * g.flatten(3), 0),
}


@pytest.mark.parametrize("name", FUSES)
def test_what_follows(name):
    follow, epilogues = FUSES[name]
    q, k, v, g = image(4)
    compile_and_compare(
        lambda q, k, v, g: follow(natten_ops.na2d(q, k, v, kernel_size=3), q, g), q, k, v, g, tolerance=2e-3
    )
    assert found() == (1, epilogues)


def test_both_outputs_with_what_follows_each():
    q, k, v, g = image(4)

    def both(q, k, v, g):
        out, lse = natten_ops.na2d(q, k, v, kernel_size=3, dilation=2, return_lse=True)
        return out, lse, out * g, lse * 2 + g[..., 0]

    compile_and_compare(both, q, k, v, g)
    assert found() == (1, 1 if torch.__version__.startswith("2.11.") else 2)  # 2.11 fuses one and writes the other


def test_packed_projections_are_read_in_place():
    x, weight = torch.randn(2, 9, 12, 32), torch.randn(192, 32)
    (source,) = compile_and_compare(
        lambda x, w: natten_ops.na2d(*(x @ w.T).unflatten(-1, (3, 4, 16)).unbind(3), kernel_size=3), x, weight
    )
    assert found()[0] == 1 and source.count("async_compile.cpp_pybinding") == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_change_without_new_kernels(dynamic):
    def block(q, k, v, g):
        return natten_ops.na2d(q * g, k, v, kernel_size=(3, 5), dilation=(2, 1)) * g + q

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for rows, columns in ((8, 9), (13, 7), (6, 21), (17, 40)):
        tensors = image(4, rows=rows, columns=columns, heads=2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), block(*tensors), atol=1e-4, rtol=1e-4)
    assert found()[0] <= 2


def test_training_saves_what_it_must():
    """The inputs, out and lse: nothing of tokens x window. The backward is one call of the kernel."""
    q, k, v, g = (t.requires_grad_() for t in image(4))
    angles = torch.randn(2, 9, 12, 1, 16).unbind()

    def loss(q, k, v, g):
        return (natten_ops.na2d(rope(q, *angles), rope(k, *angles), v, kernel_size=5) * g).sin().sum()

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        value = torch.compile(loss, fullgraph=True, dynamic=False)(q, k, v, g)
    gradients = torch.autograd.grad(value, (q, k, v, g))
    for have, want in zip(gradients, torch.autograd.grad(loss(q, k, v, g), (q, k, v, g))):
        torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)
    # Rotated queries and keys, values, the output, the gate; the log-sum-exp; both tables of angles.
    assert sorted(saved) == sorted([(2, 9, 12, 4, 16)] * 5 + [(2, 9, 12, 4)] + [(9, 12, 1, 16)] * 2)
    assert found()[0] == 1


def test_equal_layers_are_one_kernel():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project_in, self.project_out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = self.project_in(x).unflatten(-1, (3, 2, 16)).unbind(-3)
            q = torch.nn.functional.normalize(q, dim=-1) * 4
            return x + self.project_out(natten_ops.na2d(q, k, v, kernel_size=3).flatten(-2))

    model = torch.nn.Sequential(*(Layer() for _ in range(3)))
    (source,) = compile_and_compare(model, torch.randn(2, 9, 12, 32))
    kernels = re.findall(r"^(cpp\w+) = async_compile", source, re.M)
    ours = [name for name in kernels if "neighborhood" in name]
    assert found()[0] == 3 and len(ours) == 1, kernels


@pytest.mark.parametrize("winner", ["template", "call"])
def test_tilings_and_the_call_compete_where_asked(winner, monkeypatch):
    """Under max_autotune, the numbers are the same whoever wins; by default nothing is run to choose."""
    from torch._inductor.select_algorithm import ExternKernelCaller  # before the next line: they import each other

    from torch._inductor.codegen.cpp_template_kernel import CppTemplateCaller  # isort: skip

    timed = []
    for kind, name in ((CppTemplateCaller, "template"), (ExternKernelCaller, "call")):
        judge = lambda _, *args, name=name, **kwargs: timed.append(name) or (1.0 if name == winner else 2.0)  # noqa: E731
        monkeypatch.setattr(kind, "benchmark", judge)

    def attend(q, k, v, g):
        return natten_ops.na2d(q, k, v, kernel_size=3, dilation=2) * g

    compile_and_compare(attend, *image(4))
    assert timed == []
    with torch._inductor.config.patch(max_autotune=True, autotune_local_cache=False, autotune_in_subproc=False):
        torch._dynamo.reset()
        counters.clear()
        (source,) = compile_and_compare(attend, *image(4))
    assert timed.count("call") == 1 and timed.count("template") == 3
    assert ("natten_ops_call_kernel" in source) == (winner == "call")


# ---- caches --------------------------------------------------------------------------------------------------------

CACHED = """
import pathlib, sys
if sys.argv[1] == "edited":
    read = pathlib.Path.read_text
    pathlib.Path.read_text = lambda self, *a, **k: read(self, *a, **k) + (
        "\\nstruct Edited {};\\n" if self.name == "softmax.h" else "")
import torch, natten_ops
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
x = torch.randn(1, 9, 2, 16)
with torch.no_grad():
    attend = lambda x: natten_ops.na1d(x, x, x, kernel_size=3) * float(sys.argv[2])
    _, sources = run_and_get_code(torch.compile(attend), x)
print(counters["inductor"]["fxgraph_cache_hit"], any("struct Edited" in source for source in sources))
"""


def test_caches_see_the_engine():
    """Another process starts warm; after an edit of a header of the engine it gets the new code."""
    fresh = str(time.time())  # a graph that no cache holds yet

    def run_process(kind):
        command = [sys.executable, "-c", CACHED, kind, fresh]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-2:]

    assert run_process("as it is") == ["0", "False"]
    assert run_process("as it is") == ["1", "False"]
    assert run_process("edited") == ["0", "True"]
