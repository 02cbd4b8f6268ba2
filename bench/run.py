# SPDX-License-Identifier: MIT
"""Times the cases, contenders interleaved in one process, and writes CSV rows; ratios are what counts.

python -m bench.run                                    every case of the CPU suite
python -m bench.run headline dilated                   the cases whose names begin with a word
python -m bench.run scaling threads                    the cost of a pixel by size; the gain of threads
python -m bench.run calls --threads 1                  what a small call costs beside its kernel
python -m bench.run --suite smoke --out rows.csv       two cases, to a file
python -m bench.run --suite gpu                        large cases in bfloat16 on a CUDA device; sgemm is its bfloat16 product
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, SCALING, SUITES, Case
from bench.contenders import calls, check, contenders, copy, matmul, ours

FIELDS = (
    "case", "backend", "pass", "p20_ms", "p50_ms", "p80_ms", "bytes", "flops", "of_sgemm", "times_natten_ops",
    "threads", "device", "torch", "commit",
)  # fmt: skip
# A contender runs for this long at a time: after another one the machine needs some 10 ms to reach its speed again.
BLOCK_SECONDS = 0.025


def interleave(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    block_seconds: float = BLOCK_SECONDS,
    finish: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of a call of each contender, in blocks of calls, one block of each in every round.

    `finish` waits for the device at the end of a block.
    """
    repeats: dict[str, int] = {}
    for name, function in functions.items():
        for _ in range(2):  # the second call tells: the first compiles
            start = clock()
            function()
            finish()
            once = clock() - start
        repeats[name] = max(1, round(block_seconds / max(once, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            for _ in range(repeats[name]):
                function()
            finish()
            times[name].append(1e3 * (clock() - start) / repeats[name])
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round: what disturbs both cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def rows_of(
    case: Case, kind: str, times: dict[str, list[float]], yardstick_flops: int, commit: str
) -> Iterator[dict[str, Any]]:
    inputs, work = case.inputs(), case.work(kind)
    tensors = sum(t.nbytes for t in inputs[:3]) + inputs.query.nbytes
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
            "bytes": tensors * (1 if kind == "forward" else 2),
            "flops": work,
            "of_sgemm": f"{median_ratio(times['sgemm'], milliseconds) * work / yardstick_flops:.3f}",
            "times_natten_ops": f"{median_ratio(milliseconds, times['natten_ops']):.2f}",
            "threads": torch.get_num_threads(),
            "device": device_name(case.device),
            "torch": torch.__version__,
            "commit": commit,
        }


def time_case(case: Case, options: argparse.Namespace, commit: str) -> Iterator[dict[str, Any]]:
    inputs = case.inputs()
    clock = time.thread_time if options.clock == "thread" else time.perf_counter
    yardstick, yardstick_flops = matmul(case.device)
    finish = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    for kind in options.passes:
        found = contenders(case, inputs, kind, not options.ours)
        if kind == "forward":
            check(case, inputs, found)
        functions = {**calls(case, kind, found, inputs), "copy": copy(inputs), "sgemm": yardstick}
        times = interleave(functions, options.rounds, clock, finish=finish)
        yield from rows_of(case, kind, times, yardstick_flops, commit)


# An output above 32 MB comes from fresh pages at every call: 185 ns a pixel at 448x448 (measured with torch.empty and
# fill_), a fifth of the call. That is the allocator's cost, not the kernel's, so large outputs keep their pages.
KEEP_PAGES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"


def scaling(rounds: int) -> Iterator[str]:
    """Cost of a pixel at each size over that of the smallest, all sizes interleaved."""
    functions = {}
    for case in SCALING:
        inputs = case.inputs()
        functions[case.name] = functools.partial(ours(case, inputs, None), *inputs[:3])
    times = interleave(functions, rounds)
    smallest = SCALING[0]
    for case in SCALING:
        ratio = median_ratio(times[case.name], times[smallest.name]) * smallest.tokens / case.tokens
        yield f"{case.name}: cost of a pixel {ratio:.3f} of that at {smallest.spatial[0]}x{smallest.spatial[1]}"


def threads(rounds: int) -> Iterator[str]:
    """What a second thread (and all of them) gains: ours and sgemm, interleaved."""
    most = torch.get_num_threads()

    def with_threads(count: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            torch.set_num_threads(count)
            return function()

        return call

    for case in CASES[:4]:
        inputs = case.inputs()
        work = {"natten_ops": functools.partial(ours(case, inputs, None), *inputs[:3]), "sgemm": matmul()[0]}
        functions = {f"{name} {n}": with_threads(n, call) for name, call in work.items() for n in (1, most)}
        times = interleave(functions, rounds)
        gains = [f"{name} {median_ratio(times[f'{name} 1'], times[f'{name} {most}']):.2f}" for name in work]
        yield f"{case.name}: {most} threads gain {', '.join(gains)}"
    torch.set_num_threads(most)


def call_costs(rounds: int) -> Iterator[str]:
    """Microseconds of a call on 14x14 tokens, and without its kernel, whose time is what one more sample adds."""
    case = next(case for case in CASES if case.name == "small")
    many = 64
    query, key, value = case.inputs()[:3]
    batch = [t.expand(many + 1, *t.shape[1:]).contiguous() for t in (query, key, value)]
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    op, lists = torch.ops.natten.neighborhood_attention_lse.default, [list(entry) for entry in case.params]

    def raw(*tensors: Any) -> Any:
        with torch.inference_mode():
            return op(*tensors, *lists)

    functional = ours(case, case.inputs(), None)
    functions: dict[str, Callable[[], Any]] = {
        "raw": functools.partial(raw, query, key, value),
        "functional": functools.partial(torch.no_grad()(functional), query, key, value),
        "recording gradients": functools.partial(functional, *leaves),
        "batch": functools.partial(raw, *batch),
    }
    times = interleave(functions, rounds)
    kernel = statistics.median((b - a) / many for a, b in zip(times["raw"], times["batch"]))
    yield f"kernel: {1e3 * kernel:.1f} us"
    for name in list(functions)[:3]:
        whole = statistics.median(times[name])
        yield f"{name}: {1e3 * whole:.1f} us a call, {1e3 * (whole - kernel):.1f} without the kernel"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    bits = 8 * torch.ops.natten._cpu_vector_bytes()
    return f"{models[0] if models else 'cpu'} ({bits}-bit vectors)"


def current_commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of case names; all if none")
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "thread"], default="wall", help="thread: CPU time, for one thread")
    parser.add_argument("--passes", nargs="*", default=["forward", "training"], choices=["forward", "training"])
    parser.add_argument("--ours", action="store_true", help="our backends only")
    parser.add_argument("--out", type=Path, help="CSV file; the screen if absent")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if os.environ.get("GLIBC_TUNABLES") != KEEP_PAGES:  # read by the C library at start only
        os.execve(
            sys.executable,
            [sys.executable, "-m", "bench.run", *sys.argv[1:]],
            {**os.environ, "GLIBC_TUNABLES": KEEP_PAGES},
        )
    torch.set_num_threads(options.threads)
    if options.suite == "gpu" and not torch.cuda.is_available():
        sys.exit("--suite gpu needs a CUDA device, and torch finds none here")

    def wanted(name: str) -> bool:
        return not options.cases or any(name.startswith(word) for word in options.cases)

    commit = current_commit()
    stream = options.out.open("w", newline="") if options.out else sys.stdout
    writer = csv.DictWriter(stream, FIELDS)
    writer.writeheader()
    cases = [case for case in SUITES[options.suite] if wanted(case.name)]
    for number, case in enumerate(cases, start=1):
        print(f"{number}/{len(cases)} {case.name}", file=sys.stderr)
        for row in time_case(case, options, commit):
            writer.writerow(row)
            stream.flush()
    for name, report in (("scaling", scaling), ("threads", threads), ("calls", call_costs)):
        if name in options.cases:
            for line in report(max(5, options.rounds // 3)):
                print(line)


if __name__ == "__main__":
    main()
