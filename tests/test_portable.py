# SPDX-License-Identifier: MIT
"""The kernels outside torch, built for 64-bit ARM (NEON) and run under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "tests/portable/engine.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


def build_and_run(folder, compiler, emulator):
    """Every CPU source for the platform's baseline, half optimised: the check is of numbers."""
    program = folder / "engine"
    flags = [
        "-std=c++20",
        "-O1",
        "-Wno-psabi",
        "-static",
        f"-I{ROOT / 'csrc'}",
        "-DNATTEN_ISA=base",
        "-DNATTEN_ISA_LIST(X)=X(base)",
    ]
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([compiler, *flags, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([compiler, *flags, *objects, "-o", program], check=True)
    return subprocess.run([*emulator, program], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)}: a cross compiler and an emulator"
)
def test_neon_gives_the_right_numbers(tmp_path):
    done = build_and_run(tmp_path, ARM[0], ARM[1:])
    assert done.returncode == 0 and done.stdout.count("ok ") == 16, done.stdout + done.stderr
    assert "vectors of 16 bytes" in done.stdout
