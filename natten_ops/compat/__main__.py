# SPDX-License-Identifier: MIT
"""`python -m natten_ops.compat --level 0.17 script.py args..`: runs an unchanged script that imports natten."""

from __future__ import annotations

import argparse
import builtins
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from natten_ops import compat
from natten_ops._command_line import OneLineParser
from natten_ops.compat.install import for_new_processes, safe_path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = OneLineParser(
        "python -m natten_ops.compat",
        description="Run a script that imports natten on natten_ops, unchanged. Python processes that it starts find "
        "natten through PYTHONPATH, so not those of `python -E` or `python -I`.",
    )
    found.add_argument("--level", required=True, metavar="L", help=f"one of {', '.join(compat.LEVELS)}, or a release")
    found.add_argument("script", help="the Python file")
    found.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script gets")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Install the level, then run the script in the place of `__main__`, as `python script.py args..` would."""
    options = parser().parse_args(arguments)
    try:
        release = compat.install_as_natten(version=options.level).__version__
    except ValueError as error:
        parser().error(str(error))
    folder = os.path.isdir(options.script)
    script = Path(options.script, "__main__.py") if folder else Path(options.script)
    if not script.is_file():
        parser().error(f"{script}: no such file")
    source = script.read_bytes()
    if b"\0" in source:
        parser().error(f"{script} is no Python source; give a .py file, or a folder with a __main__.py")
    sys.argv = [options.script, *options.arguments]
    if not safe_path():  # else Python puts no folder first, nor has it put one there for us
        sys.path[0] = str(script.resolve().parent)
    for_new_processes(release)
    # Not runpy, which puts the old module back: pickles of the script's classes, and what runs at exit, need this one.
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    vars(module).update(__file__=os.path.abspath(script), __builtins__=builtins)
    exec(compile(source, os.fspath(script), "exec", dont_inherit=True), vars(module))


if __name__ == "__main__":
    main()
