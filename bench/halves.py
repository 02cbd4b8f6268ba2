# SPDX-License-Identifier: MIT
"""The unfused ops against sgemm, against the gather that people write, and against what a compiler could make of them.

python -m bench.halves ops          each op and backward: share of the sgemm rate, in useful FLOPs
python -m bench.halves steps        logits, softmax, sums: by the ops, compiled, fused, as a compiled gather; and in training
python -m bench.halves lowerings    between the halves a bias: two calls with one kernel between, or everything as loops
python -m bench.halves places       the two calls: weights in the place of the logits, or in memory of their own
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import natten_ops
from bench.cases import CASES
from bench.compiled import own_backend
from bench.contenders import gather, matmul
from bench.run import interleave, median_ratio
from natten_ops.geometry.masks import TENSORS
from natten_ops.geometry.params import axis_window
from natten_ops.lowerings import unfused

HEADLINE = CASES[0]
Functions = dict[str, Callable[[], Any]]


def heads_first(size: int, window: int, dim: int, heads: int = 4) -> tuple[Tensor, ...]:
    """query, key, value `[1, heads, size, size, dim]` and weights of their windows."""
    tokens = torch.randn(3, 1, heads, size, size, dim).unbind()
    return *tokens, natten_ops.na2d_qk(*tokens[:2], kernel_size=window).softmax(-1)


def ops(rounds: int) -> Iterator[str]:
    natten = torch.ops.natten
    yardstick, yardstick_flops = matmul()
    window, qk_needed, av_needed = HEADLINE.kernel_size[0], [True, True, False, False], [True, True, False]
    lists = [[window] * 2, [1, 1], [1, 1], [False, False]]
    for size in (HEADLINE.spatial[0], 4 * HEADLINE.spatial[0]):  # weights in the cache; and not
        query, key, value, weights = heads_first(size, window, HEADLINE.head_dim)
        work: dict[str, tuple[Callable[..., Any], int]] = {
            "na_qk": (functools.partial(natten.na_qk, query, key, *lists), 1),
            "na_av": (functools.partial(natten.na_av, weights, value, *lists), 1),
            "na_qk_backward": (
                functools.partial(natten.na_qk_backward, weights, query, key, *lists, None, None, qk_needed),
                2,
            ),
            "na_av_backward": (
                functools.partial(natten.na_av_backward, query, weights, value, *lists, None, av_needed),
                2,
            ),
        }
        product = 2 * query.numel() * window * window
        functions: Functions = {"sgemm": yardstick, **{name: call for name, (call, _) in work.items()}}
        with torch.inference_mode():
            times = interleave(functions, rounds)
        for name, (_, products) in work.items():
            share = median_ratio(times["sgemm"], times[name]) * products * product / yardstick_flops
            yield f"{size}x{size}, {name}: {share:.2f} of the sgemm rate"


def attend(query: Tensor, key: Tensor, value: Tensor, window: int, bias: Tensor | None = None) -> Tensor:
    logits = natten_ops.na2d_qk(query * query.shape[-1] ** -0.5, key, kernel_size=window)
    return natten_ops.na2d_av((logits if bias is None else logits + bias).softmax(-1), value, kernel_size=window)


def in_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=own_backend())


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A compilation of its own, by a first use."""
    call = functools.partial(in_one_graph(function), *arguments)
    call()
    return call


def steps(rounds: int) -> Iterator[str]:
    window = HEADLINE.kernel_size[0]
    tensors = heads_first(HEADLINE.spatial[0], window, HEADLINE.head_dim)[:3]
    heads_last = tuple(t.movedim(1, -2).contiguous() for t in tensors)
    with torch.no_grad():
        functions: Functions = {
            "ops": functools.partial(attend, *tensors, window),
            "ops, compiled": compiled(attend, *tensors, window),
            "fused op": lambda: natten_ops.na2d(*heads_last, kernel_size=window),
            "compiled gather": compiled(functools.partial(gather, HEADLINE), *heads_last),
        }
        with mock.patch.object(unfused, "halves_of", lambda _: None):
            functions["ops, compiled, not joined"] = compiled(attend, *tensors, window)
        times = interleave(functions, rounds)
    for name in functions:
        yield f"{name}: the compiled gather takes {median_ratio(times['compiled gather'], times[name]):.2f} times as long"
    leaves, leaves_last = ([t.detach().requires_grad_() for t in group] for group in (tensors, heads_last))

    def trained(function: Callable[..., Tensor], inputs: list[Tensor], *rest: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*inputs, *rest).sum(), inputs)

    functions = {
        "ops": trained(attend, leaves, window),
        "ops, compiled": trained(in_one_graph(attend), leaves, window),
        "fused op": trained(functools.partial(natten_ops.na2d, kernel_size=window), leaves_last),
        "compiled gather": trained(in_one_graph(functools.partial(gather, HEADLINE)), leaves_last),
    }
    for step in functions.values():
        step()
    times = interleave(functions, rounds)
    for name in functions:
        ratio = median_ratio(times["compiled gather"], times[name])
        yield f"training, {name}: the compiled gather takes {ratio:.1f} times as long"


def as_loops(query: Tensor, key: Tensor, value: Tensor, window: int, bias: Tensor) -> Tensor:
    """The same ops in indices and reductions, which Inductor turns into loops and fuses with all between them."""
    shape = query.shape[2:-1]
    slots = torch.zeros(1, 1, dtype=torch.int64)
    for length in shape:
        _, start, _ = axis_window(torch.arange(length), length, window, 1, 1, False, ops=TENSORS)
        keys = start[:, None] + torch.arange(window)
        slots = (slots[:, None, :, None] * length + keys[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    query, key, value = (t.flatten(2, -2) for t in (query * query.shape[-1] ** -0.5, key, value))
    logits = (query[..., None, :] * key[:, :, slots]).sum(-1) + bias
    return (logits.softmax(-1)[..., None] * value[:, :, slots]).sum(-2).unflatten(2, shape)


def lowerings(rounds: int) -> Iterator[str]:
    for window, dim in ((3, 16), (3, 64), (5, 32), (7, 32), (13, 64)):
        tensors = heads_first(56 if window < 13 else 32, window, dim)[:3]
        bias = torch.randn(window * window)
        with torch.no_grad():
            functions = {
                name: compiled(way, *tensors, window, bias) for name, way in (("calls", attend), ("loops", as_loops))
            }
            results = [function() for function in functions.values()]
            torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
            times = interleave(functions, rounds)
        yield f"window {window}, head dim {dim}: loops take {median_ratio(times['loops'], times['calls']):.2f} of calls"


def places(rounds: int) -> Iterator[str]:
    for size, window in ((28, 7), (28, 8), (56, 7), (56, 8), (112, 7), (224, 7)):
        tensors, bias = heads_first(size, window, 32)[:3], torch.randn(window * window)
        with torch.no_grad():
            functions = {"one": compiled(attend, *tensors, window, bias)}
            with mock.patch.object(unfused, "_let_weights_replace_logits", lambda _: None):
                functions["two"] = compiled(attend, *tensors, window, bias)
            times = interleave(functions, rounds)
        yield f"{size}x{size}, window {window}: one place takes {median_ratio(times['one'], times['two']):.2f} of two"


WHAT = {"ops": ops, "steps": steps, "lowerings": lowerings, "places": places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # ways and sizes of one function
    torch._inductor.config.fx_graph_cache = False
    for line in WHAT[options.what](options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
