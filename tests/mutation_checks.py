# SPDX-License-Identifier: MIT
"""What a mutation of a CUDA path must fail: fixed, quick sets of checks against the reference.

`python tests/mutation_checks.py LIBRARY PATH` runs those of a path (general, tiles or hopper) on a library of emulated ops; its
exit status is 0 if all hold, and FAILED if one does not.
"""

import ctypes
import dataclasses
import functools
import math
import sys
from typing import Any

import emulated
import pytest
import test_cuda_hopper
import torch
from emulated import GRADIENTS
from halves import Halves, av, finite, halved, in_double, make, present, qk, replaced
from samples import EMPTY, NAMED, Problem, expected
from samples import in_double as inputs_in_double
from torch import Tensor

from natten_ops import backends, reference
from natten_ops.reference import Inputs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3}
OF_TF32 = 4e-3
FAILED = 3  # unlike the status of a script that could not run
GENERAL, MMA, TF32, WGMMA = (
    backends.by_name(name).id for name in ("cuda-general", "cuda-mma", "cuda-mma-tf32", "cuda-wgmma")
)


class AllKeys(Problem):
    """A sub-box of the queries beside all keys, most of which no query of it sees."""

    def key_range(self) -> list[tuple[int, int]]:
        return [(0, length) for length in self.spatial]


EXTRA = {
    # Windows of more than 32 keys, and keys seen by more than 32 queries.
    "chunks": Problem((6, 9), (5, 8), batch=1, head_dim=6, value_dim=5, rpb=True, mask=True, additional=5),
    "chunks_of_volume": Problem(
        (4, 4, 7), (3, 4, 5), is_causal=(True, False, False), batch=1, head_dim=3, additional=2
    ),
    # Parts of more than 32 queries.
    "parts": Problem((600,), (3,), batch=1, heads=1, head_dim=3, rpb=True, additional=1),
    "groups": Problem((5, 6), (3, 3), heads=6, group=3, head_dim=4, rpb=True, additional=3),
    "biased_box": Problem(
        (12, 10), (5, 3), dilation=(2, 1), box=((3, 4), (5, 4)), rpb=True, mask=True, additional=2, head_dim=4
    ),
    "odd_box": Problem((13, 11), (3, 4), stride=(2, 1), dilation=(3, 2), box=((4, 3), (4, 5)), head_dim=4),
    "far_keys": AllKeys((12, 10), (3, 3), dilation=(2, 1), box=((1, 2), (2, 3)), rpb=True, additional=1, head_dim=4),
    "far_keys_before": AllKeys((12, 10), (3, 3), dilation=(1, 2), box=((9, 7), (3, 3)), rpb=True, head_dim=4),
    "dead_rows": Problem((6, 5), (2, 1), mask=True),
    "long_keys": Problem((5, 4), (3, 2), head_dim=300, value_dim=80, batch=1, rpb=True, mask=True, additional=1),
    "long_values": Problem((5, 4), (3, 2), head_dim=80, value_dim=300, batch=1, rpb=True, mask=True, additional=1),
    "no_value_dim": EMPTY["no_value_dim"],
    "no_additional": EMPTY["no_additional"],
}
PROBLEMS = {**NAMED, **EXTRA}
# Problems whose windows, slots and tables differ once masks, boxes and groups are left out.
IN_HALVES = ("line", "line_full", "dilated", "strided", "biased", "masked", "everything", "volume", "long_keys",
             "chunks", "chunks_of_volume", "parts")  # fmt: skip


