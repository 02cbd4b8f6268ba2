# SPDX-License-Identifier: MIT
"""Differentiation is complete: every input, both outputs, every order, every transform, eager and compiled."""

import functools
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from samples import NAMED, Problem, differentiable, problems, run, with_tensors

from natten_ops import reference
from natten_ops.ops import fused

SMALL = {
    "plain": Problem((3, 4), (2, 3), batch=1, heads=1, head_dim=2),
    "everything": Problem(
        (4, 3), (2, 2), dilation=(2, 1), is_causal=(False, True), batch=2, heads=2, group=2, head_dim=2, value_dim=3,
        scale=0.7, rpb=True, mask=True, additional=2,
    ),
    "strided": Problem((5,), (3,), stride=(2,), is_causal=(True,), batch=1, head_dim=2),
    "box": Problem((6, 4), (3, 2), dilation=(2, 1), box=((2, 1), (3, 2)), batch=1, heads=1, head_dim=2),
}  # fmt: skip


def setup(name):
    """The op and the reference as functions of the differentiable inputs, and those inputs."""
    problem = SMALL[name]
    inputs = problem.make()
    geometry = problem.geometry()

    def op(*tensors):
        return run(with_tensors(inputs, tensors), problem)

    def formula(*tensors):
        return reference.forward(with_tensors(inputs, tensors), *geometry, problem.scale)

    return op, formula, [t.clone().requires_grad_() for t in differentiable(inputs)]


def finite(outputs):
    """One number from both outputs; rows that see nothing have an lse of -inf."""
    out, lse = outputs
    return out.sin().sum() + torch.where(torch.isfinite(lse), lse, 0.0).cos().sum()


@pytest.mark.parametrize("name", SMALL)
def test_first_derivatives(name):
    op, _, leaves = setup(name)
    alive = torch.isfinite(op(*leaves)[1])
    torch.autograd.gradcheck(
        lambda *t: (op(*t)[0], op(*t)[1][alive]), leaves, check_forward_ad=True, check_batched_grad=True
    )


@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives(name):
    op, _, leaves = setup(name)
    torch.autograd.gradgradcheck(lambda *t: finite(op(*t)), leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_alone(output):
    """The other output has no gradient then: None in the backward op."""
    op, formula, leaves = setup("everything")
    alive = torch.isfinite(op(*leaves)[1])
    have, want = (
        torch.autograd.grad(f(*leaves)[output][alive].sin().sum(), leaves, allow_unused=True) for f in (op, formula)
    )
    for gradient, truth in zip(have, want):
        if truth is not None:  # lse does not depend on the values
            torch.testing.assert_close(gradient, truth)


def test_third_derivative():
    op, formula, leaves = setup("plain")
    results = []
    for function in (op, formula):
        value = finite(function(*leaves))
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaves[:1], create_graph=True)
            value = gradient.sin().sum()
        results.append(gradient)
    torch.testing.assert_close(*results)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f),
    "grad(grad)": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jvp(grad)": lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
    "grad(jvp)": lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1]),
    "jacrev": lambda f: torch.func.jacrev(f),
    "jacfwd": lambda f: torch.func.jacfwd(f),
    "hessian": lambda f: torch.func.hessian(f),
    "jacrev(jacrev)": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jvp(jvp)": lambda f: _tangent(lambda x: _tangent(f, torch.cos)(x), torch.sin),
    "jacfwd(jacfwd)": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "vmap(grad)": lambda f: lambda x: torch.vmap(torch.func.grad(f))(torch.stack([x, x.sin()])),
    "grad(vmap)": lambda f: torch.func.grad(lambda x: torch.vmap(f)(torch.stack([x, x.sin()])).sum()),
    "vmap(vmap)": lambda f: lambda x: torch.vmap(torch.vmap(f))(torch.stack([x, x.sin()])[None].expand(3, 2, *x.shape)),
}


def _tangent(f, direction):
    return lambda x: torch.func.jvp(f, (x,), (direction(x),))[1]


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, name):
    """Of each differentiable input in turn, the others fixed."""
    op, formula, leaves = setup(name)
    fixed = [t.detach() for t in leaves]
    for i, leaf in enumerate(fixed):
        results = []
        for function in (op, formula):
            scalar = functools.partial(_with, function, fixed, i)
            results.append(TRANSFORMS[transform](scalar)(leaf))
        torch.testing.assert_close(*results)


def _with(function, fixed, i, x):
    return finite(function(*fixed[:i], x, *fixed[i + 1 :]))


def test_forward_mode_of_one_input_in_forward_mode_of_another():
    """What an op saved has a tangent of the outer level, and what its rule makes needs one."""
    op, formula, leaves = setup("everything")
    fixed = [t.detach() for t in leaves]
    for i, j in itertools.permutations(range(len(fixed)), 2):
        results = []
        for function in (op, formula):

            def outer(x, i=i, j=j, function=function):
                return _tangent(functools.partial(_with, function, [*fixed[:i], x, *fixed[i + 1 :]], j), torch.cos)(
                    fixed[j]
                )

            results.append(_tangent(outer, torch.sin)(fixed[i]))
        torch.testing.assert_close(*results)


