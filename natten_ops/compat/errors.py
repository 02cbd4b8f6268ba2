# SPDX-License-Identifier: MIT
"""The one error of compat: releases of natten disagree on its kind, so it is every kind that callers may catch."""

from __future__ import annotations


class ConstraintError(ValueError, RuntimeError):
    """A setting or shape that cannot be: natten raised ValueError from Python and RuntimeError from C++.

    Example:
        >>> from natten_ops import compat
        >>> try:
        ...     compat.natten(version="0.17").context.set_memory_usage_preference("some")
        ... except RuntimeError as error:
        ...     print(error)
        pref='some' is unknown; give one of 'default', 'strict', 'unrestricted'
    """


class ConstraintTypeError(ConstraintError, TypeError):
    """The same for a value of the wrong type, which the Python checks of natten called a ValueError."""


def constraint(error: ValueError | TypeError) -> ConstraintError:
    """The error that compat raises for one of natten_ops; one of compat stays what it is."""
    if isinstance(error, ConstraintError):
        return error
    return (ConstraintTypeError if isinstance(error, TypeError) else ConstraintError)(*error.args)
