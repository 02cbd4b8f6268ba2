# SPDX-License-Identifier: MIT
"""What nvcc makes of the CUDA kernels: no spills, registers within their ceilings, tensor-core instructions, few per score.

Needs nvcc (any GPU or none); the counts of instructions need nvdisasm too. One instantiation of each kernel in `make test`,
all of them by `make test-cuda-build`. And what `bench.gpu` does before it measures them, which needs no GPU.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc/cuda"
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed: CUDA code cannot be compiled")


def find_nvdisasm():
    """That of the package that `make` installs, or CUDA's own; None if there is none."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name == "nvdisasm"), shutil.which("nvdisasm"))


NVDISASM = find_nvdisasm()
needs_nvdisasm = pytest.mark.skipif(not NVDISASM, reason="there is no nvdisasm: no SASS to count")

# Registers a thread of the plain kernels at float16, by pass and head dim, on whichever architecture takes more, as the
# hardware hands them out: in eights. 255 is all there are; up to 168 three blocks of 128 threads fit into a
# multiprocessor, up to 128 four.
REGISTERS = {
    "Forward": {16: 120, 32: 128, 64: 152, 128: 184, 256: 248},
    "QueryGradient": {16: 144, 32: 152, 64: 184, 128: 176, 256: 200},
    "KeyGradient": {16: 144, 32: 176, 64: 200, 128: 240, 256: 208},
}
# Of the Hopper forward at either 16-bit type, by head dim: up to 112 three of its blocks of 160 threads fit, up to 200 one of 288.
OF_BOXES = {64: 112, 128: 152}
# Of the general path: every kernel, and a source with each for float32 and float16 and the fewest registers of a row.
GENERAL = (
    "Forward", "Delta", "RowsOfQuery", "RowsOfKey", "RowsOfToken", "SumOfTokenParts", "SumOfBias", "SumOfBiasParts", "Logits",
)  # fmt: skip
GENERAL_SOURCE = """
#include "KERNELS/launch.h"
namespace natten::cuda {
namespace {
template <class Make> const char* two_elements(Dtype dtype, const Make& make) {
  return dtype == Dtype::float32 ? make(float()) : make(ptx::f16());
}
template <class Make> const char* fewest_registers(int64_t, const Make& make) { return make(Registers<1>()); }
}  // namespace
}  // namespace natten::cuda
#define with_element two_elements
#define with_registers fewest_registers
#include "KERNELS/general/forward.cu"
#include "KERNELS/general/backward.cu"
#include "KERNELS/general/unfused.cu"
"""


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
    source.write_text(GENERAL_SOURCE.replace("KERNELS", str(KERNELS)))
    _, facts = nvcc(source, tmp_path, "75")
    assert_no_spills(facts)
    seen = {re.search(rf"each_warpI.*?\d({'|'.join(GENERAL)})I(f|.*3f16)", name).groups() for name, _, _ in facts}
    assert {(name, element[-3:]) for name, element in seen} == {
        (name, type_) for name in GENERAL for type_ in ("f", "f16")
    }