# ---- comparisons -----------------------------------------------------------------------------------------------------
def draw(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def assert_near(have: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Within the tolerance of the largest number; NaN and infinity where they are wanted and nowhere else."""
    numbers = want[torch.isfinite(want)].abs()
    scale = max(numbers.max().item(), 1.0) if numbers.numel() else 1.0
    torch.testing.assert_close(
        have.double(), want.double(), rtol=0, atol=scale * tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def check_fused(
    inputs: Inputs,
    problem: Problem,
    exact: Inputs | None = None,
    grads: tuple[Tensor | None, Tensor | None] | None = None,
    backend: int = GENERAL,
) -> None:
    """Outputs and all gradients; `exact` has the inputs for the reference if they are not the same."""
    tolerance = OF_TF32 if backend == TF32 else TOLERANCE[inputs.query.dtype]
    of_lse = TOLERANCE[torch.float32] if backend == MMA else tolerance
    exact = inputs_in_double(inputs) if exact is None else exact
    saved = emulated.forward(inputs, problem, backend)
    for name, have, want, near in zip(("out", "lse"), saved, expected(exact, problem), (tolerance, of_lse)):
        assert_near(have, want, near, name)
    if grads is None:
        grads = draw(saved[0].shape, saved[0].dtype), draw(saved[1].shape, saved[1].dtype)
    doubles = [None if grad is None else grad.double() for grad in grads]
    wanted = reference.backward(*doubles, exact, *problem.geometry(), problem.scale)
    for name, have in zip(GRADIENTS, emulated.backward(grads, saved, inputs, problem, backend=backend)):
        want = getattr(wanted, name)
        if want is not None:
            assert_near(have, want, tolerance, f"gradient of {name}")


def check_problem(problem: Problem, dtype: torch.dtype = torch.float32) -> None:
    check_fused(problem.make(dtype), problem)


def check_halves(problem: Problem) -> None:
    """Both ops and their gradients; slots that a query does not see hold NaN."""
    problem = halved(problem)
    halves = make(problem, torch.float32)
    exact = in_double(halves)
    leaves = [t.requires_grad_() for t in present(exact)]
    exact = replaced(exact, leaves)
    logits = qk(exact, problem, reference)
    hidden = logits == -math.inf
    poisoned = halves._replace(attn=poison(halves.attn, hidden))
    check_qk(poisoned, problem, exact, logits, hidden)
    check_av(poisoned, problem, exact)


def check_qk(halves: Halves, problem: Problem, exact: Halves, logits: Tensor, hidden: Tensor) -> None:
    tokens, lists = (halves.query, halves.key), problem.lists()
    extras = {"rpb": halves.rpb, "additional_keys": halves.additional_keys}
    assert_near(emulated.call("na_qk", *tokens, *lists, **extras)[0], logits.detach(), 2e-5, "logits")
    grad = draw(logits.shape, torch.float64)
    poisoned = turned(poison(grad.float(), hidden))
    have = emulated.call("na_qk_backward", poisoned, *tokens, *lists, *extras.values(), [True] * 4)
    compare_gradients(have, (exact.query, exact.key, exact.rpb, exact.additional_keys), finite(logits), grad)


def check_av(halves: Halves, problem: Problem, exact: Halves) -> None:
    arguments = (halves.attn, halves.value, *problem.lists())
    out = av(exact, problem, reference)
    have = emulated.call("na_av", *arguments, additional_values=halves.additional_values)[0]
    assert_near(have, out.detach(), 2e-5, "sums")
    grad = draw(out.shape, torch.float64)
    gradients = emulated.call("na_av_backward", grad.float(), *arguments, halves.additional_values, [True] * 3)
    compare_gradients(gradients, (exact.attn, exact.value, exact.additional_values), out, grad)


def compare_gradients(have: tuple[Tensor, ...], leaves: tuple[Tensor | None, ...], out: Tensor, grad: Tensor) -> None:
    there = [leaf for leaf in leaves if leaf is not None]
    wanted = iter(torch.autograd.grad(out, there, grad, retain_graph=True))
    for gradient, leaf in zip(have, leaves):
        if leaf is not None:
            assert_near(gradient, next(wanted), 2e-5, "gradient of a half")


# ---- the same numbers elsewhere in memory ----------------------------------------------------------------------------
def moved(tensor: Tensor, shift: int = 0, axis: int | None = None) -> Tensor:
    """Rows that begin at multiples of 16 bytes, `shift` numbers further, or one more number apart along one axis."""
    strides, step = [1], tensor.shape[-1]
    for i in reversed(range(tensor.dim() - 1)):
        step = -(-step // 8) * 8 + (i == axis)
        strides.insert(0, step)
        step *= tensor.shape[i]
    storage = torch.full((step + shift + 8,), math.nan, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, strides, shift).copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """The last dim is not the densest."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def check_steps() -> None:
    """Rows where threads can load 16 bytes at once, and where one address or step alone forbids it."""
    problem = Problem((4, 5), (2, 3), head_dim=6, value_dim=5, mask=True, additional=2)
    inputs = problem.make(torch.float32)
    tokens = {name: getattr(inputs, name) for name in GRADIENTS if name != "rpb"}
    aligned = inputs._replace(**{name: moved(tensor) for name, tensor in tokens.items()})
    grad_lse = draw(inputs.query.shape[:-1], torch.float32)
    grad = draw(grad_lse.shape + (5,), torch.float32)
    variants = [aligned._replace(query=moved(inputs.query, axis=axis)) for axis in range(inputs.query.dim() - 1)]
    variants += [aligned._replace(**{name: moved(tensor, shift=1)}) for name, tensor in tokens.items()]
    for variant in (aligned, *variants):
        check_fused(variant, problem, grads=(moved(grad), grad_lse))
    for other in (moved(grad, shift=1), turned(grad), torch.ones(()).expand(grad.shape), None):
        check_fused(aligned, problem, grads=(other, grad_lse))
    check_fused(aligned, problem, grads=(grad, None))


def check_turned() -> None:
    """One tensor after another, with more than 32 slots: keys and additional tokens then differ in their steps."""
    problem = dataclasses.replace(EXTRA["chunks"], spatial=(5, 8))
    inputs = problem.make(torch.float32)
    for name in GRADIENTS:
        if name != "rpb":
            check_fused(inputs._replace(**{name: turned(getattr(inputs, name))}), problem)
    check_fused(inputs._replace(key_mask=turned(inputs.key_mask)), problem)


# ---- numbers that are none -------------------------------------------------------------------------------------------
def poison(tensor: Tensor, hidden: Tensor) -> Tensor:
    """NaN in these places, in memory of the same steps."""
    return tensor.clone().masked_fill_(hidden, math.nan)


def check_masked_chunks() -> None:
    """Of three chunks of 32 keys one has none that is seen."""
    problem = Problem((96,), (96,), batch=1, heads=1, head_dim=4, mask=True)
    inputs = problem.make(torch.float32)
    for chunk in range(3):
        inputs.key_mask[:] = torch.arange(96) // 32 != chunk
        check_fused(inputs, problem)


def check_poison(name: str) -> None:
    """NaN in masked tokens reaches nothing; their gradients are zero."""
    inputs = PROBLEMS[name].make(torch.float32)
    assert inputs.key_mask is not None
    hidden = ~inputs.key_mask[..., None, None]
    poisoned = inputs._replace(key=poison(inputs.key, hidden), value=poison(inputs.value, hidden))
    check_fused(poisoned, PROBLEMS[name], exact=inputs_in_double(inputs))


def check_nan_that_is_seen() -> None:
    """It reaches all that sees it, and nothing else."""
    problem = NAMED["plain"]
    inputs = problem.make(torch.float32)
    inputs.query[0, 3, 4, 1, 2] = math.nan
    check_fused(inputs, problem)


def check_infinite_bias() -> None:
    """Rows of -inf alone are as dead as those whose keys are masked, whatever the gradient of their log-sum-exp is."""
    problem = dataclasses.replace(NAMED["biased"], is_causal=(True, True))
    inputs = problem.make(torch.float32)
    inputs.rpb[0, :, 2:] = -math.inf
    check_fused(inputs, problem)
    saved = emulated.forward(inputs, problem, GENERAL)
    dead = saved[1] == -math.inf
    assert dead.any()
    grad, grad_lse = draw(saved[0].shape, torch.float32), draw(saved[1].shape, torch.float32)
    clean, dirty = (
        emulated.backward((grad, grad_lse.masked_fill(dead, number)), saved, inputs, problem, backend=GENERAL)
        for number in (0, math.nan)
    )
    assert all(map(torch.equal, dirty, clean)), "NaN from a dead row"


# ---- gradients that are not asked for ----------------------------------------------------------------------------------
def check_needed(problem: Problem, dtype: torch.dtype = torch.float32, backend: int = GENERAL) -> None:
    inputs = problem.make(dtype)
    saved = emulated.forward(inputs, problem, backend)
    grads = draw(saved[0].shape, dtype), draw(saved[1].shape, torch.float32)
    whole = emulated.backward(grads, saved, inputs, problem, backend=backend)
    for i, name in enumerate(GRADIENTS):
        needed = [other == name for other in GRADIENTS]
        alone = emulated.backward(grads, saved, inputs, problem, needed, backend)
        assert torch.equal(alone[i], whole[i]), name
        assert all(other.numel() == 0 for other in alone[:i] + alone[i + 1 :])


def check_wide_table(problem: Problem, backend: int = GENERAL) -> None:
    inputs = problem.make(torch.float16)
    check_fused(inputs._replace(rpb=problem.make(torch.float32).rpb), problem, backend=backend)


OF_GENERAL = {
    **{f"fused {name}": functools.partial(check_problem, problem) for name, problem in PROBLEMS.items()},
    **{f"halves {name}": functools.partial(check_halves, PROBLEMS[name]) for name in IN_HALVES},
    "float64": functools.partial(check_problem, NAMED["everything"], torch.float64),
    "float16": functools.partial(check_problem, NAMED["everything"], torch.float16),
    "wide table": functools.partial(check_wide_table, NAMED["everything"]),
    **{
        f"poison {name}": functools.partial(check_poison, name)
        for name in ("masked", "chunks", "biased_box", "dead_rows")
    },
    "masked chunks": check_masked_chunks,
    "seen NaN": check_nan_that_is_seen,
    "infinite bias": check_infinite_bias,
    "needed": functools.partial(check_needed, NAMED["everything"]),
    "steps": check_steps,
    "turned": check_turned,
}


# ---- tensor cores ------------------------------------------------------------------------------------------------------
# Row tiles of 64 tokens, boxes of 64 or 32: several of each, at borders, in part, and boxes that need no mask.
TILES = {
    # Keys that no query sees: no box of queries is between the copies of their rows, by all warps, and their results.
    "unseen_keys": AllKeys((20, 12), (3, 3), batch=1, heads=1, box=((1, 2), (2, 3)), head_dim=32),
    "dead_rows": Problem((6, 5), (2, 1), mask=True),
    "biased_line": Problem((128,), (128,), rpb=True, batch=1, heads=1),  # boxes that would be full
    "causal_line": Problem((320,), (127,), is_causal=(True,), batch=1, heads=1),  # full but for one column
    "masked_line": Problem((128,), (128,), mask=True, batch=1, heads=1),
    "far_keys": AllKeys((24, 20), (3, 3), box=((11, 12), (2, 3)), batch=1, heads=1),
    "short_group": Problem((129,), (3,), dilation=(2,), batch=1, heads=1),  # of two tiles of queries one is empty
    "few_groups": Problem((17, 14), (3, 4), dilation=(4, 2), box=((6, 3), (3, 7)), heads=1),
    "everything": Problem(
        (6, 8), (3, 3), dilation=(2, 1), is_causal=(False, True), heads=4, group=2, head_dim=8, value_dim=24, scale=0.3,
        rpb=True, mask=True, additional=3,
    ),
    "box": Problem((24, 20), (9, 7), dilation=(2, 1), box=((5, 3), (11, 9)), rpb=True, mask=True, heads=1),
    "of_128": Problem((9, 10), (4, 5), batch=1, heads=1, head_dim=128, value_dim=72),
    "line": Problem((290,), (270,), is_causal=(True,), batch=1, heads=1),  # longer than the fields of a word count
    "plain_box": Problem((26, 31), (7, 8), stride=(3, 1), dilation=(2, 3), box=((5, 6), (13, 19)), heads=1),
    "additional": Problem((20,), (3,), heads=2, group=2, additional=150),
    "groups": Problem((13, 11), (3, 4), stride=(2, 1), dilation=(3, 2), heads=4, group=2, head_dim=24, value_dim=8),
    "biased": Problem((14, 13), (9, 8), rpb=True, is_causal=(False, True), batch=1),
    "masked": Problem((14, 13), (9, 8), mask=True, heads=2, group=2),
    "of_256": Problem((70,), (40,), batch=1, heads=1, head_dim=256, value_dim=72, additional=1),
    "volume": Problem((6, 9, 10), (4, 5, 6), is_causal=(True, False, False), batch=1, heads=1),
    "square": Problem((25, 25), (16, 16), batch=1, heads=1, head_dim=16),
}  # fmt: skip
IN_TF32 = ("everything", "groups", "of_128")


def check_tiles(problem: Problem, backend: int = MMA) -> None:
    """NaN in masked tokens, where there are some, reaches nothing."""
    inputs = problem.make(torch.float32 if backend == TF32 else torch.float16)
    poisoned = inputs
    if inputs.key_mask is not None:
        hidden = ~inputs.key_mask[..., None, None]
        poisoned = inputs._replace(key=poison(inputs.key, hidden), value=poison(inputs.value, hidden))
    check_fused(poisoned, problem, exact=inputs_in_double(inputs), backend=backend)


OF_TILES = {
    **{f"tiles {name}": functools.partial(check_tiles, problem) for name, problem in TILES.items()},
    **{f"tf32 {name}": functools.partial(check_tiles, TILES[name], TF32) for name in IN_TF32},
    "tiles wide table": functools.partial(check_wide_table, TILES["biased_line"], MMA),
    "tiles needed": functools.partial(check_needed, TILES["biased_line"], torch.float16, MMA),
}


# ---- Hopper ------------------------------------------------------------------------------------------------------------
# More boxes than stages, boxes with free slots, at borders, in part, and seen whole.
BOXES = {
    "line": Problem((300,), (270,), batch=1, heads=1),
    "causal": Problem((200,), (90,), is_causal=(True,), batch=1, heads=1),
    "far": Problem((300,), (40,), dilation=(7,), batch=1, heads=1),
    "square": Problem((25, 25), (16, 16), batch=1, heads=1),
    "short_group": TILES["short_group"],
    "volume": Problem((5, 6, 7), (3, 4, 3), dilation=(1, 1, 2), batch=1, heads=1),
    "sparse": Problem((1, 40, 40), (1, 12, 12), batch=1, heads=1),  # of some boxes half of a tile of 128 sees nothing
    "plain_box": Problem((20, 31), (5, 8), dilation=(2, 3), box=((5, 6), (9, 19)), heads=2, group=2, batch=1),
    "packed": Problem((9, 7), (3, 5), heads=4, group=2, packed=True),
}


def check_boxes(problem: Problem, dtype: torch.dtype = torch.float16, place: str = "heads last") -> None:
    inputs = test_cuda_hopper.PLACES[place](problem.make(dtype))
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    saved = emulated.forward(inputs, problem, WGMMA)
    for name, have, want, near in zip(("out", "lse"), saved, expected(inputs, problem), (tolerance, 2e-5)):
        assert_near(have, want, near, name)


def boxes(name: str, head_dim: int, **more: Any) -> functools.partial[None]:
    return functools.partial(check_boxes, test_cuda_hopper.fitting(BOXES[name], head_dim), **more)


OF_HOPPER = {
    **{f"boxes {name}": boxes(name, 64) for name in BOXES},
    **{
        f"long boxes {name}": boxes(name, 128)
        for name in ("line", "causal", "square", "short_group", "sparse", "packed")
    },
    **{f"boxes {place}": boxes("packed", 64, place=place) for place in ("heads first", "spread")},
    "bfloat16": boxes("packed", 64, dtype=torch.bfloat16),
    **{
        f"refused {name}": functools.partial(
            test_cuda_hopper.test_the_kernels_and_the_record_refuse_for_the_same_reason, name
        )
        for name in test_cuda_hopper.REFUSED
    },
    "devices": test_cuda_hopper.test_dtypes_and_devices,
}
CHECKS = {"general": OF_GENERAL, "tiles": OF_TILES, "hopper": OF_HOPPER}


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    library = ctypes.CDLL(sys.argv[1])
    emulated.library = lambda: library
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN: what a kernel leaves out shows
    for name, check in CHECKS[sys.argv[2]].items():
        try:
            check()
        except (Exception, pytest.fail.Exception) as error:
            print(f"{name}: {error}")
            sys.exit(FAILED)


if __name__ == "__main__":
    main()
