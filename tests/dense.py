# SPDX-License-Identifier: MIT
"""The same attention by torch's own op on a dense mask: the yardstick for the error that a dtype may make."""

import math
from collections.abc import Callable, Sequence

import torch
from samples import Problem, differentiable, expected, in_double, with_tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from natten_ops import reference
from natten_ops.geometry.masks import dense_mask
from natten_ops.reference import Inputs

FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # two ulps at 1
# (inputs, grad_out) -> out, lse, and the gradients of the differentiable inputs; None: not of interest.
Attend = Callable[[Inputs, Tensor], tuple[Tensor, Tensor, Sequence[Tensor] | None]]


def dense_attention(inputs: Inputs, problem: Problem, fused: bool = False) -> Tensor:
    """out by scaled_dot_product_attention with every hidden pair at -inf, in the dtype of the inputs.

    `fused`: by its fused kernel, whose backward starts from the rounded out. It has no gradient of a bias.
    """
    query, key, value, bias, scale = _heads_first(inputs, problem)
    dead = (bias == -math.inf).all(-1, keepdim=True)
    if fused:
        width = max(query.shape[-1], value.shape[-1])  # the one head dim that it has
        padded = [pad(t, (0, width - t.shape[-1])).contiguous() for t in (query, key, value)]
        mask = bias.detach().masked_fill(dead, 0.0)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(*padded, attn_mask=mask, scale=scale)[..., : value.shape[-1]]
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2).reshape(*inputs.query.shape[:-1], inputs.value.shape[-1])


def _heads_first(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """query, key, value [batch, heads, tokens, dim] with additional tokens, the bias of every pair, and the scale."""
    query, key, value = (t.flatten(1, -3).transpose(1, 2) for t in inputs[:3])
    bias = _bias(inputs, problem)
    if inputs.additional_keys is not None and inputs.additional_values is not None:
        key = torch.cat([key, inputs.additional_keys.transpose(1, 2)], dim=2)
        value = torch.cat([value, inputs.additional_values.transpose(1, 2)], dim=2)
        bias = pad(bias, (0, inputs.additional_keys.shape[1]))
    key, value = (t.repeat_interleave(problem.group, dim=1) for t in (key, value))
    return query, key, value, bias, query.shape[-1] ** -0.5 if problem.scale is None else problem.scale


def _fused_gradient_of_bias(inputs: Inputs, problem: Problem, out: Tensor, grad_out: Tensor) -> Tensor:
    """What a fused backward has for a bias: slopes in the type of sums, from the rounded out."""
    leaves = [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in differentiable(inputs)]
    wide = with_tensors(inputs, leaves)
    wide.rpb.requires_grad_()
    query, key, value, bias, scale = _heads_first(wide, problem)
    out, grad = (t.to(query.dtype).flatten(1, -3).transpose(1, 2) for t in (out, grad_out))
    with torch.no_grad():
        weights = (scale * query @ key.mT + bias).softmax(-1).nan_to_num()
        slopes = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True))
    return torch.autograd.grad(bias, wide.rpb, slopes.sum_to_size(bias.shape))[0]


def _bias(inputs: Inputs, problem: Problem) -> Tensor:
    params, box = problem.geometry()
    q_shape, kv_shape = problem.shapes()
    visible = dense_mask(params, q_shape, kv_shape, box)[None, None]
    if inputs.key_mask is not None:
        visible = visible & inputs.key_mask.flatten(1)[:, None, None]
    bias = inputs.query.new_zeros(1, inputs.query.shape[-2], visible.shape[-2], visible.shape[-1])
    if inputs.rpb is not None:
        slots = reference.window_slots(inputs, params, box)
        entries = inputs.rpb.to(bias.dtype).flatten(1)[:, slots.bias_NS] * slots.visible_NS
        index = slots.key_NS.expand(bias.shape[1], -1, -1)
        bias = bias[0].scatter_add(2, index, entries)[None]
    return bias.masked_fill(~visible, -math.inf)


