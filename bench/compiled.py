# SPDX-License-Identifier: MIT
"""What torch.compile makes of attention with its neighbours: our lowering, extern calls alone, and eager.

python -m bench.compiled neighbours     RoPE -> na2d -> gate, residual, one call; and its training step
python -m bench.compiled keys           what rotating the keys (a kernel of its own) or the queries (inside) adds to it
python -m bench.compiled backward       what a gate, or rotated queries and keys, add to its backward, a call (Linux)
python -m bench.compiled model          twelve blocks: inference and training, time to compile
python -m bench.compiled memory         peak memory of a training step of the same blocks (Linux)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

import natten_ops
from bench.run import interleave, median_ratio


def rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def rope_of_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As much work; what is turned together lies side by side."""
    even, odd = x[..., ::2], x[..., 1::2]
    cosine, sine = (table.chunk(2, -1)[0] for table in (cosine, sine))
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)


class Attention(nn.Module):
    """Queries and keys normalised and rotated; neighborhood attention, or torch's own over all tokens."""

    def __init__(self, dim: int, heads: int, window: int | None, size: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.project_in, self.project_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query_norm, self.key_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        angles = torch.rand(size, size, 1, dim // heads) * 6
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project_in(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = (rope(norm(t), self.cosine, self.sine) for norm, t in ((self.query_norm, q), (self.key_norm, k)))
        if self.window is not None:
            out = natten_ops.na2d(q, k, v, kernel_size=self.window)
        else:
            rows = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2).view_as(q)
        return self.project_out(out.flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int | None, size: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, window, size)
        self.first_norm, self.second_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


def model(window: int | None, size: int = 56, blocks: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(128, 4, window, size) for _ in range(blocks)))


def own_backend() -> Callable[..., Any]:
    """Inductor under a name of its own. Code is looked up by function and backend: with one backend for all, each way
    would run what was compiled last."""

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs)

    return backend


def compiled(
    function: Callable[..., Any], extern: bool, use: Callable[[Callable[..., Any]], Any]
) -> Callable[..., Any]:
    """A compilation of its own, by a first use; `extern`: attention stays a call, and what surrounds it as torch has it."""
    from natten_ops.lowerings import fused, rotary

    run = torch.compile(function, fullgraph=True, dynamic=False, backend=own_backend())
    if not extern:
        use(run)
        return run
    with (
        mock.patch.object(fused, "why_not_template", lambda *_: "the bench asked"),
        mock.patch.object(rotary, "rewriting", lambda *_: None),
    ):
        use(run)
    return run


def ways(function: Callable[..., Any], use: Callable[[Callable[..., Any]], Any]) -> dict[str, Callable[[], Any]]:
    """The same use of the function, compiled with our lowering, with extern calls alone, and eager."""
    found = {"template": compiled(function, False, use), "extern": compiled(function, True, use), "eager": function}
    return {name: functools.partial(use, way) for name, way in found.items()}


def call_with(arguments: tuple[Any, ...], way: Callable[..., Any]) -> Any:
    return way(*arguments)


def ratios(functions: dict[str, Callable[[], Any]], rounds: int) -> str:
    # After eager mode, which goes through memory, the next needs longer than usual to reach its speed.
    times = interleave(functions, rounds, block_seconds=0.1)
    against = [name for name in functions if name != "template"]
    return ", ".join(f"{median_ratio(times['template'], times[name]):.3f} of {name}" for name in against)


def neighbours(rounds: int) -> Iterator[str]:
    def step(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, residual: Tensor, window: int, *angles: Tensor) -> Tensor:
        out = natten_ops.na2d(rope(q, *angles), rope(k, *angles), v, kernel_size=window)
        return (out * torch.sigmoid(gate) + residual).bfloat16()

    for size, dim, window in ((56, 32, 7), (32, 64, 13)):
        tensors = torch.randn(5, 1, size, size, 4, dim).unbind()
        angles = torch.randn(2, size, size, 1, dim).unbind()
        call = (*tensors, window, *angles)
        yield f"{size}x{size}, head dim {dim}, window {window}: template takes"
        with torch.no_grad():
            yield "  " + ratios(ways(step, lambda way, call=call: way(*call)), rounds)
        leaves = [t.requires_grad_() for t in tensors]

        def train(way: Callable[..., Tensor], call: Any = call, leaves: list[Tensor] = leaves) -> Any:
            return torch.autograd.grad(way(*call).sum(), leaves)

        yield "  training: " + ratios(ways(step, train), rounds)


