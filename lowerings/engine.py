# SPDX-License-Identifier: MIT
"""The text of the CPU engine: the headers of the library's own kernels, in one piece.

Generated code contains the text itself: packages need no library, and the compiler's caches see every change of it.
"""

from __future__ import annotations

import functools
from pathlib import Path

from natten_ops._library import library_path

# Loops are written for the contraction of a * b + c, which Inductor's flags forbid (15-18 % of the time without), and
# -march=native tunes for the machine at hand, which costs 12-17 % on Zen: both measured with g++ 12. Of clang contract(on) is
# asked, within an expression: contract(fast) is undone by -fno-unsafe-math-optimizations, which Inductor gives too (clang 14).
# The guard: one source may hold many kernels (cpp_wrapper, AOTInductor).
_BEFORE = """
#ifndef NATTEN_OPS_ENGINE
#define NATTEN_OPS_ENGINE
#if defined(__clang__)
#pragma clang fp contract(on)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast,no-math-errno")
#if defined(__x86_64__)
#pragma GCC target("tune=generic")
#endif
#endif
"""
_AFTER = """
#if !defined(__clang__)
#pragma GCC pop_options
#endif
#endif
"""


@functools.cache
def engine_text() -> str:
    """The headers that generated code calls, with everything that they include."""
    root = Path(library_path()).parent / "include"
    system: dict[str, None] = {}
    body: list[str] = []
    seen: set[Path] = set()
    for header in ("cpu/tiled/forward.h", "cpu/pairs.h"):
        _collect(root / header, seen, system, body)
    return "\n".join([*system, _BEFORE, *body, _AFTER])


def _collect(path: Path, seen: set[Path], system: dict[str, None], body: list[str]) -> None:
    path = path.resolve()
    if path in seen:
        return
    seen.add(path)
    for line in path.read_text().splitlines():
        if line.startswith('#include "'):
            _collect(path.parent / line.split('"')[1], seen, system, body)
        elif line.startswith("#include <") and "immintrin" not in line:  # Inductor's prefix has it, where it exists
            system[line] = None
        elif not line.startswith(("#pragma once", "// SPDX", "//")):
            body.append(line)
