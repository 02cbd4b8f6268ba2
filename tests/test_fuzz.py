# SPDX-License-Identifier: MIT
"""Random calls, right and wrong, in child processes: each ends with the reference's numbers or a clean exception.

A case is a valid call by one of five routes; most get one or two absurd changes. What a changed call returns must be
accepted by the checks in Python, too, and agree with the reference. One case: `python tests/test_fuzz.py SEED`.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import random
import resource
import subprocess
import sys

import pytest
import torch
from samples import DTYPES, EMPTY, NAMED, Problem, in_double

import natten_ops
from natten_ops import reference
from natten_ops.ops.arguments import Settings, check_inputs
from natten_ops.ops.fused import GRADIENTS
from natten_ops.reference import Inputs

ROUTES = ("primitive", "composite", "functional", "backward", "autograd")
LISTS, BOXES = ("kernel_size", "stride", "dilation", "is_causal"), ("q_origin", "kv_origin", "extent")
RESULTS = ("out", "lse", *(f"grad_{name}" for name in GRADIENTS))
SAVED = ("grad_out", "grad_lse", "out", "lse")
HUGE = (2**31, 2**32, 2**40, 2**61, 2**62 - 1, 2**62, 2**63 - 1)
ABSURD = (*HUGE, -1, 0, -(2**62), -(2**63))
CLEAN = (RuntimeError, ValueError, TypeError)
TOLERANCE = dict(zip(DTYPES, (1e-9, 2e-4, 1e-2, 6e-2)))  # of 1 + the largest number of the reference
MANY = 10_000  # more slots or tokens than this are not given to the reference, which gathers every slot
ADDRESS_SPACE = 16 << 30  # so that absurd sizes fail to be allocated on every machine


def draw_problem(rng, route):
    """A valid problem, small or empty: a named one with other sizes and options."""
    named = rng.choice([p for p in (*NAMED.values(), *EMPTY.values()) if p.box is None or route != "composite"])
    return dataclasses.replace(
        named,
        spatial=tuple(length + rng.randint(0, 3) for length in named.spatial),
        is_causal=tuple(rng.random() < 0.3 for _ in named.spatial),
        batch=rng.choice((0, 1, 1, 2)),
        heads=named.group * rng.choice((0, 1, 1, 2)),
        head_dim=rng.choice((1, 3, 8, 20, 33)),
        value_dim=rng.choice((None, None, 0, 1, 17)),
        scale=rng.choice((None, None, 0.0, -0.5, 1.3)),
        mask=rng.random() < 0.3,
        additional=rng.choice((None, None, 0, 1, 5)),
        packed=False,
    )


def lay_out(rng, tensor):
    """The tensor in other strides: transposed, sliced at an offset, stepped over, or one entry repeated."""
    if tensor is None or tensor.numel() == 0:
        return tensor
    dim, kind = rng.randrange(tensor.dim()), rng.randrange(6)
    if kind == 0:
        return tensor.transpose(dim, -1).contiguous().transpose(dim, -1)
    if kind == 1:
        return torch.cat([tensor] * 3, dim).narrow(dim, tensor.shape[dim], tensor.shape[dim])
    if kind == 2:
        return tensor.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    return tensor.narrow(dim, 0, 1).expand_as(tensor) if kind == 3 else tensor


def draw_call(rng, problem, route, dtype):
    """The keyword arguments of a valid call."""
    inputs = problem.make(dtype, seed=rng.randrange(1000))
    if inputs.rpb is not None and dtype.itemsize == 2 and rng.random() < 0.5:
        inputs = inputs._replace(rpb=inputs.rpb.float())
    call = {name: lay_out(rng, tensor) for name, tensor in zip(Inputs._fields, inputs)}
    call.update(zip(LISTS, problem.lists()), scale=problem.scale)
    if route != "composite":
        call.update(zip(BOXES, map(list, problem.boxes())))
    if route in ("primitive", "backward"):
        call["backend"] = rng.randint(0, 1)
    if route == "backward":
        saved = torch.ops.natten.neighborhood_attention_lse(**call)
        grads = [lay_out(rng, torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype)) for t in saved]
        if rng.random() < 0.5:
            grads[rng.randrange(2)] = None
        call.update(zip(SAVED, (*grads, *saved)), needed=[rng.random() < 0.8 for _ in GRADIENTS], deterministic=True)
    return call


def resized(rng, tensor):
    """A tensor of another shape or dtype."""
    dim, kind = rng.randrange(tensor.dim() or 1), rng.randrange(6)
    if kind == 0 and tensor.dim():
        return tensor.narrow(dim, 0, min(tensor.shape[dim], 1)).squeeze(dim)
    if kind == 1:
        return tensor.to(rng.choice((torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.float64)))
    if kind == 2 or not tensor.dim():
        return tensor[None]
    return tensor.transpose(dim, -1) if kind == 3 else grown(tensor, {dim: rng.choice((0, 1, 9, 2**40, 2**61))})


def grown(tensor, sizes):
    """Other sizes of some dims, without memory for them; the same tensor where there is no such one."""
    shape = list(tensor.shape)
    for dim, size in sizes.items():
        shape[dim] = size
    with contextlib.suppress(RuntimeError):  # more elements than an int64 counts
        return tensor.new_zeros([int(n > 0) for n in shape]).expand(shape)
    return tensor


def change(rng, call):
    """One absurd change of a call, in place."""
    present = [name for name in (*Inputs._fields, *SAVED) if call.get(name) is not None]
    name = rng.choice([name for name in (*LISTS, *BOXES) if call.get(name)] or ["scale"])
    kind = rng.choice(("entry", "entry", "box", "length", "tensor", "tensor", "absent", "scale", "other", "grow"))
    if kind == "entry" and name != "scale":
        entry = rng.choice((*ABSURD, *range(1, 10)))
        call[name][rng.randrange(len(call[name]))] = bool(entry % 2) if name == "is_causal" else entry
    elif kind == "box" and all(call.get(name) for name in BOXES):  # far out, or with products that overflow
        far, axis, root = rng.choice((*HUGE, 7)), rng.randrange(min(len(call[name]) for name in BOXES)), 2**32
        for name in BOXES:
            call[name][axis] += far
        if rng.random() < 0.3 and axis < min(len(call["kernel_size"]), len(call["dilation"])):
            call["kernel_size"][axis] = call["dilation"][axis] = root
    elif kind == "length" and name != "scale":
        call[name] = rng.choice(([], call[name][:-1], [*call[name], 1], [1] * 7))
    elif kind == "tensor":
        name = rng.choice(present)
        call[name] = resized(rng, call[name])
    elif kind == "absent":
        call[rng.choice(present)] = None
    elif kind == "grow":
        dim, size = rng.choice((0, 1, -2, -1)), rng.choice((2**40, 2**60, 2**61))
        sizes = {dim: size, **rng.choice(({}, {0: 0}, {-2: 0}))}
        for name in {"query", "key", *(() if dim == -1 else ("value", *SAVED[:3]))} & set(present):
            call[name] = grown(call[name], sizes)
    elif "backend" in call and rng.random() < 0.5:
        call["backend"] = rng.choice((-1, 2, *HUGE))
    elif "needed" in call:
        call["needed"] = rng.choice(([], [True], [True] * 5, [True] * 7, [False] * 100))
    else:
        call["scale"] = rng.choice((math.nan, math.inf, -math.inf, 1e300, 2**62))


def crafted(seed):
    """Calls that once crashed or hung: scratch and products beyond int64, a walk over the tokens of an empty batch."""
    one, far, empty = torch.zeros(1, 1, 1, 1), 2**62, torch.zeros(0, 1, 1, 1).expand(0, 2**40, 1, 1)
    wide, row, whole = one.expand(1, 1, 1, 2**61), torch.zeros(1, 4, 1, 1), {"extent": [2**40], "dilation": [2**39]}
    plain = dict.fromkeys(Inputs._fields) | {name: [1] for name in LISTS} | {"is_causal": [False], "scale": None}
    plain |= {"query": empty, "key": empty, "value": empty, **dict.fromkeys(BOXES, [0])}
    head = plain | {"query": wide, "key": wide, "value": one, **dict.fromkeys(BOXES, [])}
    saved = dict(zip(SAVED, (one, None, one, one[0]))) | {"needed": [i == 2 for i in range(6)], "deterministic": True}
    grid = {"kernel_size": [2**32], "dilation": [2**32], **dict(zip(BOXES, ([far - 1], [far - 4], [far])))}
    return [
        ("functional", head),
        ("backward", head | saved | {"backend": 0}),
        ("primitive", plain | {"query": one, "key": row, "value": row} | grid),
        ("primitive", plain | whole),
        ("functional", plain | whole),
    ][-1 - seed]


def run(route, rank, call):
    """What the library returns, by name."""
    if route == "primitive":
        return dict(zip(("out", "lse"), torch.ops.natten.neighborhood_attention_lse(**call)))
    if route == "composite":
        return {"out": getattr(torch.ops.natten, f"na{rank}d")(**call)}
    if route == "functional":
        return dict(zip(("out", "lse"), natten_ops.neighborhood_attention(**call, return_lse=True)))
    if route == "backward":
        grads = torch.ops.natten.neighborhood_attention_lse_backward(**call)
        return {f"grad_{n}": g for n, g, need in zip(GRADIENTS, grads, call["needed"]) if need and call[n] is not None}
    leaves = {name: call[name].detach().requires_grad_() for name in GRADIENTS if call[name] is not None}
    saved = natten_ops.neighborhood_attention(**{**call, **leaves}, return_lse=True)
    grads = torch.autograd.grad(saved, list(leaves.values()), [torch.ones_like(t) for t in saved])
    return dict(zip(("out", "lse", *(f"grad_{name}" for name in leaves)), (*(t.detach() for t in saved), *grads)))


def expected(route, rank, call):
    """The same by the reference; raises where the checks in Python refuse what the library accepted."""
    inputs, scale = Inputs(*(call[name] for name in Inputs._fields)), call["scale"]
    lists = [call[name] * rank if len(call[name]) == 1 and route == "composite" else call[name] for name in LISTS]
    params, box = Settings(*lists, scale, *(call.get(name, ()) for name in BOXES)).geometry()
    check_inputs(inputs, params, box)
    if max(math.prod(params.kernel_size), *inputs.query.shape, *inputs.key.shape) > MANY or not abs(scale or 0) < 10:
        return {}
    inputs = in_double(inputs)
    result = dict(zip(("out", "lse"), reference.forward(inputs, params, box, scale)))
    grads = [torch.ones_like(t) for t in result.values()]
    if route == "backward":
        grads = [None if call[name] is None else call[name].double() for name in SAVED[:2]]
    gradients = reference.backward(*grads, inputs, params, box, scale)
    return result | {f"grad_{name}": getattr(gradients, name) for name in GRADIENTS}


def compare(have, want, tolerance):
    """What differs, or None."""
    for name in (name for name in have if name in want):
        got, goal = have[name].double(), want[name]
        bound = tolerance * (1 + max(goal[torch.isfinite(goal)].abs().flatten().tolist(), default=0))
        if got.shape != goal.shape or not torch.allclose(got, goal, rtol=0, atol=bound, equal_nan=True):
            return f"{name} {list(got.shape)} differs from {list(goal.shape)} by more than {bound:.1e}"
    return None


def poisoned(rng, call):
    """A call with a NaN or inf somewhere, and the results that are still to be compared."""
    name, number = rng.choice(("query", "key", "value")), rng.choice((math.nan, math.nan, math.inf, -math.inf))
    poison = call[name].clone()
    poison[tuple(rng.randrange(length) for length in poison.shape)] = number
    compared = () if number == number else ("lse",) if name == "value" else ("out", "lse")
    return call | {name: poison}, compared


def judge(seed):
    """Run one case: (numbers, refused or ran; what is wrong or None)."""
    rng = random.Random(seed)
    route, dtype = rng.choice(ROUTES), rng.choice(DTYPES)
    problem, changes = draw_problem(rng, route), rng.choice((0, 0, 1, 1, 2))
    call, compared = draw_call(rng, problem, route, dtype), RESULTS
    if changes == 0 and rng.random() < 0.3 and all(call[name].numel() for name in ("query", "key", "value")):
        call, compared = poisoned(rng, call)
    for _ in range(changes):
        with contextlib.suppress(RuntimeError):  # no memory for the tensor of the change
            change(rng, call)
    if seed < 0:
        (route, call), problem, changes = crafted(seed), Problem((1,), (1,)), 1
    try:
        have = run(route, problem.rank, call)
        if route == "backward" and changes:  # out and lse belonged to the unchanged call
            forward = {k: call[k] for k in (*Inputs._fields, *LISTS, *BOXES, "scale")}
            call.update(run("primitive", problem.rank, forward))
            have = run(route, problem.rank, call)
    except Exception as error:
        clean = changes > 0 and isinstance(error, CLEAN) and len(str(error)) > 10
        return "refused", None if clean else f"{type(error).__name__}: {error}"[:300]
    try:
        want = expected(route, problem.rank, call)
    except Exception as error:
        return "ran", f"accepted, though {type(error).__name__}: {error}"[:300]
    tol = TOLERANCE[call["query"].dtype]
    return "numbers" if want else "ran", compare(have, {k: want[k] for k in want if k in compared}, tol)


def verdicts_of(first, count, timeout):
    """(seed, verdict, what is wrong) of a child's cases; a crash or hang is the verdict of the seed where it happened."""
    command = [sys.executable, os.path.abspath(__file__), str(first), str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()[0], f"hung: {timeout} s are over"
    verdicts = [tuple(json.loads(line)) for line in out.splitlines() if line.endswith("]")]
    crash = (first + len(verdicts), "crashed", f"exit code {process.returncode} {errors[-300:]}")
    return verdicts if len(verdicts) == count else [*verdicts, crash]


def fuzz(parts, timeout):
    """The verdicts of all seeds; fails with one line of reproduction per bad one."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lists = pool.map(lambda part: verdicts_of(*part, timeout), parts)
    verdicts = [verdict for verdicts in lists for verdict in verdicts]
    bad = [f"python tests/test_fuzz.py {seed}   # {verdict}: {wrong}" for seed, verdict, wrong in verdicts if wrong]
    assert not bad, "\n" + "\n".join(bad)
    return [verdict for _, verdict, _ in verdicts]


def test_random_calls_end_with_numbers_or_a_clean_exception():
    kinds = fuzz([(i * 600, 600) for i in range(4)], timeout=120)
    assert kinds.count("numbers") > 800 and kinds.count("refused") > 800


def test_calls_that_once_crashed_or_hung():
    assert len(fuzz([(seed, 1) for seed in range(-5, 0)], timeout=30)) == 5


@pytest.mark.slow
def test_many_random_calls_end_with_numbers_or_a_clean_exception():
    fuzz([(i * 1_000, 1_000) for i in range(20)], timeout=600)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)  # the children share the machine
    first_seed, cases = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for number in range(first_seed, first_seed + cases):
        print(json.dumps([number, *judge(number)]), flush=True)