# What makes tokens of them, from cheap to dear.
MAKERS: dict[str, Callable[..., Tensor]] = {
    "a weight": lambda x, weight, _: x * weight,
    "weight and bias": lambda x, weight, bias: x * weight + bias,
    "halves": rope,
    "pairs": rope_of_pairs,
}


def keys(rounds: int) -> Iterator[str]:
    for shape, dim, window in (
        ((56, 56), 32, 7),
        ((224, 224), 32, 7),
        ((32, 32), 64, 13),
        ((8, 28, 28), 32, 5),
        ((16, 24, 24), 64, 5),
        ((4096,), 32, 31),
    ):
        torch.compiler.reset()  # the compilations of the last shape count against torch's limit
        yield f"{shape}, head dim {dim}, window {window}: what makes them adds, of the time without"
        yield from keys_of(shape, dim, window, rounds)


def keys_of(shape: tuple[int, ...], dim: int, window: int, rounds: int) -> Iterator[str]:
    """What the cost model compares, packings of a key above the first times ops, and what both of its answers take."""
    from natten_ops.lowerings import fused

    def step(q: Tensor, k: Tensor, v: Tensor, make_q: Any, make_k: Any, *angles: Tensor) -> Tensor:
        query, key = (make(t, *angles) if make else t for make, t in ((make_q, q), (make_k, k)))
        attend = (natten_ops.na1d, natten_ops.na2d, natten_ops.na3d)[q.dim() - 4]
        return attend(query, key, v, kernel_size=window) * 2

    made: dict[str, tuple[Any, Any]] = {"neither": (None, None)}
    made |= {f"queries, {name}": (MAKERS[name], None) for name in ("halves", "pairs")}
    for name, maker in MAKERS.items():
        made |= {f"keys {place}, {name}": (None, maker) for place in ("inside", "in memory")}
    tensors, angles = torch.randn(3, 1, *shape, 4, dim).unbind(), torch.randn(2, *shape, 1, dim).unbind()
    functions, facts = {}, dict.fromkeys(made, "")
    times_packed, way_of = fused._times_packed, fused.way_of
    for name, makers in made.items():
        noted: list[Any] = []

        def note_way(producer: Any, noted: list[Any] = noted) -> Any:
            noted.append(way_of(producer))
            return noted[0]

        def note_packings(
            *given: Any, noted: list[Any] = noted, answer: float = math.inf if "memory" in name else 1.0
        ) -> float:
            noted.append(times_packed(*given) - 1)
            return answer

        use = functools.partial(call_with, (*tensors, *makers, *angles))
        with torch.no_grad(), mock.patch.multiple(fused, _times_packed=note_packings, way_of=note_way):
            functions[name] = functools.partial(use, compiled(step, False, use))
        if "keys" in name:
            way, above = noted
            facts[name] = f" ({above:.2f} packings x {way.ops} ops, limit {way.ops_of_a_pass})"
    with torch.no_grad():
        times = interleave(functions, rounds, block_seconds=0.1)
    for name in list(made)[1:]:
        yield f"  {name}{facts[name]}: {median_ratio(times[name], times['neither']) - 1:.3f}"


def keep_freed_memory() -> None:
    """Up to 32 MB of it, by glibc; else some ways fetch new pages at every call, and others do not."""
    trim_threshold, mmap_threshold = -1, -3
    for option in (trim_threshold, mmap_threshold):
        ctypes.CDLL("libc.so.6").mallopt(option, 32 << 20)


