# SPDX-License-Identifier: MIT
"""What a row of the table of names is, which levels there are, and how a row becomes a function.

A level is a range of releases of natten with the same names and argument orders. A row says which names exist where,
at which levels, with which parameters in which order, and what they call; `function_of` makes a function of it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from natten_ops.compat.errors import ConstraintError, ConstraintTypeError, constraint

# Level -> the release that it answers as, its last or the last that differs.
RELEASES = {
    "0.14": "0.14.4", "0.14.5": "0.14.6", "0.15": "0.15.1", "0.17": "0.17.5", "0.20": "0.20.1", "0.21": "0.21.7",
}  # fmt: skip
LEVELS = tuple(RELEASES)
FIRST_WITH_KERNEL_SIZE = 5  # 0.14.5: before it the unfused functions read the kernel size off the shapes


def resolve(version: str) -> tuple[str, str]:
    """(level, release) of a level such as "0.17" or a release such as "0.17.3" or "0.14.2.post4+torch200".

    Raises:
        TypeError: no string (0.20 as a number would be 0.2).
        ValueError: a release of no level.
    """
    if not isinstance(version, str):
        raise ConstraintTypeError(
            f"version={version!r} is a {type(version).__name__}; give a string, one of {', '.join(LEVELS)}"
        )
    if version in RELEASES:
        return version, RELEASES[version]
    match = re.fullmatch(r"(\d+\.\d+)\.(\d+)(\.post\d+)?(\+\S+)?", version)
    level = match[1] if match else version
    if match and level == "0.14" and int(match[2]) >= FIRST_WITH_KERNEL_SIZE:
        level = "0.14.5"
    if level not in RELEASES:
        raise ConstraintError(
            f"version={version!r} is of no level that natten_ops.compat knows; use one of {', '.join(LEVELS)}, "
            f"or a release of one, such as 0.17.3"
        )
    return level, version


class Place(NamedTuple):
    """Where a name stands: its level, the rank in its name (0: none), the name and the module that owns it."""

    level: str
    rank: int
    name: str
    module: str


class Row(NamedTuple):
    """One row of the table of names.

    `names` are separated by spaces, `{n}` in them is the rank. `where` names the modules that have them, `natten` being
    the root; the last one owns them. `parameters` is the text of the signature in the order of the release. `target` is
    called as `target(place, **arguments)`, unless `make` does something else with the row.
    """

    names: str
    where: str
    levels: tuple[str, ...]
    parameters: str
    target: Any
    ranks: tuple[int, ...] = (0,)
    make: Callable[[Row, Place], Any] | None = None
    shorter: str | None = None  # parameters that are taken as well, where the call gives these and no others

    def entries(self, level: str) -> list[tuple[Place, tuple[str, ...]]]:
        """(place, modules) of every name of the row at a level."""
        if level not in self.levels:
            return []
        found = []
        for rank in self.ranks:
            modules = tuple(self.where.format(n=rank).split())
            for name in self.names.format(n=rank).split():
                found.append((Place(level, rank, name, modules[-1]), modules))
        return found

    def build(self, place: Place) -> Any:
        """The object that the name stands for."""
        return function_of(self, place) if self.make is None else self.make(self, place)


def value_of(row: Row, place: Place) -> Any:
    """For rows whose target is the object itself."""
    return row.target


@functools.cache
def parse(parameters: str) -> inspect.Signature:
    """The signature that a text such as `query, key, scale=None, *, backend=None` describes."""
    arguments = ast.parse(f"def f({parameters}): ...").body[0].args  # type: ignore[attr-defined]
    empty = inspect.Parameter.empty
    positional = [empty] * (len(arguments.args) - len(arguments.defaults))
    positional += [ast.literal_eval(node) for node in arguments.defaults]
    named = [empty if node is None else ast.literal_eval(node) for node in arguments.kw_defaults]
    found = []
    for kind, nodes, defaults in (
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, arguments.args, positional),
        (inspect.Parameter.KEYWORD_ONLY, arguments.kwonlyargs, named),
    ):
        found += [inspect.Parameter(node.arg, kind, default=default) for node, default in zip(nodes, defaults)]
    return inspect.Signature(found)


class Binder(NamedTuple):
    """Call arguments to names, in plain Python that Dynamo traces (inspect's own way is not)."""

    title: str
    order: tuple[str, ...]
    required: tuple[str, ...]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, title: str, signature: inspect.Signature) -> Binder:
        """The binder of a signature; `title` names the function in messages."""
        parameters = signature.parameters.values()
        order = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        required = tuple(p.name for p in parameters if p.default is p.empty)
        return cls(title, order, required, {p.name: p.default for p in parameters if p.default is not p.empty})

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every parameter with its value; TypeError as Python would raise it, with the order of this level."""
        if len(args) > len(self.order):
            raise TypeError(
                f"{self.title} takes {len(self.order)} positional arguments, not {len(args)}: {self._all()}"
            )
        bound = dict(self.defaults)
        for name, value in zip(self.order, args):
            bound[name] = value
        for name, value in kwargs.items():
            if name in self.order[: len(args)]:
                raise TypeError(f"{self.title} got {name} by position and by name; give it once: {self._all()}")
            if name not in self.order and name not in self.defaults:
                raise TypeError(
                    f"{self.title} got an unexpected keyword argument {name!r}; its arguments: {self._all()}"
                )
            bound[name] = value
        for name in self.required:
            if name not in bound:
                raise TypeError(f"{self.title} misses {name}; its arguments: {self._all()}")
        return bound

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these arguments are all of this order's, each once, and none that it needs is missing."""
        given = [*self.order[: len(args)], *kwargs]
        known = set(self.order) | set(self.defaults)
        return (
            len(args) <= len(self.order) and len(set(given)) == len(given) and set(self.required) <= set(given) <= known
        )

    def _all(self) -> str:
        return ", ".join(dict.fromkeys((*self.order, *self.defaults)))


def function_of(row: Row, place: Place) -> Callable[..., Any]:
    """The function that a row describes, with its signature, its place as its home, and compat's error."""
    signature = parse(row.parameters)
    title = f"{place.name}() of natten {place.level}"
    binder = Binder.of(title, signature)
    shorter = None if row.shorter is None else Binder.of(title, parse(row.shorter))
    target = row.target

    def function(*args: Any, **kwargs: Any) -> Any:
        chosen = shorter if shorter is not None and shorter.takes(args, kwargs) else binder
        try:
            return target(place, **chosen.bind(args, kwargs))
        except (ValueError, TypeError) as error:
            raise constraint(error) from error

    function.__name__ = function.__qualname__ = place.name
    function.__module__ = place.module
    function.__doc__ = target.__doc__
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function
