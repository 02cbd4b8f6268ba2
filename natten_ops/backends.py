# SPDX-License-Identifier: MIT
"""The backends as records of facts, and the one rule that chooses among them.

A backend takes a problem if it has no reason not to (`why_not`); the first of `BACKENDS` without a reason is chosen.
The facts also make the table in the README. Ids are those of `csrc/arguments.h`; 0 means choose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from natten_ops import _library
from natten_ops._problem import ALL_DTYPES as ALL_DTYPES
from natten_ops._problem import LIMITS
from natten_ops._problem import Problem as Problem
from natten_ops._problem import describe as describe

# What the kernels are told where torch's flag allows tf32: `cuda-mma-tf32` if it takes the problem, else choose.
PREFER_TF32 = -5
# What a tensor map can step over.
_MOST_DILATION = 8


def _what_is_large(problem: Problem) -> str:
    """What the bytes of a tile go with."""
    size = "the window with its bias table" if problem.bias else "the window" if problem.whole else "the head dim"
    return f"{size} or the number of additional tokens" if problem.additional else size


class Backend(NamedTuple):
    """Facts of one backend. `id` is None where it is no kernel of the op but plain torch, run only when named."""

    name: str
    id: int | None
    devices: tuple[str, ...] | None  # None: every device
    dtypes: tuple[torch.dtype, ...]
    backward: bool
    deterministic: bool
    compiles: str
    verified_on: str  # the hardware on which the tests have run
    note: str
    positive_scale: bool = False  # takes scales above 0 only
    max_tile_bytes: int | None = None
    output_only: tuple[str, ...] = ()  # devices on which it has no backward and no log-sum-exp
    whole_grids: bool = False  # takes whole grids without additional tokens only
    in_cuda_library: bool = False
    dims: tuple[int, int] | None = None  # head dims are multiples of the first, at most the second
    capability: int = 0  # of the device, times ten, at least
    named_only: bool = False  # the kernels do not choose it
    tf32: bool = False  # ... but where torch allows tf32 in products
    tensor_maps: bool = False  # what TMA and wgmma take: this capability alone, and no extras

    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why this backend cannot run the problem; empty if it can."""
        reasons = []
        if self.devices is not None and problem.device not in self.devices:
            reasons.append(f"runs on {', '.join(self.devices)} tensors, not on {problem.device}")
        elif self.in_cuda_library and not _library.has_cuda_kernels:
            reasons.append(f"is part of {_library.CUDA_LIBRARY}, which is not loaded")
        if problem.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            reasons.append(f"takes {names}, not {str(problem.dtype).removeprefix('torch.')}")
        if self.positive_scale and not problem.scale > 0:
            reasons.append(
                f"takes positive scales, not {problem.scale}: the softmax orders scores before it scales them"
            )
        if self.max_tile_bytes is not None and problem.head_dim == 0:
            reasons.append("takes head dims of at least 1")
        if self.max_tile_bytes is not None and problem.tile_bytes > self.max_tile_bytes:
            reasons.append(
                f"keeps the keys and scores of a tile in cache, {problem.tile_bytes} bytes here, "
                f"at most {self.max_tile_bytes}: {_what_is_large(problem)} is too large"
            )
        has = problem.capability or self.capability
        if has < self.capability or (self.tensor_maps and has != self.capability):
            up = "" if self.tensor_maps else " and up"
            reasons.append(f"takes devices of compute capability {self.capability / 10}{up}, not {has / 10}")
        return (
            reasons
            + self._why_not_tensor_cores(problem)
            + self._why_not_tensor_maps(problem)
            + self._why_not_flex(problem)
        )

    def why_not_chosen(self, problem: Problem, prefers_tf32: bool) -> list[str]:
        """Every reason why the kernels do not choose this backend where none is named."""
        reasons = self.why_not(problem)
        if self.named_only and not (self.tf32 and prefers_tf32) and not reasons:
            where = ", or where torch allows tf32 in products" if self.tf32 else ": no GPU has run it yet"
            reasons.append(f"runs only when named{where}")
        return reasons

    def _why_not_tensor_cores(self, problem: Problem) -> list[str]:
        """What matrix instructions need of tensors, and what their kernels count."""
        if self.dims is None:
            return []
        (step, most), reasons = self.dims, []
        if problem.dims and any(n % step or not 0 < n <= most for n in problem.dims):
            reasons.append(f"takes head dims that are multiples of {step}, {step} to {most}, not {problem.dims}")
        if not problem.aligned:
            reasons.append("takes rows that begin at multiples of 16 bytes and lie densely: call contiguous()")
        # What float32 rounds to neither zero nor infinity; scales that are not positive have a reason of their own.
        if problem.scale > 0 and not 2**-150 < problem.scale < 2**128 - 2**103:
            reasons.append(f"takes scales that are positive and finite as float32, not {problem.scale}")
        counted = zip(LIMITS.items(), problem.counts)
        return reasons + [f"takes fewer than {limit} {what}, not {n}" for (what, limit), n in counted if n >= limit]

    def _why_not_tensor_maps(self, problem: Problem) -> list[str]:
        """What the copies of whole boxes and the products of warpgroups lack."""
        if not self.tensor_maps:
            return []
        reasons = []
        if problem.dims and problem.dims[0] != problem.dims[1]:
            reasons.append(f"takes head dims that keys and values share, not {problem.dims}")
        extras = {"bias table": problem.bias, "key mask": problem.masked, "additional tokens": problem.additional}
        reasons += [f"takes no {what}" for what, there in extras.items() if there]
        if problem.dilation > _MOST_DILATION:
            reasons.append(f"takes dilations up to {_MOST_DILATION}, what TMA can step over, not {problem.dilation}")
        if not problem.mapped:
            reasons.append(
                "takes keys and values whose heads lie within a token's stride, or as further samples: call contiguous()"
            )
        return reasons

    def _why_not_flex(self, problem: Problem) -> list[str]:
        """What FlexAttention lacks."""
        reasons = []
        if self.whole_grids and problem.additional:
            reasons.append("takes no additional keys and values: they lie outside of the grid")
        if self.whole_grids and problem.sub_box:
            reasons.append("takes whole grids, no sub-boxes: leave out q_origin, kv_origin, extent")
        if problem.device in self.output_only and problem.gradients:
            reasons.append(f"has no backward on {problem.device}: use torch.no_grad() or detach the inputs")
        if problem.device in self.output_only and problem.lse:
            reasons.append(f"has no log-sum-exp on {problem.device}: leave out return_lse")
        return reasons