COMPILED = ["grad", "grad(grad)", "jvp", "jvp(grad)", "vmap(grad)", "grad(vmap)"]


@pytest.mark.parametrize("transform", COMPILED)
def test_transforms_inside_compile(transform):
    op, formula, leaves = setup("everything")
    fixed = [t.detach() for t in leaves]
    for i in (0, len(fixed) - 1):  # the query and the bias table
        scalar = functools.partial(_with, op, fixed, i)
        torch._dynamo.reset()
        compiled = torch.compile(TRANSFORMS[transform](scalar), fullgraph=True, backend="aot_eager")
        want = TRANSFORMS[transform](functools.partial(_with, formula, fixed, i))(fixed[i])
        torch.testing.assert_close(compiled(fixed[i]), want)


def test_forward_mode_tangents():
    op, formula, leaves = setup("everything")
    tangents = [torch.randn_like(t) for t in leaves]
    results = []
    for function in (op, formula):
        with forward_ad.dual_level():
            outputs = function(*map(forward_ad.make_dual, leaves, tangents))
            results.append([forward_ad.unpack_dual(t).tangent for t in outputs])
    for have, want in zip(*results):
        torch.testing.assert_close(have, want)


def test_vmap_over_every_combination_of_mapped_inputs():
    """Mapped and unmapped inputs mixed, mapped along any dimension; the bias table too."""
    problem = SMALL["everything"]
    inputs = problem.make()
    tensors = [*differentiable(inputs), inputs.key_mask]

    def op(*given):
        return run(with_tensors(inputs, given[:-1])._replace(key_mask=given[-1]), problem)

    for mapped in range(1, 2 ** len(tensors)):
        chosen = [bool(mapped >> i & 1) for i in range(len(tensors))]
        stacked = [torch.stack([t, t.flip(0)], dim=1 if many else 0) if many else t for t, many in zip(tensors, chosen)]
        have = torch.vmap(op, in_dims=tuple(1 if many else None for many in chosen))(*stacked)
        for i in range(2):
            want = op(*(t.select(1, i) if many else t for t, many in zip(stacked, chosen)))
            for batched, single in zip(have, want):
                torch.testing.assert_close(batched[i], single)


def test_per_sample_gradients_of_a_shared_bias_table():
    """vmap(grad) with an unmapped table: one gradient a sample, never their sum."""
    op, formula, leaves = setup("everything")
    fixed = [t.detach() for t in leaves]
    queries = torch.stack([fixed[0], fixed[0].sin(), fixed[0].cos()])
    results = []
    for function in (op, formula):
        gradient = torch.func.grad(lambda table, q, f=function: finite(f(q, *fixed[1:-1], table)))
        results.append(torch.vmap(gradient, in_dims=(None, 0))(fixed[-1], queries))
    assert results[0].shape[0] == 3
    torch.testing.assert_close(*results)


@given(problem=problems())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_tangents_of_any_problem(problem):
    inputs = problem.make()
    leaves = differentiable(inputs)
    tangents = [torch.randn_like(t) for t in leaves]
    geometry = problem.geometry()
    results = []
    for function in (
        lambda *t: run(with_tensors(inputs, t), problem),
        lambda *t: reference.forward(with_tensors(inputs, t), *geometry, problem.scale),
    ):
        results.append(torch.func.jvp(function, tuple(leaves), tuple(tangents))[1])
    for have, want in zip(*results):
        torch.testing.assert_close(have, want)


def test_derivatives_of_the_backward_op_itself():
    """grad_out and grad_lse are differentiable inputs too, also when only some gradients are needed."""
    problem = SMALL["everything"]
    inputs, settings_ = problem.make(), problem.settings()
    out, lse = run(inputs, problem)
    grads = [torch.randn_like(out).requires_grad_(), (torch.randn_like(lse) * torch.isfinite(lse)).requires_grad_()]
    leaves = [t.requires_grad_() for t in differentiable(inputs)]

    def op(*tensors):
        needed = [True, False, True, True, False, True]
        now = with_tensors(inputs, tensors[2:])
        saved = [*tensors[:2], *run(now, problem), *now]
        return tuple(g for g in fused._call_backward((settings_, needed, False), saved) if g.numel())

    torch.autograd.gradcheck(op, [*grads, *leaves], check_forward_ad=True)


def test_every_named_problem_has_all_gradients():
    for name, problem in NAMED.items():
        inputs = problem.make()
        leaves = [t.requires_grad_() for t in differentiable(inputs)]
        for gradient in torch.autograd.grad(finite(run(inputs, problem)), leaves):
            assert gradient is not None and torch.isfinite(gradient).all(), name
