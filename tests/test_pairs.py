# SPDX-License-Identifier: MIT
"""Queries and keys that are rotated in interleaved pairs: vector code in the attention's kernel, whatever the spelling."""

import re

import pytest
import torch
from compiling import compile_and_compare, fresh_compiler  # noqa: F401 (a fixture)

import natten_ops

# Pairs of a head: with and without a rest behind vectors of 4, 8 and 16.
DIM = 40
WEIGHT = torch.linspace(0.5, 2, DIM)
OF_POSITIONS, POSITIONS = torch.linspace(-1, 3, 12 * DIM).view(12, DIM), torch.arange(9).flip(0)
WIDE = torch.linspace(1, 3, DIM // 2), torch.linspace(-2, 2, DIM - 1)  # the last number read is the last there is


@pytest.fixture(autouse=True)
def long_producers():
    """Torch 2.11 writes long expressions to memory before the attention (from 4 to 8 reads or 30 ops on), later ones fewer."""
    limits = ("realize_reads_threshold", "realize_acc_reads_threshold", "realize_opcount_threshold")
    with torch._inductor.config.patch(dict.fromkeys(limits, 1000)):
        yield


def by_stack(x, cosine, sine):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)


def by_repeated_tables(x, cosine, sine):
    even, odd = x[..., ::2], x[..., 1::2]
    cosine, sine = (table.repeat_interleave(2, -1) for table in (cosine, sine))
    return x * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine


def by_flip(x, cosine, sine):
    cosine, sine = (table.repeat_interleave(2, -1) for table in (cosine, sine))
    swapped = x.unflatten(-1, (-1, 2)).flip(-1) * torch.tensor([-1.0, 1.0], dtype=x.dtype)
    return x * cosine + swapped.flatten(-2) * sine


def by_complex_numbers(x, cosine, sine):
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.complex(cosine.double(), sine.double())
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def of_a_norm(x, cosine, sine):
    """A weight is read in pairs too, and the row of a norm's scale once."""
    return by_stack(torch.nn.functional.rms_norm(x, x.shape[-1:], WEIGHT), cosine, sine)


def by_tables_of_every_element(x, cosine, sine):
    """Of a table that has a number for each element, every second one is read."""
    return by_stack(x, WIDE[0] * cosine, WIDE[1][::2] * sine)


def by_positions(x, cosine, sine):
    """Where a gathered row begins is known only where it is used."""
    return by_stack(x * OF_POSITIONS[POSITIONS][:, None], cosine, sine)


def behind_a_border(x, cosine, sine):
    """What lies outside of a padded tensor is never read."""
    padded = torch.nn.functional.pad(x[:, :-2, 1:], (0, 0, 0, 0, 1, 0, 2, 0))
    return by_stack(padded, cosine, sine) + by_flip(x, cosine, sine)


def in_fours(x, cosine, sine):
    return x.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)


def tensors(dim, dtype=torch.float32):
    """Queries from the middle of a wider row, so that pairs begin anywhere."""
    q, k, v = torch.randn(3, 1, 7, 9, 2, dim).to(dtype).unbind()
    query = torch.randn(1, 7, 9, 2, dim + 5).to(dtype)[..., 3 : 3 + dim].copy_(q)
    return query, k, v, *torch.randn(2, 7, 9, 1, dim // 2).to(dtype).unbind()


def code_of_query(source):
    hooks = source.split("const auto compute_query")[1:]
    return [re.split("const auto (?:compute_key|take_out)", hook)[0] for hook in hooks]


def attend(rotate):
    return lambda q, k, v, *tables: natten_ops.na2d(rotate(q, *tables), k, v, kernel_size=3) * 2


@pytest.mark.parametrize(
    "rotate", [by_stack, by_repeated_tables, by_flip, by_complex_numbers, of_a_norm, by_tables_of_every_element]
)
def test_spellings(rotate):
    (source,) = compile_and_compare(attend(rotate), *tensors(DIM))
    (code,) = code_of_query(source)
    assert "natten::take_every_second(" in code and "natten::join_pairs(" in code and "at::vec::Vectorized" in code
    assert not any(sign in code for sign in ("div_floor", "%", "blendv", "tmpbuf"))


def test_keys():
    """As the queries, in the same kernel, with local rows of their own."""

    def both(q, k, v, *tables):
        return natten_ops.na2d(by_stack(q, *tables), by_stack(k, *tables), v, kernel_size=3) * 2

    (source,) = compile_and_compare(both, *tensors(DIM))
    code = source.split("const auto compute_key")[1].split("const auto take_out")[0]
    assert "natten::take_every_second(" in code and "natten::join_pairs(key_buf" in code
    assert source.count("async_compile.cpp_pybinding") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    (source,) = compile_and_compare(
        attend(by_stack), *tensors(24, dtype), tolerance=5e-2 if dtype.itemsize == 2 else 1e-9
    )
    assert "natten::take_every_second(" in source


@pytest.mark.parametrize("rotate", [by_positions, behind_a_border])
def test_what_cannot_be_read_beforehand(rotate):
    (source,) = compile_and_compare(attend(rotate), *tensors(DIM))
    (code,) = code_of_query(source)
    assert code.count("natten::take_every_second(") == 2  # the queries' own elements, even and odd


def test_sizes_that_are_not_known():
    function = torch.compile(attend(by_stack), dynamic=True, fullgraph=True)
    for dim_of in ((7, 9), (11, 6), (5, 30)):
        q, k, v = torch.randn(3, 2, *dim_of, 2, 16).unbind()
        tables = torch.randn(2, *dim_of, 1, 8).unbind()
        with torch.no_grad():
            torch.testing.assert_close(function(q, k, v, *tables), attend(by_stack)(q, k, v, *tables))


def with_a_border_in_the_row(x, cosine, sine):
    return by_stack(torch.nn.functional.pad(x[..., :-3], (2, 1)), cosine, sine)


def test_conditions_and_fractions_of_sizes_are_no_indices():
    """Inductor asks for such numbers as it asks for indices."""

    def attend_if_large(q, k, v):
        large = torch.full((), q.shape[1] >= 5, dtype=torch.bool)
        return natten_ops.na2d(q * large * torch.full((), q.shape[2] / 4), k, v, kernel_size=3)

    q, k, v, *_ = tensors(16)
    with torch.no_grad():
        have = torch.compile(attend_if_large, dynamic=True, fullgraph=True)(q, k, v)
    torch.testing.assert_close(have, attend_if_large(q, k, v))


@pytest.mark.parametrize("rotate, dim", [(by_stack, 6), (in_fours, 24), (with_a_border_in_the_row, DIM)])
def test_element_by_element(rotate, dim):
    """Rows of less than a vector, and what pairs do not make simpler or faster, are computed as Inductor would."""
    (source,) = compile_and_compare(attend(rotate), *tensors(dim))
    (code,) = code_of_query(source)
    assert "take_every_second" not in code
