# SPDX-License-Identifier: MIT
"""The table of names: what every level of natten has, where, and with which arguments in which order.

Argument 5 of `na2d` is the dilation up to 0.17 and the stride from 0.20 on: the level decides, and it is data here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from natten_ops.compat import full_attention, functions, inner, settings
from natten_ops.compat.nn_modules import class_of
from natten_ops.compat.rows import LEVELS, Place, Row, value_of
from natten_ops.compat.types import KernelSchedule, MemoryUsagePreference, alias


class Entry(NamedTuple):
    """A name of a level: the row that describes it, and its place."""

    row: Row
    place: Place


AT_014, AT_0145, AT_015, AT_017 = (LEVELS[i : i + 1] for i in range(4))
UP_TO_017, FROM_015_TO_017, FROM_017, FROM_020 = LEVELS[:4], LEVELS[2:4], LEVELS[3:], LEVELS[4:]
RANKS, FLAT = (1, 2, 3), (1, 2)

FUNCTIONAL, FLOPS = "natten.functional", "natten.flops"
AND_FILES = f"natten.natten{{n}}d {FUNCTIONAL}"  # the modules' files imported them, and models from there
CHECKS, UTILS_AND_CHECKS = "natten.utils.checks", "natten.utils natten.utils.checks"
OLD_CLASS = "NeighborhoodAttention{n}D"
WINDOW, WINDOW_3D = "kernel_size, dilation", "kernel_size_d, kernel_size, dilation_d, dilation"
MORE_KEYS, MORE_VALUES = "additional_keys=None", "additional_values=None"
DROPS = "qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0"
FLEX = f"query, key, value, kernel_size, dilation=1, is_causal=False, {MORE_KEYS}, {MORE_VALUES}, xformers_kwargs=None"
FUSED_017 = (
    f"query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None, {MORE_KEYS}, {MORE_VALUES}, "
    f"xformers_kwargs=None"
)
FUSED_021 = (
    f"query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, {MORE_KEYS}, {MORE_VALUES}, "
    f"attention_kwargs=None, backend=None, q_tile_shape=None, kv_tile_shape=None, backward_q_tile_shape=None, "
    f"backward_kv_tile_shape=None, backward_kv_splits=None, backward_use_pt_reduction=False, "
    f"run_persistent_kernel=True, kernel_schedule=None, torch_compile=False, return_lse=False"
)
FUSED_020 = f"{FUSED_021}, *, try_fuse_additional_kv=False"
COUNTED = "kernel_size, dilation, is_causal, is_heads_last, return_macs=False"

CLASSES = (
    *(
        Row(
            names, "natten natten.natten{n}d", AT_014,
            f"dim, kernel_size, num_heads, {DROPS}, dilation=None, bias=True", None, ranks, class_of,
        )
        for names, ranks in ((OLD_CLASS, FLAT), ("NeighborhoodAttention", (2,)))
    ),
    Row(
        OLD_CLASS, "natten natten.natten{n}d", ("0.14.5", "0.15"),
        f"dim, num_heads, kernel_size, dilation=1, bias=True, {DROPS}", None, FLAT, class_of,
    ),
    Row(
        OLD_CLASS, "natten natten.natten{n}d", AT_015,
        f"dim, num_heads, kernel_size, kernel_size_d=None, dilation=1, dilation_d=None, bias=True, {DROPS}", None,
        (3,), class_of,
    ),
    Row(
        OLD_CLASS, "natten natten.natten{n}d natten.na{n}d", AT_017,
        f"dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False, {DROPS}, "
        "use_experimental_ops=False", None, RANKS, class_of,
    ),
    Row(
        OLD_CLASS, "natten natten.modules", FROM_020,
        "embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False, qkv_bias=True, qk_scale=None, "
        "proj_drop=0.0", None, RANKS, class_of,
    ),
)  # fmt: skip

UNFUSED = (
    Row("natten{n}dqkrpb", AND_FILES, AT_014, "query, key, rpb, dilation", functions.qk, FLAT),
    Row("natten{n}dav", AND_FILES, AT_014, "attn, value, dilation", functions.av, FLAT),
    Row("natten{n}dqk", FUNCTIONAL, AT_0145, f"query, key, {WINDOW}", functions.qk, FLAT),
    Row("natten{n}dqkrpb", AND_FILES, AT_0145, f"query, key, rpb, {WINDOW}", functions.qk, FLAT),
    Row("natten{n}dav", AND_FILES, AT_0145, f"attn, value, {WINDOW}", functions.av, FLAT),
    *(  # volumes give their first axis apart; a cube's two numbers, which those releases refused, are taken too
        row._replace(shorter=row.parameters.replace(WINDOW_3D, WINDOW)) if window == WINDOW_3D else row
        for window, ranks in ((WINDOW, FLAT), (WINDOW_3D, (3,)))
        for row in (
            Row("na{n}d_qk natten{n}dqk", FUNCTIONAL, AT_015, f"query, key, {window}, {MORE_KEYS}", functions.qk, ranks),
            Row("na{n}d_qk_with_bias", AND_FILES, FROM_015_TO_017, f"query, key, bias, {window}, {MORE_KEYS}", functions.qk, ranks),
            Row("natten{n}dqkrpb", FUNCTIONAL, FROM_015_TO_017, f"query, key, rpb, {window}", functions.qk, ranks),
            Row("na{n}d_av natten{n}dav", AND_FILES, AT_015, f"attn, value, {window}, {MORE_VALUES}", functions.av, ranks),
            Row("natten{n}dqk", FUNCTIONAL, AT_017, f"query, key, {window}", functions.qk, ranks),
            Row("natten{n}dav", FUNCTIONAL, AT_017, f"attn, value, {window}", functions.av, ranks),
        )
    ),
    Row(
        "na{n}d_qk", FUNCTIONAL, AT_017,
        f"query, key, kernel_size, dilation=1, {MORE_KEYS}, is_causal=False, rpb=None", functions.qk, RANKS,
    ),
    Row(
        "na{n}d_av", FUNCTIONAL, AT_017,
        f"attn, value, kernel_size, dilation=1, {MORE_VALUES}, is_causal=False", functions.av, RANKS,
    ),
)  # fmt: skip

FUSED = (
    Row("na{n}d", "natten.experimental natten.functional", AT_017, FUSED_017, functions.fused, RANKS),
    Row("flex_na{n}d", "natten.flex", AT_017, FLEX, functions.fused, RANKS),
    Row("can_run_flex_attention", "natten.flex", AT_017, "input_shape", functions.can_run_flex_attention),
    Row("na{n}d", "natten natten.functional", ("0.20",), FUSED_020, functions.fused, RANKS),
    Row("na{n}d", "natten natten.functional", ("0.21",), FUSED_021, functions.fused, RANKS),
    Row("neighborhood_attention_generic", FUNCTIONAL, ("0.20",), FUSED_020, functions.fused),
    Row("neighborhood_attention_generic", FUNCTIONAL, ("0.21",), FUSED_021, functions.fused),
)

COUNTING = (
    Row("get_flops", FLOPS, UP_TO_017, "model, input, disable_warnings=False", functions.get_flops),
    Row("add_natten_handle", FLOPS, UP_TO_017, "flop_ctr", functions.add_natten_handle),
    Row("fna_flop_count", FLOPS, AT_017, f"q_shape, k_shape, v_shape, {COUNTED}", functions.fna_flop_count),
    Row("na_qk_flop_count", FLOPS, AT_017, f"q_shape, k_shape, {COUNTED}", functions.na_qk_flop_count),
    Row("na_av_flop_count", FLOPS, AT_017, f"a_shape, v_shape, {COUNTED}", functions.na_av_flop_count),
)

CHECKING = (
    Row("check_all_args", UTILS_AND_CHECKS, AT_017, "na_dim, kernel_size, dilation, is_causal", functions.check_all_args),
    Row("check_all_args", CHECKS, FROM_020, "na_dim, kernel_size, stride, dilation, is_causal", functions.check_all_args),
    *(
        row
        for name in ("kernel_size", "dilation", "is_causal")
        for row in (
            Row(f"check_{name.removeprefix('is_')}_arg", UTILS_AND_CHECKS, AT_017, f"na_dim, {name}", functions.check_one_arg),
            Row(f"check_{name.removeprefix('is_')}_arg", CHECKS, FROM_020, f"na_dim, {name}", functions.check_one_arg),
        )
    ),
    Row("check_stride_arg", CHECKS, FROM_020, "na_dim, stride", functions.check_one_arg),
    Row(
        "check_args_against_input", CHECKS, FROM_020, "input_tensor, kernel_size, stride, dilation, is_causal",
        functions.check_args_against_input,
    ),
    Row("get_num_na_weights", UTILS_AND_CHECKS, AT_017, "kernel_size", functions.get_num_na_weights),
)  # fmt: skip

# Prefix of the name, kernels, what an entry of natten's list looks like: sizes of tiles, and more; all left open.
TILES = (None, None)
CONFIGURATIONS = tuple(
    Row(f"{prefix}_for_{kernel}_{kind}", "natten", levels, "query, key, value", functions.Configurations(entry))
    for prefix, kernels, entry, levels in (
        ("get_configs", ("cutlass", "cutlass_blackwell", "flex"), TILES, FROM_020),
        ("get_configs", ("cutlass_hopper",), (TILES, None), FROM_020),
        ("get_bwd_configs", ("cutlass_blackwell", "cutlass_hopper"), TILES, ("0.21",)),
        ("get_bwd_configs", ("cutlass",), (*TILES, None, False), FROM_020),
    )
    for kernel in kernels
    for kind in ("fmha", "fna")
)

TYPES = tuple(
    Row(f"{name}Type{suffix}", "natten.types", FROM_017, "", alias(base, rank, bool(suffix)), make=value_of)
    for stem, base in (("Dimension", int), ("CausalArg", bool))
    for name, rank in ((stem, 0), (f"{stem}1D", 1), (f"{stem}2D", 2), (f"{stem}3D", 3))
    for suffix in ("", "OrDed")
)

VALUES = (
    Row("HAS_LIBNATTEN", "natten", FROM_020, "", True, make=value_of),
    Row("NoneType", "natten.types", FROM_017, "", type(None), make=value_of),
    Row("KernelSchedule", "natten.types", FROM_020, "", KernelSchedule, make=value_of),
    Row("MemoryUsagePreference", "natten.context", FROM_017, "", MemoryUsagePreference, make=value_of),
)

ROWS: tuple[Row, ...] = (
    CLASSES
    + UNFUSED
    + FUSED
    + full_attention.ROWS
    + settings.ROWS
    + inner.ROWS
    + COUNTING
    + CHECKING
    + CONFIGURATIONS
    + TYPES
    + VALUES
)


@functools.cache
def names_at(level: str) -> dict[str, dict[str, Entry]]:
    """Module -> name -> (row, place) of everything that a level has."""
    found: dict[str, dict[str, Entry]] = {}
    for row in ROWS:
        for place, modules in row.entries(level):
            for module in modules:
                names = found.setdefault(module, {})
                assert place.name not in names, f"{module}.{place.name} is twice in the table at {level}"
                names[place.name] = Entry(row, place)
    return found


def levels_with(module: str, name: str) -> list[str]:
    """The levels that have a name, or a module of that name."""
    inside = f"{module}.{name}"
    return [
        level
        for level in LEVELS
        if name in names_at(level).get(module, ())
        or any(path == inside or path.startswith(f"{inside}.") for path in names_at(level))
    ]


def names_table() -> str:
    """The table of names as Markdown, one row a level and module; docs/migration.md holds this text."""
    lines = ["| level | module | names |", "| --- | --- | --- |"]
    for level in LEVELS:
        for module, names in sorted(names_at(level).items()):
            lines.append(f"| {level} | `{module}` | {', '.join(f'`{name}`' for name in sorted(names))} |")
    return "\n".join(lines)
