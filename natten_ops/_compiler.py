# SPDX-License-Identifier: MIT
"""Which C++ compilers can compile the CPU engine, as generated code that torch.compile builds on the user's machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess

_LEAST = {"g++": 11, "clang++": 14}
# Before these a compiler has no _Float16 on x86, and the engine takes the CPU's own conversions (F16C).
_WITH_FLOAT16 = {"g++": 12, "clang++": 15}


def why_not_here() -> str | None:
    """The reason why the compiler that torch.compile takes here cannot compile the engine, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # eager users import no Inductor
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return why_not(get_cpp_compiler())
    except InvalidCxxCompiler:  # it found none
        return why_not(os.environ.get("CXX") or "g++")


@functools.cache
def why_not(compiler: str) -> str | None:
    """The reason why a compiler cannot compile the engine, or None."""
    needs = f"needs {_either(_LEAST)}, or a newer one"
    way_out = "install one and set the environment variable CXX to it"
    try:
        macros = _macros(compiler)
    except (OSError, subprocess.SubprocessError):
        return f"{needs}, and {compiler} cannot be asked for its version; {way_out}"
    family = "clang++" if "__clang_major__" in macros else "g++"
    version = int(macros.get("__clang_major__") or macros.get("__GNUC__", "0"))
    if version < _LEAST[family]:
        return f"{needs}, and {compiler} is {family} {version}; {way_out}"
    if version < _WITH_FLOAT16[family] and "__x86_64__" in macros and "__F16C__" not in macros:
        return f"needs {_either(_WITH_FLOAT16)} on CPUs without F16C, and {compiler} is {family} {version}; {way_out}"
    return None


def _either(versions: dict[str, int]) -> str:
    return " or ".join(f"{family} {version}" for family, version in versions.items())


def _macros(compiler: str) -> dict[str, str]:
    """What the compiler predefines for this CPU."""
    native = ["-march=native"] if platform.machine() in {"x86_64", "AMD64"} else []
    command = [*compiler.split(), *native, "-dM", "-E", "-x", "c++", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = (line.split(maxsplit=2) for line in text.splitlines())
    return {words[1]: words[2] if len(words) > 2 else "" for words in lines if len(words) > 1}
