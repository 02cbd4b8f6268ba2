# SPDX-License-Identifier: MIT
"""The types that natten names: sizes and flags, one for all axes or one an axis; they describe and do nothing."""

from __future__ import annotations

import enum
from typing import Any, Union


class KernelSchedule(enum.Enum):
    """Schedules of natten's Hopper kernels; they have no effect here."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


class MemoryUsagePreference(enum.Enum):
    """What `set_memory_usage_preference` was given, in small letters; it has no effect here."""

    Default = 0
    Strict = 1
    Unrestricted = 2


def alias(base: type, rank: int, or_one: bool) -> Any:
    """`Tuple[base] * rank`, rank 0 for any of the three; with or_one a single value does too."""
    ranks = [rank] if rank else [1, 2, 3]
    members = [tuple[(base,) * count] for count in ranks]  # type: ignore[misc]
    return Union[tuple([base, *members] if or_one else members)]  # noqa: UP007 (a union of computed members)
