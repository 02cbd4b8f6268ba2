# SPDX-License-Identifier: MIT
"""Everything that a GPU can tell, in one command of less than eight minutes: builds nothing, goes on where it stopped.

python -m bench.gpu --out bench/results/h200.csv

First the tests on the device, then compute-sanitizer on four shapes where it is installed (a file beside --out holds what has
passed for this device, torch and commit, and is not repeated), then every case: ours against
full attention by torch's SDPA, FlexAttention with our block masks, natten where it is installed, and the rate of copies.
A row per case, backend and pass; `of_dense` is useful FLOP/s over those of cuDNN's SDPA at 16,384 tokens of the same head dim and
heads, `of_copy` the bytes of the tensors a second over the rate of a copy. Blocks of calls are interleaved A/B/A, inputs rotate.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import natten_ops
from bench import contenders
from bench.cases import GPU_CASES, Case
from bench.run import current_commit
from natten_ops import backends

FIELDS = ("case", "backend", "pass", "ms", "tflops", "of_dense", "of_copy", "against_ours", "device", "torch", "commit")
ROOT = Path(__file__).parents[1]
SETS = 3  # of inputs, so that no call finds its own in the cache
SHAPES = {
    "line": ((300,), 31, 1),
    "square": ((24, 20), 7, 2),
    "volume": ((6, 10, 9), 3, 1),
    "everything": ((20, 18), 5, 2),
}  # tokens, kernel, dilation
PATHS = (
    (torch.float16, "cuda-mma"),
    (torch.float32, "cuda-mma-tf32"),
    (torch.float32, "cuda-general"),
    (torch.float16, "cuda-wgmma"),
)
SECONDS_OF_CASE = 40.0  # what the first case is expected to take, most of it in FlexAttention's compiler


def seconds_of(function: Callable[[], Any], calls: int) -> float:
    """Of a call, by the device's own clock."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each, a block of some 20 ms of each in every round, forth and back."""
    calls = {}
    for name, function in functions.items():
        seconds_of(function, 1)
        calls[name] = max(1, min(200, int(0.02 / max(seconds_of(function, 2), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            times[name].append(seconds_of(functions[name], calls[name]))
    return times


def rotating(make: Callable[[int], Callable[[], Any]]) -> Callable[[], Any]:
    """Calls with another set of inputs each time."""
    each = itertools.cycle([make(index) for index in range(SETS)])
    return lambda: next(each)()


def passes(attention: contenders.Attention, kind: str, sets: list[Any]) -> Callable[[], Any]:
    def make(index: int) -> Callable[[], Any]:
        if kind == "forward":
            return functools.partial(attention, *sets[index][:3])
        leaves = [t.detach().requires_grad_() for t in sets[index][:3]]
        out = attention(*leaves)
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return rotating(make)


def dense(case: Case, backend: SDPBackend) -> contenders.Attention:
    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*tensors)

    return contenders._heads_first(case, attend)


def yardstick(case: Case, kind: str, rounds: int) -> float:
    """FLOP/s of cuDNN's SDPA at 16,384 tokens, with the case's head dim and heads."""
    line = Case("dense", (16384,), case.heads, case.head_dim, (16384,), dtype=case.dtype, device=case.device)
    call = passes(dense(line, SDPBackend.CUDNN_ATTENTION), kind, [line.inputs() for _ in range(SETS)])
    seconds = statistics.median(interleaved({"dense": call}, max(3, rounds // 4))["dense"])
    return 4 * line.heads * line.tokens**2 * line.head_dim * (1 if kind == "forward" else 2.5) / seconds


GENERAL_WORK = 1e11  # useful FLOPs; more would take the general path, which has no tensor cores, seconds a call


def takes(backend: str, **facts: Any) -> bool:
    """Whether a backend that runs only when named takes such a problem on this device."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    problem = backends.Problem("cuda", **facts, capability=10 * major + minor)
    return not backends.by_name(backend).why_not(problem)


def found(case: Case, kind: str) -> dict[str, contenders.Attention]:
    """All ways of doing the case, each with right numbers; dense attention, another function, as it is."""
    inputs = case.inputs()
    ways = contenders.on_gpu(case, inputs, peers=True)
    facts = {"dtype": case.dtype, "dims": (case.head_dim, case.head_dim), "dilation": max(case.params.dilation)}
    if kind == "forward" and takes("cuda-wgmma", **facts):
        ways["cuda-wgmma"] = contenders.ours(case, inputs, "cuda-wgmma")
    if case.work("forward") < GENERAL_WORK:
        ways["cuda-general"] = contenders.ours(case, inputs, "cuda-general")
    contenders.check(case, inputs, ways)
    return ways


def time_case(case: Case, kind: str, rounds: int) -> Iterator[dict[str, Any]]:
    sets = [case.inputs() for _ in range(SETS)]
    functions = {name: passes(attention, kind, sets) for name, attention in found(case, kind).items()}
    functions["copy"] = rotating(lambda index: contenders.copy(sets[index]))
    times = interleaved(functions, rounds)
    rate = yardstick(case, kind, rounds)
    tensors = 4 * sets[0].query.nbytes * (1 if kind == "forward" else 2)
    copied = 6 * sets[0].query.nbytes / statistics.median(times.pop("copy"))
    work = case.work("forward") * (1 if kind == "forward" else 2.5)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(seconds, times["natten_ops"]))
        yield {
            "case": case.name, "backend": name, "pass": kind, "ms": f"{1e3 * middle:.4f}",
            "tflops": f"{work / middle / 1e12:.1f}", "of_dense": f"{work / middle / rate:.3f}",
            "of_copy": f"{tensors / middle / copied:.3f}", "against_ours": f"{ratio:.2f}",
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": current_commit(),
        }  # fmt: skip


def run_shape(name: str, device: str = "cuda", paths: Sequence[tuple[torch.dtype, str]] = PATHS) -> None:
    """Forward and backward of a small problem in every path: what compute-sanitizer watches."""
    spatial, kernel, dilation = SHAPES[name]
    for dtype, backend in paths:
        head_dim = 64 if backend == "cuda-wgmma" else 32
        if backend == "cuda-wgmma" and (name == "everything" or not takes(backend, dtype=dtype)):
            continue
        draw = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
        heads_kv, more = 2, {}
        if name == "everything":
            tables = draw(2, *[2 * kernel - 1] * len(spatial)), draw(1, 70, 1, head_dim), draw(1, 70, 1, head_dim)
            heads_kv, more = 1, dict(zip(("rpb", "additional_keys", "additional_values"), tables))
            more["key_mask"] = torch.rand(1, *spatial, device=device) > 0.3
        tensors = (draw(1, *spatial, heads, head_dim) for heads in (2, heads_kv, heads_kv))
        out, lse = natten_ops.neighborhood_attention(
            *tensors, kernel_size=kernel, dilation=dilation, return_lse=True, backend=backend, **more
        )
        (out.sum() + lse.sum()).backward()
    if device == "cuda":
        torch.cuda.synchronize()


def checks() -> dict[str, list[str]]:
    """Commands by what they check: the tests on this device, and the sanitizer where it is installed."""
    commands = {"tests/test_cuda_device.py": [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_cuda_device.py"]}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the path: not run", file=sys.stderr)
        return commands
    for tool, shape in itertools.product(("memcheck", "racecheck"), SHAPES):
        watched = [sys.executable, "-m", "bench.gpu", "--shape", shape]
        commands[f"{tool} of {shape}"] = [sanitizer, "--tool", tool, "--error-exitcode", "9", *watched]
    return commands


def check_first(record: Path, deadline: float) -> None:
    """Every check that has not passed for this device, torch and commit, by the lines of `record`.

    Ends the program where one fails, or has not ended by the deadline: the next run goes on there.
    """
    here = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {current_commit()}"
    passed = record.read_text().splitlines() if record.exists() else []
    for name, command in checks().items():
        line = f"{name}: passed on {here}"
        if line in passed:
            continue
        left = max(1.0, deadline - time.monotonic())
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            sys.exit(f"{name} did not end in the {left:.0f} s left: run again, which goes on there, or raise --seconds")
        if status:
            sys.exit(f"{name} failed: nothing is measured")
        with record.open("a") as stream:
            stream.write(f"{line}\n")


def done_already(path: Path) -> set[tuple[str, str]]:
    """(case, pass) of the rows of this device, torch and commit."""
    if not path.exists():
        return set()
    here = torch.cuda.get_device_name(), torch.__version__, current_commit()
    rows = csv.DictReader(path.open())
    return {(row["case"], row["pass"]) for row in rows if (row["device"], row["torch"], row["commit"]) == here}


def measure(path: Path, rounds: int, deadline: float) -> None:
    """Appends the rows that are not there; no case begins that would end after the deadline if it took as long as the longest."""
    done, fresh, longest = done_already(path), not path.exists(), SECONDS_OF_CASE
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        if fresh:
            writer.writeheader()
        for case, kind in itertools.product(GPU_CASES, ("forward", "backward")):
            begin = time.monotonic()
            if (case.name, kind) in done:
                continue
            if begin + longest > deadline:
                print(f"no time left for {case.name} {kind} and what follows: run again", file=sys.stderr)
                return
            print(f"{case.name} {kind}", file=sys.stderr)
            for row in list(time_case(case, kind, rounds)):  # all or none: a case that was cut off is not done
                writer.writerow(row)
            stream.flush()
            longest = max(longest, time.monotonic() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu.csv")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=460, help="in which everything ends, checks included")
    parser.add_argument("--unchecked", action="store_true", help="leave the tests and the sanitizer out")
    parser.add_argument("--shape", choices=SHAPES, help="only run this small problem, for a sanitizer")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device, and torch finds none here")
    if options.shape:
        return run_shape(options.shape)
    deadline = time.monotonic() + options.seconds
    if not options.unchecked:
        check_first(options.out.with_suffix(".checked"), deadline)
    measure(options.out, options.rounds, deadline)


if __name__ == "__main__":
    main()
