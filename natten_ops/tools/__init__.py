# SPDX-License-Identifier: MIT
"""The shop window: which backend runs a problem and why (`why`), and what a query sees (`show`, `draw_*`)."""

from natten_ops.tools.show import draw_all_windows, draw_on_image, draw_window, show, visible_keys
from natten_ops.tools.why import why

__all__ = ["draw_all_windows", "draw_on_image", "draw_window", "show", "visible_keys", "why"]
