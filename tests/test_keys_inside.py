# SPDX-License-Identifier: MIT
"""Keys and values that are computed where they are packed, or before the attention: whichever costs less."""

import itertools
import math

import pytest
import torch
from compiling import compile_and_compare, found, fresh_compiler, image  # noqa: F401 (a fixture)
from torch._dynamo.utils import counters

import natten_ops

VOLUME = (6, 16, 12)  # each key is packed about twice
PRODUCERS = {  # name: (what makes keys and values, whether it is computed where they are packed)
    "a weight": (lambda x, weight: x * weight, True),
    "a norm's weight": (lambda x, weight: torch.nn.functional.rms_norm(x, [32], weight), False),
    "repeated heads": (lambda x, weight: x[..., :1, :].expand_as(x).clone(), True),
    "rotated pairs": (lambda x, weight: torch.stack([-x[..., 1::2] * weight[1], x[..., ::2]], -1).flatten(-2), True),
    "a long expression": (lambda x, weight: ((x * 2 + weight) * weight - x.abs()) * 3 + weight * x, False),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_keys_are_computed_anew_where_that_costs_less_than_writing_them(name):
    """In a volume; in an image, whose keys are packed about once, all of them are."""
    make, inside = PRODUCERS[name]
    weight = torch.randn(32)
    for shape, expected_inside in ((VOLUME, inside), (VOLUME[1:], True)):
        q, k, v = torch.randn(3, 2, *shape, 2, 32).unbind()
        attend = natten_ops.na3d if len(shape) == 3 else natten_ops.na2d
        (source,) = compile_and_compare(
            lambda q, k, v, w, attend=attend: attend(q, make(k, w), make(v, w), kernel_size=5), q, k, v, weight
        )
        assert found()[0] == 1
        assert ("compute_key =" in source) == ("compute_value =" in source) == expected_inside, shape
        counters.clear()


def test_keys_that_others_read_are_read_from_memory():
    """Such as those of a cache: they are written anyway, in whatever shape."""
    q, k, v = image(3)

    def step(q, k, v):
        key, value = k * 2, v.flatten(-2) * 3
        out = natten_ops.na2d(q, key, value.unflatten(-1, v.shape[-2:]), kernel_size=3)
        return out, natten_ops.na2d(q, k, v * 3, kernel_size=3), key, value

    (source,) = compile_and_compare(step, q, k, v)
    assert "compute_key =" not in source and source.count("compute_value =") == 1


@pytest.mark.parametrize("name", ["channels first", "heads last"])
def test_what_lies_apart_is_brought_together_first(name):
    """Element by element would be slower than the tiles in which Inductor transposes."""
    tensors = [torch.randn(2, 64, 9, 12) if name == "channels first" else torch.randn(2, 9, 12, 16, 4) for _ in "qkv"]

    def tokens(x):
        x = x.permute(0, 2, 3, 1).unflatten(-1, (4, 16)) if name == "channels first" else x.transpose(-1, -2)
        return x.relu() * 2

    (source,) = compile_and_compare(lambda *x: natten_ops.na2d(*map(tokens, x), kernel_size=3), *tensors)
    assert found()[0] == 1 and "compute_" not in source


@pytest.mark.parametrize("length, window", [(4096, 31), (300, 300), (100, 1)])
def test_times_that_a_key_is_packed(length, window):
    """Of a line: strips of about 128 queries, a multiple of the lanes, each of which packs the union of its windows."""
    x = torch.randn(1, length, 1, 8)
    lists = [[window], [1], [1], [False]], [[], [], []]
    have = torch.ops.natten._cpu_tiled_times_packed(x, x, x, *lists[0], *[None] * 4, *lists[1], True)
    lanes = torch.ops.natten._cpu_vector_bytes() // 4
    strip = math.ceil(math.ceil(length / math.ceil(length / 128)) / lanes) * lanes
    start = lambda i: min(max(i - window // 2, 0), length - window)  # noqa: E731
    packed = sum(start(min(i + strip, length) - 1) + window - start(i) for i in range(0, length, strip))
    assert have == pytest.approx(packed / length)


def test_times_that_a_key_of_a_volume_is_packed():
    """Blocks of four rows walk the outer axis, each anew; a window that spans it leaves all of it in the ring."""

    def times(shape, window):
        x = torch.randn(1, *shape, 4, 32)
        lists = [window, [1] * 3, [1] * 3, [False] * 3], [[], [], []]
        return torch.ops.natten._cpu_tiled_times_packed(x, x, x, *lists[0], *[None] * 4, *lists[1], True)

    blocks = [range(begin, end) for begin, end in itertools.pairwise((0, 4, 8, 11, 14, 18, 22, 25, 28))]  # two ranges
    start = lambda y: min(max(y - 2, 0), 28 - 5)  # noqa: E731
    packed = sum(start(block[-1]) + 5 - start(block[0]) for block in blocks)
    assert times((8, 28, 28), [5, 5, 5]) == pytest.approx(packed / 28)
    assert times((5, 28, 28), [5, 5, 5]) == times((1, 28, 28), [1, 5, 5]) < 1.25
