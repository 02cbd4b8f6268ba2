# SPDX-License-Identifier: MIT
"""`python -m natten_ops.compat`: an unchanged script, and the processes that it starts."""

import os
import subprocess
import sys

import pytest

from natten_ops.compat.install import for_new_processes


def test_an_unchanged_script_runs_on_a_level(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside, natten\nprint(sys.argv[1:], beside.name, natten.__version__, __name__)\nsys.exit(3)\n"
    )

    def module(*arguments):
        command = [sys.executable, "-m", "natten_ops.compat", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = module("--level", "0.17", script, "--level", "x")
    assert (done.returncode, done.stdout) == (3, "['--level', 'x'] beside 0.17.5 __main__\n")
    for arguments, message in (
        (("--level", "0.3", script), "use one of 0.14,"),
        (("--level", "0.17", tmp_path / "none.py"), "none.py: no such file"),
    ):
        done = module(*arguments)
        ours = [
            line for line in done.stderr.splitlines() if "natten_ops.compat:" in line
        ]  # torch 2.11 has lines of its own
        assert done.returncode == 2 and len(ours) == 1 and message in ours[0]


LOOK = """
import importlib.metadata as metadata, importlib.util as util, sys
print(util.find_spec("natten") is not None, metadata.version("natten"), "natten" in sys.modules)
import natten.functional
import natten, natten_ops
print(natten.__version__, metadata.version("natten"), natten.__spec__ is util.find_spec("natten"))
natten_ops.compat.uninstall()
print("natten" in sys.modules)
"""
SPAWNING = """
import multiprocessing, subprocess, sys
import torch
from natten import NeighborhoodAttention1D, __version__

def work(layer, x, queue):
    queue.put((__name__, __version__, type(layer) is NeighborhoodAttention1D, layer(x).sum().item()))

if __name__ == "__main__":
    layer, x = NeighborhoodAttention1D(8, 2, 3), torch.randn(1, 9, 8)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=work, args=(layer, x, queue))
    child.start()
    child.join(120)
    print(child.exitcode, layer(x).sum().item(), *queue.get(timeout=1))
    print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


def test_processes_that_the_script_starts_find_the_release_too(tmp_path):
    """Spawned ones import the script and unpickle a module of natten; others look before they import."""
    (tmp_path / "script.py").write_text(SPAWNING)
    command = [sys.executable, "-m", "natten_ops.compat", "--level", "0.17.3", tmp_path / "script.py", LOOK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spawned, *others = done.stdout.split("\n")
    code, mine, name, version, same_class, theirs = spawned.split()
    assert (code, name, version, same_class) == ("0", "__mp_main__", "0.17.3", "True")
    assert float(mine) == pytest.approx(float(theirs), abs=1e-5)
    assert others[:3] == ["True 0.17.3 False", "0.17.3 0.17.3 True", "False"]


@pytest.mark.parametrize("before", [None, "somewhere"])
def test_afterwards_the_environment_is_as_before(tmp_path, monkeypatch, before):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    path = list(sys.path)
    with pytest.raises(KeyError), for_new_processes("0.21.0"):
        first, *rest = os.environ["PYTHONPATH"].split(os.pathsep)
        assert rest == ([] if before is None else [before])
        assert sys.path == [path[0], first, *path[1:]]
        assert sorted(os.listdir(first)) == ["natten", "natten-0.21.0.dist-info"]
        raise KeyError
    assert os.environ.get("PYTHONPATH") == before and sys.path == path and not os.path.exists(first)
