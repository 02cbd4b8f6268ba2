# SPDX-License-Identifier: MIT
"""What is shipped: the symbols of the library, the files of wheel and sdist, imports in fresh processes, configure errors."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import natten_ops

ROOT = Path(__file__).resolve().parent.parent
ON_X86 = platform.machine() in {"x86_64", "AMD64"}
FILES = {  # that no build may lack, besides the modules
    "natten_ops/cmake/natten_ops-config.cmake",
    "natten_ops/lowerings/__init__.py",
    "natten_ops/py.typed",
}


def run(command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)


def python(code, *arguments, **environment):
    """A fresh process, without our environment variables, in a folder that no module of ours is found from."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NATTEN_OPS_")}
    return run([sys.executable, "-c", code, *arguments], env={**inherited, **environment}, cwd=sys.prefix)


def tool(name):
    """A program of this environment, or of the system."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    assert found, f"{name} is missing: run `make build`, or install g++ and binutils"
    return found


# ---- symbols -------------------------------------------------------------------------------------------------------


def no_weak_symbols(build, isa):
    """The linker keeps one copy of a weak function: that of the AVX-512 file, which then runs on CPUs without it."""
    objects = sorted(build.glob(f"CMakeFiles/cpu_{isa}.dir/**/*.o"))
    assert len(objects) >= 2
    for file in objects:
        lines = [line.split() for line in run([tool("nm"), "--defined-only", file]).stdout.splitlines()]
        assert any(kind == "T" for _, kind, _ in lines), file
        assert [name for _, kind, name in lines if kind in "WwVvu"] == [], file.name


@pytest.mark.skipif(not ON_X86, reason="one instruction set only")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_wide_kernels_define_no_weak_symbols(isa):
    build = ROOT / "build" / "editable"
    if not build.is_dir():
        pytest.skip("no editable install was built in this folder")
    no_weak_symbols(build, isa)


def configure_debug_build(folder):
    configure = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG="]
    done = run([*configure, *settings])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.skipif(not ON_X86, reason="one instruction set only")
def test_wide_kernels_are_optimized_in_a_debug_build_too(tmp_path):
    """Nothing would be inlined otherwise, and inline functions would be weak; the next test compiles it."""
    configure_debug_build(tmp_path)
    blocks = re.findall(r"^build CMakeFiles/cpu_avx.*?\n\n", (tmp_path / "build.ninja").read_text(), re.M | re.S)
    flags = [flags for block in blocks for flags in re.findall(r"FLAGS = (.*)", block)]
    assert len(flags) >= 4 and all("-O3" in options.split() for options in flags)


@pytest.mark.slow
@pytest.mark.skipif(not ON_X86, reason="one instruction set only")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_wide_kernels_define_no_weak_symbols_in_a_debug_build(tmp_path, isa):
    configure_debug_build(tmp_path)
    done = run([tool("cmake"), "--build", tmp_path, "--target", f"cpu_{isa}"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    no_weak_symbols(tmp_path, isa)


def test_the_library_needs_the_stable_abi_and_nothing_of_python():
    lines = run([tool("nm"), "-D", "--undefined-only", natten_ops.library_path()]).stdout.splitlines()
    names = [line.split()[-1] for line in lines]
    assert "torch_library_impl" in names
    unversioned = [name for name in names if "@" not in name]  # libc, libstdc++ and libgcc have versioned symbols
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    stable = re.compile(r"(aoti_)?torch_\w+$")
    assert [name for name in unversioned if not stable.match(name) and name not in weak] == []
    assert [name for name in names if re.search(r"N[KR]*(2at|3c10|5torch)|^_?Py", name)] == []
    dynamic = run([tool("readelf"), "-d", natten_ops.library_path()]).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert "libtorch_cpu.so" in needed and needed <= system | {"libtorch_cpu.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic  # a folder of the build machine


def test_torch_abi_audit_agrees():
    pytest.importorskip("torch_abi_audit", reason="the auditor is a tool of the extra dev")
    code = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    done = python(code, "--check", "torch", natten_ops.library_path())
    assert done.returncode == 0 and re.search(r"Torch ABI:\s+STABLE", done.stdout), done.stdout + done.stderr
    assert re.search(r"Min torch:\s+2\.11", done.stdout), done.stdout


# ---- fresh processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word, bound", [("default", 16), ("avx2", 32), ("avx512", 64), ("AVX2", 64)])
def test_the_capability_only_lowers(word, bound):
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.natten._cpu_vector_bytes())"
    native = _native_bytes(code)
    assert native in ({16, 32, 64} if ON_X86 else {16})
    done = python(code, natten_ops.library_path(), NATTEN_OPS_CPU_CAPABILITY=word)
    assert done.stdout == f"{min(bound, native)}\n", done.stderr


@functools.lru_cache(maxsize=1)  # one process for all words
def _native_bytes(code):
    return int(python(code, natten_ops.library_path()).stdout)


def test_importing_wakes_no_compiler():
    heavy = ("torch._inductor", "torch.distributed.tensor", "sympy", "natten_ops.lowerings", "matplotlib")
    code = f"""
import sys, torch
before = set(sys.modules)
import natten_ops
x = torch.randn(1, 6, 6, 2, 4, requires_grad=True)
natten_ops.na2d(x, x, x, kernel_size=3).sum().backward()
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    done = python(code)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_bare_lowerings_are_refused():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import natten_ops, lowerings"
    done = python(code, ROOT)
    assert done.returncode == 1 and "ImportError: import natten_ops.lowerings, not a bare `lowerings`" in done.stderr


