# SPDX-License-Identifier: MIT
"""What nvcc makes of the CUDA kernels: no spills, registers within their ceilings, tensor-core instructions, few per score.

Needs nvcc (any GPU or none); the counts of instructions need nvdisasm too. One instantiation of each kernel in `make test`,
all of them by `make test-cuda-build`.
"""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc/cuda"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed: CUDA code cannot be compiled")
needs_nvdisasm = pytest.mark.skipif(
    not shutil.which("nvdisasm"), reason="nvdisasm is not on the path: no SASS to count"
)

# Registers a thread of the plain kernels at float16, by pass and head dim, on whichever architecture takes more, as the
# hardware hands them out: in eights. 255 is all there are; up to 168 three blocks of 128 threads fit into a
# multiprocessor, up to 128 four.
REGISTERS = {
    "Forward": {16: 120, 32: 128, 64: 152, 128: 184, 256: 248},
    "QueryGradient": {16: 144, 32: 152, 64: 184, 128: 176, 256: 200},
    "KeyGradient": {16: 144, 32: 176, 64: 200, 128: 240, 256: 208},
}
# Of the general path: kernels that a test compiles for devices of compute capability 7.5.
GENERAL = [
    "Delta<float>", "RowsOfQuery<float,1,false>", "RowsOfKey<float,1,false>", "SumOfBias<float,false>",
    "Logits<float>", "RowsOfQuery<float,1,true>", "RowsOfKey<float,1,true>", "RowsOfToken<float,1,true>",
]  # fmt: skip


def nvcc(source, folder, arch="80", *flags):
    """Compiles to a cubin; returns it and, for each kernel, (name, stack and spill bytes, registers)."""
    target = folder / f"{source.stem}_{arch}_{len(flags)}.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", *flags]
    done = subprocess.run([*command, "-cubin", str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search(r"C75\d\d", done.stderr), done.stderr
    facts = []
    for part in done.stderr.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        facts.append((part.split("'")[0], [int(n) for n in numbers.groups()], int(registers.group(1))))
    assert facts
    return target, facts


def assert_no_spills(facts):
    assert [(name, spills) for name, spills, _ in facts if any(spills)] == []


def one_kernel(folder, name, dim, extras="false", element="ptx::f16"):
    """A source that instantiates one tensor-core kernel."""
    source = folder / f"{name}{dim}{extras}.cu"
    source.write_text(
        f'#include "{KERNELS}/tiles/run.h"\nnamespace natten::cuda::tiles {{\n'
        f"const void* kernel() {{ return (const void*)attend<{element}, {name}<{element}, {dim}, {extras}>>; }}\n}}\n"
    )
    return source


@needs_nvcc
@pytest.mark.parametrize("name", ["Forward", "QueryGradient", "KeyGradient"])
def test_tensor_core_kernels_do_not_spill(name, tmp_path):
    target, facts = nvcc(one_kernel(tmp_path, name, 64), tmp_path)
    assert_no_spills(facts)
    assert facts[0][2] <= REGISTERS[name][64]
    ptx = tmp_path / "kernel.ptx"
    source = tmp_path / f"{name}64false.cu"
    subprocess.run(["nvcc", "-std=c++17", "-arch=compute_80", "-ptx", str(source), "-o", str(ptx)], check=True)
    text = ptx.read_text()
    for instruction in ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global"):
        assert instruction in text


@needs_nvcc
def test_general_kernels_compile_for_old_devices_without_spills(tmp_path):
    """PTX for 7.5 is what devices without a build of their own get."""
    source = tmp_path / "general.cu"
    kernels = [f"each_warp<{body}>" for body in GENERAL]
    source.write_text(
        f'#include "{KERNELS}/general/backward.cu"\n#include "{KERNELS}/general/unfused.cu"\n'
        f"namespace natten::cuda::general {{\nconst void* kernels[] = {{{', '.join(f'(const void*){k}' for k in kernels)}}};\n}}\n"
    )
    _, facts = nvcc(source, tmp_path, "75")
    assert_no_spills(facts)


def main_loop(cubin):
    """Opcodes of the innermost loop around tensor-core instructions that is longest."""
    text = subprocess.run(["nvdisasm", "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    labels, opcodes, best = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        if code := re.search(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", line):
            opcodes.append(code.group(1).split(".")[0])
            target = re.search(r"\.L_\w+", code.group(2)) if opcodes[-1] == "BRA" else None
            if target and target.group() in labels:
                loop = opcodes[labels[target.group()] :]
                best = max(best, loop, key=lambda part: len(part) if "HMMA" in part else 0)
    return Counter(best)


# Instructions of the loop a score of a thread at float16, mma and copies included, when every box is of one kind.
PER_SCORE = {"Forward": (18.5, 26.0), "QueryGradient": (19.0, 27.0), "KeyGradient": (32.5, 39.5)}


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("name", PER_SCORE)
def test_instructions_of_a_score(name, tmp_path):
    for full, ceiling in zip(("true", "false"), PER_SCORE[name]):
        target, _ = nvcc(one_kernel(tmp_path, name, 64), tmp_path, "80", f"-DNATTEN_ASSUME_FULL={full}")
        counts = main_loop(target)
        assert counts["HMMA"] > 0 and counts.total() / (64 * 64 / 128) <= ceiling, counts


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_every_kernel_of_the_library(arch, tmp_path):
    sources = sorted(KERNELS.rglob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(lambda source: nvcc(source, tmp_path, arch) if source.stem != "device" else (None, []), sources)
        )
    facts = [fact for _, found in done for fact in found]
    assert_no_spills(facts)
    for name, _, registers in facts:
        which = re.search(r"3f16ENS\d_\d+(Forward|QueryGradient|KeyGradient)IS\d_Li(\d+)ELb0", name)
        if which:
            assert registers <= REGISTERS[which.group(1)][int(which.group(2))], name
