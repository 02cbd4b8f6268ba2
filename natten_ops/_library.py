# SPDX-License-Identifier: MIT
"""Finds and loads the shared libraries that define `torch.ops.natten`, once; tells what was loaded."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys

import torch

CPU_LIBRARY = "libnatten_ops.so"
CUDA_LIBRARY = "libnatten_ops_cuda.so"
# An op of ours that somebody else has defined would be defined twice, which ends the process.
OWN_OPS = (
    "na1d", "na2d", "na3d", "neighborhood_attention_lse", "neighborhood_attention_lse_backward", "merge_attentions",
    "neighborhood_attention_jagged", "neighborhood_attention_jagged_backward",
    "na_qk", "na_av", "na_qk_backward", "na_av_backward",
    "_windows", "_cpu_vector_bytes", "_cpu_scratch_bytes", "_cpu_tiled_scratch_bytes",
    "_cpu_tiled_times_packed",
    "_cpu_tiled_forward",
)  # fmt: skip
_VECTOR_NAMES = {16: "default", 32: "avx2", 64: "avx512"}


# Two folders in an editable install: the sources and the built libraries.
_FOLDERS = list(sys.modules["natten_ops"].__path__)


def _find(name: str) -> str | None:
    for folder in _FOLDERS:
        path = os.path.realpath(os.path.join(folder, name))  # as torch.ops.loaded_libraries has them
        if os.path.exists(path):
            return path
    return None


def _is_mapped(path: str) -> bool:
    """Whether this very file is in the process already, by a plain dlopen; its ops are ours then."""
    try:
        ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _load_cpu() -> str:
    path = _find(CPU_LIBRARY)
    if path is None:
        raise ImportError(
            f"{CPU_LIBRARY} is in none of {_FOLDERS}: the package is a source folder or a broken "
            f"install; run `pip install .` (or `make build`) in the source folder"
        )
    if path not in torch.ops.loaded_libraries:
        foreign = (
            []
            if _is_mapped(path)
            else [op for op in OWN_OPS if torch._C._jit_get_schemas_for_operator(f"natten::{op}")]
        )
        if foreign:
            raise ImportError(
                f"torch.ops.natten.{foreign[0]} is defined already, by another library of this process "
                f"({sorted(torch.ops.loaded_libraries) or 'unknown'}); import only one of them"
            )
        torch.ops.load_library(path)
    return path


def _load_cuda() -> tuple[str | None, str]:
    """The path of the library if it is loaded, or why not. A broken one must not take the CPU kernels down."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    path = _find(CUDA_LIBRARY)
    if path is None:
        return None, "natten_ops was built where CMake found no nvcc of a version that fits, or no CUDA build of torch"
    try:
        if path not in torch.ops.loaded_libraries:
            torch.ops.load_library(path)
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    return path, ""


_cpu_path = _load_cpu()
_cuda_path, _why_no_cuda = _load_cuda()
has_cuda_kernels = _cuda_path is not None


def why_no_cuda_kernels() -> str:
    """How this process came to have no CUDA kernels, and how to get them; empty if it has them."""
    if has_cuda_kernels:
        return ""
    if torch.version.cuda is None:
        first, newest = "install a CUDA build of torch, then ", "torch's CUDA"
    else:
        first, newest = "", f"CUDA {torch.version.cuda.split('.')[0]}, torch's,"
    return (
        f"{CUDA_LIBRARY} is not loaded: {_why_no_cuda}; {first}put an nvcc of the major version of {newest} or an older "
        f"one, at least 12, on the path and run `make cuda` in the source folder"
    )


def library_path() -> str:
    """The file of the CPU library, for C++ programs that `dlopen` it and for `cmake` (see `examples/cpp`)."""
    return _cpu_path


def show_config() -> str:
    """Versions, instruction set, libraries and devices: what a bug report needs.

    Example:
        >>> import natten_ops
        >>> "natten_ops" in natten_ops.show_config()
        True
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {
        "natten_ops": importlib.metadata.version("natten-ops"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu kernels": f"{_VECTOR_NAMES[torch.ops.natten._cpu_vector_bytes()]} ({_cpu_path})",
        "cpu threads": str(torch.get_num_threads()),
        "cuda kernels": _cuda_path or why_no_cuda_kernels(),
        "cuda of torch": str(torch.version.cuda),
        "cuda devices": ", ".join(devices) or "none",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
