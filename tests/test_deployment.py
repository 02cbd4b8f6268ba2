# SPDX-License-Identifier: MIT
"""A model leaves Python: packages of AOTInductor, run by another process and by a C++ program without Python.

Attention over a whole grid is generated code in them; a box of a grid is an extern call, which torch's proxy executor
makes. Each package is compiled by a process of its own, as a user would do it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch.export import Dim

import natten_ops

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((1, 3, 12, 14), (5, 3, 40, 18))
TOO_SMALL = (1, 3, 10, 14)  # five rows of patches: fewer than kernel_size * dilation
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # Inductor fuses and reorders the sums around our op


class Model(torch.nn.Module):
    """Patches of a picture, two blocks of attention, one of them dilated, both biased, a box of the grid, and a head."""

    def __init__(self, boxed=True):
        super().__init__()
        self.boxed = boxed
        self.patches = torch.nn.Conv2d(3, 16, kernel_size=2, stride=2)
        self.near = natten_ops.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
        self.far = natten_ops.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, dilation=2, rel_pos_bias=True)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, image):
        x = self.patches(image).permute(0, 2, 3, 1)
        x = x + self.near(x)
        x = x + self.far(x)
        if not self.boxed:
            return self.head(x.mean((1, 2)))
        # Queries of the rows in the middle: the calls above pass empty lists, this one lists with symbolic sizes in them.
        heads = x.unflatten(-1, (2, 8))
        box = {"q_origin": [2, 0], "kv_origin": [0, 0], "extent": [x.shape[1], x.shape[2]]}
        middle = natten_ops.neighborhood_attention(heads[:, 2:-2], heads, heads, kernel_size=3, **box)
        return self.head(x.mean((1, 2)) + middle.flatten(-2).mean((1, 2)))


COMPILE = """
import sys, torch, natten_ops
program = torch.export.load(sys.argv[1])
torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2])
"""
RUN = """
import sys, torch
if sys.argv[1] == "with":
    import natten_ops
model = torch._inductor.aoti_load_package(sys.argv[2])
*samples, too_small = torch.load(sys.argv[3])
torch.save([model(*inputs) for inputs in samples], sys.argv[4])
model(*too_small)
"""


def python(code, *arguments):
    """A fresh process, in a folder that no module of ours is found from."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=sys.prefix)


