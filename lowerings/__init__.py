# SPDX-License-Identifier: MIT
"""The compiler's workshop (installed as natten_ops.lowerings), imported only while something compiles.

`fused.py` decides how the fused op is lowered, `unfused.py` how the unfused ones are, `template.py` writes the kernel
around the engine (`engine.py`), and `_compat.py` knows the versions of torch. The room also salts Inductor's caches: a
graph that was compiled by another version of these rules, or around another engine, must not be taken from a cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch

from natten_ops import _compiler, _problem, backends
from natten_ops.geometry import params


def salt() -> str:
    """The version, and a hash of the engine and of all that decides what is made of it: the files of this folder, the
    geometry, the facts of backends and of compilers, and whether the compiler at hand can compile the engine."""
    digest = hashlib.sha256(f"{engine.engine_text()}{_compiler.why_not_here()}".encode())
    folders = (Path(__file__).parent, Path(params.__file__).parent)
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in {".py", ".jinja"}]
    for path in (*files, *map(Path, (_problem.__file__, backends.__file__, _compiler.__file__))):
        digest.update(path.read_bytes())
    return f"|natten_ops:{importlib.metadata.version('natten-ops')}:{digest.hexdigest()[:16]}"


if __name__ != "natten_ops.lowerings":
    raise ImportError("import natten_ops.lowerings, not a bare `lowerings`: its rules would be registered twice")

from natten_ops.lowerings import engine, fused, rotary, unfused  # noqa: E402  (not before the check above)

SALT = salt()
fused.register()
rotary.register()
unfused.register()


def ensure_salt() -> None:
    """Salt the tag where it is not: config values belong to a thread or a `config.patch`, so every wake-up looks."""
    if SALT not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += SALT  # append: the tag belongs to the user
