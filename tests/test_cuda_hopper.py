# SPDX-License-Identifier: MIT
"""The Hopper forward (TMA and wgmma) under emulation: numbers, no findings, the same bits in any order; what it refuses."""

import dataclasses

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import NAMED, Problem, problems

from natten_ops import _problem, backends

WGMMA, MMA = (backends.by_name(name).id for name in ("cuda-wgmma", "cuda-mma"))
HALVES = (torch.float16, torch.bfloat16)


def fitting(problem, head_dim=64):
    """The problem without what the kernel does not take."""
    scale = None if problem.scale == 0 else problem.scale
    without = {"rpb": False, "mask": False, "additional": None, "transposed": False, "value_dim": None}
    return dataclasses.replace(problem, head_dim=head_dim, scale=scale, **without)


def heads_first(inputs):
    """The same numbers, each head's tokens together in memory."""
    move = lambda t: t.movedim(-2, 1).contiguous().movedim(1, -2)  # noqa: E731
    return inputs._replace(**{name: move(getattr(inputs, name)) for name in ("query", "key", "value")})


def spread(inputs):
    """The same numbers with gaps behind every row, every token and every sample."""

    def moved(tensor):
        shape = [size + 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 8]
        room = tensor.new_full(shape, torch.nan)[tuple(slice(size) for size in tensor.shape)]
        return room.copy_(tensor)

    return inputs._replace(**{name: moved(getattr(inputs, name)) for name in ("query", "key", "value")})


PLACES = {"heads last": lambda inputs: inputs, "heads first": heads_first, "spread": spread}


