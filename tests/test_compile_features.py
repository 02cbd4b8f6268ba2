# SPDX-License-Identifier: MIT
"""What else the compiler's users do, with the op in their graph: transforms, checkpointing, autocast, stances, regions."""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from compiling import contractions_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import natten_ops
from natten_ops import _compiler, _library
from natten_ops.tools import why

FORWARD = torch.ops.natten.neighborhood_attention_lse.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


class Block(torch.nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim)
        self.attention = natten_ops.nn.NeighborhoodAttention2D(dim, heads, kernel_size=3, rel_pos_bias=True)

    def forward(self, x):
        return x + self.attention(self.norm(x))


def attend(query, key, value):
    return natten_ops.na2d(query, key, value, kernel_size=3, dilation=2)


def tensors(*batch):
    return torch.randn(3, *batch, 1, 7, 8, 2, 4).unbind(0)


TRANSFORMS = {
    "grad": lambda: torch.func.grad(lambda *t: attend(*t).sin().sum(), argnums=(0, 2)),
    "vjp": lambda: lambda *t: torch.func.vjp(attend, *t)[1](torch.ones(1, 7, 8, 2, 4)),
    "vmap": lambda: torch.vmap(attend),
    "per-sample gradients": lambda: torch.vmap(torch.func.grad(lambda *t: attend(*t).sin().sum())),
    "jvp": lambda: lambda *t: torch.func.jvp(attend, t, t)[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_a_compiled_function(name):
    function = TRANSFORMS[name]()
    arguments = tensors(3) if name in ("vmap", "per-sample gradients") else tensors()
    backend = "aot_eager" if name == "jvp" else "inductor"  # tangents are many ATen ops, 20 s of C++ compiler
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize("saved", [True, False], ids=["must save", "must recompute"])
def test_selective_checkpointing_decides_whether_attention_is_computed_again(saved):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = {"forward": [], "backward": []}

    def keep(kind):
        def compiler(module, _inputs):
            graphs[kind].append([node.target for node in module.graph.nodes])
            return make_boxed_func(module.forward)

        return compiler

    def policy(_context, op, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE if saved and op is FORWARD else CheckpointPolicy.MUST_RECOMPUTE

    block, x = Block(), torch.randn(2, 8, 8, 16, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts).sin().sum()

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    (have,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend=backend)(x), x)
    (want,) = torch.autograd.grad(block(x).sin().sum(), x)
    torch.testing.assert_close(have, want)
    ((forward,), (backward,)) = graphs["forward"], graphs["backward"]
    assert forward.count(FORWARD) == 1 and backward.count(FORWARD) == (0 if saved else 1)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_inside_and_around(training):
    block, x = Block(), torch.randn(2, 8, 8, 16)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x).float().sin().sum()

    def gradients(function):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=function is around):
            value = function(x)
        if training:
            value.float().backward()
        return value.float(), [p.grad for p in block.parameters()]

    around = torch.compile(lambda x: block(x).float().sin().sum(), fullgraph=True)
    with torch.set_grad_enabled(training):
        want = gradients(inside)
        for compiled in (torch.compile(inside, fullgraph=True), around):
            torch.testing.assert_close(gradients(compiled), want, rtol=2e-2, atol=2e-2)
    _, sources = run_and_get_code(torch.compile(lambda x: inside(x) + 1, fullgraph=True), x)
    assert "bfloat16" in "".join(sources)  # attention is computed in the lower type, not merely surrounded by it


def test_stances():
    block, x, other = Block(), torch.randn(2, 8, 8, 16), torch.randn(2, 9, 8, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend=counter)
    with torch.no_grad():
        want, want_other = block(x), block(other)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(compiled(x), want)
        assert counter.frame_count == 0
        torch.testing.assert_close(compiled(x), want)
        assert counter.frame_count == 1
        with torch.compiler.set_stance("eager_on_recompile"):
            torch.testing.assert_close(compiled(other), want_other)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x), want)
            with pytest.raises(RuntimeError, match="recompile"):
                compiled(other)
        assert counter.frame_count == 1


@pytest.mark.parametrize("way", ["nested region", "block by block"])
def test_equal_blocks_compile_once(way):
    """A region is traced once and called often; blocks compiled one by one share their code."""
    blocks, x = torch.nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        want = blocks(x)
        if way == "nested region":
            region = torch.compiler.nested_compile_region(lambda block, x: block(x))

            def run(x):
                for block in blocks:
                    x = region(block, x)
                return x

            have, sources = run_and_get_code(torch.compile(run, fullgraph=True), x)
            assert len(sources) == 1
        else:
            for block in blocks:
                block.compile(fullgraph=True)
            have = blocks(x)
            assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("name", _library.OWN_OPS)
def test_no_op_keeps_cuda_graphs_away(name):
    packet = getattr(torch.ops.natten, name)
    for overload in packet.overloads():
        assert torch.Tag.cudagraph_unsafe not in getattr(packet, overload).tags


# ---- C++ compilers -------------------------------------------------------------------------------------------------


@pytest.fixture
def old_compiler(tmp_path):
    """A compiler that says it is g++ 9, and compiles as the real one does; torch's config names it."""
    script = tmp_path / "g++-9"
    script.write_text('#!/bin/sh\ncase " $* " in *" -dM "*) echo "#define __GNUC__ 9";; *) exec g++ "$@";; esac\n')
    script.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(script)), "force_disable_caches": True}):
        yield str(script)


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_an_old_compiler_gets_calls_of_the_kernel(old_compiler):
    reason = f"needs g++ 11 or clang++ 14, or a newer one, and {old_compiler} is g++ 9; install one and set"
    assert f"compiled as a call: generated code {reason}" in why((8, 8), kernel_size=3)
    given = tensors()
    with torch.no_grad():
        got, (code,) = run_and_get_code(torch.compile(attend, fullgraph=True), *given)
    assert "natten.neighborhood_attention_lse" in code and "natten::Problem" not in code
    torch.testing.assert_close(got, attend(*given))


def test_compilers_that_cannot_say_what_they_are(monkeypatch):
    assert "/no/such/compiler cannot be asked for its version" in _compiler.why_not("/no/such/compiler")
    monkeypatch.setattr(_compiler, "_macros", lambda compiler: {"__GNUC__": "11", "__x86_64__": "1"})
    assert _compiler.why_not("g++ of a CPU without F16C").startswith("needs g++ 12 or clang++ 15 on CPUs without F16C")


_COMPILE = """
import torch, natten_ops
from torch._inductor.utils import run_and_get_code
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    q, k, v = torch.randn(3, 1, 14, 15, 2, 24).to(dtype).unbind()
    function = lambda *t: natten_ops.na2d(t[0] * 2, *t[1:], kernel_size=5) * 2
    got, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), q, k, v)
    assert "natten::Problem" in code
    torch.testing.assert_close(got, function(q, k, v))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["g++-11", "clang++-14"])
def test_oldest_compilers(name, tmp_path):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "CXX": name, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = [path for path in tmp_path.rglob("*.so") if b"natten" in path.read_bytes()]
    assert len(kernels) == 3
    if shutil.which("objdump"):  # each compiler has its own way to be allowed what Inductor's flags forbid
        assert min(map(contractions_of, kernels)) > 200
