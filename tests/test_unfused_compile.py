# SPDX-License-Identifier: MIT
"""What the compiler makes of the two halves: the fused kernel where it may, else two calls and one kernel between them."""

import pytest
import torch
from compiling import compile_and_compare, found, fresh_compiler, skeleton  # noqa: F401 (a fixture)
from expecttest import assert_expected_inline

import natten_ops

HEADS, DIM = 4, 16
SETTINGS = {"kernel_size": (3, 5), "dilation": (2, 1), "is_causal": (False, True)}
SLOTS = 15


def tokens(rows=9, columns=12, dtype=torch.float32):
    """Query, key and value, heads first."""
    return torch.randn(3, 2, HEADS, rows, columns, DIM, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()


def weights_of(query, key, **more):
    return natten_ops.na2d_qk(query * DIM**-0.5, key, **SETTINGS, **more).softmax(-1)


def stores_weights(source):
    """Whether some tensor of the program has a slot for each key of a window."""
    return any(f", {SLOTS}]" in line or f", {SLOTS + 2}]" in line for line in skeleton(source).splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softmax_between_the_halves_is_the_fused_op(dtype):
    """From a packed projection, as models have it: dropout of inference is nothing, and no weight is in memory."""
    table = torch.randn(HEADS, 5, 9).to(dtype)

    def block(x, table):
        query, key, value = x.unflatten(-1, (3, HEADS, DIM)).permute(3, 0, 4, 1, 2, 5)
        weights = torch.nn.functional.dropout(weights_of(query, key, rpb=table), 0.1, training=False)
        out = natten_ops.na2d_av(weights, value, **SETTINGS)
        return out.permute(0, 2, 3, 1, 4).flatten(-2) * 2 + 1

    x = torch.randn(2, 9, 12, 3 * HEADS * DIM, dtype=dtype)
    (source,) = compile_and_compare(block, x, table, tolerance=1e-4 if dtype == torch.float32 else 6e-2)
    assert found()[0] == 1 and not stores_weights(source)
    if dtype == torch.float32:
        assert_expected_inline(
            skeleton(source),
            """\
new float32 [2, 9, 12, 64]
attention and its neighbours""",
        )


def test_additional_tokens_go_along():
    query, key, value = tokens()
    extra = torch.randn(2, 2, HEADS, 2, DIM)

    def step(query, key, value, extra):
        weights = weights_of(query, key, additional_keys=extra[0])
        return natten_ops.na2d_av(weights, value, **SETTINGS, additional_values=extra[1])

    (source,) = compile_and_compare(step, query, key, value, extra)
    assert found()[0] == 1 and not stores_weights(source)


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 2, 1), (0, 2, 8), (1, 1, 1)])
def test_shapes_of_one_order_in_memory(shape):
    """With one head, one token or no sample, heads first and heads last are one: there is no copy to spare."""
    query, key, value = torch.randn(3, *shape, DIM).unbind()

    def step(query, key, value):
        weights = natten_ops.na1d_qk(query, key, kernel_size=1).softmax(-1)
        return natten_ops.na1d_av(weights, value, kernel_size=1).transpose(1, 2).flatten(2) + 1

    compile_and_compare(step, query, key, value)
    assert found()[0] == (shape[0] > 0)  # of nothing there is no kernel


def returned(query, key, value):
    weights = weights_of(query, key)
    return natten_ops.na2d_av(weights, value, **SETTINGS), weights


def other_windows(query, key, value):
    return natten_ops.na2d_av(weights_of(query, key), value, kernel_size=(5, 3))


def biased(query, key, value):
    logits = natten_ops.na2d_qk(query, key, **SETTINGS)
    return natten_ops.na2d_av((logits * 0.2 + torch.arange(SLOTS)).softmax(-1), value, **SETTINGS)


def other_dim(query, key, value):
    logits = natten_ops.na2d_qk(query, key, kernel_size=3)
    return natten_ops.na2d_av(logits.softmax(-2), value, kernel_size=3)


def logits_too(query, key, value):
    logits = natten_ops.na2d_qk(query, key, **SETTINGS)
    return natten_ops.na2d_av(logits.softmax(-1), value, **SETTINGS), logits.amax(-1)


def upcast(query, key, value):
    """The values in another type than the queries: no fused attention takes that."""
    weights = torch.nn.functional.softmax(natten_ops.na2d_qk(query, key, **SETTINGS), -1, dtype=torch.float32)
    return natten_ops.na2d_av(weights, value.float(), **SETTINGS)


CASES = [(step, torch.float32) for step in (returned, other_windows, biased, other_dim, logits_too)]
CASES += [(step, torch.bfloat16) for step in (returned, upcast)]


