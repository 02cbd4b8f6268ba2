# SPDX-License-Identifier: MIT
"""What the functions of every level call: arguments brought to the order and layout of natten_ops, then one call.

No maths: kernel sizes read off shapes, `None` read as its default, names of natten's kernels read as our choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from natten_ops import backends, flops, functional
from natten_ops.compat.errors import ConstraintError, ConstraintTypeError
from natten_ops.compat.rows import Place
from natten_ops.compat.types import KernelSchedule
from natten_ops.geometry.params import integer, make_params

_log = logging.getLogger("natten_ops")

FUSED: dict[int, Any] = {
    0: functional.neighborhood_attention, 1: functional.na1d, 2: functional.na2d, 3: functional.na3d,
}  # fmt: skip
QK = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}
AV = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}

FAMILIES = ("cutlass", "hopper", "blackwell", "flash", "flex")
NATTEN_BACKENDS = tuple(f"{family}-{kind}" for kind in ("fna", "fmha") for family in FAMILIES)
KERNEL_SCHEDULES = (None, "non", "coop", "pp", *KernelSchedule)
# Arguments of natten that choose among its kernels; the same numbers whatever they are, so they have no effect here.
ATTENTION_TUNING = (
    "backend", "q_tile_size", "kv_tile_size", "backward_q_tile_size", "backward_kv_tile_size", "backward_kv_splits",
    "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile",
)  # fmt: skip


def note(message: str, *values: object) -> None:
    """One debug line, but not while a graph is traced, which a logger would break."""
    if not torch.compiler.is_compiling():
        _log.debug(message, *values)


def our_backend(name: str | None, kernel_schedule: object = None) -> str | None:
    """Our backend for a name: one of ours is that one, one of natten's is left to our choice.

    Raises:
        ValueError: a name of neither.
    """
    if kernel_schedule not in KERNEL_SCHEDULES:
        raise ConstraintError(f"kernel_schedule={kernel_schedule!r} is unknown; use one of {KERNEL_SCHEDULES}")
    ours = tuple(backend.name for backend in backends.BACKENDS)
    if name is None or name in ours:
        return name
    if name not in NATTEN_BACKENDS:
        raise ConstraintError(f"backend={name!r} is unknown; use None, one of {NATTEN_BACKENDS} or one of {ours}")
    note("backend=%r names a kernel of natten: natten_ops chooses its own", name)
    return None


def check_options(name: str, options: dict[str, Any] | None, known: Collection[str]) -> None:
    """Raise ValueError for an entry that would have an effect which natten_ops does not have."""
    if options is not None and not isinstance(options, dict):
        raise ConstraintTypeError(f"{name} is a {type(options).__name__}; give a dict of options, or None")
    for key in options or ():
        if key not in known:
            raise ConstraintError(
                f"{name}[{key!r}] has no counterpart in natten_ops; leave it out, or give one of {tuple(known)}"
            )


def _check_inner_backend(name: str | None) -> None:
    """natten's names have no effect there; one of ours would have, and is not dropped silently."""
    if our_backend(name) is not None:
        raise ConstraintError(f"attention_kwargs['backend']={name!r} is a backend of natten_ops; give it as backend=")


# ---- fused and unfused attention -----------------------------------------------------------------------------------


def fused(
    place: Place,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] | None = None,
    is_causal: bool | Sequence[bool] | None = None,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    kernel_schedule: object = None,
    attention_kwargs: dict[str, Any] | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
    **tuning: object,
) -> Any:
    """Fused neighborhood attention, heads last: `natten_ops.na1d`, `na2d` or `na3d` with this level's arguments.

    `backend` may name a kernel of natten; it, tile shapes, schedules and `torch_compile` have no effect on results.
    """
    check_options("attention_kwargs", attention_kwargs, ATTENTION_TUNING)
    _check_inner_backend((attention_kwargs or {}).get("backend"))
    check_options("xformers_kwargs", xformers_kwargs, ())
    return FUSED[place.rank](
        query,
        key,
        value,
        kernel_size,
        _or(stride, 1),
        _or(dilation, 1),
        _or(is_causal, False),
        None if scale is False else scale,  # as some models have it; natten read whatever is false as None
        _tokens(additional_keys),
        _tokens(additional_values),
        return_lse=return_lse,
        rpb=_table_like(rpb, query),
        backend=our_backend(backend, kernel_schedule),
    )