def backward(rounds: int) -> Iterator[str]:
    from natten_ops.lowerings import rotary

    def bare(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, window: int, *angles: Tensor) -> Tensor:
        return natten_ops.na2d(q, k, v, kernel_size=window)

    def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, window: int, *angles: Tensor) -> Tensor:
        return bare(q, k, v, gate, window) * torch.sigmoid(gate)

    def halves(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, window: int, *angles: Tensor) -> Tensor:
        return bare(rope(q, *angles), rope(k, *angles), v, gate, window)

    def pairs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, window: int, *angles: Tensor) -> Tensor:
        return bare(rope_of_pairs(q, *angles), rope_of_pairs(k, *angles), v, gate, window)

    def of_gate(grad: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        share = torch.sigmoid(gate)
        return grad * out * share * (1 - share)

    def of_both(grad: Tensor, out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return of_gate(grad, out, gate), grad * torch.sigmoid(gate)

    torch._functorch.config.donated_buffer = False  # the same outputs are differentiated again and again
    keep_freed_memory()
    for size, dim, window in ((56, 32, 7), (112, 32, 7), (32, 64, 13)):
        tensors = torch.randn(4, 1, size, size, 4, dim).unbind()
        angles = torch.randn(2, size, size, 1, dim).unbind()
        functions = {}
        for function, rewritten in ((bare, True), (gated, True), *itertools.product((halves, pairs), (True, False))):
            leaves = [t.clone().requires_grad_() for t in tensors]
            torch._dynamo.reset()
            with contextlib.nullcontext() if rewritten else mock.patch.object(rotary, "rewriting", lambda *_: None):
                run = torch.compile(function, fullgraph=True, dynamic=False, backend=own_backend())
                out = run(*leaves, window, *angles)
                wanted = leaves if function is gated else leaves[:3]
                call = functools.partial(torch.autograd.grad, out, wanted, torch.randn_like(out), retain_graph=True)
                call()
            functions[function.__name__ + ("" if rewritten else ", torch's own")] = call
        with torch.no_grad():
            for kernel in (of_gate, of_both):
                call = torch.compile(kernel, fullgraph=True, dynamic=False, backend=own_backend())
                call(*tensors[:3])
                functions[kernel.__name__] = functools.partial(call, *tensors[:3])
        times = interleave(functions, rounds, block_seconds=0.1)
        one, two = (median_ratio(times[name], times["bare"]) for name in ("of_gate", "of_both"))
        adds = {
            name: median_ratio(times[name], times["bare"]) - 1
            for name in functions
            if name not in ("bare", "of_gate", "of_both")
        }
        yield f"{size}x{size}, head dim {dim}, window {window}: to the backward adds"
        yield f"  a gate: {adds.pop('gated'):.3f} (of which its own gradient takes {one:.3f}, with that of the output {two:.3f})"
        for name, share in adds.items():
            yield f"  rotated queries and keys, {name}: {share:.3f}"


def twelve_blocks(rounds: int) -> Iterator[str]:
    x = torch.randn(1, 56, 56, 128)
    torch.compile(torch.sin)(x)  # what torch asks the compiler once a process, whoever comes first
    seconds = {}
    for name, window in (("na", 7), ("sdpa", None)):
        with torch._inductor.utils.fresh_cache(), torch.no_grad():
            torch._dynamo.reset()
            start = time.perf_counter()
            torch.compile(model(window), fullgraph=True, dynamic=False)(x)
            seconds[name] = time.perf_counter() - start
    yield f"first call of 12 blocks: {seconds['na']:.1f} s with na2d, {seconds['sdpa']:.1f} s with SDPA"
    net = model(7)
    with torch.no_grad():
        yield "inference: template takes " + ratios(ways(net, lambda way: way(x)), rounds)
    parameters = list(net.parameters())

    def train(way: Callable[[Tensor], Tensor]) -> Any:
        return torch.autograd.grad(way(x).square().mean(), parameters)

    yield "training: template takes " + ratios(ways(net, train), rounds)


def peak_of(step: Callable[[], Any]) -> float:
    """Megabytes that the process grows by during a step, at most."""

    def status(field: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / 1024


def memory(rounds: int) -> Iterator[str]:
    x = torch.randn(1, 56, 56, 128)
    for name, window, extern in (("na2d", 7, False), ("na2d by calls", 7, True), ("SDPA", None, False)):
        net = model(window)
        parameters = list(net.parameters())

        def train(way: Callable[[Tensor], Tensor], parameters: list[Tensor] = parameters) -> Any:
            return torch.autograd.grad(way(x).square().mean(), parameters)

        way = compiled(net, extern, train)
        peaks = sorted(peak_of(functools.partial(train, way)) for _ in range(rounds))
        yield f"a training step of 12 blocks with {name} takes {peaks[rounds // 2]:.0f} MB more at its peak"


WHAT = {"neighbours": neighbours, "keys": keys, "backward": backward, "model": twelve_blocks, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # ways and sizes of one function
    torch._inductor.config.fx_graph_cache = False  # to which both lowerings of a graph are one
    torch._functorch.config.enable_autograd_cache = False
    for line in WHAT[options.what](options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
