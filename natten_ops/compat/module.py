# SPDX-License-Identifier: MIT
"""A release of natten as a tree of modules, made from the table of names."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
from collections.abc import Callable
from types import ModuleType
from typing import Any

from natten_ops.compat.levels import levels_with, names_at
from natten_ops.compat.rows import resolve

ROOT = "natten"
ORIGIN = __file__


class Loader(importlib.abc.Loader):
    """Gives the module that was made for a name; there is nothing to execute."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self.modules = modules

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module of that name."""
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the names are there."""


def natten(version: str) -> ModuleType:
    """The module that behaves as a release of natten on natten_ops, without installing it anywhere.

    Args:
        version: a level ("0.14", "0.14.5", "0.15", "0.17", "0.20", "0.21") or a release of one, such as "0.17.3". The
            level decides what argument 5 of `na2d` is: the dilation up to 0.17, the stride from 0.20 on.

    Returns:
        A module with the submodules of that release as attributes (`functional`, `context`, `utils`, ..).

    Raises:
        ValueError: a version of no level.
        TypeError: no string.

    Example:
        >>> import torch
        >>> from natten_ops import compat
        >>> query, key, value = torch.randn(3, 1, 12, 12, 4, 32).unbind(0)
        >>> dilated = compat.natten(version="0.17").functional.na2d(query, key, value, 3, 2)
        >>> strided = compat.natten(version="0.21").functional.na2d(query, key, value, 3, 2)
        >>> torch.equal(dilated, strided)
        False
    """
    return _kept(*resolve(version))[ROOT]


@functools.cache
def _kept(level: str, release: str) -> dict[str, ModuleType]:
    """The tree that `natten` gives every time; installs have trees of their own, which their users may patch."""
    return tree(level, release)


@functools.cache
def _object(level: str, module: str, name: str) -> Any:
    """What a name stands for: one class, one function, in whichever tree."""
    entry = names_at(level)[module][name]
    return entry.row.build(entry.place)


def tree(level: str, release: str) -> dict[str, ModuleType]:
    """Dotted name -> module, for a release of a level; new modules at every call."""
    names = names_at(level)
    modules: dict[str, ModuleType] = {}
    for path in sorted({prefix for name in names for prefix in _prefixes(name)}):
        modules[path] = ModuleType(path, f"{path} {release} on natten_ops; see docs/migration.md of natten_ops.")
    for path, module in modules.items():
        is_package = path == ROOT or any(other.startswith(f"{path}.") for other in modules)
        spec = importlib.machinery.ModuleSpec(path, Loader(modules), origin=ORIGIN, is_package=is_package)
        attributes: dict[str, Any] = {"__spec__": spec, "__loader__": spec.loader, "__package__": spec.parent}
        attributes |= {"__file__": ORIGIN} | ({"__path__": []} if is_package else {})
        for name, entry in names.get(path, {}).items():
            attributes[name] = _object(level, entry.place.module, entry.place.name)
        attributes["__all__"] = sorted(names.get(path, ()))
        attributes["__getattr__"] = _missing(path, level)
        vars(module).update(attributes)
    modules[ROOT].__version__ = release  # type: ignore[attr-defined]
    for path, module in modules.items():
        parent, _, last = path.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    return modules


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _missing(path: str, level: str) -> Callable[[str], Any]:
    """What a module does for a name that it does not have: say which levels do."""

    def __getattr__(name: str) -> Any:
        elsewhere = levels_with(path, name)
        hint = f"; levels {', '.join(elsewhere)} have it" if elsewhere else ""
        raise AttributeError(f"module {path!r} of natten {level} has no {name!r}{hint}", name=name, obj=None)

    return __getattr__