def disassemble(cubin):
    """Opcodes of a kernel, and those of each of its loops."""
    text = subprocess.run([NVDISASM, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    labels, opcodes, loops = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        if code := re.search(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", line):
            opcodes.append(code.group(1).removesuffix(".SYNC"))
            target = re.search(r"\.L_\w+", code.group(2)) if opcodes[-1] == "BRA" else None
            if target and target.group() in labels:
                loops.append(opcodes[labels[target.group()] :])
    return opcodes, loops


def main_loop(loops, product):
    """How often each kind of opcode is in the innermost loop around most products."""
    kinds = [[opcode.split(".")[0] for opcode in loop] for loop in loops]
    return Counter(max(kinds, key=lambda loop: (loop.count(product), -len(loop))))


# Instructions of the loop a score of a thread at float16, mma and copies included, when every box is of one kind.
PER_SCORE = {"Forward": (18.5, 26.0), "QueryGradient": (19.0, 27.0), "KeyGradient": (32.5, 39.5)}


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("name", PER_SCORE)
def test_instructions_of_a_score(name, tmp_path):
    for full, ceiling in zip(("true", "false"), PER_SCORE[name]):
        target, _ = nvcc(one_kernel(tmp_path, name, 64), tmp_path, "80", f"-DNATTEN_ASSUME_FULL={full}")
        counts = main_loop(disassemble(target)[1], "HMMA")
        assert counts["HMMA"] > 0 and counts.total() / (64 * 64 / 128) <= ceiling, counts


def hopper_kernel(folder, dim):
    """A source that instantiates one Hopper kernel."""
    source = folder / f"boxes{dim}.cu"
    source.write_text(
        f'#include "{KERNELS}/tiles/hopper.h"\nnamespace natten::cuda::hopper {{\n'
        f"const void* kernel() {{ return (const void*)attend_boxes<ptx::f16, {dim}>; }}\n}}\n"
    )
    return source


@needs_nvcc
@pytest.mark.parametrize("dim", OF_BOXES)
def test_hopper_kernels_do_not_spill(dim, tmp_path):
    """Nor does ptxas wait between their wgmmas (nvcc() looks for its warnings), and other devices get no code of them."""
    source = hopper_kernel(tmp_path, dim)
    _, facts = nvcc(source, tmp_path, "90a")
    assert_no_spills(facts)
    assert facts[0][2] <= OF_BOXES[dim]
    assert nvcc(source, tmp_path, "80")[1][0][2] < 16


# As PER_SCORE, wgmma and barriers included; the copies are another warp's.
PER_SCORE_OF_BOXES = {64: (12.0, 18.5), 128: (15.6, 21.7)}


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("dim", PER_SCORE_OF_BOXES)
def test_instructions_of_a_score_on_hopper(dim, tmp_path):
    for full, ceiling in zip(("true", "false"), PER_SCORE_OF_BOXES[dim]):
        target, _ = nvcc(hopper_kernel(tmp_path, dim), tmp_path, "90a", f"-DNATTEN_ASSUME_FULL={full}")
        opcodes, loops = disassemble(target)
        counts = main_loop(loops, "HGMMA")
        assert counts["HGMMA"] == dim // 16 + 64 // 16 and counts["WARPGROUP"] <= 4, counts
        assert counts.total() / (64 * 64 / 128) <= ceiling, counts
        assert opcodes.count("UTMALDG.5D") == 2 * dim // 64
        assert not {opcode.split(".")[0] for opcode in opcodes} & {"HMMA", "LDL", "STL"}


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
    seen, boxes = set(), set()
    for name, _, registers in facts:
        if of_boxes := re.search(r"attend_boxesIN3ptx\d(b?f16)ELi(\d+)", name):
            boxes.add(of_boxes.groups())
            assert registers <= OF_BOXES[int(of_boxes.group(2))], name
        which = re.search(r"3f16ENS\d_\d+(Forward|QueryGradient|KeyGradient)IS\d_Li(\d+)ELb0", name)
        if which:
            kernel, dim = which.group(1), int(which.group(2))
            seen.add((kernel, dim))
            assert registers <= REGISTERS[kernel][dim], name
    assert seen == {(kernel, dim) for kernel, ceilings in REGISTERS.items() for dim in ceilings}
    assert boxes == {(element, str(dim)) for element in ("f16", "bf16") for dim in OF_BOXES}


# ---- bench.gpu ---------------------------------------------------------------------------------------------------------


def test_checks_that_passed_are_not_repeated_and_none_outlasts_the_limit(tmp_path, monkeypatch):
    """The file beside the rows says what has passed; what takes too long or fails ends the program and is not in it."""
    gpu = pytest.importorskip(
        "bench.gpu", reason="bench is of the source tree, which an installed wheel is tested without"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    ran = tmp_path / "ran"
    append = [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('x')"]
    record = tmp_path / "gpu.checked"
    for second, message in (("import time; time.sleep(60)", "raise --seconds"), ("raise SystemExit(1)", "b failed")):
        commands = {"a": append, "b": [sys.executable, "-c", second]}
        monkeypatch.setattr(gpu, "checks", lambda commands=commands: commands)
        with pytest.raises(SystemExit, match=message):
            gpu.check_first(record, time.monotonic() + 3)
        assert ran.read_text() == "x"
        assert record.read_text().startswith("a: passed on H200, torch ") and record.read_text().count("\n") == 1


@pytest.mark.parametrize("shape", ["line", "everything"])
def test_what_the_sanitizer_watches_runs(shape):
    gpu = pytest.importorskip(
        "bench.gpu", reason="bench is of the source tree, which an installed wheel is tested without"
    )
    gpu.run_shape(shape, "cpu", ((torch.float32, "cpu-tiled"),))
