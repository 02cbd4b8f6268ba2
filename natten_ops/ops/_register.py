# SPDX-License-Identifier: MIT
"""How a rule is registered, for all ops alike, and the doorbell that wakes the compiler's workshop.

`torch.library.register_autograd` is not used: `torch.func` transforms raise with it and forward mode is silently zero.
An autograd kernel here is an autograd.Function applied at one level, so the op behaves like a built-in one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch._guards import TracingContext
from torch.autograd.function import _SingleLevelFunction

from natten_ops import _library

LIBRARY = torch.library.Library("natten", "FRAGMENT")
SingleLevelFunction = _SingleLevelFunction
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def wake() -> None:
    """Called by every fake kernel, which runs before any lowering is asked for: eager users never import Inductor."""
    # On torch 2.11 is_compiling() is False in a fake kernel that Dynamo runs; its tracing context is there on all.
    compiling = torch.compiler.is_compiling() or TracingContext.try_get() is not None
    if compiling:
        importlib.import_module("natten_ops.lowerings").ensure_salt()


def direct(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the op from its top: whatever level wants to sees it."""
    return op(*args, **kwargs)


def below_autograd(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the next kernel with gradients switched on again.

    Under torch.func the next kernel is the next *level*, which must be able to record its own graph;
    autograd.Function switches gradients off in forward, and second derivatives would silently be zero.
    """
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op(*args, **kwargs)


def forward_rule(rule: Callable[..., Any]) -> Any:
    """The `jvp` of an autograd.Function whose derivatives have some: rule(ctx, primals of what was saved, *tangents).

    Autograd runs a `jvp` with forward mode switched off, so that in another level of it the result would silently have
    no tangent; and what was saved brings its tangents along, of which a formula cannot have second ones.
    """

    @functools.wraps(rule)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = (None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)
            return rule(ctx, list(saved), *tangents[1:])  # the first is that of the settings

    return staticmethod(jvp)


def past_autograd(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the next kernel below autograd; right where nothing records derivatives."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def telling_of_memory(tensor: Tensor, call: Callable[..., Any] = direct) -> Callable[..., Any]:
    """`call` with torch.OutOfMemoryError, which handlers look for, where the memory of the tensor's device is used up.

    Below torch 2.13 the library's allocations fail with a plain RuntimeError. Nothing is allocated while code is compiled.
    """
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return call
    return functools.partial(_call_telling_of_memory, call)


def _call_telling_of_memory(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def records_derivatives(tensors: Sequence[Tensor | None]) -> bool:
    """Whether some level wants derivatives; levels and forward mode cannot be read off requires_grad."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def register_autograd(name: str, op: Any, function: Any, split: Callable[..., tuple[Any, Sequence[Any]]]) -> None:
    """Install `function` as the Autograd kernel of `op`; `split` brings the op's arguments to (settings, tensors)."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        settings, tensors = split(*args, **kwargs)
        if not records_derivatives(tensors):
            return past_autograd(op, *args, **kwargs)
        with enable_single_level_autograd_function():
            return function.apply(settings, *tensors)

    LIBRARY.impl(name, kernel, "Autograd")


def register_composite(name: str, function: Callable[..., Any]) -> None:
    """A composition of other ops; under FuncTorchBatched as well, or vmap would run it sample by sample."""
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        LIBRARY.impl(name, function, key)


def register_autocast(name: str, casting: Callable[..., Callable[[torch.dtype, str], Any]]) -> None:
    """Follow the active autocast dtype on CPU and CUDA (`torch.library.register_autocast` would fix one for ever)."""
    for device_type, key in AUTOCAST_KEYS.items():
        own_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        LIBRARY.impl(name, _autocast_kernel(device_type, own_key, casting), key)


def _autocast_kernel(device_type: str, own_key: Any, casting: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(own_key):
            return casting(*args, **kwargs)(torch.get_autocast_dtype(device_type), device_type)

    return kernel


def register_vmap(
    name: str,
    split: Callable[..., tuple[Any, Sequence[Any]]],
    call: Callable[[Any, Sequence[Any]], Any],
    rule: Callable[[int, Sequence[int | None], Any, Sequence[Any]], Any],
) -> None:
    """Install a batching rule (size, mapped dims, settings, tensors) -> (outputs, their mapped dims).

    `torch.library.register_vmap` refuses ops with keyword-only tensors; the helper behind it does not mind once the
    tensors are positional.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        settings, tensors = split(*args, **kwargs)

        def batched(info: Any, dims: Sequence[int | None], *unwrapped: Any) -> Any:
            return rule(info.batch_size, dims, settings, unwrapped)

        interpreter: Any = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(interpreter, batched, lambda *t: call(settings, t), *tensors)

    LIBRARY.impl(name, kernel, "FuncTorchBatched")


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Around the reference formulas: they accumulate in float32, which an autocast region around them would undo."""
    if device_type in AUTOCAST_KEYS:  # asking torch which devices have autocast breaks graphs on 2.11
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def register_missing_cuda(name: str, has_kernel: bool = True) -> None:
    """Where there is no CUDA kernel, a CUDA call raises our sentence instead of the dispatcher's."""
    if has_kernel and _library.has_cuda_kernels:
        return
    why = _library.why_no_cuda_kernels() if has_kernel else "this op has CPU kernels only"

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"no CUDA kernel for natten::{name}: {why}; or move the tensors to the CPU")

    LIBRARY.impl(name, kernel, "CUDA")