BACKENDS = (
    Backend(
        name="cpu-tiled",
        id=2,
        devices=("cpu",),
        dtypes=ALL_DTYPES,
        backward=True,
        deterministic=True,
        compiles="as one kernel with its neighbours; backward: an extern call",
        verified_on="x86-64 with AVX2 and AVX-512",
        note="every option, any window, any strides; not head dims, bias tables or additional tokens of some 2 MB",
        positive_scale=True,
        max_tile_bytes=2 << 20,
    ),
    Backend(
        name="cpu-general",
        id=1,
        devices=("cpu",),
        dtypes=ALL_DTYPES,
        backward=True,
        deterministic=True,
        compiles="as an extern call",
        verified_on="x86-64 with AVX2 and AVX-512",
        note="every option, any head dim, any strides, any window",
    ),
    Backend(
        name="cuda-wgmma",
        id=6,
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        backward=True,
        deterministic=True,
        compiles="as an extern call",
        verified_on="no GPU yet; x86-64 under emulation",
        note="forward on Hopper, gradients are cuda-mma's; head dims 64 and 128, compute capability 9.0; only when named",
        positive_scale=True,
        in_cuda_library=True,
        dims=(64, 128),
        capability=90,
        named_only=True,
        tensor_maps=True,
    ),
    Backend(
        name="cuda-mma",
        id=4,
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16),
        backward=True,
        deterministic=True,
        compiles="as an extern call",
        verified_on="no GPU yet; x86-64 under emulation",
        note="every option; head dims that are multiples of 8 up to 256, rows of 16-byte pieces, compute capability 8.0",
        positive_scale=True,
        in_cuda_library=True,
        dims=(8, 256),
        capability=80,
    ),
    Backend(
        name="cuda-mma-tf32",
        id=5,
        devices=("cuda",),
        dtypes=(torch.float32,),
        backward=True,
        deterministic=True,
        compiles="as an extern call",
        verified_on="no GPU yet; x86-64 under emulation",
        note="as cuda-mma, products of ten bits, head dims up to 128; when named, or where torch allows tf32 in products",
        positive_scale=True,
        in_cuda_library=True,
        dims=(8, 128),
        capability=80,
        named_only=True,
        tf32=True,
    ),
    Backend(
        name="cuda-general",
        id=3,
        devices=("cuda",),
        dtypes=ALL_DTYPES,
        backward=True,
        deterministic=True,
        compiles="as an extern call",
        verified_on="no GPU yet; x86-64 under emulation",
        note="every option, any head dim, any strides, any window; a warp a query, no tensor cores",
        in_cuda_library=True,
        capability=75,
    ),
    Backend(
        name="reference",
        id=None,
        devices=None,
        dtypes=ALL_DTYPES,
        backward=True,
        deterministic=False,
        compiles="as ATen ops",
        verified_on="x86-64",
        note="plain torch, slow, gathers every window; only when named",
    ),
    Backend(
        name="flex",
        id=None,
        devices=("cpu", "cuda", "xpu", "hpu", "mps"),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        backward=True,
        deterministic=False,
        compiles="as `flex_attention`",
        verified_on="x86-64, no accelerator",
        note="FlexAttention with our block mask; no additional tokens, no sub-boxes; only when named",
        output_only=("cpu", "mps"),
        whole_grids=True,
    ),
)


