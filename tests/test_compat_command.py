# SPDX-License-Identifier: MIT
"""`python -m natten_ops.compat`: an unchanged script, and the processes that it starts."""

import os
import subprocess
import sys

import pytest


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


RUN = """
from dataclasses import dataclass, fields
import multiprocessing, os, sys

@dataclass
class Point:
    x: int

def late():
    import time; time.sleep(1)
    import natten; print("late", natten.__version__)

if __name__ == "__main__":
    print(fields(Point)[0].type, os.path.isabs(__file__), __spec__)
    multiprocessing.get_context("spawn").Process(target=late).start()  # not waited for, which Python does in the end
"""


def test_a_script_is_run_as_python_runs_it(tmp_path):
    """With its own rules for annotations, a full path, and children that it leaves to the end of the interpreter."""
    (tmp_path / "script.py").write_text(RUN)
    (tmp_path / "script.pyc").write_bytes(b"\0\1\2")
    command = [sys.executable, "-m", "natten_ops.compat", "--level", "0.17.3"]
    done = subprocess.run([*command, "script.py"], capture_output=True, text=True, cwd=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["<class 'int'> True None", "late 0.17.3"], done.stderr
    done = subprocess.run([*command, "script.pyc"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "script.pyc is no Python source; give a .py file" in done.stderr


LATE = """
import atexit, os, pickle, subprocess, sys, threading, time

class Mine:
    pass

def child():
    look = "import natten; print(natten.__version__)"
    return subprocess.run([sys.executable, "-c", look], capture_output=True, text=True).stdout.strip()

def last():
    print("at exit", type(pickle.loads(pickle.dumps(Mine()))) is Mine, child())

def later():
    time.sleep(0.5)
    print("thread", child())

atexit.register(last)
threading.Thread(target=later).start()
if os.fork() == 0:
    sys.exit()
os.wait()
print(os.environ["PYTHONPATH"])
"""


@pytest.mark.parametrize("before", [None, "somewhere"])
def test_what_outlives_the_last_line_finds_the_release_too(tmp_path, before):
    """Threads, what runs at exit (of a forked process too), pickles of the script's classes; then the folder is gone."""
    (tmp_path / "script.py").write_text(LATE)
    unset = ("PYTHONPATH", "PYTHONUNBUFFERED")  # lines come out when a process ends
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {} if before is None else {"PYTHONPATH": before}
    command = [sys.executable, "-m", "natten_ops.compat", "--level", "0.17.3", tmp_path / "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    path, *rest = sorted(done.stdout.splitlines(), key=lambda line: not line.startswith(os.sep))
    first, *others = path.split(os.pathsep)
    assert rest == ["at exit True 0.17.3", "thread 0.17.3", "at exit True 0.17.3"]
    assert others == ([] if before is None else [before]) and not os.path.exists(first)


def test_a_folder_is_run_and_a_safe_path_stays_safe(tmp_path):
    """As `python folder` and `python -P script.py` do: the second puts no folder before those of PYTHONPATH."""
    for name, text in (
        ("app/__main__.py", "import beside"),
        ("app/beside.py", "print('beside')"),
        ("lib/far.py", "print('far')"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "script.py").write_text("import far")
    command = [sys.executable, "-m", "natten_ops.compat", "--level", "0.17"]
    assert subprocess.run([*command, tmp_path / "app"], capture_output=True, text=True).stdout == "beside\n"
    safe = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run([*command, tmp_path / "script.py"], capture_output=True, text=True, env=safe)
    assert done.stdout == "far\n", done.stderr
    done = subprocess.run([*command, tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such file" in done.stderr
