# SPDX-License-Identifier: MIT
"""torch.compile: whole graphs, few graphs, the same numbers, inference and training."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from samples import NAMED, differentiable, run, with_tensors
from torch._dynamo.testing import CompileCounterWithBackend

import natten_ops


class Block(torch.nn.Module):
    """Pre-norm neighborhood attention with a residual."""

    def __init__(self, **settings):
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.attention = natten_ops.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, **settings)

    def forward(self, x):
        return x + self.attention(self.norm(x))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("name", NAMED)
def test_every_problem_compiles_whole_with_its_gradients(name):
    problem = NAMED[name]
    inputs = problem.make()
    leaves = [t.requires_grad_() for t in differentiable(inputs)]

    def step(*tensors):
        out, lse = run(with_tensors(inputs, tensors), problem)
        value = out.sin().sum() + torch.where(torch.isfinite(lse), lse, 0.0).sum()
        return value, *torch.autograd.grad(value, tensors)

    def forward(*tensors):
        out, lse = run(with_tensors(inputs, tensors), problem)
        return out.sin().sum() + torch.where(torch.isfinite(lse), lse, 0.0).sum()

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    value = compiled(*leaves)
    want, *want_gradients = step(*leaves)
    torch.testing.assert_close(value, want)
    for gradient, truth in zip(torch.autograd.grad(value, leaves), want_gradients):
        torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize(
    "settings", [{}, {"dilation": 2, "rel_pos_bias": True}, {"stride": 2, "num_kv_heads": 1}], ids=str
)
def test_inductor_inference_and_training(settings):
    torch.manual_seed(0)
    block, x = Block(**settings), torch.randn(2, 8, 7, 16)
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    gradients = []
    for function in (block, compiled):
        block.zero_grad()
        function(x).sin().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    for have, want in zip(*gradients):
        torch.testing.assert_close(have, want)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_functional_options_inside_inductor():
    query, key, value = torch.randn(3, 2, 9, 8, 2, 8).unbind(0)
    extra = torch.randn(2, 2, 3, 2, 8).unbind(0)
    mask = torch.rand(2, 9, 8) > 0.2

    def attend(query, key, value):
        near = natten_ops.na2d(
            query, key, value, kernel_size=(3, 4), is_causal=(True, False), key_mask=mask, return_lse=True
        )
        far = natten_ops.na2d(
            query,
            key,
            value,
            3,
            dilation=2,
            scale=0.2,
            additional_keys=extra[0],
            additional_values=extra[1],
            return_lse=True,
        )
        merged, lse = natten_ops.merge_attentions([near[0], far[0]], [near[1], far[1]])
        rows = natten_ops.neighborhood_attention(
            query[:, 4:], key[:, 2:], value[:, 2:], kernel_size=5, q_origin=[4, 0], kv_origin=[2, 0], extent=[9, 8]
        )
        return merged * 2, lse, rows, natten_ops.na2d(query, key, value, 3, backend="reference")

    for have, want in zip(torch.compile(attend, fullgraph=True)(query, key, value), attend(query, key, value)):
        torch.testing.assert_close(have, want)


SHAPES = [(2, 8, 9), (3, 12, 10), (4, 16, 9), (2, 11, 23), (5, 7, 8)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"dilation": 2, "rel_pos_bias": True}, {"stride": 2, "is_causal": True}], ids=str
)
def test_five_shapes_make_at_most_two_graphs(training, settings):
    block = Block(**settings).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for shape in SHAPES:
        x = torch.randn(*shape, 16)
        with torch.set_grad_enabled(training):
            out = compiled(x)
        torch.testing.assert_close(out, block(x))
        if training:
            out.sum().backward()
    assert counter.frame_count <= 2


def test_sub_boxes_do_not_recompile_for_every_origin():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def part(query, x, origin: int):
        return natten_ops.neighborhood_attention(
            query, x, x, kernel_size=5, dilation=2, q_origin=[origin], kv_origin=[0], extent=[x.shape[1]]
        )

    for length, origin, count in ((64, 3, 9), (64, 7, 9), (64, 20, 9), (70, 31, 12), (80, 40, 7), (90, 11, 30)):
        x = torch.randn(1, length, 2, 4)
        whole = natten_ops.na1d(x, x, x, kernel_size=5, dilation=2)
        out = part(x[:, origin : origin + count], x, origin)
        torch.testing.assert_close(out, whole[:, origin : origin + count])
    assert counter.frame_count <= 3  # static, then a dynamic origin, then dynamic sizes


def test_a_sub_box_that_does_not_cover_is_refused_when_compiled_too():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def part(query, x, origin: int):
        return natten_ops.neighborhood_attention(
            query, x, x, kernel_size=5, q_origin=[origin], kv_origin=[4], extent=[64]
        )

    x = torch.randn(1, 20, 2, 4)
    part(x[:, :8], x, 8)
    with pytest.raises((RuntimeError, ValueError), match="see keys"):
        part(x[:, :8], x, 3)


def test_mark_dynamic_and_dynamic_true():
    block = Block(dilation=2)
    x = torch.randn(2, 9, 10, 16)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), block(x))
    y = torch.randn(3, 17, 10, 16)
    torch.testing.assert_close(compiled(y), block(y))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    attend = torch.compile(lambda q: natten_ops.na2d(q, q, q, kernel_size=3), fullgraph=True, dynamic=True)
    for shape in ((2, 8, 9, 2, 4), (3, 9, 12, 2, 6)):
        q = torch.randn(shape)
        torch.testing.assert_close(attend(q), natten_ops.na2d(q, q, q, kernel_size=3))


def test_debug_logging_breaks_no_graph(caplog):
    with caplog.at_level(logging.DEBUG, logger="natten_ops"):
        x = torch.randn(1, 8, 8, 16)
        block = Block()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, block(x))
    assert "cpu-tiled runs float32 tensors on cpu" in caplog.text


def test_mistakes_are_found_while_tracing_and_do_no_harm():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, kernel_size):
        return natten_ops.na1d(q, q, q, kernel_size=kernel_size)

    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(Exception, match=r"kernel_size\[0\]=9 with dilation\[0\]=1 spans 9 > 8 tokens on axis 0"):
        attend(q, 9)
    torch.testing.assert_close(attend(q, 5), natten_ops.na1d(q, q, q, kernel_size=5))


def test_activation_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    block, x = Block(rel_pos_bias=True), torch.randn(2, 8, 8, 16, requires_grad=True)
    want = torch.autograd.grad(block(x).sin().sum(), x)
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        have = torch.autograd.grad(checkpoint(function, x, use_reentrant=False).sin().sum(), x)
        torch.testing.assert_close(have, want)


FRESH = """
import sys, torch, natten_ops
block = natten_ops.nn.NeighborhoodAttention1D(8, 2, kernel_size=3, rel_pos_bias=True)
block(torch.randn(1, 6, 8)).sum().backward()
torch.vmap(block)(torch.randn(2, 1, 6, 8))
for heavy in ("torch._inductor", "torch.distributed.tensor", "sympy", "natten_ops.lowerings"):
    assert heavy not in sys.modules, heavy
user = torch.compiler.config.cache_key_tag = "mine"
torch.compile(block, fullgraph=True, backend="aot_eager")(torch.randn(1, 6, 8))
assert "natten_ops.lowerings" in sys.modules
assert torch.compiler.config.cache_key_tag.startswith("mine|natten_ops:"), torch.compiler.config.cache_key_tag
print("fresh process ok")
"""


def test_eager_users_pay_for_no_compiler_and_compiling_users_get_the_salt():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, env=os.environ, timeout=120)
    assert "fresh process ok" in done.stdout, done.stderr
