# SPDX-License-Identifier: MIT
"""The ways of solving a case that are timed against each other, each with what it can do."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import natten_ops
from bench.cases import Case
from natten_ops import reference
from natten_ops.geometry.masks import dense_mask, mask_mod
from natten_ops.reference import Inputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MANY_PAIRS = 3136**2  # tokens squared: masks of more are not built


def ours(case: Case, inputs: Inputs, backend: str | None) -> Attention:
    settings = (case.kernel_size, case.stride, case.dilation, case.is_causal)
    more = {"rpb": inputs.rpb, "key_mask": inputs.key_mask, "backend": backend}
    additional = {"additional_keys": inputs.additional_keys, "additional_values": inputs.additional_values}
    return lambda q, k, v: natten_ops.neighborhood_attention(q, k, v, *settings, **additional, **more)


def gather(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What people write without a library: windows by unfold, indexed by clamped starts, two einsums, softmax."""
    windows = []
    for tokens in (key, value):
        for axis, kernel in enumerate(case.kernel_size, start=1):
            length = case.spatial[axis - 1]
            starts = (torch.arange(length) - kernel // 2).clamp(0, length - kernel)
            tokens = tokens.unfold(axis, kernel, 1).index_select(axis, starts)
        windows.append(tokens.flatten(-len(case.spatial)))
    keys, values = windows
    scores = torch.einsum("b...hd,b...hdk->b...hk", query, keys) * case.head_dim**-0.5
    return torch.einsum("b...hk,b...hdk->b...hd", scores.softmax(-1), values)


def _heads_first(case: Case, attention: Attention) -> Attention:
    def run(*tensors: Tensor) -> Tensor:
        out = attention(*(t.flatten(1, -3).transpose(1, 2) for t in tensors))
        return out.transpose(1, 2).reshape(case.batch, *case.spatial, case.heads, case.head_dim)

    return run


def masked_sdpa(case: Case) -> Attention:
    mask = dense_mask(case.params, case.spatial, case.spatial)
    return _heads_first(case, functools.partial(scaled_dot_product_attention, attn_mask=mask))


def _compiled_flex(mask: Any) -> Attention:
    """The views outside: torch 2.13 fails on views of 5-D inputs inside, on CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(functools.partial(flex_attention, block_mask=mask), fullgraph=True, dynamic=False)


def flex(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    visible = mask_mod(case.spatial, *case.params)
    return _heads_first(
        case, _compiled_flex(create_block_mask(visible, None, None, case.tokens, case.tokens, device="cpu"))
    )


def original(case: Case) -> Attention:
    """The natten package, where it is installed."""
    import natten

    function = getattr(natten, f"na{len(case.spatial)}d")
    settings = {"stride": case.stride, "dilation": case.dilation, "is_causal": case.is_causal}
    return lambda q, k, v: function(q, k, v, kernel_size=case.kernel_size, **settings)


def flex_in_tiles(case: Case) -> Attention:
    """FlexAttention on tokens in box-shaped tiles, brought there and back by index ops that it fuses."""
    from torch.nn.attention.flex_attention import flex_attention

    tile = {1: (128,), 2: (8, 16), 3: (2, 8, 8)}[len(case.spatial)]
    mask, order = natten_ops.tiled_block_mask(case.spatial, *case.params, tile=tile, device=case.device)

    def run(*tensors: Tensor) -> Tensor:
        tiled = (natten_ops.tile_permute(t, order, dim=2) for t in tensors)
        return natten_ops.tile_unpermute(flex_attention(*tiled, block_mask=mask), order, case.spatial, dim=2)

    return _heads_first(case, torch.compile(run, fullgraph=True, dynamic=False))


def on_gpu(case: Case, inputs: Inputs, peers: bool) -> dict[str, Attention]:
    """Ours, FlexAttention with our block masks on tokens in rows and in tiles, and full attention, which is another function."""
    torch.compiler.reset()
    found = {"natten_ops": ours(case, inputs, None)}
    if peers:
        mask = natten_ops.block_mask(case.spatial, *case.params, device=case.device)
        found["flex"] = _heads_first(case, _compiled_flex(mask))
        found["flex_in_tiles"] = flex_in_tiles(case)
        found["dense_sdpa"] = _heads_first(case, scaled_dot_product_attention)
    if peers and importlib.util.find_spec("natten"):
        found["natten"] = original(case)
    return found


def contenders(case: Case, inputs: Inputs, kind: str, peers: bool) -> dict[str, Attention]:
    """By name; `kind` is forward or training. Absent ones cannot do the case or would take minutes."""
    if case.device != "cpu":
        return on_gpu(case, inputs, peers)
    found: dict[str, Attention] = {
        "natten_ops": ours(case, inputs, None),
        "cpu-general": ours(case, inputs, "cpu-general"),
    }
    if not peers or not case.plain:
        return found
    torch.compiler.reset()  # every case is a graph of its own, not one more of the last case's
    simple = case.stride == case.dilation == 1 and not case.is_causal and len(case.spatial) == 2
    if simple and case.tokens <= 3136:
        found["compiled_gather"] = torch.compile(functools.partial(gather, case), fullgraph=True, dynamic=False)
    small = case.tokens**2 <= MANY_PAIRS and case.dtype != torch.float64
    if small:
        found["masked_sdpa"] = masked_sdpa(case)
        found["dense_sdpa"] = _heads_first(case, scaled_dot_product_attention)  # another function: a floor, not a peer
    if small and kind == "forward":  # on CPU it has no backward
        found["flex"] = flex(case)
    if small and kind == "forward":
        found["reference"] = lambda q, k, v: reference.forward(Inputs(q, k, v), case.params, None, None)[0]
    if importlib.util.find_spec("natten"):
        found["natten"] = original(case)
    return found


def _samples(case: Case) -> list[tuple[slice, ...]]:
    """The queries that are checked: all, or of the large cases of GPUs two an axis at the corner and in the middle."""
    if case.device == "cpu":
        return [(slice(None),)]
    corners = ((0,) * len(case.spatial), tuple(n // 2 for n in case.spatial))
    return [(slice(None), *(slice(at, at + 2) for at in corner)) for corner in corners]


def _expected(case: Case, inputs: Inputs, box: tuple[slice, ...]) -> Tensor:
    if case.device == "cpu" and case.tokens > 3136:  # the reference gathers every window
        return ours(case, inputs, "cpu-general")(*inputs[:3]).double()
    doubles = Inputs(*(t if t is None or t.dtype == torch.bool else t.cpu().double() for t in inputs))
    if case.device == "cpu":
        return reference.forward(doubles, case.params, None, None)[0]
    place = {"q_origin": [axis.start for axis in box[1:]], "kv_origin": [0] * len(case.spatial), "extent": case.spatial}
    settings = (case.kernel_size, case.stride, case.dilation, case.is_causal)
    query, key, value = doubles[:3]
    return natten_ops.neighborhood_attention(query[box], key, value, *settings, **place, backend="cpu-general")


def check(case: Case, inputs: Inputs, found: dict[str, Attention]) -> None:
    """No contender is timed before its numbers are right."""
    wanted = [(box, _expected(case, inputs, box)) for box in _samples(case)]
    tolerance = 1e-4 if case.dtype in (torch.float32, torch.float64) else 3e-2
    for name, attention in found.items():
        out = attention(*inputs[:3])
        error = max((out[box].cpu().double() - want).abs().max().item() for box, want in wanted)
        assert name == "dense_sdpa" or error < tolerance, f"{case.name}: {name} is off by {error}"


def calls(case: Case, kind: str, found: dict[str, Attention], inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The timed calls: the forward alone, or with the gradients of query, key and value."""
    if kind == "forward":
        return {name: functools.partial(attention, *inputs[:3]) for name, attention in found.items()}
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    grad = torch.randn_like(inputs.query)

    def step(attention: Attention) -> Any:
        return torch.autograd.grad(attention(*leaves), leaves, grad)

    return {name: functools.partial(step, attention) for name, attention in found.items()}


def matmul(device: str = "cpu") -> tuple[Callable[[], Tensor], int]:
    """The yardstick of the machine and its FLOPs: 1024^3 in float32; on a GPU 8192^3 in bfloat16."""
    size, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)
    return functools.partial(torch.matmul, left, right), 2 * size**3


def copy(inputs: Inputs) -> Callable[[], Any]:
    """The floor of memory: query, key and value are read and as much is written, by torch's own copies."""
    sources = inputs[:3]
    targets = [torch.empty_like(source) for source in sources]
    return lambda: [target.copy_(source) for target, source in zip(targets, sources)]
