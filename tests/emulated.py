# SPDX-License-Identifier: MIT
"""The CUDA kernels on the CPU: builds them with the emulator, once per state of the sources, and calls them as ops.

`natten_emulated` has the ops of `natten` that have CUDA kernels, on CPU tensors: the same fronts, the same kernel sources.
After every call the emulator's findings (races, stray accesses, divergence, deadlocks) must be empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dense
import torch
from samples import Problem
from torch import Tensor

from natten_ops import backends
from natten_ops.reference import Inputs

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "csrc/arguments.cpp", *sorted((ROOT / "csrc/cuda").rglob("*.cu")), ROOT / "tests/emulation/ops.cpp"]
HEADERS = [*sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "tests/emulation").glob("*.h"))]
# A launch holds few blocks, so that every problem of some size takes several.
DEFINES = ["NATTEN_EMULATE", "NATTEN_MAX_BLOCKS=37", "TORCH_TARGET_VERSION=0x020b000000000000", "TORCH_STABLE_ONLY"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Order of warps and lanes, landing of asynchronous copies, seed.
FIXED, REVERSED, RANDOM = 0, 1, 2
LATE, EARLY, ANY_TIME = 0, 1, 2
SCHEDULES = ((FIXED, LATE, 1), (REVERSED, EARLY, 1), (RANDOM, ANY_TIME, 7))
CAPABILITY, SHARED_BYTES = 90, 227 << 10  # of the device that emulator.h begins with
GRADIENTS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


def compile_one(source: Path, folder: Path) -> Path:
    include = ["-isystem", str(Path(torch.__file__).parent / "include"), "-I", str(ROOT / "tests/emulation")]
    target = folder / f"{source.parent.name}_{source.name}.o"
    flags = [*FLAGS, *(f"-D{define}" for define in DEFINES)]
    subprocess.run(["g++", *flags, *include, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
    return target


def build(folder: Path) -> Path:
    """The library of emulated ops, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: str(compile_one(source, folder)), SOURCES))
    library, unfinished = folder / "libnatten_emulated.so", folder / "unfinished.so"
    torch_library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    subprocess.run(["g++", "-shared", "-o", str(unfinished), *objects, str(torch_library)], check=True)
    return unfinished.rename(library)


@functools.cache
def library() -> ctypes.CDLL:
    """Builds and loads; later processes find the library in build/, under the hash of all that it is made of."""
    text = b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    text += " ".join([*FLAGS, *DEFINES, torch.__version__]).encode()
    folder = ROOT / "build/emulation" / hashlib.sha256(text).hexdigest()[:16]
    path = folder / "libnatten_emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not path.exists():
            build(folder)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def findings() -> str:
    """What the emulator found since the last call; empty if all is well."""
    text = ctypes.create_string_buffer(1 << 16)
    library().natten_emulation_findings(text, ctypes.c_size_t(len(text)))
    return text.value.decode()


@contextlib.contextmanager
def device(capability: int = CAPABILITY, shared_bytes: int = SHARED_BYTES, error: str = "") -> Iterator[None]:
    """Another device than an H100 for the kernels to be chosen for, or one whose launches all report `error`."""
    change = library().natten_emulation_device
    change(capability, ctypes.c_int64(shared_bytes), error.encode())
    try:
        yield
    finally:
        change(CAPABILITY, ctypes.c_int64(SHARED_BYTES), b"")


def call(name: str, *args: Any, schedules: Any = SCHEDULES, **kwargs: Any) -> tuple[Tensor, ...]:
    """The op in every schedule: no findings, the same bits in all."""
    first: tuple[Tensor, ...] | None = None
    for order, landing, seed in schedules:
        library().natten_emulation_set(order, landing, ctypes.c_uint64(seed))
        results = getattr(torch.ops.natten_emulated, name)(*args, **kwargs)
        results = results if isinstance(results, tuple) else (results,)
        found = findings()
        assert not found, found
        first = first or results
        for have, want in zip(results, first):
            assert torch.equal(bits(have), bits(want)), f"{name}: bits depend on the order of warps"
    assert first is not None
    return first


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: NaN equals NaN."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def forward(inputs: Inputs, problem: Problem, backend: int = 0) -> tuple[Tensor, ...]:
    """out and lse."""
    i, s = inputs, problem.settings()
    return call(
        "neighborhood_attention_lse", *i[:3], *s[:5], i.additional_keys, i.additional_values, rpb=i.rpb,
        key_mask=i.key_mask, q_origin=s.q_origin, kv_origin=s.kv_origin, extent=s.extent, backend=backend,
    )  # fmt: skip


def backward(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    inputs: Inputs,
    problem: Problem,
    needed: Sequence[bool] = (True,) * 6,
    backend: int = 0,
) -> tuple[Tensor, ...]:
    """Gradients in the order of GRADIENTS, from those of out and lse."""
    i, s = inputs, problem.settings()
    return call(
        "neighborhood_attention_lse_backward", *grads, *outputs, *i[:3], *s[:5], i.additional_keys, i.additional_values,
        i.rpb, i.key_mask, s.q_origin, s.kv_origin, s.extent, backend, list(needed), True,
    )  # fmt: skip


def gradients_of(inputs: Inputs, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Those of the inputs that are there, in the order of Inputs."""
    by_name = dict(zip(GRADIENTS, gradients))
    return [by_name[name] for name in inputs._fields[:-1] if getattr(inputs, name) is not None]


def compare(
    problem: Problem,
    dtype: torch.dtype,
    backend: int,
    seed: int = 0,
    placed: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    gradients: bool = True,
) -> None:
    """Outputs and, if asked for, gradients of a backend, in every schedule; `placed` moves the inputs in memory."""

    def attend(inputs: Inputs, grad_out: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor] | None]:
        inputs = placed(inputs)
        out, lse = forward(inputs, problem, backend)
        if not gradients:
            return out, lse, None
        found = backward((grad_out, None), (out, lse), inputs, problem, backend=backend)
        return out, lse, gradients_of(inputs, found)

    dense.compare(problem, dtype, attend, seed=seed, cuda=True, tf32=backend == backends.by_name("cuda-mma-tf32").id)
