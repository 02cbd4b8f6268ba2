# SPDX-License-Identifier: MIT
"""Nested tensors in the unfused functions: grids and lines, additional tokens of each sample's own, and mistakes."""

import pytest
import torch
from expecttest import assert_expected_inline
from nesting import SIZES, by_op, draw, gradients, grids, lines, offsets_of, sentence, values_of

import natten_ops
from natten_ops import compat, reference

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
HOMES = {"natten_ops": natten_ops.functional, "0.17": compat.natten("0.17").functional}


def tokens_of(extras, samples):
    """Additional keys and values, heads first: one number for all samples, or one each."""
    if extras == "none":
        return None, None
    if extras == "dense":
        return [draw(samples, 2, 2, 8, seed=seed).requires_grad_() for seed in (30, 31)]
    counts = [(3 * i + 1) % 4 for i in range(samples)]  # 1, 0, 3
    return [
        torch.nested.nested_tensor([draw(2, n, 8, seed=seed + n) for n in counts], requires_grad=True)
        for seed in (30, 40)
    ]


def rows_of(tensor, samples):
    """A row of each sample, apart from the graph of the others."""
    rows = [None] * samples if tensor is None else tensor.unbind()
    return [None if row is None else row.detach().requires_grad_() for row in rows]


@pytest.mark.parametrize("extras", ["none", "dense", "nested"])
@pytest.mark.parametrize(("home", "rank"), [("natten_ops", 2), ("natten_ops", 3), ("0.17", 2)])
def test_halves_of_grids(home, rank, extras):
    """Forward and gradients are those of each sample alone, by the reference."""
    samples, window = len(SIZES[rank]), [[n] * rank for n in (3, 1, 1, True)]
    qk, av = (getattr(HOMES[home], f"na{rank}d_{half}") for half in ("qk", "av"))
    query, key, value = (grids(rank, 8, front=(2,), seed=seed) for seed in (0, 10, 20))
    more_keys, more_values = tokens_of(extras, samples)
    logits = qk(query, key, kernel_size=3, is_causal=True, additional_keys=more_keys)
    out = av(logits.softmax(-1), value, kernel_size=3, is_causal=True, additional_values=more_values)
    given = [query, key, value, more_keys, more_values]
    slopes = torch.autograd.grad(sum(part.sin().sum() for part in out.unbind()), [t for t in given if t is not None])
    for i, sample in enumerate(zip(*(rows_of(t, samples) for t in given))):
        q, k, v, extra_keys, extra_values = (None if t is None else t[None] for t in sample)
        want_logits = reference.qk(q, k, *window, additional_keys=extra_keys)
        want = reference.av(want_logits.softmax(-1), v, *window, additional_values=extra_values)
        torch.testing.assert_close(logits.unbind()[i], want_logits[0])
        torch.testing.assert_close(out.unbind()[i], want[0])
        wanted = torch.autograd.grad(want.sin().sum(), [t for t in sample if t is not None])
        for have, slope in zip(slopes, wanted):
            torch.testing.assert_close(have.unbind()[i], slope)


# Additional tokens [samples, tokens, heads, dim] as the unfused functions take them beside lines.
FORMS = {
    "dense": lambda t: t.transpose(1, 2),
    "jagged": lambda t: lines(t.flatten(0, 1), offsets_of([t.shape[1]] * len(t))).transpose(1, 2),
    "strided": lambda t: torch.nested.as_nested_tensor(list(t.transpose(1, 2).unbind())),
}


