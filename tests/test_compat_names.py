# SPDX-License-Identifier: MIT
"""Every name of every level of natten: it is there, with the signature of the release; and where libraries find it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from natten_names import EXPECTED

from natten_ops import compat
from natten_ops.compat import levels

ROOT = Path(__file__).parents[1]


def modules_of(root):
    """Dotted name -> module, by walking the attributes."""
    found, waiting = {}, [root]
    while waiting:
        module = waiting.pop()
        found[module.__name__] = module
        waiting += [m for m in vars(module).values() if inspect.ismodule(m)]
    return found


@pytest.mark.parametrize("level", EXPECTED)
def test_a_level_has_its_names_with_their_signatures(level):
    modules = modules_of(compat.natten(version=level))
    assert set(modules) == set(EXPECTED[level])
    for path, signatures in EXPECTED[level].items():
        expected = {name: text for text, names in signatures.items() for name in names.split()}
        assert set(modules[path].__all__) == set(expected)
        for name, text in expected.items():
            item = getattr(modules[path], name)
            if text is not None:
                assert str(inspect.signature(item)) == f"({text})", f"{path}.{name}"
                assert inspect.isclass(item) == name.startswith("Neighborhood")
                assert item.__name__ == name or name == "NeighborhoodAttention"  # another name of the 2-D class
                assert item.__doc__, f"{path}.{name}"


def test_every_level_is_expected_and_shared_names_are_one_object():
    assert tuple(EXPECTED) == compat.LEVELS
    module = compat.natten(version="0.17")
    assert (
        module.NeighborhoodAttention2D is module.na2d.NeighborhoodAttention2D is module.natten2d.NeighborhoodAttention2D
    )
    assert module.use_fused_na is module.context.use_fused_na
    assert compat.natten(version="0.17") is module


@pytest.mark.parametrize(
    "version, level, release",
    [
        ("0.14", "0.14", "0.14.4"), ("0.14.2.post4", "0.14", "0.14.2.post4"), ("0.14.5", "0.14.5", "0.14.6"),
        ("0.14.6+torch200cu118", "0.14.5", "0.14.6+torch200cu118"), ("0.15.1", "0.15", "0.15.1"),
        ("0.17.3", "0.17", "0.17.3"), ("0.20.0", "0.20", "0.20.0"), ("0.21", "0.21", "0.21.7"),
    ],
)  # fmt: skip
def test_a_release_is_of_its_level_and_says_its_number(version, level, release):
    module = compat.natten(version=version)
    assert module.__version__ == release
    assert set(modules_of(module)) == set(EXPECTED[level])


@pytest.mark.parametrize("version", ["0.16", "0.16.1", "0.2", "0.17.x", "1.0", "", 0.17, None])
def test_an_unknown_level_is_refused_with_the_known_ones(version):
    with pytest.raises(ValueError, match=r"0\.14, 0\.14\.5, 0\.15, 0\.17, 0\.20, 0\.21"):
        compat.natten(version=version)


def test_a_missing_name_says_which_levels_have_it():
    assert not hasattr(compat.natten(version="0.15"), "context")
    with pytest.raises(AttributeError, match="levels 0.14.5, 0.15, 0.17 have it"):
        compat.natten(version="0.14").functional.natten2dqk  # noqa: B018
    with pytest.raises(AttributeError, match="has no 'na4d'$"):
        compat.natten(version="0.21").functional.na4d  # noqa: B018


def test_the_page_holds_the_generated_table():
    text = (ROOT / "docs" / "migration.md").read_text()
    held = re.search(r"<!-- names -->\n(.*)\n<!-- /names -->", text, re.DOTALL)
    assert held and held[1] == levels.names_table()
    assert all(f"| {level} | `natten.functional` |" in held[1] for level in EXPECTED)


# ---- fresh processes -----------------------------------------------------------------------------------------------


def run(code, *folders, arguments=()):
    """Standard output of a fresh process with some folders first on its path."""
    program = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n{code}"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOK = """
import importlib.metadata, importlib.util, natten
print(natten.__version__, importlib.metadata.version("natten"), importlib.util.find_spec("natten") is natten.__spec__)
"""


@pytest.fixture
def other_natten(tmp_path):
    """A folder with an installed package of that name."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = '9.9'\n")
    (tmp_path / "natten" / "functional.py").write_text("answer = 42\n")
    (tmp_path / "natten-9.9.dist-info").mkdir()
    (tmp_path / "natten-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: natten\nVersion: 9.9\n")
    return tmp_path


def test_everything_that_looks_for_natten_finds_it_and_then_no_more():
    out = run(f"""
from natten_ops import compat
module = compat.install_as_natten(version="0.17.3")
{LOOK}
import natten.utils.checks, natten.flex, natten.types
from natten.functional import na2d, natten2dqkrpb
from natten.na2d import NeighborhoodAttention2D
print(module is natten, natten.utils.checks.__spec__.name, importlib.util.find_spec("natten.flops") is not None)
print(natten.functional.na2d is na2d, sum(d.name == "natten" for d in importlib.metadata.distributions()))
import pickle
again = [pickle.loads(pickle.dumps(item)) for item in (na2d, NeighborhoodAttention2D(8, 2, 3))]
print(again[0] is na2d, type(again[1]) is NeighborhoodAttention2D)
for missing in ("natten.wings", "natten.utils.varlen"):
    try:
        importlib.import_module(missing)
    except ModuleNotFoundError as error:
        print(error)
del sys.modules["natten"]
import natten as again
print(again is module, importlib.reload(again) is module)
compat.install_as_natten(version="0.21")
{LOOK}
print("natten.na2d" in sys.modules)
compat.uninstall()
compat.uninstall()
print([name for name in sys.modules if name.startswith("natten.")], importlib.util.find_spec("natten"))
for look in (lambda: importlib.metadata.version("natten"), lambda: importlib.import_module("natten")):
    try:
        look()
    except ImportError as error:
        print(type(error).__name__)
""")
    assert out.splitlines() == [
        "0.17.3 0.17.3 True", "True natten.utils.checks True", "True 1", "True True", "No module named 'natten.wings'",
        "No module named 'natten.utils.varlen'", "True True", "0.21.7 0.21.7 True", "False", "[] None",
        "PackageNotFoundError", "ModuleNotFoundError",
    ]  # fmt: skip


def test_an_installed_natten_is_hidden_an_imported_one_is_not_unless_forced(other_natten):
    out = run(
        f"""
from natten_ops import compat
compat.install_as_natten(version="0.14.5")
{LOOK}
compat.uninstall()
{LOOK}
import natten.functional
real = natten.functional
for kind in (ValueError, RuntimeError):
    try:
        compat.install_as_natten(version="0.17")
    except kind as error:
        print(error)
print(sys.modules["natten"].__version__, importlib.metadata.version("natten"))
compat.install_as_natten(version="0.17", force=True)
compat.install_as_natten(version="0.20")
{LOOK}
compat.uninstall()
import natten.functional
{LOOK}
print(natten.functional is real, natten.functional.answer)
""",
        other_natten,
    )
    refusal = f"natten is imported already, from {other_natten}/natten/__init__.py; call install_as_natten before"
    assert [line.split(" anything")[0] for line in out.splitlines()] == [
        "0.14.6 0.14.6 True", "9.9 9.9 True", refusal, refusal, "9.9 9.9", "0.20.1 0.20.1 True", "9.9 9.9 True",
        "True 42",
    ]  # fmt: skip
