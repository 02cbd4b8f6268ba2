# SPDX-License-Identifier: MIT
"""What attends to what: integers only. `params` holds the window formulas, `tiles` counts, `masks` draws."""
