# SPDX-License-Identifier: MIT
"""natten as it was at each level, on natten_ops: for models that were written for it, unchanged. See docs/migration.md.

Nothing new is written here: every function brings its arguments to the order of natten_ops and calls it.

Example:
    >>> from natten_ops import compat
    >>> compat.natten(version="0.17.5").__version__
    '0.17.5'
"""

from natten_ops.compat.errors import ConstraintError
from natten_ops.compat.full_attention import attention, merge_attentions
from natten_ops.compat.install import install_as_natten, uninstall
from natten_ops.compat.module import natten
from natten_ops.compat.rows import LEVELS
from natten_ops.compat.settings import reset

__all__ = [
    "LEVELS",
    "ConstraintError",
    "attention",
    "install_as_natten",
    "merge_attentions",
    "natten",
    "reset",
    "uninstall",
]