def errors_of_torch(
    inputs: Inputs, problem: Problem, grad_out: Tensor, fused: bool = False
) -> tuple[float, list[float]]:
    """Largest error of torch's op in the inputs' dtype against float64: of out, and of each gradient.

    One number alone is right by chance: the gradient of a lone additional key sums a thousand terms, and torch's error of
    it varies 13 times with grad_out. Of such a gradient the error is the largest of four draws. `fused`: the larger
    errors of both ways that torch's op goes.
    """
    if not grad_out.numel():  # of nothing torch's own op has no gradient
        return 0.0, [0.0] * len(differentiable(inputs))
    draws = [grad_out]
    if any(0 < t.numel() < 32 for t in differentiable(inputs)):
        draws += [grad_out.roll(shift) for shift in (7, 11, 13)]  # of the flattened numbers
    found = [_errors(inputs, problem, draw, way) for draw in draws for way in {False, fused}]
    grads = [max(errors) for errors in zip(*(grads for _, grads in found))]
    return max(error for error, _ in found), grads


def _errors(inputs: Inputs, problem: Problem, grad_out: Tensor, fused: bool) -> tuple[float, list[float]]:
    results = []
    for dtype, way in ((torch.float64, False), (inputs.query.dtype, fused)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in differentiable(inputs)]
        out = dense_attention(with_tensors(inputs, leaves), problem, way)
        grads = torch.autograd.grad(out, leaves, grad_out.to(dtype), allow_unused=True)
        results.append(
            (out.detach(), [_fused_gradient_of_bias(inputs, problem, out, grad_out) if g is None else g for g in grads])
        )
    (exact, exact_grads), (out, grads) = results
    return worst(out, exact), [worst(g, e) for g, e in zip(grads, exact_grads)]


def worst(have: Tensor, want: Tensor) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    return (have.double() - want.double()).abs().max().item() if have.numel() else 0.0


def compare(
    problem: Problem, dtype: torch.dtype, *ways: Attend, seed: int = 0, cuda: bool = False, tf32: bool = False
) -> None:
    """Outputs and gradients of every way within twice the error of torch's own op in the same dtype.

    The yardstick itself is off by chance on a handful of numbers, hence the floor of a few ulps of the result. Of CUDA
    kernels it is what torch has there, the fused op. Numbers of tf32 have as many bits as those of float16, which is what
    torch's own op can do on a CPU.
    """
    inputs = problem.make(dtype, seed)
    want, want_lse = expected(inputs, problem)
    grad_out = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)
    yardstick = with_tensors(inputs, [t.half() for t in differentiable(inputs)]) if tf32 else inputs
    torch_out, torch_grads = errors_of_torch(yardstick, problem, grad_out, fused=cuda)
    floor = _floor_of_tf32(inputs, problem) if tf32 else FLOOR[dtype]
    of_lse = 10 * floor if dtype == torch.float64 else floor if tf32 else 1e-5
    exact = reference.backward(grad_out.double(), None, in_double(inputs), *problem.geometry(), problem.scale)
    for attend in ways:
        out, lse, gradients = attend(inputs, grad_out)
        assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert worst(out, want) <= 2 * torch_out + floor * max(1.0, _largest(want))
        torch.testing.assert_close(lse.double(), want_lse, atol=of_lse, rtol=1e-5)
        if gradients is None:
            continue
        for gradient, truth, error in zip(gradients, differentiable(exact), torch_grads, strict=True):
            assert gradient.dtype == dtype
            assert worst(gradient, truth) <= 2 * error + 2 * floor * max(1.0, _largest(truth))


def _floor_of_tf32(inputs: Inputs, problem: Problem) -> float:
    """What rounding costs beside float16's, whose inputs are exact: an ulp or two of the logits, and of every product, since
    <grad_out, value> - delta no longer cancels to the last bit."""
    scale = problem.scale or inputs.query.shape[-1] ** -0.5
    logits = scale * inputs.query.norm(dim=-1).max() * inputs.key.norm(dim=-1).max() if inputs.query.numel() else 0.0
    return 2**-10 * (2.0 + float(logits))


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
