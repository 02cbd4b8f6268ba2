# SPDX-License-Identifier: MIT
"""Do the tests on the emulator notice a mistake in a kernel? Makes one mistake at a time and says what noticed it.

`python tests/mutations.py [WORD ..]` runs the mutations of `emulation/mutations.txt` whose name or file has one of the
words, or all; its exit status is 0 if every one is caught. test_mutations.py runs the same.
"""

import functools
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import emulated
import mutation_checks
import test_emulator

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests/emulation/mutations.txt"
LIMIT = 180  # seconds that checks may take; without a mutation they take about 15


class Mutation(NamedTuple):
    name: str
    file: str
    check: str
    text: str
    replacement: str


# What the checks of a path never start is not built: it would take half the time of a mutation.
RUN, HOPPER = "csrc/cuda/tiles/run.h", "csrc/cuda/tiles/hopper_forward.cu"
UNUSED = {
    "tiles": (
        Mutation(
            "bfloat16", RUN, "", "if (dtype == Dtype::bfloat16) return run_extras<Sums, ptx::bf16>(p, stream);", ""
        ),
        Mutation("dims", RUN, "", "if (dim <= 64) return run_pass<T, Sums<T, 64, kExtras>>(p, stream);", ""),
        Mutation(
            "short boxes",
            HOPPER,
            "",
            "? run<ptx::f16, 64>(p, stream) : run<ptx::f16, 128>(p, stream)",
            "? nullptr : nullptr",
        ),
        Mutation(
            "boxes",
            HOPPER,
            "",
            "? run<ptx::bf16, 64>(p, stream) : run<ptx::bf16, 128>(p, stream)",
            "? nullptr : nullptr",
        ),
    )
}


def read(path: Path = LIST) -> list[Mutation]:
    """The mutations of a list, whose head describes the format."""
    mutations = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            fields = [field.strip() for field in f"{line} ".split(" | ")]
            if len(fields) != len(Mutation._fields):
                raise ValueError(f"{path.name}: expected {len(Mutation._fields)} fields: {line}")
            mutations.append(Mutation(*fields))
    return mutations


def apply(mutation: Mutation, root: Path) -> None:
    """Makes the mistake in the sources below `root`; raises unless there is exactly one place for it."""
    path = root / mutation.file
    pattern = r"\s+".join(re.escape(word) for word in mutation.text.split())
    text, count = re.subn(pattern, lambda _: mutation.replacement, path.read_text())
    if count != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has {count} places for {mutation.text}")
    path.write_text(text)


def copy_sources(folder: Path) -> Path:
    """All that the emulated library and the programs of the emulator are made of."""
    for name in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def texts_of(source: Path, root: Path) -> bytes:
    """A file below `root` and all of ours that it includes."""
    text = source.read_bytes()
    for name in re.findall(rb'^#include "(.*)"', text, re.M):
        places = (folder / name.decode() for folder in (source.parent, root / "tests/emulation"))
        text += b"".join(texts_of(place, root) for place in places if place.exists())
    return text


def why_path(path: str, root: Path) -> str | None:
    """Why the checks of a CUDA path fail on the sources below `root`; None if they hold."""
    for unused in UNUSED.get(path, ()):
        apply(unused, root)
    sources = [root / source.relative_to(ROOT) for source in emulated.SOURCES]
    built, compile_one = Path(emulated.library()._name).parent, emulated.compile_one

    def reuse_or_compile(source: Path, folder: Path) -> Path:
        same = texts_of(source, root) == texts_of(ROOT / source.relative_to(root), ROOT)
        ready = built / f"{source.parent.name}_{source.name}.o"
        return ready if same and ready.exists() else compile_one(source, folder)

    flags = [*emulated.FLAGS, "-w"]  # what a mistake leaves unused is no reason to stop
    with mock.patch.multiple(emulated, ROOT=root, SOURCES=sources, FLAGS=flags, compile_one=reuse_or_compile):
        library = emulated.build(root / "build")
    command = [sys.executable, str(ROOT / "tests/mutation_checks.py"), str(library), path]
    return why(command, (mutation_checks.FAILED,))


def why_sm90(root: Path) -> str | None:
    """The same of the Hopper kernel of the emulator's own tests."""
    program = test_emulator.build(root, "check_sm90", root, ["-w"])
    return why([str(program), "quick"], range(1, 8))


def why(command: list[str], failures: Container[int]) -> str | None:
    """The first words of a command that ends with one of those statuses, is killed, or runs for too long; None: it passes."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"ran for {LIMIT} s"
    if result.returncode == 0:
        return None
    if result.returncode < 0:
        return f"died of {signal.Signals(-result.returncode).name}"
    if result.returncode not in failures:  # the harness is broken, not the kernel
        raise RuntimeError(result.stdout + result.stderr)
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("line ")), "; ".join(lines[:3]))


# The checks that a line of the list may name: folder of the sources -> why they fail, or None.
CHECKS: dict[str, Callable[[Path], str | None]] = {
    **{path: functools.partial(why_path, path) for path in mutation_checks.CHECKS},
    "sm90": why_sm90,
}


def what_catches(mutation: Mutation, folder: Path) -> str | None:
    """What the checks say of the sources with this mistake; None if they notice nothing."""
    root = copy_sources(folder)
    apply(mutation, root)
    return CHECKS[mutation.check](root)


def main() -> None:
    words = sys.argv[1:]
    chosen = [m for m in read() if not words or any(word in m.name or word in m.file for word in words)]
    missed = []
    for mutation in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            reason = what_catches(mutation, Path(folder))
        if reason is None:
            missed.append(mutation.name)
        result = "MISSED" if reason is None else "caught"
        print(f"{result} {time.perf_counter() - start:4.0f} s  {mutation.name:50} {(reason or '')[:120]}", flush=True)
    print(f"{len(chosen)} mutations, {len(missed)} missed", *missed, sep="\n  ")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
