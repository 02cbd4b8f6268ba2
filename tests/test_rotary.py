# SPDX-License-Identifier: MIT
"""Rotary embeddings in their spellings: rotated where tokens are packed, and turned back by one kernel."""

import time

import pytest
import torch
from compiling import compile_and_compare, found, fresh_compiler, image, skeleton  # noqa: F401 (a fixture)
from torch._inductor.utils import run_and_get_code

import natten_ops


def test_rotary_embeddings_in_every_spelling():
    """Queries are rotated where they are packed: a kernel each, no concatenation."""
    q, k, v = image(3, dim=32)
    cosine, sine = torch.randn(2, 2, 9, 12, 1, 16).unbind()

    def rotate(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    def products(x, first, second, join):
        return join([first * cosine - second * sine, second * cosine + first * sine])

    spellings = [
        lambda x: x * torch.cat([cosine, cosine], -1) + rotate(x) * torch.cat([sine, sine], -1),
        lambda x: products(x, x[..., :16], x[..., 16:], lambda parts: torch.cat(parts, -1)),
        lambda x: products(x, x[..., ::2], x[..., 1::2], lambda parts: torch.stack(parts, -1).flatten(-2)),
    ]
    (source,) = compile_and_compare(
        lambda q, k, v: [natten_ops.na2d(spell(q), k, v, kernel_size=3) for spell in spellings], q, k, v
    )
    assert (
        found() == (3, 0) and source.count("= empty_strided_cpu(") == 3
    )  # the outputs: tables are joined in place too


def test_rotary_embeddings_of_keys_and_in_complex_numbers():
    """Keys are rotated where they are packed, as queries are; complex products are real ones."""
    q, k, v = image(3, dim=32)
    cosine, sine = torch.randn(2, 2, 9, 12, 1, 16).unbind()
    table = torch.complex(cosine, sine)

    def halves(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def pairs(x):
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    def other_way(x):
        return torch.view_as_real(table * torch.view_as_complex(x.unflatten(-1, (-1, 2)))).flatten(-2)

    for rotate in (halves, pairs, other_way):
        (source,) = compile_and_compare(
            lambda q, k, v, rotate=rotate: natten_ops.na2d(rotate(q), rotate(k), v, kernel_size=3), q, k, v
        )
        steps = skeleton(source).splitlines()
        kinds = ["new" if step.startswith("new float32 [2, 9, 12, 4") else step for step in steps]
        assert kinds == ["new", "attention and its neighbours"]  # the result
    trained = [t.requires_grad_() for t in (q, k, v)]
    attend = torch.compile(lambda q, k, v: natten_ops.na2d(pairs(q), pairs(k), v, kernel_size=3).sin().sum())
    want = natten_ops.na2d(pairs(q), pairs(k), v, kernel_size=3).sin().sum()
    for have, truth in zip(torch.autograd.grad(attend(q, k, v), trained), torch.autograd.grad(want, trained)):
        torch.testing.assert_close(have, truth, atol=1e-4, rtol=1e-4)


def turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def in_halves(x, c, s):
    return torch.cat([x[..., :16] * c - x[..., 16:] * s, x[..., 16:] * c + x[..., :16] * s], -1)


def in_pairs(x, c, s):
    return torch.stack([x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s], -1).flatten(-2)


ROTATIONS = {  # gradients: a concatenation of halves; scatters of halves; of every other element
    "chunks": lambda x, c, s: x * torch.cat([c, c], -1) + turned(x) * torch.cat([s, s], -1),
    "slices": in_halves,
    "pairs": in_pairs,
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_gradients_of_rotated_tokens_are_one_kernel(name):
    """Behind the call for all gradients one kernel turns those of queries and keys back, of halves in vectors, with nothing in
    memory between."""
    q, k, v = (t.requires_grad_() for t in image(3, dim=32))
    cosine, sine = torch.randn(2, 2, 9, 12, 1, 16).unbind()

    def loss(q, k, v):
        rotated = (ROTATIONS[name](x, cosine, sine) for x in (q, k))
        return natten_ops.na2d(*rotated, v, kernel_size=5).sin().sum()

    def step(loss):
        return torch.autograd.grad(loss(q, k, v), (q, k, v))

    have, (forward, backward) = run_and_get_code(step, torch.compile(loss, fullgraph=True))
    for one, other in zip(have, step(loss)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    new = "new float32 [2, 9, 12, 4, 32]"  # the other one's lies where the gradient of the keys was
    assert skeleton(backward).splitlines()[-3:] == ["call neighborhood_attention_lse_backward", new, "kernel"]
    behind = backward[backward.rindex("async_compile.cpp_pybinding") : backward.rindex("def call(")]
    assert behind.count("#pragma omp for") == 1 and (name == "pairs" or "at::vec::Vectorized" in behind)
    assert "[&]" not in behind  # which is how Inductor looks up what lies among zeros
    if name != "pairs":  # which torch joins as fast by itself
        before = forward[: forward.index("natten::Forward")]
        assert before.count("#pragma omp for") == 1 and "at::vec::Vectorized" in before


def test_what_is_no_rotation_stays():
    """Gradients of a rotated part and in 16 bits, where choices would be scalar code, and scatters of what is no number."""
    cosine, sine = torch.randn(2, 2, 9, 12, 1, 16).unbind()

    def loss(q, k, v, rotate):
        return natten_ops.na2d(rotate(q), rotate(k), v, kernel_size=5).sin().sum()

    def step(q, k, v, rotate, loss=loss):
        return torch.autograd.grad(loss(q, k, v, rotate), (q, k, v))

    def part(x):
        return torch.cat([in_halves(x[..., :32], cosine, sine), x[..., 32:]], -1)

    def whole(x):
        tables = (torch.cat([table, table], -1).to(x.dtype) for table in (cosine, sine))
        return x * next(tables) + turned(x) * next(tables)

    for rotate, dim, dtype in ((part, 64, torch.float32), (whole, 32, torch.bfloat16)):
        q, k, v = (t.to(dtype).requires_grad_() for t in image(3, dim=dim))
        have, (_, backward) = run_and_get_code(
            step, q, k, v, rotate, torch.compile(loss, fullgraph=True, dynamic=False)
        )
        exact = step(*(t.detach().double().requires_grad_() for t in (q, k, v)), rotate)
        for one, eager, truth in zip(have, step(q, k, v, rotate), exact):
            assert (one - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-5
        behind = backward[backward.rindex("async_compile.cpp_pybinding") : backward.rindex("def call(")]
        assert "at::vec::Vectorized" in behind

    def scattered(q, k, v):
        gradient = torch.func.grad(lambda q: natten_ops.na2d(q, k, v, kernel_size=3).sin().sum())(q)
        large = torch.zeros_like(gradient, dtype=torch.bool)
        large[..., :16] = gradient[..., :16].abs() > 0.1
        return torch.bitwise_not(large).float()

    compile_and_compare(scattered, *image(3, dim=32))


def test_many_pieces_do_not_take_long():
    """What is made of a gradient is looked at once, however many ways lead there."""

    def pieces(q, k, v):
        for _ in range(10):
            q = torch.cat([part * 0.9 for part in q.chunk(8, -1)[::-1]], -1)
        return natten_ops.na2d(q, k, v, kernel_size=3).sum()

    q, k, v = (t.requires_grad_() for t in image(3, dim=16))
    start = time.perf_counter()
    (have,) = torch.autograd.grad(torch.compile(pieces)(q, k, v), q)
    assert time.perf_counter() - start < 60
    torch.testing.assert_close(have, torch.autograd.grad(pieces(q, k, v), q)[0], atol=1e-4, rtol=1e-4)
