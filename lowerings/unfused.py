# SPDX-License-Identifier: MIT
"""The unfused ops in Inductor: a softmax between two halves becomes the fused op; what is left calls the eager kernels.

`na_av(softmax(na_qk(query, key)), value)` whose weights nobody else reads is `neighborhood_attention_lse`: in inference
a model that was written with the halves gets the fused kernel and never has its weights in memory. With something else
between them (dropout, a bias of one's own), or where the backward needs the weights, both halves are extern calls and
Inductor fuses everything between them into one kernel, whose weights take the place of the logits in memory. Lowered as
loops (windows by index, a reduction over the head dim or the slots) they fuse as well, and lose:
python -m bench.halves lowerings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.fx_passes import post_grad
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, register_graph_pattern
from torch.fx.experimental.symbolic_shapes import statically_known_true

from natten_ops.lowerings._compat import ir
from natten_ops.lowerings.fused import FORWARD, erase_unused, replace_node
from natten_ops.ops.unfused_arguments import av_backward_op, av_op, qk_backward_op, qk_op

_ATEN, _PRIMS = torch.ops.aten, torch.ops.prims


def logits_of(weights: Any) -> Any | None:
    """What a node is the softmax over slots of; None if it is none."""
    exponentials: Any = weights.args[0] if _is(weights, _ATEN.div.Tensor) else None
    if not _is(exponentials, _ATEN.exp.default) or len(exponentials.users) != 2:
        return None
    shifted: Any = exponentials.args[0]
    if not _is_over_slots(weights.args[1], _ATEN.sum.dim_IntList, exponentials) or not _is(shifted, _ATEN.sub.Tensor):
        return None
    logits = shifted.args[0]
    return logits if len(shifted.users) == 1 and _is_over_slots(shifted.args[1], _ATEN.amax.default, logits) else None


def halves_of(weighted_sum: Any) -> Any | None:
    """The na_qk node whose softmax an na_av node sums values by, if nobody else reads what is between; else None."""
    logits = logits_of(_only_used_here(weighted_sum.args[0]))  # None has no target: it is no softmax
    if logits is None or len(logits.users) != 2:  # the maximum and the difference
        return None
    scores = logits
    if _is(logits, _PRIMS.convert_element_type.default):
        scores = logits.args[0] if len(logits.args[0].users) == 1 else None
    return scores if _is(scores, qk_op) and _fit(scores, weighted_sum) else None


def _is(node: Any, target: Any) -> bool:
    return getattr(node, "target", None) is target


def _only_used_here(node: Any) -> Any:
    """The node; below a change of dtype what was changed, where nothing else uses it. None if something else does."""
    if len(node.users) != 1:
        return None
    if _is(node, _PRIMS.convert_element_type.default):
        source = node.args[0]
        return source if len(source.users) == 1 else None
    return node


def _is_over_slots(node: Any, target: Any, source: Any) -> bool:
    """target(source, [-1], True), used once."""
    if not _is(node, target) or len(node.users) != 1 or node.args[0] is not source:
        return False
    last = source.meta["val"].dim() - 1
    return tuple(node.args[1:3]) in (([-1], True), ([last], True))


def _fit(scores: Any, weighted_sum: Any) -> bool:
    """Whether both halves have the same windows and dtype, and both or neither additional tokens."""
    extras = [
        node.kwargs.get(name) for node, name in ((scores, "additional_keys"), (weighted_sum, "additional_values"))
    ]
    same = list(map(list, scores.args[2:6])) == list(map(list, weighted_sum.args[2:6]))
    tokens = [*scores.args[:2], weighted_sum.args[1], *(node for node in extras if node is not None)]
    one_dtype = len({node.meta["val"].dtype for node in tokens}) == 1
    return same and one_dtype and (extras[0] is None) == (extras[1] is None)


def fused(query: Any, key: Any, value: Any, *extras: Any, windows: Any, has_rpb: bool) -> Any:
    """The same attention by the fused op, which is heads last."""
    query, key, value = (tokens.movedim(1, -2) for tokens in (query, key, value))
    rest = list(extras)
    rpb = rest.pop(0) if has_rpb else None
    additional = [tokens.transpose(1, 2) for tokens in rest] or [None, None]
    out = FORWARD(query, key, value, *windows, 1.0, *additional, rpb=rpb)[0]
    return out.movedim(-2, 1).contiguous()  # as the halves leave it; Inductor fuses the copy with what follows


def _spare_the_way_back(heads_first: Any) -> None:
    """Most models bring the output heads last again, into memory of its own: that is how the fused op has it.

    One such copy is spared; a second one must not share memory with it. With one head, one token or no sample both orders
    are one in memory, and there is no copy.
    """
    if not _is(heads_first, _ATEN.clone.default):
        return
    heads_last, dims = heads_first.args[0].args
    for back in list(heads_first.users):
        if not _is(back, _ATEN.permute.default) or [dims[i] for i in back.args[1]] != list(range(len(dims))):
            continue
        for copy in list(back.users):
            if _is(copy, _ATEN.clone.default) and copy.kwargs.get("memory_format") is torch.contiguous_format:
                copy.replace_all_uses_with(heads_last)
                erase_unused(copy)
                return


def _let_weights_replace_logits(weighted_sum: Any) -> None:
    """Inductor lets a result take the memory of a tensor of its size that the same step of a kernel reads last.

    The last step of a softmax reads exponentials, which earlier steps leave in a small buffer. Here it looks at the logits
    as well, so that there is one tensor of the size of the attention less. Logits, softmax and sums of 224x224 take 0.88 to
    1.00 of the time, and, which all caches hold, of 56x56 1.13 to 1.19: with a window of 7 a row of slots ends within a
    vector, and AVX-512 waits for its store before it loads the next row; with one of 8 they take 0.90 to 1.00.
    python -m bench.halves places
    """
    between, shape = [weighted_sum.args[0]], weighted_sum.args[0].meta["val"].shape
    for node in between:  # grows: dropout, a change of dtype, whatever else is element by element
        logits = logits_of(node)
        if logits is not None:
            if not any(_is(user, _ATEN.ne.Tensor) for user in logits.users):  # else another sum has the same weights
                replace_node(node, _divide, [*node.args, logits])
            return
        between += [n for n in node.all_input_nodes if n not in between and _has_shape(n, shape)]


def _divide(exponentials: Any, total: Any, logits: Any) -> Any:
    """The weights: a logit that is NaN makes all weights of its query NaN, so that it may as well stand for its own."""
    return torch.where(logits != logits, logits, exponentials / total)


def _has_shape(node: Any, shape: Any) -> bool:
    """Whether it surely has; nothing is assumed of sizes that are not known."""
    tensor = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != len(shape):
        return False
    return all(statically_known_true(size == wanted) for size, wanted in zip(tensor.shape, shape))


def _extern(op: Any) -> Any:
    """A call of the eager kernel, which reads views in place; Inductor's own fallback copies them."""
    call = fallback_handler(op, add_to_fallback_set=False)

    def lower(*args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        return call(*map(_in_place, args), **{name: _in_place(value) for name, value in given.items()})

    return lower


def _in_place(argument: Any) -> Any:
    return ir.ExternKernel.realize_input(argument) if isinstance(argument, ir.TensorBox) else argument


def register() -> None:
    """Called once, when the workshop opens."""
    for op in (qk_op, av_op, qk_backward_op, av_backward_op):
        register_lowering(op, type_promotion_kind=None)(_extern(op))

    @register_graph_pattern(CallFunctionVarArgs(av_op), pass_dict=post_grad.pass_patterns[0])
    def join_halves(match: Match, *_args: Any, **_kwargs: Any) -> None:
        weighted_sum: Any = match.output_node()
        scores = halves_of(weighted_sum)
        if scores is None:
            return _let_weights_replace_logits(weighted_sum)
        extras = [
            scores.kwargs.get("rpb"),
            scores.kwargs.get("additional_keys"),
            weighted_sum.kwargs.get("additional_values"),
        ]
        tokens = [*scores.args[:2], weighted_sum.args[1], *(node for node in extras if node is not None)]
        windows, has_rpb = scores.args[2:6], extras[0] is not None
        heads_first = replace_node(weighted_sum, lambda *given: fused(*given, windows=windows, has_rpb=has_rpb), tokens)
        _spare_the_way_back(heads_first)
