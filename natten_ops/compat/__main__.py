# SPDX-License-Identifier: MIT
"""`python -m natten_ops.compat --level 0.17 script.py args..`: runs an unchanged script that imports natten."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from natten_ops import compat
from natten_ops._command_line import OneLineParser
from natten_ops.compat.install import for_new_processes


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
    """Install the level, then run the script as `python script.py args..` would."""
    options = parser().parse_args(arguments)
    try:
        release = compat.install_as_natten(version=options.level).__version__
    except ValueError as error:
        parser().error(str(error))
    if not os.path.isfile(options.script):
        parser().error(f"{options.script}: no such file")
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    with for_new_processes(release):
        runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