def make_package(program, folder):
    torch.export.save(program, folder / "program.pt2")
    done = python(COMPILE, folder / "program.pt2", folder / "model.pt2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "model.pt2"


def run_package(package, samples, folder, natten="with"):
    """The process, which ends with an error at the last sample, and the outputs of the others."""
    torch.save(samples, folder / "samples.pt")
    outputs = folder / "outputs.pt"
    done = python(RUN, natten, package, folder / "samples.pt", outputs)
    assert done.returncode == 1, done.stderr[-3000:]  # an exception, not a crash
    return done.stderr, torch.load(outputs) if outputs.exists() else None


def deploy(boxed, folder):
    """(model, package): exported with dynamic batch and sizes, then compiled."""
    torch.manual_seed(0)
    model = Model(boxed).eval()
    with torch.no_grad():
        for name, table in model.named_parameters():
            if name.endswith("rpb"):  # tables as they come are too small to be missed
                table.normal_()
    rows, columns = (2 * Dim(name, min=6, max=64) for name in ("rows", "columns"))
    sizes = {0: Dim("batch", min=1, max=64), 2: rows, 3: columns}
    program = torch.export.export(model, (torch.randn(2, 3, 16, 20),), dynamic_shapes=(sizes,))
    return model, make_package(program, folder)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    return deploy(True, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def program_in_cpp(tmp_path_factory):
    """examples/cpp, built against the torch and the natten_ops of this Python."""
    cmake, compiler = shutil.which("cmake", path=search_path()), shutil.which(os.environ.get("CXX", "c++"))
    assert cmake and compiler, "the C++ example needs cmake and a C++ compiler: make build, or install g++"
    build = tmp_path_factory.mktemp("cpp")
    configure = [
        cmake, "-S", ROOT / "examples" / "cpp", "-B", build, f"-DTORCH_DIR={Path(torch.__file__).parent}",
        f"-Dnatten_ops_DIR={Path(natten_ops.__file__).parent / 'cmake'}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / "run_model"


def search_path():
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


def test_a_package_runs_in_a_fresh_process_within_its_bounds(deployed, tmp_path):
    model, package = deployed
    samples = [(torch.randn(size),) for size in (*SIZES, TOO_SMALL)]
    error, outputs = run_package(package, samples, tmp_path)
    assert outputs is not None, error[-3000:]
    for have, (image,) in zip(outputs, samples):
        torch.testing.assert_close(have, model(image).detach(), **TOLERANCE)
    assert "natten" in error and "dilation" in error


def test_a_package_without_the_library_says_what_it_misses(deployed, tmp_path):
    error, outputs = run_package(deployed[1], [(torch.randn(TOO_SMALL),)], tmp_path, natten="without")
    assert outputs is None
    assert "Could not find schema for natten::neighborhood_attention_lse" in error


def test_a_package_without_boxes_needs_no_library(tmp_path):
    """Nothing of ours is installed where it runs, as far as it knows."""
    model, package = deploy(False, tmp_path)
    samples = [(torch.randn(size),) for size in (*SIZES, TOO_SMALL)]
    error, outputs = run_package(package, samples, tmp_path, natten="without")
    assert outputs is not None, error[-3000:]
    for have, (image,) in zip(outputs, samples):
        torch.testing.assert_close(have, model(image).detach(), **TOLERANCE)
    assert "kernel_size[0]=3 with dilation[0]=2 spans 6 > 5 tokens on axis 0" in error


@pytest.mark.parametrize("size", SIZES)
def test_a_program_in_cpp_computes_the_same(deployed, program_in_cpp, tmp_path, size):
    model, package = deployed
    image = torch.randn(size)
    image.numpy().tofile(tmp_path / "input")
    shape = ",".join(map(str, size))
    command = [program_in_cpp, package, shape, tmp_path / "input", tmp_path / "output"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, f"[{size[0]}, 4]\n"), done.stderr
    have = torch.from_numpy(numpy.fromfile(tmp_path / "output", dtype=numpy.float32)).view(size[0], 4)
    torch.testing.assert_close(have, model(image).detach(), **TOLERANCE)


def test_the_program_in_cpp_links_our_library_and_no_python(program_in_cpp):
    libraries = subprocess.run(["ldd", program_in_cpp], capture_output=True, text=True, check=True).stdout
    assert "libnatten_ops.so" in libraries and "not found" not in libraries
    assert "python" not in [line.split()[0].split(".")[0].removeprefix("lib")[:6] for line in libraries.splitlines()]
    assert "libtorch_python" not in libraries


def test_mistakes_at_the_program_in_cpp_are_one_line(program_in_cpp, tmp_path):
    assert subprocess.run([program_in_cpp], capture_output=True, timeout=60).returncode == 2
    command = [program_in_cpp, tmp_path / "absent.pt2", "1,2", tmp_path / "absent", tmp_path / "output"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("run_model: ")


WRAPPER = """
import json, sys, torch, natten_ops
torch.manual_seed(0)
layer = natten_ops.nn.NeighborhoodAttention2D(16, 2, kernel_size=3, rel_pos_bias=True)
compiled = torch.compile(layer, fullgraph=True, dynamic=True, options={"cpp_wrapper": True})
differences = []
for size in ((1, 6, 7, 16), (2, 9, 5, 16)):
    x = torch.randn(size, requires_grad=True)
    have, want = compiled(x), layer(x)
    differences.append((have - want).abs().max().item())
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), [x, layer.rpb]) for out in (have, want))):
        differences.append((a - b).abs().max().item())
print(json.dumps(differences))
"""


@pytest.mark.slow
def test_the_cpp_wrapper_trains():
    done = python(WRAPPER)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 6 and max(differences) < 1e-4
