# SPDX-License-Identifier: MIT
"""Samples of different sizes in one call of the fused functions: jagged lines, and strided grids sample after sample."""

import pytest
import torch
from dense import worst
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from nesting import SIZES, by_op, by_reference, draw, gradients, grids, lines, offsets_of, sentence, values_of
from samples import DTYPES
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import natten_ops

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
jagged_op = torch.ops.natten.neighborhood_attention_jagged.default
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def assert_right(tensors, lengths, windows, dtype):
    exact = [None if t is None else t.double() for t in tensors]
    for have, want in zip(by_op(tensors, lengths, windows), by_reference(exact, lengths, windows)):
        assert worst(have, want) <= TOLERANCE[dtype]
    wanted = gradients(by_reference, exact, lengths, windows)
    for have, want in zip(gradients(by_op, tensors, lengths, windows), wanted):
        assert have.shape == want.shape and have.dtype == dtype
        assert worst(have, want) <= TOLERANCE[dtype] * max(1.0, want.abs().max().item() if want.numel() else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [3, 40])  # of few samples each has all threads, many share them out
def test_lines_of_every_dtype(dtype, count):
    lengths = [7 + 5 * i % 23 for i in range(count)]
    tensors = values_of(lengths, dtype, heads=4, group=2, value_dim=5, additional=2, rpb=3)
    assert_right(tensors, lengths, ([3], [1], [2], [True]), dtype)