@pytest.mark.parametrize("form", FORMS)
def test_halves_of_lines_make_the_fused_attention(form):
    lengths, windows = [9, 5, 14], ([3], [1], [1], [True])
    tensors = values_of(lengths, additional=2)
    offsets = offsets_of(lengths)

    def by_halves(given, *_):
        query, key, value = (lines(t, offsets).transpose(1, 2) for t in given[:3])
        extras = [FORMS[form](t) for t in given[3:5]]
        settings = {"kernel_size": 3, "is_causal": True}
        logits = natten_ops.na1d_qk(query * 8**-0.5, key, **settings, additional_keys=extras[0])
        weights = logits.transpose(1, 2).softmax(-1).transpose(1, 2)  # torch has no gradient of it the other way round
        out = natten_ops.na1d_av(weights, value, **settings, additional_values=extras[1])
        lse = torch.cat([part.logsumexp(-1).T for part in logits.unbind()])
        return [out.transpose(1, 2).values(), lse]

    for have, want in zip(by_halves(tensors), by_op(tensors, lengths, windows)):
        torch.testing.assert_close(have, want)
    for have, want in zip(gradients(by_halves, tensors), gradients(by_op, tensors, lengths, windows)):
        torch.testing.assert_close(have, want)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_sentences():
    qk, av, na2d_qk = natten_ops.na1d_qk, natten_ops.na1d_av, natten_ops.na2d_qk
    query, other, more, fewer = (
        lines(draw(sum(lengths), 2, 8), offsets_of(lengths)).transpose(1, 2)
        for lengths in ([9, 5, 7], [9, 6, 6], [1, 2, 1], [2, 2])
    )
    dense, attn = draw(3, 2, 9, 8), qk(query, query, kernel_size=3)
    grid = grids(2, 8, front=(2,))
    reversed_grid = torch.nested.nested_tensor(list(grid.unbind())[::-1])
    k3 = {"kernel_size": 3}
    found = {
        "half nested qk": sentence(qk, query, dense, **k3),
        "half nested av": sentence(av, attn, dense, **k3),
        "half nested av the other way": sentence(av, draw(3, 2, 9, 3), query, **k3),
        "nested tokens beside dense": sentence(qk, dense, dense, **k3, additional_keys=more),
        "two layouts": sentence(na2d_qk, grid, query, **k3),
        "table": sentence(qk, query, query, **k3, rpb=more),
        "table beside dense": sentence(qk, dense, dense, **k3, rpb=more),
        "table at 0.17": sentence(HOMES["0.17"].na1d_qk, query, query, **k3, rpb=more),
        "sizes of lines": sentence(qk, query, other, **k3),
        "sizes of grids": sentence(na2d_qk, grid, reversed_grid, **k3),
        "sizes of av": sentence(av, attn, other, **k3),
        "samples": sentence(qk, query, lines(draw(14, 2, 8), offsets_of([9, 5])).transpose(1, 2), **k3),
        "window": sentence(qk, query, query, kernel_size=6),
        "rows": sentence(qk, query, query, **k3, additional_keys=draw(1, 2, 1, 8)),
        "nested rows": sentence(qk, query, query, **k3, additional_keys=fewer),
        "nested rows of grids": sentence(na2d_qk, grid, grid, **k3, additional_keys=fewer),
        "no tensor": sentence(qk, query, query, **k3, additional_keys=5),
        "no dimensions": sentence(av, attn, query, **k3, additional_values=torch.tensor(1.0)),
        "numbers of tokens": sentence(qk, query, query, **k3, additional_keys=more),
        "slots": sentence(na2d_qk, grid, grid, **k3, additional_keys=grid),
        "heads last": sentence(qk, *[query.transpose(1, 2)] * 2, **k3),
        "no samples": sentence(qk, *[lines(draw(0, 2, 8), offsets_of([])).transpose(1, 2)] * 2, **k3),
    }
    assert_expected_inline(
        "\n".join(f"{name}: {text.split('natten: ')[-1]}" for name, text in found.items()),
        """\
half nested qk: key is a dense tensor and query nested; nest all of ['query', 'key']
half nested av: value is a dense tensor and attn nested; nest all of ['attn', 'value']
half nested av the other way: attn is a dense tensor and value nested; nest all of ['attn', 'value']
nested tokens beside dense: query is a dense tensor and additional_keys nested; nest all of ['query', 'key']
two layouts: key is nested as torch.jagged, query as torch.strided; use one layout
table: rpb is a nested tensor; it must be dense, one for all samples or one row a sample
table beside dense: rpb is a nested tensor; it must be dense, one for all samples or one row a sample
table at 0.17: rpb is a nested tensor; it must be dense, one for all samples or one row a sample
sizes of lines: key has [6] tokens in sample 1, query [5]; they must be equal
sizes of grids: key has [6, 6] tokens in sample 0, query [5, 6]; they must be equal
sizes of av: value has [6] tokens in sample 1, attn [5]; they must be equal
samples: key has 2 samples, query 3; they must be equal
window: sample 1: kernel_size[0]=6 with dilation[0]=1 spans 6 > 5 tokens on axis 0; lower one of them, or pad the grid
rows: additional_keys has 1 rows for 3 samples; give one a sample
nested rows: additional_keys has 2 rows for 3 samples; give one a sample
nested rows of grids: additional_keys has 2 rows for 3 samples; give one a sample
no tensor: additional_keys is a int; give a tensor with one row a sample, or None
no dimensions: additional_values is a tensor without dimensions; give a tensor with one row a sample, or None
numbers of tokens: additional_keys has 2 tokens in sample 1, 1 in sample 0; beside jagged tensors they must be equal; nest everything with layout=torch.strided for other numbers
slots: sample 0: additional_keys has shape [1, 2, 5, 6, 8], expected [1, 2, 5, 8]: [batch, heads, tokens, head dim], heads first
heads last: query is ragged in dim 1; give [samples, heads, tokens, head dim], ragged in its tokens and without holes: query.transpose(1, 2)
no samples: a nested tensor without samples; give at least one""",  # noqa: E501
    )


def test_offsets_beyond_the_tokens():
    query = lines(draw(20, 2, 8), offsets_of([9, 5, 7])).transpose(1, 2)
    told = "query has offsets from 0 to 21; they must go from 0 to 20, the number of its tokens"
    assert sentence(natten_ops.na1d_qk, query, query, kernel_size=3) == told


def test_jagged_halves_are_refused_while_a_graph_is_traced():
    """In eager code alone, and the sentence says what to take instead."""
    query = lines(draw(14, 2, 8), offsets_of([9, 5])).transpose(1, 2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: natten_ops.na1d_qk(t, t, kernel_size=3), fullgraph=True, backend="eager")
    assert "the unfused ops take jagged tensors in eager code only; use na1d, or dense tensors" in sentence(
        compiled, query
    )
