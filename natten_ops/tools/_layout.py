# SPDX-License-Identifier: MIT
"""How a figure is laid out; a file of its own, for only pictures need matplotlib."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


class Layout(ConstrainedLayoutEngine):
    """Repeated for titles of several lines: they shrink a picture of fixed proportions, and that moves its labels."""

    def execute(self, fig: Figure) -> None:
        """Place everything."""
        tall = any("\n" in axes.get_title() for axes in fig.axes)
        for _ in range(4 if tall else 1):
            super().execute(fig)