@pytest.mark.parametrize(("step", "dtype"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_whatever_else_lies_between_stays(step, dtype):
    """The right numbers, by two calls."""
    (source,) = compile_and_compare(step, *tokens(dtype=dtype), tolerance=1e-4 if dtype == torch.float32 else 6e-2)
    assert found()[0] == 0
    assert "call na_qk" in skeleton(source) and "call na_av" in skeleton(source)


def test_the_joined_output_lies_in_memory_as_the_halves_leave_it():
    """Whatever looks at strides finds those of eager code; two copies stay two."""

    def strided(query, key, value):
        out = natten_ops.na2d_av(weights_of(query, key), value, **SETTINGS)
        return out.as_strided((4608,), (1,)) * 2

    def copied(query, key, value):
        out = natten_ops.na2d_av(weights_of(query, key), value, **SETTINGS).movedim(1, -2)
        return out.contiguous(), out.contiguous()

    compile_and_compare(strided, *tokens())
    compile_and_compare(copied, *tokens())
    with torch.no_grad():
        one, other = torch.compile(copied, fullgraph=True)(*tokens())
    kept = other.clone()
    one.zero_()
    assert torch.equal(other, kept)


def test_what_lies_between_two_calls_is_one_kernel():
    """Casts, a bias, the softmax and dropout: the logits are read and the weights written in their place, once."""

    def step(query, key, value, bias):
        logits = natten_ops.na2d_qk(query, key, **SETTINGS).float() * DIM**-0.5 + bias
        weights = torch.nn.functional.dropout(logits.softmax(-1), 0.5, training=True).to(query.dtype)
        return natten_ops.na2d_av(weights, value, **SETTINGS)

    query, key, value = tokens(dtype=torch.bfloat16)
    with torch.no_grad():
        from torch._inductor.utils import run_and_get_code

        _, (source,) = run_and_get_code(torch.compile(step, fullgraph=True), query, key, value, torch.randn(SLOTS))
    assert_expected_inline(
        "\n".join(line for line in skeleton(source).splitlines() if "int64" not in line),
        """\
call na_qk
new float32 [2, 4, 9, 12, 1]
new float32 [2, 4, 9, 12, 1]
kernel
call na_av""",
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_the_place_of_the_logits(dtype, dynamic):
    """One tensor of the size of the attention, whatever is added before the softmax and whoever else reads the weights."""
    bias = torch.randn(SLOTS, dtype=dtype)

    def biased(query, key, value):
        weights = (natten_ops.na2d_qk(query * DIM**-0.5, key, **SETTINGS) + bias).softmax(-1)
        return natten_ops.na2d_av(weights, value, **SETTINGS), weights

    def clamped(query, key, value):
        weights = natten_ops.na2d_qk(query, key, **SETTINGS).float().softmax(-1).clamp(max=0.5)
        return natten_ops.na2d_av(weights.to(dtype) * 2, value, **SETTINGS)

    for step in (biased, clamped):
        tolerance = 1e-4 if dtype == torch.float32 else 6e-2
        (source,) = compile_and_compare(step, *tokens(dtype=dtype), dynamic=dynamic, tolerance=tolerance)
        lines = skeleton(source).splitlines()
        assert [line for line in lines if not line.startswith("new")][-3:] == ["call na_qk", "kernel", "call na_av"]
        assert not stores_weights(source)


def test_logits_that_others_read_stay():
    """Here the weights must not take their place."""

    def step(query, key, value):
        logits = natten_ops.na2d_qk(query, key, **SETTINGS)
        return natten_ops.na2d_av(logits.softmax(-1), value, **SETTINGS), logits

    (source,) = compile_and_compare(step, *tokens())
    assert stores_weights(source)


def test_weights_of_several_sums_look_at_the_logits_once():
    def step(query, key, value):
        weights = (natten_ops.na2d_qk(query, key, **SETTINGS) + 1).softmax(-1)
        return [natten_ops.na2d_av(weights, value * n, **SETTINGS) for n in (1, 2, 3)]

    (source,) = compile_and_compare(step, *tokens())
    assert not stores_weights(source) and source.count("blendv") <= 2  # vectors, and the rest of a row


def test_unknown_sizes_are_not_compared():
    """Rows and columns that are one size today make no graph of their own."""

    def step(query, key, value, gate):
        weights = (natten_ops.na2d_qk(query, key, **SETTINGS) + 1).softmax(-1)
        return natten_ops.na2d_av(gate.transpose(2, 3) * weights, value, **SETTINGS)

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    with torch.fx.experimental._config.patch(use_duck_shape=False), torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
        for rows, columns in ((9, 9), (10, 12), (11, 14)):
            given = [t[..., :columns, :] for t in tokens(rows, columns)]
            gate = torch.randn(2, HEADS, columns, rows, SLOTS)
            torch.testing.assert_close(compiled(*given, gate), step(*given, gate), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_a_logit_that_is_nan_is_that_of_eager_code():
    """The weights look at the logits only for the sake of their memory."""
    query, key, value = tokens()
    query[0, 0, 0, 0, 0], key[1, 1, 4, 5, 2] = torch.nan, torch.inf

    def step(query, key, value):
        weights = (natten_ops.na2d_qk(query, key, **SETTINGS) + 1).softmax(-1)
        return natten_ops.na2d_av(weights, value, **SETTINGS), weights

    with torch.no_grad():
        have, want = torch.compile(step, fullgraph=True)(query, key, value), step(query, key, value)
    for one, other in zip(have, want):
        torch.testing.assert_close(one, other, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert want[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_the_weights_and_nothing_else_of_their_size(dtype):
    """Saved for the backward: query, key, value, and the weights; attention is not computed twice."""
    leaves = [t.requires_grad_() for t in tokens(dtype=dtype)]

    def step(query, key, value):
        return natten_ops.na2d_av(weights_of(query, key), value, **SETTINGS)

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        out = torch.compile(step, fullgraph=True)(*leaves)
    assert found()[0] == 0
    sizes = [shape[-1] for shape in saved]
    assert sizes.count(SLOTS) == 1 or dtype == torch.bfloat16 and sizes.count(SLOTS) <= 2  # float32 and its rounding
    gradients = torch.autograd.grad(out.sin().sum(), leaves)
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for have, want in zip(gradients, torch.autograd.grad(step(*leaves).sin().sum(), leaves)):
        torch.testing.assert_close(have, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_kv_heads", [HEADS, 2])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_module_with_dropout_is_one_graph(backend, num_kv_heads):
    """Forward and backward, with the random numbers of eager code; what is kept are two sets of weights and a mask."""
    torch.manual_seed(0)
    layer = natten_ops.nn.NeighborhoodAttention2D(
        HEADS * DIM, HEADS, (3, 5), attn_drop=0.5, rel_pos_bias=True, num_kv_heads=num_kv_heads
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, results, saved = torch.randn(2, 9, 12, HEADS * DIM, requires_grad=True), [], []
    with torch._inductor.config.patch(fallback_random=True):
        for call in (layer, compiled, compiled):
            torch.manual_seed(1)
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
                out = call(x)
            results.append((out.detach(), torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])))
    assert counter.frame_count == 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)
    kept = [t.dtype for t in saved if t.dim() and t.shape[-1] == SLOTS]
    assert kept.count(torch.bool) <= 1 and kept.count(torch.float32) <= 2
    assert not torch.equal(layer.eval()(x), results[0][0])


def test_dropout_with_shared_key_heads_is_that_of_repeated_heads():
    """The same mask over the weights, whether keys and values are repeated by the layer or in its parameters."""
    torch.manual_seed(0)
    shared = natten_ops.nn.NeighborhoodAttention2D(HEADS * DIM, HEADS, 3, attn_drop=0.5, num_kv_heads=2)
    repeated = natten_ops.nn.NeighborhoodAttention2D(HEADS * DIM, HEADS, 3, attn_drop=0.5)
    state = shared.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        query, key, value = state[name].unflatten(0, (-1, DIM)).split([HEADS, 2, 2])
        state[name] = torch.cat([query, *(t.repeat_interleave(HEADS // 2, 0) for t in (key, value))]).flatten(0, 1)
    repeated.load_state_dict(state)
    x, results = torch.randn(2, 9, 12, HEADS * DIM, requires_grad=True), []
    for layer in (shared, repeated):
        torch.manual_seed(1)
        out = layer(x)
        results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), x)))
    torch.testing.assert_close(*results)


def test_views_of_a_projection_are_read_in_place():
    def step(x):
        query, key, value = x.unflatten(-1, (3, HEADS, DIM)).permute(3, 0, 4, 1, 2, 5)
        weights = natten_ops.na2d_qk(query, key, **SETTINGS).sigmoid()
        return natten_ops.na2d_av(weights, value, **SETTINGS)

    (source,) = compile_and_compare(step, torch.randn(2, 9, 12, 3 * HEADS * DIM))
    assert_expected_inline(
        skeleton(source),
        """\
call na_qk
kernel
call na_av""",
    )


def test_sizes_may_change():
    """One graph; the fused kernel in it takes every size."""

    def step(query, key, value):
        return natten_ops.na2d_av(weights_of(query, key), value, **SETTINGS)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((9, 12), (6, 5), (13, 20)):
            torch.testing.assert_close(compiled(*tokens(*size)), step(*tokens(*size)), atol=1e-5, rtol=1e-4)
    assert found()[0] == 1