@st.composite
def jagged_problems(draw_):
    kernel, dilation = draw_(st.integers(1, 6)), draw_(st.integers(1, 3))
    rpb = draw_(st.booleans())
    stride = 1 if rpb else draw_(st.integers(1, kernel))
    longer = draw_(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    windows = [kernel], [stride], [dilation], [draw_(st.booleans())]
    more = {"group": draw_(st.integers(1, 2)), "dim": draw_(st.sampled_from([1, 8, 20])), "rpb": kernel * rpb}
    more["additional"] = draw_(st.sampled_from([None, 0, 3]))
    return [kernel * dilation + n for n in longer], windows, more


@given(problem=jagged_problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_lines(problem):
    lengths, windows, more = problem
    assert_right(values_of(lengths, **more), lengths, windows, torch.float64)


def test_a_head_dim_beyond_tiles_and_a_batch_of_nothing():
    lengths = [5, 4]
    assert_right(values_of(lengths, dim=9000, heads=1, value_dim=3), lengths, ([3], [1], [1], [False]), torch.float64)
    empty = [t.requires_grad_() for t in values_of([])[:3]]
    out, _ = jagged_op(*empty, offsets_of([]), [3], [1], [1], [False])
    assert out.shape == (0, 2, 8) and all(g.numel() == 0 for g in torch.autograd.grad(out.sum(), empty))


def test_results_do_not_depend_on_threads():
    lengths, windows = [9 + i % 7 for i in range(12)], ([5], [1], [1], [False])
    tensors, results, threads = values_of(lengths, torch.float32, rpb=5, additional=2), [], torch.get_num_threads()
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        results.append([*by_op(tensors, lengths, windows), *gradients(by_op, tensors, lengths, windows)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for have, want in zip(other, results[0]):
            assert torch.equal(have, want)


def test_opcheck():
    lengths = [6, 9]
    query, key, value, keys, values, rpb = (t.requires_grad_() for t in values_of(lengths, additional=2, rpb=3))
    lists = [3], [1], [2], [True]
    opcheck(jagged_op, (query, key, value, offsets_of(lengths), *lists, None, keys, values), {"rpb": rpb})
    out, lse = jagged_op(query, key, value, offsets_of(lengths), *lists, None, keys, values, rpb=rpb)
    backward = torch.ops.natten.neighborhood_attention_jagged_backward.default
    saved = [t.detach() for t in (torch.ones_like(out), torch.ones_like(lse), out, lse, query, key, value)]
    extras = [t.detach() for t in (keys, values, rpb)]
    opcheck(backward, (*saved, offsets_of(lengths), *lists, None, *extras, [True, False, True, True, True, False]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_lines_are_one_graph(backend):
    """Offsets are data: other lengths, the same code."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def step(query, key, value):
        return natten_ops.na1d(query * 0.5, key, value, kernel_size=3, dilation=2) * 2

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for lengths in ([7, 12, 9], [6, 30, 8, 15], [21, 6], [8, 9, 10, 11, 12]):
        offsets = offsets_of(lengths)
        tensors = [lines(t, offsets).detach().requires_grad_() for t in values_of(lengths, torch.float32)[:3]]
        results = []
        for function in (compiled, step):
            out = function(*tensors)
            slopes = torch.autograd.grad(out.values().sin().sum(), tensors)
            results.append([out.values(), *(t.values() for t in slopes)])
        for have, want in zip(*results):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("more", [{"additional": 2}, {"rpb": 3}, {"additional": 2, "rpb": 3, "group": 2}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled_lines_with_every_argument(more, is_causal):
    """Additional tokens, a bias table, causal windows and the log-sum-exp: one graph, the gradients of eager code."""
    torch._dynamo.reset()
    lengths, windows = [7, 12, 9], ([3], [1], [2], [is_causal])
    tensors = values_of(lengths, torch.float32, heads=4, **more)
    offsets = offsets_of(lengths)
    settings = {"kernel_size": 3, "dilation": 2, "is_causal": is_causal, "return_lse": True}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value, keys, values, rpb):
        return natten_ops.na1d(query, key, value, **settings, additional_keys=keys, additional_values=values, rpb=rpb)

    def compiled(given, *_):
        out, lse = attend(*(lines(t, offsets) for t in given[:3]), *given[3:])
        return [out.values(), lse.values()]

    torch.testing.assert_close(compiled(tensors), by_op(tensors, lengths, windows))
    torch.testing.assert_close(gradients(compiled, tensors), gradients(by_op, tensors, lengths, windows))


def test_compiled_lines_of_other_samples_are_refused():
    query = lines(draw(21, 2, 8), offsets_of([5, 9, 7]))
    other = lines(draw(21, 2, 8), offsets_of([7, 7, 7]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: natten_ops.na1d(q, k, k, kernel_size=3), fullgraph=True, backend="aot_eager")
    assert "key has samples of other lengths than query" in sentence(compiled, query, other)


def test_second_derivatives_and_forward_mode_say_the_way_out():
    """Never zeros in silence: also where the first gradient comes in as a constant."""
    lengths, offsets = [6, 9], offsets_of([6, 9])
    query, key, value = values_of(lengths)[:3]

    def attend(q):
        return jagged_op(q, key, value, offsets, [3], [1], [1], [False])[0].sum()

    leaf = query.clone().requires_grad_()
    (slope,) = torch.autograd.grad(attend(leaf), leaf, create_graph=True)
    assert "first derivatives" in sentence(slope.sum().backward)
    inner = torch.func.grad(attend)
    assert "first derivatives" in sentence(torch.func.grad(lambda q: inner(q).sin().sum()), query)
    assert "key_mask" in sentence(torch.func.jvp, attend, (query,), (query,))
    torch.testing.assert_close(inner(query), slope.detach())


def test_flops_of_lines_are_those_of_their_samples():
    lengths = [6, 9, 14]
    tensors = [t.requires_grad_() for t in values_of(lengths)[:3]]
    counts = []
    for attend in (by_op, None):
        with FlopCounterMode(display=False) as counter:
            if attend is not None:
                out = attend([*tensors, None, None, None], lengths, ([3], [1], [2], [True]))[0]
                torch.autograd.grad(out.sum(), tensors)
            else:
                for a, b in zip(offsets_of(lengths).tolist(), offsets_of(lengths).tolist()[1:]):
                    sample = [t[None, a:b] for t in tensors]
                    out = natten_ops.na1d(*sample, kernel_size=3, dilation=2, is_causal=True)
                    torch.autograd.grad(out.sum(), tensors)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_offsets_of_32_bits():
    lengths = [6, 9]
    query = draw(15, 2, 8)
    short = lines(query, offsets_of(lengths).int())
    have = natten_ops.na1d(short, short, short, kernel_size=3)
    assert torch.equal(have.values(), by_op([query] * 3 + [None] * 3, lengths, ([3], [1], [1], [False]))[0])


def test_autocast_of_lines():
    lengths = [6, 9]
    tensors = values_of(lengths, torch.float32, rpb=3, additional=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = by_op(tensors, lengths, ([3], [1], [1], [False]))
    cast = [t if t is None else t.bfloat16() for t in tensors[:5]] + [tensors[5]]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, by_op(cast, lengths, ([3], [1], [1], [False]))[0])


# ---- strided grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"attn_drop": 1e-9}, {"return_attention": True}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_modules_take_lines(kv_heads, more):
    """The samples one by one, their gradients too; torch 2.13's own split of lines crashed in the backward."""
    looking = {name: value for name, value in more.items() if name == "return_attention"}
    dropping = {name: value for name, value in more.items() if name == "attn_drop"}
    torch.manual_seed(0)
    module = natten_ops.nn.NeighborhoodAttention1D(
        16, 4, 3, num_kv_heads=kv_heads, rel_pos_bias=True, **dropping, dtype=torch.float64
    )
    x = lines(draw(21, 16), offsets_of([9, 5, 7])).requires_grad_()
    samples = [sample.detach().requires_grad_() for sample in x.unbind()]
    have = module(x, **looking)
    want = [module(sample[None], **looking) for sample in samples]
    if looking:
        maps = torch.cat([weights[0].transpose(0, 1) for _, weights in want])
        torch.testing.assert_close(have[1].transpose(1, 2).values(), maps)
        have, want = have[0], [out for out, _ in want]
    torch.testing.assert_close(have.values(), torch.cat(want, 1)[0])
    of_x, *gradients = torch.autograd.grad(have.values().sin().sum(), [x, *module.parameters()])
    of_samples = torch.autograd.grad(sum(out.sin().sum() for out in want), [*samples, *module.parameters()])
    torch.testing.assert_close(of_x.values(), torch.cat(of_samples[:3]))
    torch.testing.assert_close(gradients, list(of_samples[3:]))


@pytest.mark.parametrize("rank", [2, 3])
def test_grids_of_different_sizes(rank):
    function = getattr(natten_ops, f"na{rank}d")
    query, key, value = (grids(rank, 2, 8, seed=seed) for seed in (0, 10, 20))
    extra = draw(len(SIZES[rank]), 2, 2, 8)
    more = {"additional_keys": extra, "additional_values": extra}
    out, lse = function(query, key, value, kernel_size=3, is_causal=True, **more, return_lse=True)
    have = torch.autograd.grad(sum(part.sin().sum() for part in out.unbind()), [query, key, value])
    parts = [[t.detach().requires_grad_() for t in tensor.unbind()] for tensor in (query, key, value)]
    for i, sample in enumerate(zip(*parts)):
        rows = {name: t[i : i + 1] for name, t in more.items()}
        want, want_lse = function(*(t[None] for t in sample), kernel_size=3, is_causal=True, **rows, return_lse=True)
        assert torch.equal(out.unbind()[i], want[0]) and torch.equal(lse.unbind()[i], want_lse[0])
        for tensor, slope in zip(have, torch.autograd.grad(want.sin().sum(), sample)):
            torch.testing.assert_close(tensor.unbind()[i], slope)


def with_holes(query):
    lengths = query.offsets().diff() - 1
    return torch.nested.nested_tensor_from_jagged(query.values(), offsets=query.offsets(), lengths=lengths)


def test_offsets_that_do_not_lie_side_by_side():
    query = draw(21, 2, 8)
    offsets = offsets_of([9, 5, 7])
    spread = torch.stack([offsets, offsets], 1)[:, 0]
    have, want = (natten_ops.na1d(*[lines(query, o)] * 3, kernel_size=3).values() for o in (spread, offsets))
    assert not spread.is_contiguous() and torch.equal(have, want)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_sentences():
    offsets = offsets_of([9, 5, 7])
    query = lines(draw(21, 2, 8), offsets)
    other = lines(draw(21, 2, 8), offsets_of([9, 6, 6]))
    grid = grids(2, 2, 8)
    na1d, na2d = natten_ops.na1d, natten_ops.na2d
    k3, extra = {"kernel_size": 3}, draw(2, 1, 2, 8)
    found = {
        "half nested": sentence(na1d, query, query.values()[None], query, **k3),
        "two layouts": sentence(na1d, query, torch.nested.nested_tensor(list(query.unbind())), query, **k3),
        "nested table": sentence(na1d, query, query, query, **k3, rpb=query),
        "mask": sentence(na1d, query, query, query, **k3, key_mask=torch.ones(3, 9, dtype=torch.bool)),
        "window": sentence(na1d, query, query, query, kernel_size=3, dilation=2),
        "sizes": sentence(na1d, query, other, query, **k3),
        "rank": sentence(na2d, query, query, query, **k3),
        "backend": sentence(na1d, query, query, query, **k3, backend="cpu-general"),
        "transposed": sentence(na1d, query.transpose(1, 2), query, query, **k3),
        "dims": sentence(na1d, *[lines(draw(21, 8), offsets)] * 3, **k3),
        "holes": sentence(na1d, *[with_holes(query)] * 3, **k3),
        "begin": sentence(na1d, *[lines(query.values(), offsets + 1)] * 3, **k3),
        "end": sentence(na1d, query, lines(query.values()[:20], offsets + 0), query, **k3),
        "empty": sentence(na1d, *[lines(query.values(), offsets[:0])] * 3, **k3),
        "order": sentence(na1d, *[lines(query.values(), torch.tensor([0, 9, 5, 21]))] * 3, **k3),
        "box": sentence(
            natten_ops.neighborhood_attention, query, query, query, **k3, q_origin=[0], kv_origin=[0], extent=[9]
        ),
        "grid window": sentence(na2d, grid, grid, grid, kernel_size=(3, 5)),
        "grid sizes": sentence(na2d, grid, torch.nested.nested_tensor(list(grid.unbind())[::-1]), grid, **k3),
        "rows of grids": sentence(na2d, grid, grid, grid, **k3, additional_keys=extra, additional_values=extra),
        "table beside dense": sentence(na1d, *[query.values()[None]] * 3, **k3, rpb=query),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {text.split('natten: ')[-1]}" for name, text in found.items()),
        """\
half nested: key is a dense tensor and query, value nested; nest all of ['query', 'key', 'value']
two layouts: key is nested as torch.strided, query as torch.jagged; use one layout
nested table: rpb is a nested tensor; it must be dense, one for all samples or one row a sample
mask: key_mask beside nested tensors, which hold no padding to mask; leave it out
window: sample 1: kernel_size[0]=3 with dilation[0]=2 spans 6 > 5 tokens on axis 0; lower one of them, or pad the grid
sizes: key has 6 tokens in sample 1, query 5; they must be equal
rank: torch's jagged layout has one ragged dimension and 2-D samples have 2; nest them with layout=torch.strided
backend: backend='cpu-general' with jagged tensors, whose op chooses itself; leave it out
transposed: query is ragged in dim 2; give [samples, tokens, heads, head dim], ragged in its tokens and without holes: query.transpose(1, 2)
dims: query is a jagged tensor of 3 dims; give [samples, tokens, heads, head dim]
holes: query is ragged in dim 1, with holes; give [samples, tokens, heads, head dim], ragged in its tokens and without holes: query.contiguous()
begin: query has offsets from 1 to 22; they must go from 0 to 21, the number of its tokens
end: key has offsets from 0 to 21; they must go from 0 to 20, the number of its tokens
empty: query has offsets without entries; give [samples + 1]
order: query has offsets[2]=5 after offsets[1]=9; they must not descend
box: q_origin, kv_origin and extent beside nested tensors; every sample is a whole grid
grid window: sample 1: kernel_size[1]=5 with dilation[1]=1 spans 5 > 4 tokens on axis 1; lower one of them, or pad the grid
grid sizes: key has [6, 6] tokens in sample 0, query [5, 6]; they must be equal
rows of grids: additional_keys has 2 rows for 3 samples; give one a sample
table beside dense: rpb is a nested tensor, which the op itself does not take; natten_ops.na1d and its kin take nested queries, keys and values, all of them, and nothing else nested""",  # noqa: E501
    )


def test_modules_and_merges_say_what_they_take():
    query = lines(draw(21, 2, 8), offsets_of([9, 5, 7]))
    module = natten_ops.nn.NeighborhoodAttention1D(8, 2, 3)
    holes = with_holes(lines(draw(21, 8), offsets_of([9, 5, 7])))
    told = "give a dense tensor, or, to the 1-D module, lines nested as torch.jagged"
    assert sentence(module, torch.nested.nested_tensor([draw(5, 8)])) == f"input is nested as torch.strided; {told}"
    assert sentence(natten_ops.nn.NeighborhoodAttention2D(8, 2, 3), query) == f"input is nested as torch.jagged; {told}"
    assert sentence(module, holes) == "input has holes between its lines; give input.contiguous()"
    told = "outputs[0] is a nested tensor; merge its samples one by one, or the values of lines"
    assert sentence(natten_ops.merge_attentions, [query], [query]) == told


def test_the_raw_ops_name_the_argument():
    values, offsets = draw(21, 2, 8), offsets_of([9, 5, 7])
    backward = torch.ops.natten.neighborhood_attention_jagged_backward
    three, rows, windows = [values] * 3, values[..., 0], ([3], [1], [1], [False])
    rest = *three, offsets, *windows, None, None, None, None, [True] * 6
    for words, op, arguments in (
        ("offsets begin at 1 and end at 22, expected 0 and 21", jagged_op, (*three, offsets + 1, *windows)),
        ("offsets is on meta, query on cpu", jagged_op, (*three, offsets.to("meta"), *windows)),
        ("spans more than the 5 tokens of sample 1", jagged_op, (*three, offsets, [6], *windows[1:])),
        ("out has dtype Float, expected Double", backward, (values, None, values.float(), rows, *rest)),
        ("lse has dtype Float, expected Double", backward, (values, None, values, rows.float(), *rest)),
        ("grad_out has shape", backward, (rows, None, values, rows, *rest)),
    ):
        assert words in sentence(op, *arguments)


def test_a_compiled_window_larger_than_a_sample_names_it():
    query = lines(draw(14, 2, 8), offsets_of([9, 5]))
    compiled = torch.compile(lambda t: natten_ops.na1d(t, t, t, kernel_size=6), fullgraph=True, backend="aot_eager")
    assert "kernel_size[0]=6 with dilation[0]=1 spans more than the 5 tokens of sample 1" in sentence(compiled, query)