def qk(
    place: Place,
    *,
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] | None = None,
    kernel_size_d: int | None = None,
    dilation_d: int | None = None,
    rpb: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool | Sequence[bool] | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Logits of every window, heads first: `natten_ops.functional.na{1,2,3}d_qk` with this level's arguments.

    Where this level has no `kernel_size`, it is read off the bias table. No scale; additional tokens come last.
    """
    table = bias if rpb is None else rpb
    if kernel_size is None:
        if not isinstance(table, Tensor) or table.dim() != place.rank + 1:
            what = f"shape {list(table.shape)}" if isinstance(table, Tensor) else f"type {type(table).__name__}"
            raise ConstraintError(
                f"rpb has {what}; the kernel size is read off it: give [heads{', 2 * kernel_size - 1' * place.rank}]"
            )
        kernel_size = tuple((size + 1) // 2 for size in table.shape[1:])
    return QK[place.rank](
        query,
        key,
        _with_depth(kernel_size_d, kernel_size),
        dilation=_with_depth(dilation_d, _or(dilation, 1)),
        is_causal=_or(is_causal, False),
        additional_keys=additional_keys,
        rpb=_table_like(table, query),
    )


def av(
    place: Place,
    *,
    attn: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] | None = None,
    kernel_size_d: int | None = None,
    dilation_d: int | None = None,
    is_causal: bool | Sequence[bool] | None = None,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums of values weighted by attn, heads first: `natten_ops.functional.na{1,2,3}d_av` with this level's arguments.

    Where this level has no `kernel_size`, it is the side of a window of as many slots as attn has.
    """
    if kernel_size is None:
        if not isinstance(attn, Tensor) or attn.dim() == 0:
            what = "without dimensions" if isinstance(attn, Tensor) else f"a {type(attn).__name__}"
            raise ConstraintTypeError(f"attn is {what}; give a tensor [batch, heads, tokens.., slots]")
        slots = int(attn.shape[-1])  # a tensor, while torch.jit.trace records
        side = round(slots ** (1 / place.rank))
        if side**place.rank != slots:
            raise ConstraintError(
                f"attn has {slots} slots a query, no {place.rank}-D window of equal sides, and this level "
                f"reads the kernel size off it; use a level from 0.14.5 on"
            )
        kernel_size = side
    return AV[place.rank](
        attn,
        value,
        _with_depth(kernel_size_d, kernel_size),
        dilation=_with_depth(dilation_d, _or(dilation, 1)),
        is_causal=_or(is_causal, False),
        additional_values=additional_values,
    )


def can_run_flex_attention(place: Place, *, input_shape: Sequence[int]) -> bool:
    """True: what the functions of this module run takes every shape."""
    return True


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _with_depth(depth: int | None, value: Any) -> Any:
    """The 3-D functions of 0.15 give the first axis apart, and one number for the two others."""
    return value if depth is None else (depth, value, value)


def _tokens(additional: Tensor | None) -> Tensor | None:
    """0.17 took additional tokens of any spatial shape."""
    return additional.flatten(1, -3) if isinstance(additional, Tensor) and additional.dim() > 4 else additional


def _table_like(table: Tensor | None, query: Tensor) -> Tensor | None:
    """natten cast the table to the dtype of the keys; ours may stay float32 beside 16-bit inputs, which is exact."""
    if table is not None and not isinstance(table, Tensor):
        raise ConstraintTypeError(
            f"rpb={table!r} is a {type(table).__name__}; give a bias table, or None (argument 7 of na1d, na2d and na3d is "
            f"rpb at 0.17, and scale from 0.20 on)"
        )
    if table is None or not isinstance(query, Tensor) or (table.dtype == torch.float32 and query.dtype.itemsize == 2):
        return table
    return table.to(query.dtype)


# ---- natten.utils --------------------------------------------------------------------------------------------------


def check_all_args(
    place: Place, *, na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any, stride: Any = None
) -> tuple[Any, ...]:
    """One entry an axis of each setting, checked; (kernel_size, dilation, is_causal), from 0.20 on with the stride."""
    params = make_params(na_dim, kernel_size, _or(stride, 1), _or(dilation, 1), _or(is_causal, False))
    if place.level == "0.17":
        return params.kernel_size, params.dilation, params.is_causal
    return tuple(params)