def compare(problem, dtype, place="heads last"):
    emulated.compare(problem, dtype, WGMMA, placed=PLACES[place], gradients=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_named_problems(name, dtype):
    compare(fitting(NAMED[name], head_dim=64 if dtype == torch.float16 else 128), dtype)


@st.composite
def fitting_problems(draw):
    problem = fitting(draw(problems()), draw(st.sampled_from([64, 64, 128])))
    packed = problem.box is None and draw(st.booleans())
    return dataclasses.replace(problem, packed=packed), draw(st.sampled_from(sorted(PLACES)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(drawn=fitting_problems())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_problem(dtype, drawn):
    problem, place = drawn
    compare(problem, dtype, place)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(drawn=fitting_problems())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_problem_long(dtype, drawn):
    problem, place = drawn
    compare(problem, dtype, place)


# Several tiles, and more boxes than stages.
LONG = {
    "line": Problem((300,), (270,), batch=1, heads=1),
    "causal line": Problem((260,), (150,), is_causal=(True,), batch=1, heads=1),
    "whole line": Problem((200,), (200,), batch=1, heads=1),
    "square": Problem((25, 25), (16, 16), batch=1, heads=1),
    "strided": Problem((24, 24), (12, 8), stride=(8, 8), batch=1, heads=1),
    "even and causal": Problem((20, 18), (8, 6), is_causal=(True, False), batch=1, heads=1),
    "volume": Problem((6, 9, 10), (4, 5, 6), is_causal=(True, False, False), batch=1, heads=1),
    "box": Problem((60, 50), (20, 15), box=((11, 3), (30, 20)), batch=1, heads=1),
    "groups": Problem((9, 12), (5, 7), heads=4, group=2, batch=2),
    "dilated box": Problem((26, 31), (7, 8), stride=(3, 1), dilation=(2, 3), box=((5, 6), (13, 19)), heads=2),
}


@pytest.mark.parametrize("name", LONG)
def test_several_tiles_and_more_boxes_than_stages(name):
    compare(fitting(LONG[name]), torch.float16)


@pytest.mark.parametrize("name", LONG)
def test_halves_of_a_tile_that_share_their_boxes(name):
    """The longer rows: two warpgroups, each passing over boxes that only the other sees."""
    compare(fitting(LONG[name], head_dim=128), torch.bfloat16)


@pytest.mark.parametrize("dilation", range(2, 9))
def test_every_dilation_that_a_tensor_map_steps_over(dilation):
    """A line's boxes would have 64 tokens, more than a tensor map reaches over from dilation 5 on."""
    compare(fitting(Problem((90 * dilation + 1,), (80,), dilation=(dilation,), batch=1, heads=1)), torch.float16)
    plane = Problem((4 * dilation, 21), (4, 5), dilation=(dilation, 9 - dilation // 2 * 2), batch=1, heads=1)
    if plane.dilation[1] * 5 <= 21:
        compare(fitting(plane), torch.float16)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packed", [False, True])
def test_projections_and_heads_are_read_where_they_lie(place, packed):
    """Several samples and heads, queries that share keys; packed: views of one projection."""
    problem = fitting(Problem((6, 7), (3, 5), heads=4, group=2, batch=2, packed=packed))
    compare(problem, torch.float16, place)


def test_ends_of_huge_grids():
    """Coordinates of TMA are counted from the first key of the tensors, whose places in the grid fill 31 bits."""
    length = 2**31 - 2000
    problem = fitting(Problem((length,), (100,), box=((length - 90,), (90,)), batch=1, heads=1))
    inputs = problem.make(torch.float16)
    wgmma, mma = (emulated.forward(inputs, problem, number) for number in (WGMMA, MMA))
    torch.testing.assert_close(wgmma[0], mma[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(wgmma[1], mma[1], atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_tensor_cores_of_all_devices():
    problem = fitting(Problem((9, 7), (3, 5), batch=1, heads=2, group=2))
    inputs = problem.make(torch.float16)
    outputs = emulated.forward(inputs, problem, WGMMA)
    for grads in ((torch.randn_like(outputs[0]), None), (None, torch.randn_like(outputs[1]))):
        have, want = (emulated.backward(grads, outputs, inputs, problem, backend=b) for b in (WGMMA, MMA))
        assert all(torch.equal(a, b) for a, b in zip(have, want))


def test_nothing_to_attend_is_no_launch():
    for empty in ({"batch": 0}, {"heads": 0}):
        problem = fitting(Problem((5, 5), (3, 3), **empty))
        assert emulated.forward(problem.make(torch.float16), problem, WGMMA)[0].numel() == 0


def test_it_runs_only_when_named():
    """Choice goes to the kernels that every device has: no GPU has run this one yet."""
    problem = fitting(Problem((40,), (20,), batch=1, heads=1))
    inputs = problem.make(torch.float16)
    chosen, mma = (emulated.forward(inputs, problem, number) for number in (0, MMA))
    assert all(torch.equal(a, b) for a, b in zip(chosen, mma))


# ---- what it refuses ---------------------------------------------------------------------------------------------------


def strided(tensor, strides, offset=0):
    """Numbers of any kind in such places."""
    size = offset + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, strides))
    return torch.zeros(size, dtype=tensor.dtype).as_strided(tensor.shape, strides, offset)


PLAIN = fitting(Problem((7, 9), (3, 5), batch=2, heads=2))
# What differs of PLAIN, how keys lie, and the reason against it: of the kernels, and of the record.
REFUSED = {
    "dilation": ({"spatial": (9, 9), "kernel_size": (1, 5), "dilation": (9, 1)}, None, "takes dilations up to 8"),
    "bias": ({"rpb": True}, None, "takes no bias table"),
    "mask": ({"mask": True}, None, "takes no"),
    "additional": ({"additional": 1}, None, "takes no"),
    "head dim": ({"head_dim": 32}, None, "takes head dims"),
    "value dim": ({"value_dim": 128}, None, "takes head dims"),
    "misaligned": ({}, (9 * 7 * 128, 9 * 128, 128, 64, 1, 4), "takes rows that begin at multiples of 16 bytes"),
    "turned": ({}, (9 * 7 * 128, 9 * 128, 128, 1, 2, 0), "takes rows that begin at multiples of 16 bytes"),
    "heads apart": ({}, (9 * 7 * 64, 9 * 64, 64, 3 * 9 * 7 * 64, 1, 0), "takes keys and values whose heads lie"),
    "one sample for all": ({}, (0, 9 * 128, 128, 64, 1, 0), "takes keys and values whose heads lie"),
    "one token for all": ({}, (9 * 7 * 128, 9 * 128, 0, 64, 1, 0), "takes keys and values whose heads lie"),
    "scale": ({"scale": -1.0}, None, "takes"),
}


def by_record(inputs, problem):
    """The reasons that the record has against a problem, as if it lay on an H100."""
    facts = backends.describe(list(inputs), *problem.geometry(), problem.scale)
    places = {
        "aligned": all(_problem.is_aligned(tensor) for tensor in inputs[:3]),
        "mapped": all(_problem.fits_tensor_map(tensor) for tensor in inputs[1:3]),
    }
    reasons = backends.by_name("cuda-wgmma").why_not(facts._replace(device="cuda", capability=90, **places))
    return [reason for reason in reasons if "not loaded" not in reason]


@pytest.mark.parametrize("name", REFUSED)
def test_the_kernels_and_the_record_refuse_for_the_same_reason(name):
    changes, strides, reason = REFUSED[name]
    problem = dataclasses.replace(PLAIN, **changes)
    inputs = problem.make(torch.float16)
    if strides:
        inputs = inputs._replace(key=strided(inputs.key, strides[:-1], strides[-1]))
    with pytest.raises(RuntimeError, match=reason) as caught:
        emulated.forward(inputs, problem, WGMMA)
    assert "use 0 (choose) or 4 (cuda-mma)" in str(caught.value)
    assert any(text.startswith(reason) for text in by_record(inputs, problem))


def test_the_record_has_no_reason_against_what_the_kernels_take():
    for problem in (PLAIN, *(fitting(p) for p in NAMED.values()), dataclasses.replace(PLAIN, packed=True)):
        for place in PLACES.values():
            assert by_record(place(problem.make(torch.float16)), problem) == []


def test_dtypes_and_devices():
    inputs = PLAIN.make(torch.float32)
    with pytest.raises(RuntimeError, match="takes float16 and bfloat16"):
        emulated.forward(inputs, PLAIN, WGMMA)
    for facts, reason in (
        ({"capability": 80}, "takes devices of compute capability 9.0"),
        ({"capability": 100}, "takes devices of compute capability 9.0"),
        ({"shared_bytes": 80 << 10}, "takes more shared memory than a block of this device has"),
    ):
        with emulated.device(**facts), pytest.raises(RuntimeError, match=reason):
            emulated.forward(PLAIN.make(torch.float16), PLAIN, WGMMA)
    for capability in (80, 100):
        facts = backends.Problem("cuda", torch.float16, capability=capability)
        reasons = backends.by_name("cuda-wgmma").why_not(facts)
        assert f"takes devices of compute capability 9.0, not {capability / 10}" in reasons


def test_what_the_driver_says_is_told():
    with emulated.device(error="out of luck"), pytest.raises(RuntimeError, match="out of luck"):
        emulated.forward(PLAIN.make(torch.float16), PLAIN, WGMMA)
