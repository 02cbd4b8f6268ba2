# SPDX-License-Identifier: MIT
"""Puts a level where libraries look for natten: `import natten`, `find_spec("natten")` and `importlib.metadata`.

One finder in `sys.meta_path` answers all three, and keeps what it took away until it is uninstalled. Processes that are
started anew know nothing of it; `for_new_processes` gives them a folder.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import multiprocessing.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from natten_ops.compat.errors import ConstraintError
from natten_ops.compat.module import ROOT, tree
from natten_ops.compat.rows import resolve

_lock = threading.RLock()  # of what is installed


class Distribution(importlib.metadata.Distribution):
    """The metadata of a release that is not on disk."""

    def __init__(self, release: str) -> None:
        self.texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {ROOT}\nVersion: {release}\nSummary: natten on natten_ops\n",
            "top_level.txt": f"{ROOT}\n",
        }

    def read_text(self, filename: str) -> str | None:
        """One of the two files that there are."""
        return self.texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Where a file would be."""
        return Path(__file__).parent / path


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules and the metadata of one release; `hidden` are the modules of another natten."""

    def __init__(self, level: str, release: str, hidden: dict[str, ModuleType]) -> None:
        self.modules, self.release, self.hidden = tree(level, release), release, hidden

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of natten or of one of its modules."""
        module = self.modules.get(fullname)
        return None if module is None else module.__spec__

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        """The metadata of natten, if it is asked for; this finder comes first, so it hides an installed one's."""
        if context is None or context.name is None or context.name.lower() == ROOT:
            yield Distribution(self.release)


def install_as_natten(version: str, force: bool = False) -> ModuleType:
    """Let `import natten`, and everything that looks for natten in this process, find a release on natten_ops.

    Call it before the library that looks is imported: some look once. A natten that is installed but not imported is
    hidden until `uninstall`. Installing another level takes the place of the one before.

    Args:
        version: a level or a release, as for `natten_ops.compat.natten`.
        force: replace a real natten that is imported already; what was imported from it elsewhere stays.

    Returns:
        The module that `import natten` gives now.

    Raises:
        ConstraintError (a ValueError and a RuntimeError): a real natten is imported, and force is False.
        ValueError, TypeError: a version of no level.

    Example:
        >>> from natten_ops import compat
        >>> module = compat.install_as_natten(version="0.14.5")
        >>> from natten.functional import natten2dav, natten2dqkrpb
        >>> compat.uninstall()
    """
    level, release = resolve(version)
    with _lock:
        imported = sys.modules.get(ROOT)
        if _installed() is None and imported is not None and not force:
            raise ConstraintError(
                f"natten is imported already, from {getattr(imported, '__file__', None)}; call install_as_natten before "
                f"anything imports it, or with force=True to replace it"
            )
        uninstall()
        finder = Finder(level, release, _take_away())
        sys.modules.update(finder.modules)
        sys.meta_path.insert(0, finder)
        return finder.modules[ROOT]


def uninstall() -> None:
    """Undo `install_as_natten`: a natten that was imported or installed is found again. Nothing if none is installed.

    Example:
        >>> from natten_ops import compat
        >>> compat.uninstall()
    """
    with _lock:
        finder = _installed()
        if finder is not None:
            sys.meta_path.remove(finder)
            _take_away()
            sys.modules.update(finder.hidden)


_PACKAGE = """# What `import natten` finds first in a process started by a script of `python -m natten_ops.compat`.
import sys

from natten_ops import compat

del sys.modules[__name__]  # else it is a real natten, which an install does not replace
compat.install_as_natten(version={release!r})
"""


def for_new_processes(release: str) -> None:
    """Let Python processes that this one starts (multiprocessing's spawn, subprocess) find a release too, while it runs.

    They get a folder in PYTHONPATH with a package natten, which installs the release when it is imported, and its
    metadata, so all three ways of looking say yes before anything is imported. It is in `sys.path` as well, which
    multiprocessing hands on in place of PYTHONPATH; in this process an installed release comes first. The folder goes
    when the interpreter ends: after the script's threads, what it registered with atexit, and the processes of
    multiprocessing that it did not wait for.
    """
    folder = tempfile.mkdtemp(prefix="natten_ops_compat_")
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-100)
    files = {f"{ROOT}-{release}.dist-info/{file}": text for file, text in Distribution(release).texts.items()}
    files[f"{ROOT}/__init__.py"] = _PACKAGE.format(release=release)
    for file, text in files.items():
        path = Path(folder, file)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((folder, before)) if before else folder
    sys.path.insert(0 if safe_path() else 1, folder)  # the script's own folder stays first, where there is one


def safe_path() -> bool:
    """Whether Python was told to put no folder of its own before those of PYTHONPATH (`python -P`, from 3.11 on)."""
    return bool(getattr(sys.flags, "safe_path", False))


def _installed() -> Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, Finder)), None)


def _take_away() -> dict[str, ModuleType]:
    """Remove natten and its modules from the imported ones."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] == ROOT]
    return {name: sys.modules.pop(name) for name in names}
