# SPDX-License-Identifier: MIT
"""FLOPs: a count of visible pairs on fingers, the formulas, torch's FlopCounterMode and fvcore say the same."""

import itertools
import logging
import math
import sys

import brute_force
import pytest
import torch
from samples import NAMED, Problem, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import natten_ops
from natten_ops import compat, flops
from natten_ops.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

NO_FVCORE = "fvcore is not installed (`pip install fvcore`); the other counters are tested without it"
# The unfused ops know no sub-boxes and no grouped heads; value_dim is av's alone.
UNFUSED = {name: problem for name, problem in NAMED.items() if problem.box is None and problem.group == 1} | {
    "tokens": Problem((7, 6), (3, 4), dilation=(2, 1), is_causal=(True, False), head_dim=3, value_dim=5, additional=3),
    "tokens_causal": Problem((9,), (4,), stride=(3,), dilation=(2,), is_causal=(True,), value_dim=4, additional=2),
}
EVERY_SUBSET_OF_3 = list(itertools.product([False, True], repeat=3))[1:]


def pairs(problem):
    """(query, key) pairs of one head of one sample: in the windows, and with additional tokens."""
    shape, _ = problem.shapes()
    origin = problem.boxes()[0] or (0,) * problem.rank
    axes = list(zip(problem.spatial, *problem.lists(), strict=True))
    window = 0
    for row in itertools.product(*map(range, shape)):
        here = [index + first for index, first in zip(row, origin)]
        window += math.prod(len(brute_force.window(index, *axis)) for index, axis in zip(here, axes))
    return window, math.prod(shape) * (problem.additional or 0)


def by_torch(function, *args, **kwargs):
    """What FlopCounterMode counts, and what the function returned."""
    with FlopCounterMode(display=False) as counter:
        out = function(*args, **kwargs)
    return counter.get_total_flops(), out


def by_fvcore(function, *tensors):
    """{operator: count} of fvcore for a function of tensors."""
    fvcore_nn = pytest.importorskip("fvcore.nn", reason=NO_FVCORE)

    class Model(nn.Module):
        def forward(self, *args):
            return function(*args)

    return dict(flops.add_natten_handle(fvcore_nn.FlopCountAnalysis(Model(), tensors)).by_operator())


def windows(problem):
    return dict(zip(("kernel_size", "stride", "dilation", "is_causal"), problem.lists()))


def fused_by_formula(problem, inputs):
    """fna_flop_count of a problem's shapes."""
    shapes = [tensor.shape for tensor in inputs[:3]]
    box = dict(zip(("q_origin", "kv_origin", "extent"), problem.boxes()))
    return flops.fna_flop_count(*shapes, **windows(problem), additional_tokens=problem.additional or 0, **box)


# ---- the fused op --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_fused_formula_and_torch_count_the_pairs(name):
    problem = NAMED[name]
    inputs = problem.make(torch.float32)
    dims = inputs.query.shape[-1] + inputs.value.shape[-1]
    expected = 2 * problem.batch * problem.heads * sum(pairs(problem)) * dims
    assert fused_by_formula(problem, inputs) == expected
    assert by_torch(run, inputs, problem)[0] == expected


@pytest.mark.parametrize("name", NAMED)
def test_fvcore_counts_the_fused_op(name):
    problem = NAMED[name]
    inputs = problem.make(torch.float32)

    def attend(*tensors):
        given = iter(tensors)
        return run(type(inputs)(*[None if t is None else next(given) for t in inputs]), problem)

    counts = by_fvcore(attend, *[t for t in inputs if t is not None])
    assert counts == {"neighborhood_attention_lse": fused_by_formula(problem, inputs)}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fvcore_counts_composites_whose_lists_have_one_entry(rank):
    query = torch.randn(1, *(7, 6, 5)[:rank], 2, 4)
    attend = getattr(torch.ops.natten, f"na{rank}d")
    counts = by_fvcore(lambda q: attend(q, q, q, [3], [2], [1], [True] * rank), query)
    want = flops.fna_flop_count(*[query.shape] * 3, kernel_size=3, stride=2, is_causal=True)
    assert counts == {f"na{rank}d": want} and by_torch(attend, *[query] * 3, [3], [2], [1], [True] * rank)[0] == want