def _torch_allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Dynamo cannot trace the flag: a graph keeps what held when it was made. This is torch.compiler.assume_constant_result, which would
# import Dynamo for all who only run eager code.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def number_for_tf32(query: Tensor) -> int:
    """`PREFER_TF32` for tensors whose products torch's flag allows to be tf32; else 0, choose."""
    on_cuda = query.device.type == "cuda" and query.dtype == torch.float32
    return PREFER_TF32 if on_cuda and _torch_allows_tf32() else 0


NAMES = tuple(backend.name for backend in BACKENDS)


def by_name(name: str) -> Backend:
    """The record of a backend; an unknown name is a ValueError that lists the known ones."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend={name!r} is unknown; the backends of this version are {', '.join(NAMES)}")


def choose(problem: Problem, prefers_tf32: bool = False) -> Backend:
    """The first backend that is a kernel and has no reason against the problem; raises with every reason if none."""
    for backend in BACKENDS:
        if backend.id is not None and not backend.why_not_chosen(problem, prefers_tf32):
            return backend
    raise ValueError(_no_backend(problem))


def why_not_inlined(problem: Problem) -> list[str]:
    """Every reason why compiled code calls the kernels; empty if it holds the tiled one, fused with its neighbours.

    Where both could be the code is inlined: what follows or precedes it costs less, and whole models never take longer
    (docs/compile.md, 'How fast'). The choice needs no trial, and packages that hold the code need no library.
    """
    return by_name("cpu-tiled").why_not(problem)


def runs_here(tensor: Tensor) -> bool:
    """Whether a call computes in this process, or compiles for it; not for another one, as tracing of fake tensors does."""
    compiling = torch.compiler.is_compiling()
    real = tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)
    return real or (compiling and not torch.compiler.is_exporting())


def check_unfused(tensor: Tensor) -> None:
    """Raise ValueError where the unfused ops have no kernel for the tensor's device."""
    device = tensor.device.type
    if device == "cpu" or (device == "cuda" and _library.has_cuda_kernels) or not runs_here(tensor):
        return
    missing = f": {_library.why_no_cuda_kernels()}" if device == "cuda" else ""
    raise ValueError(
        f"the unfused ops run on cpu and cuda tensors, not on {device}{missing}; move the tensors to the CPU"
    )


def check_id(number: int) -> None:
    """Raise ValueError unless 0 or the id of a backend."""
    ids = {backend.id: backend.name for backend in BACKENDS if backend.id is not None}
    if number not in (0, PREFER_TF32) and number not in ids:
        raise ValueError(f"backend={number} is unknown; use 0 (choose) or one of {ids}")


def require(name: str, problem: Problem) -> Backend:
    """The named backend, or a ValueError with its reasons: a named backend never falls back."""
    backend = by_name(name)
    reasons = backend.why_not(problem)
    if reasons:
        lacks = _library.why_no_cuda_kernels() if backend.in_cuda_library and problem.device == "cuda" else ""
        raise ValueError(
            f"backend={name!r} cannot run {problem}: it {'; it '.join(reasons)}{'; ' if lacks else ''}{lacks}"
        )
    return backend


def _no_backend(problem: Problem) -> str:
    lines = [f"no kernel of natten_ops runs {problem}:"]
    lines += [f"  {b.name}: {'; '.join(b.why_not(problem))}" for b in BACKENDS if b.id is not None]
    if problem.device == "cuda" and not _library.has_cuda_kernels:
        lines.append(f"  {_library.why_no_cuda_kernels()}")
    lines.append(
        'The way out: move the tensors to the CPU, or pass backend="reference" (plain torch, slow, any device).'
    )
    return "\n".join(lines)


def table() -> str:
    """What works where, in Markdown; the README holds this text."""
    head = ("backend", "devices", "dtypes", "backward", "`torch.compile`", "`torch.export`", "has run on", "notes")
    rows = [head, ("---",) * len(head)]
    for b in BACKENDS:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in b.dtypes)
        devices = "any" if b.devices is None else ", ".join(b.devices)
        backward = ("yes" if b.backward else "no") + (", deterministic" if b.deterministic else "")
        backward += f", but not on {', '.join(b.output_only)}" if b.output_only else ""
        exports = b.compiles if b.id is None else "as `natten` ops"
        rows.append((f"`{b.name}`", devices, dtypes, backward, b.compiles, exports, b.verified_on, b.note))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
