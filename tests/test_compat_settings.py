# SPDX-License-Identifier: MIT
"""Settings that say what they were given, errors that every `except` catches, attention without neighborhoods."""

import math

import pytest
import torch

import natten_ops
from natten_ops import compat
from natten_ops.compat.types import MemoryUsagePreference as Memory

ERRORS = (ValueError, RuntimeError)


@pytest.fixture(autouse=True)
def defaults():
    torch.manual_seed(0)
    yield
    compat.reset()


def refusal(call):
    """The message, the same whichever of the two kinds is caught."""
    messages = set()
    for kind in ERRORS:
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, compat.ConstraintError)
        messages.add(str(caught.value))
    assert len(messages) == 1
    return messages.pop()


# ---- settings ------------------------------------------------------------------------------------------------------

# level -> (setter, arguments, getter, what the getter says first, and after)
TOGGLES = [
    ("0.17", "use_fused_na", (), "is_fused_na_enabled", False, True),
    ("0.17", "use_fna", (True, False), "is_fna_enabled", False, True),
    ("0.17", "use_fused_na", (), "is_kv_parallelism_in_fused_na_enabled", False, True),
    ("0.17", "use_fused_na", (True, False, True), "should_use_flex_attention", False, True),
    ("0.17", "use_flex_attention", (), "should_use_flex_attention", False, True),
    ("0.17", "use_flex_attention", (), "is_fused_na_enabled", False, True),
    ("0.17", "force_flex_attention", (), "should_force_flex_attention", False, True),
    ("0.17", "use_kv_parallelism_in_fused_na", (), "is_kv_parallelism_in_fused_na_enabled", False, True),
    ("0.20", "use_kv_parallelism_in_fused_na", (False,), "is_kv_parallelism_in_fused_na_enabled", True, False),
    ("0.17", "use_deterministic_algorithms", (), "are_deterministic_algorithms_enabled", False, True),
    ("0.21", "use_deterministic_algorithms", (), "are_deterministic_algorithms_enabled", False, True),
    ("0.17", "use_autotuner", (True,), "is_autotuner_enabled", False, True),
    ("0.17", "use_autotuner", (True,), "is_autotuner_enabled_for_forward", False, True),
    ("0.17", "use_autotuner", (None, True), "is_autotuner_enabled_for_backward", False, True),
    ("0.17", "use_autotuner", (None, True), "is_autotuner_enabled", False, True),
    ("0.17", "use_autotuner", (None, None, True), "is_autotuner_thorough_for_forward", False, True),
    ("0.17", "use_autotuner", (None, None, None, True), "is_autotuner_thorough_for_backward", False, True),
    ("0.17", "use_tf32_in_gemm_na", (False,), "is_tf32_in_gemm_na_enabled", True, False),
    ("0.17", "disable_tf32", (), "is_tf32_in_gemm_na_enabled", True, False),
    ("0.17", "use_tiled_na", (False,), "is_tiled_na_enabled", True, False),
    ("0.17", "disable_tiled_na", (), "is_tiled_na_enabled", True, False),
    ("0.17", "use_gemm_na", (False,), "is_gemm_na_enabled", True, False),
    ("0.17", "disable_gemm_na", (), "is_gemm_na_enabled", True, False),
    ("0.17", "set_memory_usage_preference", ("strict",), "is_memory_usage_strict", False, True),
    ("0.20", "set_memory_usage_preference", ("unrestricted",), "is_memory_usage_unrestricted", False, True),
    ("0.21", "set_memory_usage_preference", ("strict",), "is_memory_usage_default", True, False),
    ("0.17", "set_memory_usage_preference", ("strict",), "get_memory_usage_preference", Memory.Default, Memory.Strict),
    ("0.21", "allow_flex_compile", (), "is_flex_compile_allowed", False, True),
    ("0.21", "allow_flex_compile", (True, True), "is_flex_compile_backprop_allowed", False, True),
    ("0.20", "allow_flex_compile_backprop", (), "is_flex_compile_backprop_allowed", False, True),
]


