# SPDX-License-Identifier: MIT
"""The bench harness: rows come out, and the ways that wait for a GPU are right where they can run."""

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import natten_ops  # noqa: E402
from bench import cases, compiled, contenders, halves  # noqa: E402


def test_rows_of_a_case(tmp_path):
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "bench.run", "small", "--ours", "--rounds", "2", "--out", path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with path.open() as stream:
        rows = {(row["backend"], row["pass"]): row for row in csv.DictReader(stream)}
    assert {name for name, _ in rows} == {"natten_ops", "cpu-general", "copy"}
    assert all(float(row["of_sgemm"]) > 0 for row in rows.values())


def test_reports_come_out():
    command = [sys.executable, "-m", "bench.run", "calls", "--rounds", "3", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    assert all(f"{name}: " in done.stdout for name in ("kernel", "raw", "functional", "recording gradients"))


def test_each_compiled_way_runs_its_own_code():
    """A way that ran another one's code would compare it with itself."""

    def step(query, key, value):
        return natten_ops.na2d(query * 2, key, value, kernel_size=3)

    tensors = torch.randn(3, 1, 8, 9, 2, 8).unbind()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        calls = {}
        for name, way in compiled.ways(step, lambda way: way(*tensors)).items():
            with torch.profiler.profile() as profile:
                way()
            calls[name] = any("neighborhood_attention_lse" in event.key for event in profile.key_averages())
    assert calls == {"template": False, "extern": True, "eager": True}


def test_halves_as_loops_are_the_halves():
    query, key, value, _ = halves.heads_first(size=7, window=3, dim=4, heads=2)
    bias = torch.randn(9)
    torch.testing.assert_close(halves.as_loops(query, key, value, 3, bias), halves.attend(query, key, value, 3, bias))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the suite would run")
def test_the_gpu_suite_says_what_it_needs():
    command = [sys.executable, "-m", "bench.run", "--suite", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "needs a CUDA device" in done.stderr
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "needs a CUDA device" in done.stderr


@pytest.mark.parametrize("case", cases.GPU_CASES, ids=lambda case: case.name)
def test_the_samples_of_large_cases_are_those_of_the_whole(case):
    """A sub-box of queries has the numbers of the whole grid, on small grids with the same settings."""
    small = dataclasses.replace(
        case,
        spatial=tuple(max(6, n // 16) for n in case.spatial),
        kernel_size=tuple(max(1, k // 16) for k in case.kernel_size),
        stride=1, batch=1, heads=1, head_dim=8, device="cpu", dtype=torch.float64,
    )  # fmt: skip
    inputs = small.inputs()
    whole = contenders._expected(small, inputs, (slice(None),))
    sampled = dataclasses.replace(small, device="elsewhere")
    for box in contenders._samples(sampled):
        torch.testing.assert_close(contenders._expected(sampled, inputs, box), whole[box])


@pytest.mark.slow
def test_contenders_of_gpus_are_right_on_cpu():
    """FlexAttention with our masks, row-major and in tiles; compiled for the CPU, whose inputs need no gradients."""
    case = dataclasses.replace(cases.CASES[0], spatial=(24, 40))
    contenders.check(case, case.inputs(), contenders.on_gpu(case, case.inputs(), peers=True))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_in_halves_are_three_times_as_fast_as_a_compiled_gather(threads):
    """Compiled as the gather is, and in training; an eager forward step is below 3. The best of three runs: other work on
    a machine makes the figures smaller."""
    found = dict.fromkeys(("ops, compiled", "training, ops", "training, ops, compiled"), 0.0)
    for _ in range(3):
        command = [sys.executable, "-m", "bench.halves", "steps", "--threads", str(threads)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600)
        for name in found:
            figure = re.search(rf"^{name}: the compiled gather takes ([\d.]+) times as long", done.stdout, re.M)
            found[name] = max(found[name], float(figure[1]))
        if min(found.values()) >= 3:
            break
    assert min(found.values()) >= 3, found