def check_one_arg(place: Place, *, na_dim: int, **setting: Any) -> tuple[Any, ...]:
    """One entry an axis of one setting, checked."""
    ((name, value),) = setting.items()
    settings: dict[str, Any] = {"kernel_size": 1 << 30}  # a stride is at most the kernel size
    if value is not None or name == "kernel_size":
        settings[name] = value
    return getattr(make_params(na_dim, **settings), name)


def check_args_against_input(
    place: Place, *, input_tensor: Tensor, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> None:
    """ValueError unless the windows fit into a tensor `[batch, *spatial, heads, head_dim]`."""
    params = make_params(input_tensor.dim() - 3, kernel_size, _or(stride, 1), _or(dilation, 1), _or(is_causal, False))
    params.check_extent(input_tensor.shape[1:-2])


def get_num_na_weights(place: Place, *, kernel_size: tuple[int, ...]) -> int:
    """Slots of a window: the product of a tuple of kernel sizes."""
    if not isinstance(kernel_size, tuple):
        raise ConstraintError(f"kernel_size={kernel_size!r} is a {type(kernel_size).__name__}; give a tuple of ints")
    return math.prod([integer(f"kernel_size[{axis}]", size) for axis, size in enumerate(kernel_size)])


# ---- natten.flops --------------------------------------------------------------------------------------------------


def fna_flop_count(place: Place, *, q_shape: Any, k_shape: Any, v_shape: Any, is_heads_last: bool, **rest: Any) -> int:
    """FLOPs of one fused forward, two a multiply-add; keys that causal axes hide are not counted."""
    shapes = [shape if is_heads_last else _moved(shape, 1, -2) for shape in (q_shape, k_shape, v_shape)]
    return _count(flops.fna_flop_count, shapes, **rest)


def na_qk_flop_count(place: Place, *, q_shape: Any, k_shape: Any, is_heads_last: bool, **rest: Any) -> int:
    """FLOPs of one unfused qk, two a multiply-add; keys that causal axes hide are not counted."""
    shapes = [_moved(shape, -2, 1) if is_heads_last else shape for shape in (q_shape, k_shape)]
    return _count(flops.na_qk_flop_count, shapes, **rest)


def na_av_flop_count(place: Place, *, a_shape: Any, v_shape: Any, is_heads_last: bool, **rest: Any) -> int:
    """FLOPs of one unfused av, two a multiply-add; keys that causal axes hide are not counted."""
    shapes = [_moved(shape, -2, 1) if is_heads_last else shape for shape in (a_shape, v_shape)]
    return _count(flops.na_av_flop_count, shapes, **rest)


def _count(formula: Any, shapes: list[Any], *, return_macs: bool, **windows: Any) -> int:
    count: int = formula(*shapes, **windows)
    return count // 2 if return_macs else count


def _moved(shape: Sequence[int], start: int, end: int) -> tuple[int, ...]:
    """A shape with its heads moved from one place to another."""
    sizes = list(shape)
    heads = sizes.pop(start)
    sizes.insert(len(shape) + end if end < 0 else end, heads)
    return tuple(sizes)


def get_flops(place: Place, *, model: Any, input: Any, disable_warnings: bool) -> int:
    """FLOPs of a model by fvcore, two a multiply-add throughout: twice the number of natten's function of this name."""
    return flops.get_flops(model, input, disable_warnings)


def add_natten_handle(place: Place, *, flop_ctr: Any) -> Any:
    """Teach an fvcore analysis the ops of natten_ops; see `help(natten_ops.flops.add_natten_handle)`."""
    return flops.add_natten_handle(flop_ctr)


# ---- configurations of kernels (0.20 on) ---------------------------------------------------------------------------


class Configurations:
    """The function that lists the configurations of a kernel: one, in which everything is left to our kernels.

    `shape` is what the entries of natten's list look like, with None for what is left open; the functions take None.
    """

    def __init__(self, shape: tuple[Any, ...]) -> None:
        self.shape = shape
        self.__doc__ = "Configurations of a kernel: one, all None, as our kernels choose; none where no kernel runs."

    def __call__(self, place: Place, *, query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Any, ...]]:
        problem = backends.Problem(query.device.type, query.dtype)
        return [self.shape] if any(b.id is not None and not b.why_not(problem) for b in backends.BACKENDS) else []
