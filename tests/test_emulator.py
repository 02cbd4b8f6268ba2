# SPDX-License-Identifier: MIT
"""The emulator of CUDA kernels: it finds every kind of mistake, finds nothing in right kernels, and runs a Hopper kernel."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DNATTEN_EMULATE"]
# Kernel of check_findings.cpp -> what the emulator says of it when it is broken.
FINDINGS = {
    "race": "race: reads what a thread of another warp wrote, nothing orders the two",
    "reuse": "race: overwrites what a thread of another warp still reads",
    "unwritten": "read of shared memory that was never written",
    "shared_bounds": "shared access out of bounds",
    "lanes": "bits depend on the order",
    "banks": "ldmatrix with bank conflicts",
    "copy": "race: reads what cp.async wrote, nothing orders the two",
    "copy_group": "race: reads what cp.async wrote, nothing orders the two",
    "divergent": "divergent: shfl_xor here, but other threads are at shfl_xor of line",
    "absent_lanes": "deadlock: 124 threads in shfl at line",
    "barrier": "deadlock: 32 threads in named_barrier_sync at line",
    "phase": "deadlock: 128 threads in mbarrier_wait at line",
    "load_bounds": "global access out of bounds or misaligned",
    "store_bounds": "global access out of bounds or misaligned",
    "alignment": "global access out of bounds or misaligned",
    "order": "bits depend on the order",
}


def build(folder: Path, name: str, root: Path = ROOT, more_flags: Sequence[str] = ()) -> Path:
    """The program tests/emulation/<name>.cpp."""
    include = ["-I", str(root / "csrc/cuda"), "-I", str(root / "tests/emulation")]
    program = folder / name
    source = root / f"tests/emulation/{name}.cpp"
    subprocess.run(["g++", *FLAGS, *more_flags, *include, "-x", "c++", str(source), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """(kernel, "broken" or "right") -> what the emulator says of it."""
    program = build(tmp_path_factory.mktemp("findings"), "check_findings")
    found = {(name, variant): [] for name in FINDINGS for variant in ("broken", "right")}
    for line in subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout.splitlines():
        name, variant, text = line.split(" | ")
        found[name, variant].append(text)
    return found


@pytest.mark.parametrize("name", FINDINGS)
def test_it_finds_what_is_broken(name, findings):
    assert any(FINDINGS[name] in text for text in findings[name, "broken"]), findings[name, "broken"]


@pytest.mark.parametrize("name", FINDINGS)
def test_it_finds_nothing_in_what_is_right(name, findings):
    assert findings[name, "right"] == []


@pytest.fixture(scope="module")
def sm90(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sm90"), "check_sm90")


def test_a_hopper_kernel_is_right(sm90):
    """TMA, mbarriers and wgmma: numbers, no findings, the same bits in every order."""
    result = subprocess.run([sm90, "quick"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_a_hopper_kernel_is_right_on_more_problems(sm90):
    result = subprocess.run([sm90], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout
