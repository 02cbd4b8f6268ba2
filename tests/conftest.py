# SPDX-License-Identifier: MIT
"""Two threads, whatever the machine has: enough to show what threads break.

They sleep while they wait: the tests run in several processes, and spinning takes a third of the others' time.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch

torch.set_num_threads(2)