def test_causal_windows_and_borders_on_paper():
    """Five tokens, windows of three: 3 keys each; causal 1 + 2 + 3 + 3 + 3."""
    shape = (1, 5, 1, 1)
    assert flops.fna_flop_count(shape, shape, shape, 3) == 2 * 15 * 2
    assert flops.fna_flop_count(shape, shape, shape, 3, is_causal=True) == 2 * 12 * 2
    assert flops.fna_flop_count(shape, shape, shape, 3, is_causal=True, additional_tokens=2) == 2 * 22 * 2


# ---- the unfused ops -----------------------------------------------------------------------------------------------


class Unfused:
    """Tensors of the two ops for a problem, heads first, and the counts of their pairs over heads and batch."""

    def __init__(self, problem, requires_grad=True):
        generator = torch.Generator().manual_seed(0)
        outer = problem.batch, problem.heads
        dim, value_dim = problem.head_dim, problem.value_dim or problem.head_dim
        slots = math.prod(problem.kernel_size) + (problem.additional or 0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, requires_grad=requires_grad)

        self.lists = problem.lists()
        self.query, self.key = (draw(*outer, *problem.spatial, dim) for _ in range(2))
        self.attn, self.value = draw(*outer, *problem.spatial, slots), draw(*outer, *problem.spatial, value_dim)
        self.rpb = draw(problem.heads, *(2 * kernel - 1 for kernel in problem.kernel_size)) if problem.rpb else None
        tokens = problem.additional
        self.keys, self.values = (None if tokens is None else draw(*outer, tokens, d) for d in (dim, value_dim))
        self.window, self.extra = (math.prod(outer) * count for count in pairs(problem))

    def qk(self):
        options = {"rpb": self.rpb, "additional_keys": self.keys}
        return torch.ops.natten.na_qk(self.query, self.key, *self.lists, **options)

    def av(self):
        return torch.ops.natten.na_av(self.attn, self.value, *self.lists, additional_values=self.values)


@pytest.mark.parametrize("name", UNFUSED)
def test_unfused_formulas_and_torch_count_the_pairs(name):
    problem = UNFUSED[name]
    case = Unfused(problem)
    tokens = problem.additional or 0
    dim, value_dim = case.query.shape[-1], case.value.shape[-1]
    of_qk, of_av = (2 * (case.window + case.extra) * d for d in (dim, value_dim))
    by_formula = flops.na_qk_flop_count(case.query.shape, case.key.shape, **windows(problem), additional_tokens=tokens)
    assert by_formula == of_qk
    assert flops.na_av_flop_count(case.attn.shape, case.value.shape, **windows(problem)) == of_av
    assert by_torch(case.qk)[0] == of_qk and by_torch(case.av)[0] == of_av


@pytest.mark.parametrize("name", UNFUSED)
def test_fvcore_counts_the_unfused_ops(name):
    case = Unfused(UNFUSED[name], requires_grad=False)  # torch.jit takes no others as constants
    dim, value_dim = case.query.shape[-1], case.value.shape[-1]
    counts = by_fvcore(lambda _: (case.qk(), case.av()), case.query)
    both = case.window + case.extra
    assert counts == {"na_qk": 2 * both * dim, "na_av": 2 * both * value_dim}


@pytest.mark.parametrize("needed", EVERY_SUBSET_OF_3, ids=str)
def test_torch_counts_the_backwards_of_the_unfused_ops(needed):
    """One product for each gradient; what is needed of it runs over the window, the tokens or both."""
    case = Unfused(UNFUSED["tokens"])
    first, window, extra = needed
    pairs_of_products = first * (case.window + case.extra) + window * case.window + extra * case.extra
    for forward, leaves in (
        (case.qk, (case.query, case.key, case.keys)),
        (case.av, (case.attn, case.value, case.values)),
    ):
        for leaf, wanted in zip(leaves, needed):
            leaf.requires_grad_(wanted)
        out = forward()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        counted, _ = by_torch(torch.autograd.grad, out, wanted, torch.ones_like(out))
        assert counted == 2 * pairs_of_products * leaves[1].shape[-1]


