# SPDX-License-Identifier: MIT
"""The house rules that a script can hold: who may import whom, file and function sizes, headers, doctests."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "natten_ops"

# Room -> rooms it may import. A room is a file or a folder of natten_ops; `lowerings` lies beside it.
MAY_IMPORT = {
    "_command_line": set(),
    "_compiler": set(),
    "_library": set(),
    "_problem": {"geometry"},
    "geometry": set(),
    "reference": {"geometry"},
    "backends": {"geometry", "_library", "_problem"},
    "flops": {"geometry"},
    "ops": {"geometry", "reference", "flops", "backends", "_library"},
    "functional": {"geometry", "reference", "backends", "ops"},
    "nn": {"geometry", "functional"},
    "compat": {"geometry", "functional", "nn", "flops", "backends", "_command_line"},
    "tools": {"geometry", "backends", "flops", "functional", "nn", "_command_line", "_compiler"},
    "export": {"ops", "reference"},
    "lowerings": {"geometry", "backends", "ops", "_compiler", "_library", "_problem"},
    "__init__": {"_library", "compat", "export", "functional", "geometry", "nn"},
}
NO_TORCH = ["geometry/__init__.py", "geometry/params.py", "geometry/tiles.py"]
PYTHON_FILES = sorted(
    p
    for folder in ("natten_ops", "lowerings", "tests", "examples", "bench", "docs")
    for p in (ROOT / folder).rglob("*.py")
)
CPP_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu"})


def room_of(path):
    if path.is_relative_to(ROOT / "lowerings"):
        return "lowerings"
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path):
    """Every dotted name that the file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SHIPPED = [p for p in PYTHON_FILES if p.is_relative_to(PACKAGE) or p.is_relative_to(ROOT / "lowerings")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = room_of(path)
    known = {room_of(p) for p in SHIPPED}
    for name in imports_of(path):
        parts = name.split(".")
        assert parts[0] != "lowerings", f"{path}: import natten_ops.lowerings instead"
        if parts[0] != "natten_ops":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in known else "__init__"
        if target not in (room, "__init__"):
            assert target in MAY_IMPORT[room], (
                f"{path.relative_to(ROOT)} imports {name}: {room} may not import {target}"
            )


def test_the_graph_of_rooms_has_no_cycle():
    done = set()
    while len(done) < len(MAY_IMPORT):
        ready = {room for room, targets in MAY_IMPORT.items() if room not in done and targets <= done}
        assert ready, f"cycle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize("name", NO_TORCH)
def test_geometry_is_integers_only(name):
    assert not [imported for imported in imports_of(PACKAGE / name) if imported.split(".")[0] == "torch"]


def functions(tree):
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_files_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file says what it is for"
    for function in functions(tree):
        docstring = ast.get_docstring(function, clean=False) or ""
        length = function.end_lineno - function.lineno + 1 - len(docstring.splitlines())
        assert length <= 60, f"{function.name} has {length} lines"


def test_every_test_file_has_its_budget():
    rows = re.findall(r"^\| (test_\w+) \| \d+ \|", (ROOT / "tests/README.md").read_text(), re.M)
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "tests").glob("test_*.py"))


def test_the_front_hall_has_no_logic():
    assert len((PACKAGE / "__init__.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_cpp_files_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert text.startswith("// SPDX-License-Identifier: MIT\n")
    assert len(text.splitlines()) <= 600


MODULES = ["_library", "backends", "flops", "functional.fused", "functional.unfused", "reference", "geometry.params", "geometry.tiles",
           "geometry.masks", "geometry.block_masks", "nn.neighborhood", "ops.merge", "tools.why", "tools.show",
           "compat", "compat.errors", "compat.full_attention", "compat.install", "compat.module", "compat.settings"]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"natten_ops.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_public_functions_have_running_examples():
    import natten_ops

    public = [getattr(natten_ops, name) for name in natten_ops.__all__ if name != "nn"]
    public += [getattr(natten_ops.nn, name) for name in natten_ops.nn.__all__]
    for item in public:
        assert item.__doc__, item
        if item is not natten_ops.library_path:
            assert ">>>" in item.__doc__, item


def test_the_loader_knows_every_op_of_the_library():
    import torch

    from natten_ops import _library

    own = {s.name.removeprefix("natten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("natten::")}
    assert own == set(_library.OWN_OPS)


def test_the_quick_start_of_the_readme_runs():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 5 and result.failed == 0
