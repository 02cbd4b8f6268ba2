# SPDX-License-Identifier: MIT
"""Time and memory of `natten_ops.block_mask` on a video of 30x48x80 tokens, window 18x24x24, against torch's own.

python -m bench.block_masks              ours, median of 21 calls
python -m bench.block_masks --torch      also `create_block_mask`, compiled: without a mask over 115200^2 tokens

Uncompiled, `create_block_mask` would first make that mask: 12 GiB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

import natten_ops

SPATIAL, KERNEL = (30, 48, 80), (18, 24, 24)
TOKENS = 30 * 48 * 80


def table_bytes(mask: Any) -> int:
    """Bytes of all index tables of a BlockMask."""
    tables = (getattr(mask, name, None) for name in mask._TENSOR_ATTRS)
    return sum(table.numel() * table.element_size() for table in tables if table is not None)


def report(name: str, make: Callable[[], Any], rounds: int) -> None:
    mask = make()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        make()
        seconds.append(time.perf_counter() - start)
    middle, least = statistics.median(seconds), min(seconds)
    visited = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    print(
        f"{name:32} median {1e3 * middle:9.1f} ms, least {1e3 * least:9.1f} ms, tables {table_bytes(mask) / 2**20:.1f} MiB, "
        f"{visited} block pairs, {int(mask.full_kv_num_blocks.sum())} full"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true", help="also torch's create_block_mask: minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {"spatial_shape": SPATIAL, "kernel_size": KERNEL, "device": "cpu"}
    report("block_mask", lambda: natten_ops.block_mask(**settings), arguments.rounds)
    tile = (2, 8, 8)
    report(f"tiled_block_mask {tile}", lambda: natten_ops.tiled_block_mask(**settings, tile=tile)[0], arguments.rounds)
    if arguments.torch:
        visible = natten_ops.mask_mod(SPATIAL, KERNEL)
        compiled = torch.compile(create_block_mask)
        report("compiled create_block_mask", lambda: compiled(visible, None, None, TOKENS, TOKENS, device="cpu"), 1)


if __name__ == "__main__":
    main()
