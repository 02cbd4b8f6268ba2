# SPDX-License-Identifier: MIT
"""Derivatives of the unfused ops: every tensor, every order, every transform, as those of the reference."""

import functools
import itertools

import pytest
import torch
from halves import av, both, make, ops, present, qk, replaced
from samples import Problem

import natten_ops
from natten_ops import reference

SMALL = {
    "biased": Problem((4, 3), (2, 2), dilation=(2, 1), is_causal=(False, True), head_dim=2, rpb=True, additional=2),
    "strided": Problem((5,), (3,), stride=(2,), is_causal=(True,), batch=1, head_dim=2),
    "volume": Problem((2, 3, 2), (2, 2, 1), is_causal=(True, False, False), batch=1, heads=1, head_dim=2),
}


def attention(halves, problem, module):
    """One number from the whole chain, nonlinear in everything."""
    weights = qk(halves, problem, module).softmax(-1) * (1 + halves.attn.sin())
    return av(halves._replace(attn=weights), problem, module).sin().sum()


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_of_both_orders_and_forward_mode(name):
    problem = SMALL[name]
    halves = make(problem)
    leaves = [t.clone().requires_grad_() for t in present(halves)]

    def outputs(*tensors):
        return both(replaced(halves, tensors), problem, ops)

    torch.autograd.gradcheck(outputs, leaves, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(
        lambda *t: attention(replaced(halves, t), problem, ops), leaves, check_fwd_over_rev=True
    )


def test_third_derivatives():
    problem, results = SMALL["biased"], []
    halves = make(problem)
    for module in (ops, reference):
        leaves = [t.clone().requires_grad_() for t in present(halves)]
        value = attention(replaced(halves, leaves), problem, module)
        for _ in range(3):
            slopes = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(slope.sin().sum() for slope in slopes)
        results.append(slopes)
    for have, want in zip(*results):
        torch.testing.assert_close(have, want)


TRANSFORMS = {
    "grad(grad)": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum()),
    "jvp(grad)": lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
    "grad(jvp)": lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1]),
    "jacfwd": lambda f: torch.func.jacfwd(f),
    "jacfwd(jacfwd)": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "hessian": lambda f: torch.func.hessian(f),
    "vmap(grad)": lambda f: lambda x: torch.vmap(torch.func.grad(f))(torch.stack([x, x.sin()])),
    "grad(vmap)": lambda f: torch.func.grad(lambda x: torch.vmap(f)(torch.stack([x, x.sin()])).sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_each_tensor_in_turn(transform):
    problem = SMALL["biased"]
    halves = make(problem)
    tensors = present(halves)
    for i, tensor in enumerate(tensors):

        def scalar(module, x, i=i):
            return attention(replaced(halves, [*tensors[:i], x, *tensors[i + 1 :]]), problem, module)

        have, want = (TRANSFORMS[transform](functools.partial(scalar, m))(tensor) for m in (ops, reference))
        torch.testing.assert_close(have, want)


def test_forward_mode_of_one_tensor_in_forward_mode_of_another():
    problem = SMALL["biased"]
    halves = make(problem)
    tensors = present(halves)
    for i, j in itertools.permutations(range(len(tensors)), 2):

        def mixed(module, i=i, j=j):
            def scalar(x, y):
                given = [y if n == j else x if n == i else t for n, t in enumerate(tensors)]
                return attention(replaced(halves, given), problem, module)

            def inner(x):
                return torch.func.jvp(functools.partial(scalar, x), (tensors[j],), (tensors[j].cos(),))[1]

            return torch.func.jvp(inner, (tensors[i],), (tensors[i].sin(),))[1]

        torch.testing.assert_close(mixed(ops), mixed(reference))


def test_torchs_own_vectorised_derivatives_by_the_bias_table():
    """torch.autograd.functional has a vmap of its own, with fewer rules."""
    problem = SMALL["biased"]
    halves = make(problem)

    def scalar(table):
        return attention(halves._replace(rpb=table), problem, ops).sin()

    for strategy in ("reverse-mode", "forward-mode"):
        settings = {"vectorize": True, "outer_jacobian_strategy": strategy}
        have = torch.autograd.functional.hessian(scalar, halves.rpb, **settings)
        torch.testing.assert_close(have, torch.func.hessian(scalar)(halves.rpb))


def test_vmap_over_nothing_leaves_the_graph_whole():
    query, key = torch.randn(2, 1, 1, 4, 2).unbind()
    tables = torch.randn(0, 1, 5, requires_grad=True)
    out = torch.vmap(lambda table: natten_ops.na1d_qk(query, key, kernel_size=3, rpb=table))(tables)
    assert torch.autograd.grad(out.sum(), tables)[0].shape == tables.shape


def test_vmap_of_every_combination_of_mapped_tensors():
    problem = SMALL["biased"]
    halves = make(problem)
    for chosen in ((0, 1, 4), (0, 4, 5), (1, 2), (3, 6), (2, 6), (4,)):
        stacked = [torch.stack([t, t.flip(0)], dim=1) if i in chosen else t for i, t in enumerate(halves)]
        in_dims = tuple(1 if i in chosen else None for i in range(len(halves)))
        have = torch.vmap(lambda *t: both(replaced(halves, t), problem, ops), in_dims=in_dims)(*stacked)
        for n in range(2):
            single = [t.select(1, n) if i in chosen else t for i, t in enumerate(stacked)]
            for batched, want in zip(have, both(replaced(halves, single), problem, ops)):
                torch.testing.assert_close(batched[n], want.expand_as(batched[n]))