@pytest.mark.parametrize("needed", EVERY_SUBSET_OF_3, ids=str)
def test_backward_formulas_of_the_unfused_ops(needed):
    problem = UNFUSED["tokens"]
    params, tokens = problem.params(), problem.additional
    window, extra = (problem.batch * problem.heads * count for count in pairs(problem))
    want = 2 * (needed[0] * (window + extra) + needed[1] * window + needed[2] * extra)
    shape = problem.batch, problem.heads, *problem.spatial
    for bias in (False, True):  # the table's gradient only adds
        flags = needed[0], needed[1], bias, needed[2]
        assert flops.qk_backward_flops((*shape, 3), params, flags, tokens) == want * 3
    assert flops.av_backward_flops((*shape, 5), params, needed, tokens) == want * 5


def test_a_bias_table_alone_costs_no_products_backward():
    case = Unfused(UNFUSED["biased"])
    for leaf in (case.query, case.key):
        leaf.requires_grad_(False)
    out = case.qk()
    counted, (gradient,) = by_torch(torch.autograd.grad, out, [case.rpb], torch.ones_like(out))
    assert counted == 0 and gradient.abs().sum() > 0


def test_two_halves_make_the_fused_op():
    problem = Problem((8, 9), (3, 4), stride=(2, 1), dilation=(1, 2), is_causal=(False, True), additional=3)
    heads_last, heads_first = (2, 8, 9, 2, 8), (2, 2, 8, 9, 8)
    tokens = {"additional_tokens": 3}
    halves = flops.na_qk_flop_count(heads_first, heads_first, **windows(problem), **tokens)
    halves += flops.na_av_flop_count((2, 2, 8, 9, 15), heads_first, **windows(problem))
    assert halves == flops.fna_flop_count(*[heads_last] * 3, **windows(problem), **tokens)


# ---- whole models --------------------------------------------------------------------------------------------------

LAYERS = {
    "line": (NeighborhoodAttention1D, (11,), {"kernel_size": 4, "dilation": 2, "is_causal": True}),
    "image": (NeighborhoodAttention2D, (7, 9), {"kernel_size": (3, 4), "rel_pos_bias": True, "is_causal": [True, False]}),
    "grouped": (NeighborhoodAttention2D, (6, 6), {"kernel_size": 3, "stride": 2, "num_kv_heads": 1}),
    "volume": (NeighborhoodAttention3D, (4, 5, 6), {"kernel_size": (2, 3, 3), "dilation": (2, 1, 2)}),
}  # fmt: skip


def layer_and_input(name, channels=12, heads=3, batch=2):
    kind, spatial, settings = LAYERS[name]
    torch.manual_seed(0)
    return kind(channels, heads, **settings), torch.randn(batch, *spatial, channels)


@pytest.mark.parametrize("name", LAYERS)
def test_torch_counts_a_layer(name):
    layer, x = layer_and_input(name)
    spatial = tuple(x.shape[1:-1])
    problem = Problem(spatial, layer.kernel_size, layer.stride, layer.dilation, layer.is_causal, heads=3, head_dim=4)
    projections = 2 * x[..., 0].numel() * 12 * (layer.qkv.out_features + 12)
    attention = 2 * 2 * 3 * pairs(problem)[0] * (4 + 4)
    assert by_torch(layer, x)[0] == projections + attention


@pytest.mark.parametrize("name", LAYERS)
def test_fvcore_and_torch_agree_on_a_layer(name, caplog):
    pytest.importorskip("fvcore", reason=NO_FVCORE)
    layer, x = layer_and_input(name)
    with caplog.at_level(logging.WARNING):
        assert flops.get_flops(layer, x) == by_torch(layer, x)[0] > 0
    assert not caplog.records, "our layers hold nothing that fvcore would warn of"


