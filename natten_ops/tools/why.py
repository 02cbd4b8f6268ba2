# SPDX-License-Identifier: MIT
"""Which backend runs a problem, why no other one does, and how much work the problem is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from natten_ops import _compiler, backends, flops
from natten_ops.geometry.masks import checked_params
from natten_ops.geometry.params import NAParams, integer
from natten_ops.geometry.tiles import visible_pairs

_OF_QUERY_KEY_VALUE = (True, True, True, False, False, False)


def why(
    spatial_shape: Sequence[int],
    heads: int = 1,
    head_dim: int = 32,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    batch: int = 1,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> str:
    """Text: the chosen backend, the others with their reasons, and FLOPs = 4 * heads * head_dim * visible pairs.

    Args:
        spatial_shape: tokens of each axis, 1 to 3 of them.
        heads, head_dim, batch: query heads, channels of a head (values too), samples.
        kernel_size, stride, dilation, is_causal: as in `natten_ops.na2d`, in tokens.
        scale: of the logits, head_dim ** -0.5 by default.
        dtype, device: of the tensors; the device need not be present.

    Returns:
        Lines for a person to read. FLOPs are of the forward, and of the backward to query, key and value.

    Raises:
        ValueError, TypeError: a geometry that no backend could run, with the way out.

    Example:
        >>> from natten_ops.tools import why
        >>> print(why((56, 56), heads=4, head_dim=32, kernel_size=7).splitlines()[2])
        window   49 keys a query on average, 1.6 % of the 3136 tokens
    """
    params = checked_params(spatial_shape, kernel_size, stride, dilation, is_causal)
    for name, count in (("heads", heads), ("head_dim", head_dim), ("batch", batch)):
        if integer(name, count) < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    size = f"batch {batch}, {heads} head{'s' * (heads > 1)} of {head_dim}"
    shape = (batch, *spatial_shape, heads, head_dim)
    problem, whole = (_problem(params, shape, scale, dtype, torch.device(device), whole) for whole in (False, True))
    forward = flops.forward_flops(shape, shape, params)
    backward = flops.backward_flops(shape, shape, params, _OF_QUERY_KEY_VALUE)
    tokens = math.prod(spatial_shape)
    mean = visible_pairs(params, spatial_shape) / tokens
    lines = [
        f"problem  {describe(spatial_shape, params)}",
        f"         {size}, {problem}",
        f"window   {mean:.4g} keys a query on average, {100 * mean / tokens:.2g} % of the {tokens} tokens",
        f"work     forward {_flops_text(forward)}, backward {_flops_text(backward)}",
        *_backend_lines(problem, whole),
    ]
    return "\n".join(lines)


def _problem(
    params: NAParams, shape: Sequence[int], scale: float | None, dtype: torch.dtype, device: torch.device, whole: bool
) -> backends.Problem:
    if device.type != "cpu":  # the device need not be present
        dims, dilation = (shape[-1], shape[-1]), max(params.dilation)
        return backends.Problem(device.type, dtype, 1.0 if scale is None else scale, dims=dims, dilation=dilation)
    tensor = torch.empty((), dtype=dtype, device="cpu").expand(*shape)
    return backends.describe([tensor, tensor, tensor, None, None, None, None], params, None, scale, whole)


def _backend_lines(problem: backends.Problem, whole: backends.Problem) -> list[str]:
    able = [b.name for b in backends.BACKENDS if not b.why_not(problem)]
    # None where no kernel is able; `choose` would then raise.
    kernels = any(b.id is not None and b.name in able for b in backends.BACKENDS)
    chosen = backends.choose(problem) if kernels else None
    if chosen is None:
        lines = ["chosen   none: no kernel of this version runs the problem"]
    else:
        nature = "deterministic" if chosen.deterministic else "not deterministic"
        lines = [
            f"chosen   {chosen.name}: {chosen.note}",
            f"         {nature}, verified on {chosen.verified_on}",
        ]
        too_old = _compiler.why_not_here()
        reasons = backends.why_not_inlined(whole) or ([too_old] if too_old else [])
        compiled = f"as a call: generated code {'; '.join(reasons)}" if reasons else "as one kernel with its neighbours"
        lines.append(f"compiled {compiled}; backward: a call")
    lead = "others   "
    for backend in backends.BACKENDS:
        if backend is chosen:
            continue
        reasons = backend.why_not(problem)
        if reasons:
            text = "cannot: " + "; ".join(reasons)
        elif backend.id is None or backend.named_only:
            text = f'also able, but only when named: backend="{backend.name}"'
        else:
            text = f"also able, but later in the list ({backend.note})"
        lines.append(f"{lead}{backend.name}: {text}")
        lead = " " * len(lead)
    return lines


def _flops_text(count: int) -> str:
    for factor, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} FLOP"


def describe(spatial_shape: Sequence[int], params: NAParams) -> str:
    """`12 x 12 tokens, kernel_size 5, dilation 2`: one number where all axes agree, defaults left out."""
    parts = [" x ".join(map(str, spatial_shape)) + " tokens", f"kernel_size {_short(params.kernel_size)}"]
    parts += [f"stride {_short(params.stride)}"] * any(step != 1 for step in params.stride)
    parts += [f"dilation {_short(params.dilation)}"] * any(gap != 1 for gap in params.dilation)
    if all(params.is_causal):
        parts.append("causal")
    elif any(params.is_causal):
        parts.append(f"causal {_short(params.is_causal)}")
    return ", ".join(parts)


def _short(values: Sequence[object]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(tuple(values))
