# SPDX-License-Identifier: MIT
"""The shop window: which backend runs a problem and why (`why`), what a query sees (`show`, `draw_*`) and attends to."""

from natten_ops.tools.attention import attention_on_grid, draw_attention
from natten_ops.tools.show import draw_all_windows, draw_on_image, draw_window, show, visible_keys
from natten_ops.tools.why import why

__all__ = [
    "attention_on_grid",
    "draw_all_windows",
    "draw_attention",
    "draw_on_image",
    "draw_window",
    "show",
    "visible_keys",
    "why",
]