def test_a_foreign_definition_is_an_error_and_no_crash():
    code = """
import torch
other = torch.library.Library("natten", "FRAGMENT")
other.define("na2d(Tensor query) -> Tensor")
import natten_ops
"""
    done = python(code)
    assert done.returncode == 1, done.stderr
    assert "ImportError: torch.ops.natten.na2d is defined already, by another library of this process" in done.stderr


def test_a_folder_without_the_library_says_how_to_build_it(tmp_path):
    shutil.copytree(ROOT / "natten_ops", tmp_path / "natten_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # The finder of an editable install, an instance, comes before sys.path; Python's own are classes.
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if isinstance(finder, type)]
sys.path.insert(0, sys.argv[1])
import natten_ops
"""
    done = python(code, tmp_path)
    assert done.returncode == 1, done.stderr
    assert re.search(r"ImportError: libnatten_ops.so is in none of .* run `pip install .`", done.stderr), done.stderr


# ---- building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, "2.10.0+cpu"])
def test_configuring_without_new_torch_is_one_sentence(tmp_path, version):
    torch_dir = tmp_path / "torch"
    torch_dir.mkdir()
    if version:
        (torch_dir / "version.py").write_text(f"__version__ = '{version}'\n")
    done = run([tool("cmake"), "-S", ROOT, "-B", tmp_path / "build", f"-DTORCH_DIR={torch_dir}"])
    message = " ".join(done.stderr.split())
    found = "2.10" if version else "0"
    assert done.returncode != 0
    assert f"natten_ops needs the headers of PyTorch >= 2.11 (found: {found}): pip install 'torch>=2.11'" in message
    assert message.count("CMake Error") == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source folder, so that no build touches the original."""
    folder = tmp_path_factory.mktemp("source") / "natten_ops"
    made = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "demo_out", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, ignore=made, symlinks=True)
    return folder


def backend(source, code, *arguments):
    """Calls scikit-build-core as pip does; returns the file that it names."""
    code = f"import sys; from scikit_build_core.build import *; print(file := {code}, flush=True)"
    done = run([sys.executable, "-c", code, *arguments], cwd=source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def check_names(names, headers=()):
    """Every module of the source folder, the other files, headers of the engine, and nothing else of the repository."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "natten_ops").rglob("*.py")}
    modules |= {f"natten_ops/{path.relative_to(ROOT)}" for path in (ROOT / "lowerings").rglob("*.py")}
    modules |= {f"natten_ops/{path.relative_to(ROOT)}" for path in (ROOT / "lowerings").rglob("*.jinja")}
    assert (modules | FILES) - set(names) == set()
    top = {name.split("/")[0] for name in names}
    assert top == {"natten_ops", f"natten_ops-{natten_ops.__version__}.dist-info"}
    assert {name for name in names if re.search(r"\.(cpp|h|o|pyc)$|/test", name)} == set(headers)


def test_the_packages_have_every_file(source, tmp_path):
    """The wheel without the compiled library, which takes no compiler; the sdist has what it takes to build one."""
    wheel = backend(source, "build_wheel(sys.argv[1], {'wheel.cmake': 'false'})", tmp_path)
    check_names(zipfile.ZipFile(tmp_path / wheel).namelist())
    sdist = backend(source, "build_sdist(sys.argv[1])", tmp_path)
    with tarfile.open(tmp_path / sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    wanted = sources | {
        "CMakeLists.txt",
        "LICENSE",
        "lowerings/__init__.py",
        "natten_ops/cmake/natten_ops-config.cmake",
    }
    assert wanted - names == set()
    assert [name for name in names if name.startswith(("tests/", "build/", ".venv/"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("start", ["folder", "sdist"])
def test_a_wheel_is_complete_and_works(source, tmp_path, start):
    origin = source if start == "folder" else tmp_path / backend(source, "build_sdist(sys.argv[1])", tmp_path)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    done = run([sys.executable, "-m", "pip", "wheel", *options, origin], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"natten_ops-{natten_ops.__version__}-py3-none-linux_{platform.machine()}.whl"
    names = zipfile.ZipFile(wheel).namelist()
    engine = [ROOT / "csrc/geometry.h", ROOT / "csrc/problem.h", *(ROOT / "csrc/cpu").rglob("*.h")]
    check_names(names, {f"natten_ops/include/{path.relative_to(ROOT / 'csrc')}" for path in engine})
    assert "natten_ops/libnatten_ops.so" in names
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if isinstance(finder, type)]
sys.path.insert(0, sys.argv[1])
import torch, natten_ops
x = torch.randn(1, 9, 2, 4)
torch.testing.assert_close(natten_ops.na1d(x, x, x, kernel_size=9),
    torch.nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2))
torch._inductor.config.fx_graph_cache = False
with torch.no_grad():  # the compiler finds rules, template and headers beside the library
    twice = torch.compile(lambda x: natten_ops.na1d(x, x, x, kernel_size=9) * 2, fullgraph=True)
    torch.testing.assert_close(twice(x), natten_ops.na1d(x, x, x, kernel_size=9) * 2)
from torch._dynamo.utils import counters
assert counters["inductor"]["cpp_templated_kernel_counter"] == 1, counters["inductor"]
assert sys.modules["natten_ops.lowerings"].__file__.startswith(sys.argv[1])
print(natten_ops.library_path())
"""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = python(code, tmp_path / "site")
    assert done.stdout == f"{tmp_path}/site/natten_ops/libnatten_ops.so\n", done.stdout + done.stderr