@pytest.mark.parametrize("level, setter, arguments, getter, before, after", TOGGLES)
def test_getters_say_what_setters_set_and_reset_forgets_it(level, setter, arguments, getter, before, after):
    module = compat.natten(version=level)
    levels = [name for name in compat.LEVELS if hasattr(compat.natten(version=name), getter)]
    others = {name: getattr(compat.natten(version=name), getter)() for name in levels if name != level}
    get = getattr(module.context, getter)
    assert get() == before
    getattr(module.context, setter)(*arguments)
    assert get() == after
    assert {name: getattr(compat.natten(version=name), getter)() for name in others} == others  # a level of its own
    compat.reset()
    assert get() == before
    getattr(module.context, setter)(*arguments)
    module.context.NattenContext.reset()
    if hasattr(module.context, "AutotunerContext"):
        module.context.AutotunerContext.reset()
    kept = getter in ("is_tf32_in_gemm_na_enabled", "is_tiled_na_enabled", "is_gemm_na_enabled")  # of neither context
    assert get() == (after if kept else before)


def test_torchs_own_deterministic_mode_ignores_what_contradicts_it(caplog):
    """As natten did: a line in the log, and the setting stays."""
    module = compat.natten(version="0.17")
    torch.use_deterministic_algorithms(True)
    try:
        module.use_fused_na()
        module.use_autotuner(True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.is_fused_na_enabled() and not module.is_kv_parallelism_in_fused_na_enabled()
    assert not module.is_autotuner_enabled()
    assert [record.getMessage().partition("=")[0] for record in caplog.records] == [
        "kv_parallel", "forward_pass", "backward_pass",
    ]  # fmt: skip


def test_switching_off_switches_off_all_that_goes_with_it():
    old, new = compat.natten(version="0.17"), compat.natten(version="0.21")
    old.force_flex_attention()
    old.use_fused_na(False)
    getters = (old.is_fused_na_enabled, old.context.should_use_flex_attention, old.context.should_force_flex_attention)
    assert not any(get() for get in (*getters, old.is_kv_parallelism_in_fused_na_enabled))
    old.use_autotuner(True, True, True, True, 7, 8, steps_forward=9)
    context = old.context.AutotunerContext
    assert (context.warmup_steps_forward, context.warmup_steps_backward, context.steps_forward) == (7, 8, 9)
    assert context.steps_backward == 5 and context.enabled_for_forward
    old.disable_autotuner()
    assert not old.is_autotuner_enabled() and not old.is_autotuner_thorough_for_backward()
    old.use_autotuner(backward_pass=True)
    old.use_autotuner(forward_pass=False)  # None leaves the other as it is
    assert old.is_autotuner_enabled_for_backward() and not old.is_autotuner_enabled_for_forward()
    new.allow_flex_compile(backprop=True)
    new.disable_flex_compile_backprop()
    assert new.is_flex_compile_allowed() and not new.is_flex_compile_backprop_allowed()
    new.allow_flex_compile(False, True)
    assert not new.is_flex_compile_allowed() and not new.is_flex_compile_backprop_allowed()
    new.allow_flex_compile(backprop=True)
    new.disable_flex_compile()
    assert not new.is_flex_compile_allowed() and not new.is_flex_compile_backprop_allowed()


def test_what_contradicts_deterministic_mode_is_refused():
    module = compat.natten(version="0.17")
    module.use_deterministic_algorithms()
    forbidden = {
        "mode": module.use_kv_parallelism_in_fused_na,
        "kv_parallel": module.use_fused_na,
        "forward_pass": lambda: module.use_autotuner(forward_pass=True),
        "backward_pass": lambda: module.use_autotuner(False, True),
    }
    for argument, call in forbidden.items():
        assert refusal(call).startswith(f"{argument}=True contradicts deterministic mode")
    assert not module.is_fused_na_enabled() and not module.is_autotuner_enabled()  # all or nothing
    module.use_fused_na(kv_parallel=False)
    assert module.is_fused_na_enabled()
    module.use_deterministic_algorithms(False)
    module.use_fused_na()
    assert module.is_kv_parallelism_in_fused_na_enabled()


def test_values_that_a_setting_cannot_have():
    module = compat.natten(version="0.17")
    refusals = {
        "pref='most' is unknown; give one of 'default', 'strict', 'unrestricted'": lambda: (
            module.set_memory_usage_preference("most")
        ),
        "mode=1 is a int; give True or False": lambda: module.use_gemm_na(1),
        "steps_forward=2.0 is a float; give an int": lambda: module.use_autotuner(steps_forward=2.0),
        "warmup_steps_backward=True is a bool; give an int": lambda: module.use_autotuner(warmup_steps_backward=True),
        "use_fused_na() of natten 0.17 got an unexpected keyword argument 'kv'": lambda: module.use_fused_na(kv=True),
        "has_cuda() of natten 0.17 takes 0 positional arguments, not 1": lambda: module.has_cuda(0),
    }
    for sentence, call in refusals.items():
        assert refusal(call).startswith(sentence)
    with pytest.raises(AttributeError, match="no setting 'speed'"):
        module.context.NattenContext.speed  # noqa: B018


DTYPES = {
    "has_half": torch.float16,
    "has_bfloat": torch.bfloat16,
    "has_gemm": torch.float32,
    "has_fna": torch.float32,
    "has_fused_na": torch.float32,
    "has_fp32_gemm": torch.float32,
    "has_fp64_gemm": torch.float64,
}


@pytest.mark.parametrize("name", DTYPES)
def test_has_tells_what_the_kernels_take(name):
    has = getattr(compat.natten(version="0.17"), name)
    tokens = torch.randn(1, 6, 6, 2, 8).to(DTYPES[name])
    assert natten_ops.na2d(tokens, tokens, tokens, 3).dtype == DTYPES[name]
    assert has("cpu") is True and has(torch.device("cpu")) is True
    assert has() is (True if not natten_ops.compat.natten(version="0.17").has_cuda() else has(0))
    assert has("meta") is False


def test_tf32_and_cuda_need_cuda_kernels():
    for level in ("0.15", "0.17"):
        module = compat.natten(version=level)
        assert module.has_tf32_gemm() is module.has_cuda()
        assert module.has_cuda() is (natten_ops._library.has_cuda_kernels and torch.cuda.is_available())
        assert module.has_half(0) is module.has_cuda()
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        assert module.functional.get_device_cc() == 10 * capability[0] + capability[1]


# ---- errors --------------------------------------------------------------------------------------------------------

TOKENS = torch.ones(1, 6, 8, 2, 4)
NEW, FUSED, OLD = (compat.natten(version=level) for level in ("0.21", "0.17", "0.14"))
IMAGE = torch.ones(1, 6, 8, 8)


def na2d(level=NEW, query=TOKENS, key=TOKENS, value=TOKENS, kernel_size=3, **more):
    return level.functional.na2d(query, key, value, kernel_size, **more)


def attend(query=TOKENS[0], key=TOKENS[0], value=TOKENS[0], **more):
    return NEW.attention(query, key, value, **more)


MISTAKES = {
    "kernel_size[1]=3 with dilation[1]=3 spans 9 > 8 tokens": lambda: na2d(FUSED, dilation=(1, 3)),
    "kernel_size[0]=7 with dilation[0]=1 spans 7 > 6": lambda: na2d(kernel_size=7),
    "stride[0]=4 exceeds kernel_size[0]=3": lambda: na2d(stride=4),
    "kernel_size[0]=3.0 is a float": lambda: na2d(kernel_size=3.0),
    "query has shape [6, 8, 2, 4]": lambda: na2d(query=TOKENS[0]),
    "key has batch 2, query 1": lambda: na2d(key=TOKENS.expand(2, -1, -1, -1, -1)),
    "key has 7 tokens on axis 1, query 8": lambda: na2d(key=TOKENS[:, :, :7], value=TOKENS[:, :, :7]),
    "key has head dim 3, query 4": lambda: na2d(key=TOKENS[..., :3]),
    "query has 2 heads, key 3": lambda: na2d(key=TOKENS[..., [0, 1, 1], :], value=TOKENS[..., [0, 1, 1], :]),
    "additional_keys is given without additional_values": lambda: na2d(additional_keys=TOKENS[:, 0]),
    "backend='fast' is unknown; use None, one of ('cutlass-fna'": lambda: na2d(backend="fast"),
    "kernel_schedule='fast' is unknown": lambda: na2d(kernel_schedule="fast"),
    "attention_kwargs['dropout'] has no counterpart": lambda: na2d(attention_kwargs={"dropout": 0.1}),
    "backend='slow' is unknown": lambda: na2d(attention_kwargs={"backend": "slow"}),
    "backend='flex' cannot run float64 tensors": lambda: attend(*[TOKENS[0].double()] * 3, backend="flex"),
    "xformers_kwargs['p'] has no counterpart": lambda: na2d(FUSED, xformers_kwargs={"p": 0.1}),
    "na2d() of natten 0.17 got an unexpected keyword argument 'stride'": lambda: na2d(FUSED, stride=1),
    "na2d() of natten 0.21 got key by position and by name": lambda: NEW.na2d(TOKENS, TOKENS, key=TOKENS),
    "na2d() of natten 0.21 misses kernel_size": lambda: NEW.na2d(TOKENS, TOKENS, TOKENS),
    "natten2dav() of natten 0.14 takes 3 positional arguments, not 4": lambda: OLD.functional.natten2dav(*[TOKENS] * 4),
    "rpb has type NoneType; the kernel size is read off it": lambda: OLD.functional.natten2dqkrpb(
        TOKENS, TOKENS, None, 1
    ),
    "rpb has shape [2, 5]; the kernel size is read off it": lambda: OLD.functional.natten2dqkrpb(
        TOKENS, TOKENS, torch.ones(2, 5), 1
    ),
    "attn has 8 slots a query, no 2-D window of equal sides": lambda: OLD.functional.natten2dav(
        torch.ones(1, 6, 8, 2, 8), TOKENS, 1
    ),
    "embed_dim=8 is no positive multiple of num_heads=3": lambda: FUSED.NeighborhoodAttention2D(8, 3, 3),
    "NeighborhoodAttention2D() of natten 0.17 got an unexpected keyword argument 'bias'": lambda: (
        FUSED.NeighborhoodAttention2D(8, 2, 3, bias=True)
    ),
    "input has shape [6, 8, 8]": lambda: FUSED.NeighborhoodAttention2D(8, 2, 3)(IMAGE[0]),
    "input has shape [6, 8, 8]; ": lambda: OLD.NeighborhoodAttention2D(8, 3, 2)(IMAGE[0]),
    "kernel_size[0]=3 with dilation[0]=3": lambda: FUSED.NeighborhoodAttention2D(8, 2, 3, 3)(IMAGE),
    "query has shape [1, 6, 8, 2, 4]; give [batch, tokens, heads, dim]": lambda: attend(query=TOKENS),
    "value has token count 7, key 8": lambda: attend(value=TOKENS[0, :, :7]),
    "key is torch.float64 on cpu, query torch.float32": lambda: attend(key=TOKENS[0].double()),
    "is_causal=0.5 is a float": lambda: attend(is_causal=0.5),
    "packed sequences take seqlens_Q and seqlens_KV, or": lambda: attend(seqlens_Q=torch.tensor([8])),
    "query has batch 6; packed sequences are one batch": lambda: attend(
        seqlens_Q=torch.tensor([8]), seqlens_KV=torch.tensor([8])
    ),
    "seqlens_Q is a list; give a tensor of ints": lambda: attend(
        *[IMAGE[:, 0, :, None]] * 3, seqlens_Q=[8], seqlens_KV=[8]
    ),
    "seqlens_Q has shape [2], seqlens_KV [1]; give one entry": lambda: attend(
        *[IMAGE[:, 0, :, None]] * 3, seqlens_Q=torch.tensor([4, 4]), seqlens_KV=torch.tensor([8])
    ),
    "merge_attentions got 0 outputs and 0 lses": lambda: NEW.merge_attentions([], []),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_errors_of_both_kinds(sentence):
    assert refusal(MISTAKES[sentence]).startswith(sentence)


def test_packed_lengths_must_fit_the_tokens():
    one = TOKENS[0].flatten(0, 1)[None]

    def packed(starts, most):
        starts = torch.tensor(starts)
        cumulative = {"cumulative_seqlen_Q": starts, "cumulative_seqlen_KV": starts}
        return attend(one, one, one, **cumulative, max_seqlen_Q=most, max_seqlen_KV=most)

    assert "must grow from 0 to the 48 tokens" in refusal(lambda: packed([0, 47], 47))
    assert "must grow from 0 to the 48 tokens" in refusal(lambda: packed([0, 40, 20, 48], 48))
    assert "max_seqlen_Q=20 is less than the longest sequence, 28" in refusal(lambda: packed([0, 20, 48], 20))
    lengths = torch.tensor([5, 6])
    assert "must be of the 48 tokens" in refusal(lambda: attend(one, one, one, seqlens_Q=lengths, seqlens_KV=lengths))


# ---- attention without neighborhoods -------------------------------------------------------------------------------


def by_the_book(query, key, value, is_causal=False, scale=None):
    """(out, lse) by softmax of all products, heads last."""
    key, value = (t.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for t in (key, value))
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(query.shape[1], key.shape[1]).tril().logical_not()
        logits = logits.masked_fill(hidden, -math.inf)
    return torch.einsum("bhqk,bkhe->bqhe", logits.softmax(-1), value), logits.logsumexp(-1).transpose(1, 2)


def inputs(tokens, keys, heads=4, heads_kv=4, batch=2, value_dim=6):
    shapes = (tokens, heads, 8), (keys, heads_kv, 8), (keys, heads_kv, value_dim)
    return [torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("tokens, keys", [(7, 7), (5, 9), (9, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize(
    "is_causal, scale, heads_kv", [(False, None, 4), (True, 0.3, 2), (True, None, 1), (False, 0.0, 4)]
)
def test_dense_attention_and_its_gradients(tokens, keys, is_causal, scale, heads_kv):
    tensors = inputs(tokens, keys, heads_kv=heads_kv)
    expected = by_the_book(*tensors, is_causal, scale)
    torch.testing.assert_close(NEW.attention(*tensors, is_causal, scale), expected[0])
    found = NEW.attention(*tensors, is_causal, scale, return_lse=True, backend="cutlass-fmha", q_tile_size=64)
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(part) for part in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, grads), torch.autograd.grad(expected, tensors, grads)
    )
    old = compat.natten(version="0.20").attention(*tensors, scale, is_causal=is_causal)
    torch.testing.assert_close(old, expected[0])


@pytest.mark.parametrize("parts", [(3, 4), (2, 2, 3)])
def test_merged_parts_have_the_gradients_of_the_whole(parts):
    query, key, value = tensors = inputs(5, 7)
    whole = NEW.attention(*tensors, return_lse=True)
    pieces = [NEW.attention(query, k, v, return_lse=True) for k, v in zip(key.split(parts, 1), value.split(parts, 1))]
    merged = NEW.merge_attentions(*zip(*pieces), torch_compile=False)
    torch.testing.assert_close(merged, whole)
    grads = [torch.randn_like(part) for part in whole]
    torch.testing.assert_close(torch.autograd.grad(merged, tensors, grads), torch.autograd.grad(whole, tensors, grads))
    alone = compat.natten(version="0.20").merge_attentions(*zip(*pieces))
    assert torch.equal(alone, merged[0])  # releases before 0.21.5 give the output only


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("lengths", [((3, 0, 4), (3, 0, 4)), ((2, 4, 1), (4, 1, 2)), ((3, 4), (0, 7)), ((7,), (7,))])
def test_packed_sequences_are_sequences_apart(lengths, is_causal):
    query, key, value = tensors = inputs(7, 7, heads_kv=2, batch=1)
    counts = [torch.tensor(count, dtype=torch.int32) for count in lengths]
    found = NEW.attention(*tensors, is_causal, seqlens_Q=counts[0], seqlens_KV=counts[1], return_lse=True)
    splits = zip(query.split(lengths[0], 1), key.split(lengths[1], 1), value.split(lengths[1], 1))
    apart = [by_the_book(q, k, v, is_causal) for q, k, v in splits]
    expected = [
        torch.cat([torch.nan_to_num(pair[i], nan=0.0, neginf=-math.inf) for pair in apart], dim=1) for i in (0, 1)
    ]
    torch.testing.assert_close(found, tuple(expected))
    starts = NEW.utils.varlen.generate_varlen_parameters(*tensors, *counts)
    assert starts[2:] == (max(lengths[0]), max(lengths[1]))
    names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
    assert torch.equal(NEW.attention(*tensors, is_causal, **dict(zip(names, starts))), found[0])
    (gradient,) = torch.autograd.grad(found[0].square().sum(), query, retain_graph=True)
    (oracle,) = torch.autograd.grad(expected[0].square().sum(), query)
    torch.testing.assert_close(gradient, oracle.nan_to_num(0.0))


def test_sequences_may_be_empty():
    query, key, value = inputs(3, 0)
    for pair in (NEW.attention(query, key, value, return_lse=True), (NEW.attention(query, key, value), None)):
        assert torch.equal(pair[0], torch.zeros(2, 3, 4, 6, dtype=torch.float64))
        assert pair[1] is None or torch.equal(pair[1], torch.full((2, 3, 4), -math.inf, dtype=torch.float64))
    query, key, value = inputs(0, 3)
    assert (
        NEW.attention(query, key, value).shape
        == NEW.attention(query, key, value, return_lse=True)[0].shape
        == (2, 0, 4, 6)
    )
    starts = torch.tensor([0, 0])
    packed = {"cumulative_seqlen_Q": starts, "cumulative_seqlen_KV": starts, "max_seqlen_Q": 0, "max_seqlen_KV": 0}
    assert NEW.attention(*inputs(0, 0, batch=1), **packed).shape == (1, 0, 4, 6)


def test_attention_is_also_a_function_of_compat():
    tensors = inputs(5, 5)
    assert torch.equal(compat.attention(*tensors, True), NEW.attention(*tensors, True))
    pair = compat.attention(*tensors, return_lse=True)
    assert torch.equal(compat.merge_attentions([pair[0]], [pair[1]])[0], pair[0])
