# SPDX-License-Identifier: MIT
"""Two threads, whatever the machine has: enough to show what threads break."""

import torch

torch.set_num_threads(2)
