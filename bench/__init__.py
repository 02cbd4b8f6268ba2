# SPDX-License-Identifier: MIT
"""Timings of the ops against sgemm, a copy and every other way of local attention; run as python -m bench.run."""
