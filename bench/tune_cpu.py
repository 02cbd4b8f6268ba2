# SPDX-License-Identifier: MIT
"""Are the CPU's choices good? The tiling chosen against the best of all, and tiles against the general kernels.

python -m bench.tune_cpu tilings        the bench cases: chosen tiling / best of an exhaustive trial
python -m bench.tune_cpu random         random problems: chosen kernels / general kernels, sorted
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.cases import CASES, Case
from bench.run import interleave, median_ratio
from natten_ops import backends


def tilings(case: Case) -> Iterator[list[int]]:
    """Every tiling worth a trial: queries of a strip, rows of a block, heads together, bytes of a chunk."""
    longest = max(case.spatial)
    strips = [size for size in (16, 32, 64, 128, 256) if size < 2 * longest]
    heads = [n for n in (1, 2, 4) if case.heads % n == 0]
    return (
        list(choice) for choice in itertools.product(strips, (1, 2, 4), heads, (12 << 10, 24 << 10, 48 << 10, 96 << 10))
    )


def compare_tilings(case: Case, rounds: int) -> str:
    inputs = case.inputs()
    lists = [list(entry) for entry in case.params]
    run = functools.partial(torch.ops.natten._cpu_tiled_forward, *inputs[:3], *lists)
    functions: dict[str, Callable[[], Any]] = {"chosen": functools.partial(run, [0, 0, 0, 0])}
    for tiling in tilings(case):
        functions[str(tiling)] = functools.partial(run, tiling)
    quick = {name: statistics.median(times) for name, times in interleave(functions, 2).items()}
    best = sorted((name for name in quick if name != "chosen"), key=quick.__getitem__)[:4]
    times = interleave({name: functions[name] for name in ("chosen", *best)}, rounds)
    ratios = {name: median_ratio(times["chosen"], times[name]) for name in best}
    winner = max(ratios, key=ratios.__getitem__)
    return f"{case.name:14} chosen / best {ratios[winner]:.2f}   best {winner} of {len(quick) - 1}"


def random_case(number: int) -> Case:
    rng = random.Random(number)
    rank = rng.choice((1, 2, 2, 2, 3))
    sizes = {1: (16, 64, 200, 1000), 2: (7, 14, 28, 56), 3: (4, 8, 14)}[rank]
    spatial = tuple(rng.choice(sizes) for _ in range(rank))
    kernel = tuple(rng.randint(1, min(size, {1: 64, 2: 13, 3: 5}[rank])) for size in spatial)
    stride = rng.choice((1, 1, 1, min(kernel)))
    dilation = rng.choice((1, 1, min(size // k for size, k in zip(spatial, kernel))))
    heads, dim = rng.choice((1, 2, 4)), rng.choice((8, 16, 32, 64, 80))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    return Case(f"random_{number}", spatial, heads, dim, kernel, stride, dilation, rng.random() < 0.2, dtype)


def compare_random(count: int, rounds: int) -> Iterator[str]:
    ratios = []
    for number in range(count):
        case = random_case(number)
        arguments = *case.inputs()[:3], *[list(entry) for entry in case.params]
        # The op itself: what functional adds is the same for both, but for the reasons that a named backend asks for.
        run = functools.partial(torch.ops.natten.neighborhood_attention_lse, *arguments)
        kernels = {"chosen": run, "general": functools.partial(run, backend=backends.by_name("cpu-general").id)}
        times = interleave(kernels, rounds)
        ratios.append((median_ratio(times["chosen"], times["general"]), case))
    ratios.sort(key=lambda pair: pair[0])
    values = [ratio for ratio, _ in ratios]
    yield f"{count} problems: median {statistics.median(values):.2f}, worst {values[-1]:.2f}, above 1.1: {sum(v > 1.1 for v in values)}"
    for ratio, case in ratios[-12:]:
        yield f"{ratio:.2f}  {case}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tilings", "random"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "random":
        for line in compare_random(options.count, options.rounds):
            print(line, flush=True)
        return
    for case in CASES:
        if case.plain:
            print(compare_tilings(case, options.rounds), flush=True)


if __name__ == "__main__":
    main()