class Products(nn.Module):
    """Each product that fvcore counts by multiply-adds, around an attention."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, kernel_size=2, stride=2)
        self.attention = NeighborhoodAttention2D(8, num_heads=2, kernel_size=3)
        self.weight = nn.Parameter(torch.ones(8, 5))

    def forward(self, image, other):
        x = self.attention(self.patches(image).permute(0, 2, 3, 1))
        tokens = x.flatten(1, 2)
        flat = tokens.flatten(0, 1)
        scores = torch.einsum("bnc,bmc->bnm", tokens, other) + torch.bmm(tokens, other.transpose(1, 2))
        return scores, torch.mm(flat, self.weight), torch.addmm(flat[:, :5], flat, self.weight), flat @ self.weight


def test_one_convention_in_one_sum():
    fvcore_nn = pytest.importorskip("fvcore.nn", reason=NO_FVCORE)
    torch.manual_seed(0)
    model, args = Products(), (torch.randn(1, 3, 12, 8), torch.randn(1, 7, 8))
    want, _ = by_torch(model, *args)
    assert flops.get_flops(model, args) == want
    analysis = fvcore_nn.FlopCountAnalysis(model, args)
    assert flops.add_natten_handle(analysis) is analysis
    assert flops.add_natten_handle(analysis).total() == want, "twice is once"
    names = {"conv", "linear", "neighborhood_attention_lse", "einsum", "bmm", "addmm", "matmul", "mm"}
    assert set(analysis.by_operator()) <= names and {"conv", "einsum", "addmm"} <= set(analysis.by_operator())
    assert analysis.total("attention") == by_torch(model.attention, torch.randn(1, 6, 4, 8))[0]


def test_normalisation_keeps_the_estimate_of_fvcore():
    pytest.importorskip("fvcore", reason=NO_FVCORE)
    layer, x = layer_and_input("image")
    model = nn.Sequential(nn.LayerNorm(12), layer)
    assert flops.get_flops(model, x) == by_torch(model, x)[0] + 5 * x.numel()


@pytest.mark.parametrize("level", [level for level in compat.LEVELS if level < "0.20"])
def test_get_flops_of_every_level_is_ours(level):
    """Of a layer of the level and of other ones, by position and by name."""
    pytest.importorskip("fvcore.nn", reason=NO_FVCORE)
    natten = compat.natten(level)
    x = torch.randn(1, 7, 8, 12)
    attention = natten.NeighborhoodAttention2D(dim=12, num_heads=3, kernel_size=3)
    for model in (attention, nn.Sequential(nn.Linear(12, 12), attention)):
        count = flops.get_flops(model, x)
        assert count > 0 and natten.flops.get_flops(model, x) == count
        assert natten.flops.get_flops(model=model, input=(x,), disable_warnings=True) == count


class Softmax(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


def test_warnings_can_be_switched_off(caplog):
    pytest.importorskip("fvcore", reason=NO_FVCORE)
    with caplog.at_level(logging.WARNING):
        assert flops.get_flops(Softmax(), torch.randn(3, 4)) == 0
        assert "aten::softmax" in caplog.text
        caplog.clear()
        assert flops.get_flops(Softmax(), torch.randn(3, 4), disable_warnings=True) == 0
    assert not caplog.records


def test_merging_costs_no_products():
    query, key, value = torch.randn(3, 1, 6, 2, 4).unbind(0)

    def attend(query, key, value):
        near = natten_ops.na1d(query, key, value, kernel_size=3, return_lse=True)
        far = natten_ops.na1d(query, key, value, kernel_size=2, dilation=3, return_lse=True)
        return natten_ops.merge_attentions([near[0], far[0]], [near[1], far[1]])

    want = 2 * 2 * 6 * (3 + 2) * 8
    assert by_torch(attend, query, key, value)[0] == want
    assert by_fvcore(attend, query, key, value) == {"neighborhood_attention_lse": want}


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda: flops.get_flops(nn.Identity(), torch.ones(1)),
                                  lambda: flops.add_natten_handle(None)])  # fmt: skip
def test_without_fvcore_an_error_says_how_to_get_it(call, monkeypatch):
    for module in ("fvcore.nn.flop_count", "fvcore.nn.jit_handles"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install fvcore"):
        call()


def test_models_inputs_and_analyses_of_other_types():
    with pytest.raises(TypeError, match=r"model is a function; give a torch\.nn\.Module"):
        flops.get_flops(by_torch, torch.ones(1))
    with pytest.raises(TypeError, match="input is a list; give a tensor, or the tuple"):
        flops.get_flops(nn.Identity(), [torch.ones(1)])
    pytest.importorskip("fvcore", reason=NO_FVCORE)
    with pytest.raises(TypeError, match="flop_ctr is a Identity; give a fvcore"):
        flops.add_natten_handle(nn.Identity())


FUSED = {"q_shape": (1, 6, 8, 4, 16), "k_shape": (1, 6, 8, 2, 16), "v_shape": (1, 6, 8, 2, 5), "kernel_size": 3}
QK = {"q_shape": (1, 4, 6, 8, 16), "k_shape": (1, 4, 6, 8, 16), "kernel_size": 3}
AV = {"a_shape": (1, 4, 6, 8, 9), "v_shape": (1, 4, 6, 8, 5), "kernel_size": 3}
MISTAKES = [
    (FUSED, {"q_shape": torch.ones(3)}, TypeError, r"q_shape is a Tensor; give a shape"),
    (FUSED, {"q_shape": (1, 6, 8, 4.0, 16)}, TypeError, r"q_shape\[3\]=4\.0 is a float; give an int"),
    (FUSED, {"q_shape": (6, 8, 4)}, ValueError, r"q_shape=\(6, 8, 4\) has 3 dims; give 4 to 6"),
    (FUSED, {"k_shape": (1, 6, 4, 16)}, ValueError, r"k_shape=\(1, 6, 4, 16\) has 4 dims, q_shape 5"),
    (FUSED, {"q_shape": (-1, 6, 8, 4, 16)}, ValueError, r"q_shape=.* has a size of -1; give at least 0"),
    (FUSED, {"q_shape": (1, 6, 8, 4, 0)}, ValueError, r"q_shape=.* has a size of 0; give .* 1 as the last"),
    (FUSED, {"k_shape": (1, 6, 7, 2, 16)}, ValueError, r"k_shape\[2\]=7 and q_shape\[2\]=8 must be equal"),
    (FUSED, {"k_shape": (1, 6, 8, 2, 15)}, ValueError, r"k_shape\[4\]=15 and q_shape\[4\]=16 must be equal"),
    (FUSED, {"v_shape": (1, 6, 8, 4, 16)}, ValueError, r"v_shape\[3\]=4 and k_shape\[3\]=2 must be equal"),
    (FUSED, {"q_shape": (1, 6, 8, 3, 16)}, ValueError, r"q_shape=.* has 3 heads, k_shape=.* 2; give a multiple"),
    (FUSED, {"kernel_size": 7}, ValueError, r"kernel_size\[0\]=7 with dilation\[0\]=1 spans 7 > 6 tokens"),
    (FUSED, {"stride": 4}, ValueError, r"stride\[0\]=4 exceeds kernel_size\[0\]=3"),
    (FUSED, {"additional_tokens": -1}, ValueError, r"additional_tokens=-1 must be at least 0"),
    (FUSED, {"additional_tokens": True}, TypeError, r"additional_tokens=True is a bool; give an int"),
    (FUSED, {"extent": (9, 9)}, ValueError, r"q_origin and kv_origin missing"),
    (FUSED, {"extent": (9, 9), "q_origin": (0, 0), "kv_origin": (2, 0)}, ValueError, r"queries \[0, 6\) on axis 0"),
    (QK, {"k_shape": (1, 2, 6, 8, 16)}, ValueError, r"k_shape\[1\]=2 and q_shape\[1\]=4 must be equal"),
    (QK, {"dilation": 3}, ValueError, r"dilation\[0\]=3 spans 9 > 6 tokens"),
    (QK, {"additional_tokens": 1.0}, TypeError, r"additional_tokens=1\.0 is a float; give an int"),
    (AV, {"v_shape": (1, 4, 6, 7, 5)}, ValueError, r"v_shape\[3\]=7 and a_shape\[3\]=8 must be equal"),
    (AV, {"a_shape": (1, 4, 6, 8, 8)}, ValueError, r"a_shape=.* has 8 slots a query, kernel_size=\(3, 3\) takes 9"),
    (AV, {"is_causal": 1}, TypeError, r"is_causal\[0\]=1 is a int; give True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "change", "error", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_refused(good, change, error, message):
    count = {id(FUSED): flops.fna_flop_count, id(QK): flops.na_qk_flop_count, id(AV): flops.na_av_flop_count}[id(good)]
    assert count(**good) > 0
    with pytest.raises(error, match=message):
        count(**(good | change))
