# SPDX-License-Identifier: MIT
"""Times the cases, contenders interleaved in one process, and writes CSV rows; ratios are what counts.

python bench/run.py                      every case
python bench/run.py headline scaling     the cases whose names begin with a word
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SCALING, SGEMM_FLOPS, Case, check, forward_contenders, natten, sgemm, training_contenders

from natten_ops import flops

FIELDS = (
    "case", "backend", "pass", "p20_ms", "p50_ms", "p80_ms", "bytes", "flops", "of_sgemm", "times_natten_ops",
    "threads", "device", "torch", "commit",
)  # fmt: skip
_ALL = (True, True, True, False, False, False)


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender, one after the other in every round, the first round dropped.

    Each timed call follows an untimed one of its own: the caches are warm with its data, not with its neighbour's.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, function in contenders.items():
            function()
            start = time.perf_counter()
            function()
            if number:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round: what disturbs both cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def rows_of(case: Case, kind: str, times: dict[str, list[float]], work: float, commit: str) -> Iterator[dict[str, Any]]:
    tensor = 4 * case.tensors()[0].nbytes * (1 if kind == "forward" else 2)
    for name, milliseconds in times.items():
        if name == "sgemm":
            continue
        low, middle, high = (q for q in statistics.quantiles(milliseconds, n=10)[1::3])
        yield {
            "case": case.name,
            "backend": name,
            "pass": kind,
            "p20_ms": f"{low:.3f}",
            "p50_ms": f"{middle:.3f}",
            "p80_ms": f"{high:.3f}",
            "bytes": tensor,
            "flops": int(work),
            "of_sgemm": f"{median_ratio(times['sgemm'], milliseconds) * work / SGEMM_FLOPS:.3f}",
            "times_natten_ops": f"{median_ratio(milliseconds, times['natten_ops']):.2f}",
            "threads": torch.get_num_threads(),
            "device": device_name(),
            "torch": torch.__version__,
            "commit": commit,
        }


def time_case(case: Case, kinds: list[str], rounds: int, commit: str) -> Iterator[dict[str, Any]]:
    tensors = case.tensors()
    shape = tensors[0].shape
    forward = flops.forward_flops(shape, shape, case.params)
    for kind in kinds:
        work = forward if kind == "forward" else 3.5 * forward
        make = forward_contenders if kind == "forward" else training_contenders
        if kind == "forward":
            check(case, tensors, make(case, tensors))
        contenders = {**make(case, tensors), "sgemm": sgemm}
        yield from rows_of(case, kind, interleave(contenders, rounds), work, commit)


# An output above 32 MB comes from fresh pages at every call: 185 ns a pixel at 448x448 (measured with torch.empty and
# fill_), a fifth of the call. That is the allocator's cost, not the kernel's, so the scaling rows keep pages.
KEEP_PAGES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"


def scaling(rounds: int) -> Iterator[str]:
    """Cost of a pixel at each size over that of the smallest, all sizes interleaved."""
    contenders = {}
    for case in SCALING:
        tensors = case.tensors()
        contenders[case.name] = lambda case=case, tensors=tensors: natten(case, *tensors)
    times = interleave(contenders, rounds)
    smallest = SCALING[0]
    for case in SCALING:
        pixels = (case.spatial[0] / smallest.spatial[0]) ** 2
        ratio = median_ratio(times[case.name], times[smallest.name]) / pixels
        yield f"{case.name}: cost of a pixel {ratio:.3f} of that at {smallest.spatial[0]}x{smallest.spatial[1]}"


def device_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    bits = 8 * torch.ops.natten._cpu_vector_bytes()
    return f"{models[0] if models else 'cpu'} ({bits}-bit vectors)"


def current_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of case names; all if none")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--passes", nargs="*", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--out", type=Path, help="CSV file; the screen if absent")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def wanted(name: str) -> bool:
        return not options.cases or any(name.startswith(word) for word in options.cases)

    commit = current_commit()
    stream = options.out.open("w", newline="") if options.out else sys.stdout
    writer = csv.DictWriter(stream, FIELDS)
    writer.writeheader()
    for case in CASES:
        if wanted(case.name):
            for row in time_case(case, options.passes, options.rounds, commit):
                writer.writerow(row)
                stream.flush()
    if wanted("scaling"):
        if os.environ.get("GLIBC_TUNABLES") != KEEP_PAGES:  # read by the C library at start only
            words = ["scaling", "--rounds", str(options.rounds), "--threads", str(options.threads)]
            subprocess.run(
                [sys.executable, __file__, *words], env={**os.environ, "GLIBC_TUNABLES": KEEP_PAGES}, check=True
            )
        else:
            for line in scaling(max(5, options.rounds // 3)):
                print(line)


if __name__ == "__main__":
    main()
