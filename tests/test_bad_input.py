# SPDX-License-Identifier: MIT
"""Every mistake is refused with a sentence that names argument, value, bound and way out; the sentences are frozen here.

`EXPECTTEST_ACCEPT=1 pytest tests/test_bad_input.py` writes changed sentences into this file.
"""

import math
import re

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses import FakeTensorMode

import natten_ops
from natten_ops import backends
from natten_ops.nn import NeighborhoodAttention2D

CLEAN = (RuntimeError, ValueError, TypeError)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


def all_of(**changes):
    """The same change of query, key and value."""
    return {name: change(TOKENS) for change in changes.values() for name in ("query", "key", "value")}


def box(q_origin=(0, 0), kv_origin=(0, 0), extent=(6, 8)):
    return {"q_origin": list(q_origin), "kv_origin": list(kv_origin), "extent": list(extent)}


TOKENS, EXTRA = ones(1, 6, 8, 4, 8), ones(1, 2, 4, 8)
GOOD = {"query": TOKENS, "key": TOKENS, "value": TOKENS, "kernel_size": 3}

# Changes of GOOD, each a mistake that both the public functions and the raw op must refuse.
MISTAKES = {
    "kernel_size 0": {"kernel_size": 0},
    "kernel_size negative": {"kernel_size": [3, -3]},
    "kernel_size too big": {"kernel_size": [3, 9]},
    "kernel_size too many": {"kernel_size": [3, 3, 3]},
    "kernel_size huge": {"kernel_size": 2**62, "dilation": 4},
    "kernel_size float": {"kernel_size": 3.0},
    "kernel_size None": {"kernel_size": None},
    "kernel_size str": {"kernel_size": "3"},
    "stride 0": {"stride": 0},
    "stride too big": {"stride": [1, 4]},
    "dilation 0": {"dilation": 0},
    "dilation too big": {"dilation": [2, 3]},
    "is_causal too few": {"is_causal": [True]},
    "scale nan": {"scale": math.nan},
    "key batch": {"key": ones(2, 6, 8, 4, 8)},
    "key dims": {"key": ones(1, 6, 8, 8)},
    "key axis": {"key": ones(1, 6, 7, 4, 8), "value": ones(1, 6, 7, 4, 8)},
    "key head dim": {"key": ones(1, 6, 8, 4, 7)},
    "key heads": {"key": ones(1, 6, 8, 3, 8), "value": ones(1, 6, 8, 3, 8)},
    "value axis": {"value": ones(1, 5, 8, 4, 8)},
    "value heads": {"value": ones(1, 6, 8, 2, 8)},
    "query no head dim": {"query": ones(1, 6, 8, 4, 0), "key": ones(1, 6, 8, 4, 0)},
    "additional_keys alone": {"additional_keys": EXTRA},
    "additional_values alone": {"additional_values": EXTRA},
    "additional_keys shape": {"additional_keys": ones(1, 2, 4, 7), "additional_values": EXTRA},
    "additional_values shape": {"additional_keys": EXTRA, "additional_values": ones(1, 3, 4, 8)},
    "additional_keys dtype": {"additional_keys": EXTRA.double(), "additional_values": EXTRA},
    "rpb shape": {"rpb": ones(4, 3, 3)},
    "rpb stride": {"rpb": ones(4, 5, 5), "stride": [1, 2]},
    "rpb dtype": {"rpb": ones(4, 5, 5).double()},
    "key_mask dtype": {"key_mask": ones(1, 6, 8)},
    "key_mask shape": {"key_mask": ones(1, 6, 7).bool()},
    "key dtype": {"key": TOKENS.double()},
    "key device": {"key": TOKENS.to("meta")},
    "query int64": all_of(change=lambda t: t.long()),
    "query float8": all_of(change=lambda t: t.to(torch.float8_e4m3fn)),
    "box without keys": box() | all_of(change=lambda t: t[:, :3]),
    "box far query": box(q_origin=(1, 0)),
    "box negative": box(q_origin=(0, -1)),
    "box incomplete": box(extent=()),
    "box too short": box(q_origin=[0]),
    "box small extent": box(extent=(5, 8)),
    "natten's argument": {"q_tile_shape": (8, 8)},
    "backend unknown": {"backend": "fast"},
}
# What the raw op's schema cannot see (it takes True for 1 and a tensor of one number for the number), or dynamo wraps.
PYTHON_ONLY = {
    "kernel_size bool": {"kernel_size": True},
    "stride bool": {"stride": [True, 1]},
    "is_causal int": {"is_causal": [True, 1]},
    "scale bool": {"scale": True},
    "scale tensor": {"scale": torch.tensor(1.0)},
    "query array": {"query": np.ones((1, 6, 8, 4, 8))},
}
DENSE = "tensor; give a dense one"
LAYOUTS = {
    "coo": (lambda: {"query": TOKENS.to_sparse()}, f"query is a torch.sparse_coo {DENSE}"),
    "coo mask": (lambda: {"key_mask": ones(1, 6, 8).bool().to_sparse()}, f"key_mask is a torch.sparse_coo {DENSE}"),
    "csr": (lambda: {"key": TOKENS.flatten(1).to_sparse_csr()}, f"key is a torch.sparse_csr {DENSE}"),
    "quantised": (
        lambda: {"value": torch.quantize_per_tensor(TOKENS, 0.1, 0, torch.qint8)},
        f"value is a quantised {DENSE}",
    ),
}


def public(**changes):
    return natten_ops.neighborhood_attention(**{**GOOD, **changes})


def raw_arguments(changes):
    """The primitive's arguments; a single int stands for one an axis, as in naNd's schema."""
    call = {**GOOD, "stride": 1, "dilation": 1, "is_causal": [False, False], **changes}
    return {
        n: [v] * 2 if n in ("kernel_size", "stride", "dilation") and isinstance(v, int) else v for n, v in call.items()
    }


def raw(**changes):
    return torch.ops.natten.neighborhood_attention_lse(**raw_arguments(changes))[0]


def refusal(function, *args, **kwargs):
    """The error of a bad call as text; a good call still works after it."""
    with pytest.raises(CLEAN) as caught:
        function(*args, **kwargs)
    assert torch.equal(public(), TOKENS) and torch.equal(raw(), TOKENS)
    text = re.sub(r"^\w+, csrc/\w+\.\w+:\d+, ", "", str(caught.value))
    return f"{caught.type.__name__}: {text}"


def snapshot(refusals):
    return "\n".join(f"{name} | {text}" for name, text in refusals.items())


def test_sentences_of_the_public_functions():
    found = {name: refusal(public, **changes) for name, changes in {**MISTAKES, **PYTHON_ONLY}.items()}
    assert_expected_inline(
        snapshot(found),
        """\
kernel_size 0 | ValueError: kernel_size[0]=0 must be at least 1
kernel_size negative | ValueError: kernel_size[1]=-3 must be at least 1
kernel_size too big | ValueError: kernel_size[1]=9 with dilation[1]=1 spans 9 > 8 tokens on axis 1; lower one of them, or pad the grid
kernel_size too many | ValueError: kernel_size=(3, 3, 3) has 3 entries for 2 spatial axes; give one int or 2 of them
kernel_size huge | ValueError: kernel_size[0]=4611686018427387904 with dilation[0]=4 spans 18446744073709551616 > 6 tokens on axis 0; lower one of them, or pad the grid
kernel_size float | TypeError: kernel_size[0]=3.0 is a float; give an int
kernel_size None | TypeError: kernel_size[0]=None is a NoneType; give an int
kernel_size str | TypeError: kernel_size[0]='3' is a str; give an int
stride 0 | ValueError: stride[0]=0 must be at least 1
stride too big | ValueError: stride[1]=4 exceeds kernel_size[1]=3: queries between two windows would lose their own neighborhood; use a stride of 1 to 3
dilation 0 | ValueError: dilation[0]=0 must be at least 1
dilation too big | ValueError: kernel_size[1]=3 with dilation[1]=3 spans 9 > 8 tokens on axis 1; lower one of them, or pad the grid
is_causal too few | ValueError: is_causal=(True,) has 1 entries for 2 spatial axes; give one bool or 2 of them
scale nan | ValueError: scale=nan is not finite as a float; give a finite number, or None for head_dim ** -0.5
key batch | ValueError: key has batch 2, query 1; they must be equal
key dims | ValueError: key has shape [1, 6, 8, 8]; 2-D neighborhood attention takes 5 dims: [batch, axis 0, axis 1, heads, head dim]
key axis | ValueError: key has 7 tokens on axis 1, query 8; they must be equal, or say where they lie with q_origin, kv_origin and extent
key head dim | ValueError: key has head dim 7, query 8; they must be equal (value's may differ)
key heads | ValueError: query has 4 heads, key 3; query's heads must be a multiple of key's
value axis | ValueError: value has 5 tokens on axis 0, key 6; they must be equal
value heads | ValueError: value has 2 heads, key 4; they must be equal
query no head dim | ValueError: query has head dim 0; it must be 1 to 1048576
additional_keys alone | ValueError: additional_keys is given without additional_values; give both or none
additional_values alone | ValueError: additional_values is given without additional_keys; give both or none
additional_keys shape | ValueError: additional_keys has shape [1, 2, 4, 7], expected [1, 2, 4, 8]: [batch, tokens, heads of key, head dim]
additional_values shape | ValueError: additional_values has shape [1, 3, 4, 8], expected [1, 2, 4, 8]: [batch, tokens, heads of key, head dim of value]
additional_keys dtype | ValueError: additional_keys has dtype torch.float64, query torch.float32; cast them to one dtype
rpb shape | ValueError: rpb has shape [4, 3, 3], expected [4, 5, 5]: [heads, 2 * kernel_size - 1 an axis]
rpb stride | ValueError: rpb is defined for stride 1 only, and stride[1]=2; drop one of them
rpb dtype | ValueError: rpb has dtype torch.float64, query torch.float32; cast them to one dtype
key_mask dtype | ValueError: key_mask has dtype torch.float32; give torch.bool, True where a key may be attended
key_mask shape | ValueError: key_mask has shape [1, 6, 7], expected [1, 6, 8]: [batch, the key's axes]
key dtype | ValueError: key has dtype torch.float64, query torch.float32; cast them to one dtype
key device | ValueError: key is on meta, query on cpu; move them to one device
query int64 | ValueError: query has dtype torch.int64; cast it to one of float64, float32, float16, bfloat16
query float8 | ValueError: query has dtype torch.float8_e4m3fn; cast it to one of float64, float32, float16, bfloat16
box without keys | ValueError: the queries [0, 3) on axis 0 see keys [0, 4), but key and value hold only [0, 3); pass keys and values for the whole range, or fewer queries
box far query | ValueError: q_origin[0]=1 with 6 tokens leaves the grid of extent[0]=6; q_origin[0] must lie in [0, 0]
box negative | ValueError: q_origin[1]=-1 with 8 tokens leaves the grid of extent[1]=8; q_origin[1] must lie in [0, 0]
box incomplete | ValueError: a sub-box needs q_origin, kv_origin and extent; extent missing: give all three or none
box too short | ValueError: q_origin=(0,) has 1 entries for 2 spatial axes; give 2
box small extent | ValueError: extent[0]=5 is less than the 6 tokens of query; give the whole grid's
natten's argument | TypeError: neighborhood_attention() got an unexpected keyword argument 'q_tile_shape': an argument of the natten package, which natten_ops.compat takes; leave it out here
backend unknown | ValueError: backend='fast' is unknown; the backends of this version are cpu-tiled, cpu-general, cuda-wgmma, cuda-mma, cuda-mma-tf32, cuda-general, reference, flex
kernel_size bool | TypeError: kernel_size[0]=True is a bool; give an int
stride bool | TypeError: stride[0]=True is a bool; give an int
is_causal int | TypeError: is_causal[1]=1 is a int; give True or False
scale bool | TypeError: scale=True is a bool; give a float, or None for head_dim ** -0.5
scale tensor | TypeError: scale is a Tensor; give a float, or None for head_dim ** -0.5
query array | TypeError: query is a ndarray; give a torch.Tensor""",  # noqa: E501
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_refused(name):
    make, sentence = LAYOUTS[name]
    changes = make()
    assert sentence in refusal(natten_ops.na2d, **{**GOOD, **changes})
    assert "natten" in refusal(raw, **changes)


@pytest.mark.parametrize("door", ["na1d", "na2d", "na3d"])
def test_a_front_door_takes_its_rank_only(door):
    rank = int(door[2])
    wrong = ones(1, *(4, 4, 4)[: {1: 2, 2: 3, 3: 1}[rank]], 2, 8)
    message = f"query has shape {list(wrong.shape)}; {rank}-D neighborhood attention takes {rank + 3} dims"
    assert message in refusal(getattr(natten_ops, door), wrong, wrong, wrong, kernel_size=3)
    assert "kernel_size" in refusal(getattr(torch.ops.natten, door), wrong, wrong, wrong, [3] * rank)


def test_sentences_of_merging_modules_and_other_ranks():
    out, lse, layer = ones(1, 6, 2, 4), ones(1, 6, 2), NeighborhoodAttention2D
    merge = natten_ops.merge_attentions
    calls = {
        "rank 4": lambda: natten_ops.neighborhood_attention(*[ones(1, 2, 2, 2, 2, 1, 4)] * 3, kernel_size=1),
        "merge nothing": lambda: merge([], []),
        "merge unpaired": lambda: merge([out], [lse, lse]),
        "merge shapes": lambda: merge([out, out[:, :1]], [lse, lse]),
        "merge lse shape": lambda: merge([out], [lse[:, :1]]),
        "merge lse dtype": lambda: merge([out], [lse.half()]),
        "module heads": lambda: layer(64, 5, 3),
        "module kv heads": lambda: layer(64, 4, 3, num_kv_heads=3),
        "module kernel_size": lambda: layer(64, 4, (3, 3, 3)),
        "module bias": lambda: layer(64, 4, 3, stride=2, rel_pos_bias=True),
        "module dims": lambda: layer(64, 4, 3)(ones(1, 8, 64)),
        "module small input": lambda: layer(64, 4, 9)(ones(1, 8, 8, 64)),
        "module scale": lambda: layer(64, 4, 3, qk_scale=math.nan)(ones(1, 8, 8, 64)),
    }
    assert_expected_inline(
        snapshot({name: refusal(call) for name, call in calls.items()}),
        """\
rank 4 | ValueError: query has shape [1, 2, 2, 2, 2, 1, 4]; give [batch, 1 to 3 spatial axes, heads, head dim]
merge nothing | ValueError: merge_attentions got 0 outputs and 0 lses; give at least one of each, paired
merge unpaired | ValueError: merge_attentions got 1 outputs and 2 lses; give at least one of each, paired
merge shapes | ValueError: outputs[1] is float32 [1, 1, 2, 4], outputs[0] float32 [1, 6, 2, 4]; they must be alike
merge lse shape | ValueError: lses[0] is float32 [1, 1, 2]; give float32 or float64 [1, 6, 2], the shape of outputs[0] without its last dim
merge lse dtype | ValueError: lses[0] is float16 [1, 6, 2]; give float32 or float64 [1, 6, 2], the shape of outputs[0] without its last dim
module heads | ValueError: embed_dim=64 is no positive multiple of num_heads=5; change one of them
module kv heads | ValueError: num_heads=4 is no multiple of num_kv_heads=3; change one of them
module kernel_size | ValueError: kernel_size=(3, 3, 3) has 3 entries for 2 spatial axes; give one int or 2 of them
module bias | ValueError: rel_pos_bias needs stride 1, and stride=(2, 2); drop one of them
module dims | ValueError: input has shape [1, 8, 64]; give [batch, axis 0, axis 1, embed_dim=64]
module small input | ValueError: kernel_size[0]=9 with dilation[0]=1 spans 9 > 8 tokens on axis 0; lower one of them, or pad the grid
module scale | ValueError: scale=nan is not finite as a float; give a finite number, or None for head_dim ** -0.5""",
    )


# ---- raw and compiled calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISTAKES)
def test_the_raw_op_names_the_argument(name):
    text = refusal(raw, **MISTAKES[name])
    assert any(argument in text for argument in MISTAKES[name]), text


def backward_arguments(**changes):
    out, lse = torch.ops.natten.neighborhood_attention_lse(**raw_arguments({}))
    call = {"grad_out": out, "grad_lse": lse, "out": out, "lse": lse, **raw_arguments({}), "scale": None, "backend": 0}
    absent = dict.fromkeys(("additional_keys", "additional_values", "rpb", "key_mask"))
    whole = dict.fromkeys(("q_origin", "kv_origin", "extent"), ())
    return {**call, **absent, **whole, "needed": [True] * 6, "deterministic": True, **changes}


def test_the_raw_backward_names_the_argument():
    out, lse = TOKENS, ones(1, 6, 8, 4)
    for changes in (
        *({"needed": [True] * length} for length in (0, 5, 7)),
        *(
            {name: bad}
            for name in ("grad_out", "out")
            for bad in (out[:, :5], out[..., None], out.double(), out.long())
        ),
        *(
            {name: bad}
            for name in ("grad_lse", "lse")
            for bad in (lse[:, :5], lse[..., None], lse.double(), lse.half())
        ),
        {"kernel_size": [3, 9]},
        {"backend": 2**40},
    ):
        (name,) = changes
        text = refusal(torch.ops.natten.neighborhood_attention_lse_backward, **backward_arguments(**changes))
        assert name in text, text
    assert len(torch.ops.natten.neighborhood_attention_lse_backward(**backward_arguments())) == 6


@pytest.mark.parametrize("name", ["grad_out", "grad_lse", "out", "lse"])
def test_the_raw_backward_refuses_tensors_of_another_device(name):
    """The kernel of shapes would answer, with memory that nobody has written."""
    call = backward_arguments()
    call[name] = call[name].to("meta")
    assert name in refusal(torch.ops.natten.neighborhood_attention_lse_backward, **call)


def compiled(function, changes, backend):
    """A compiled call with the tensors as inputs and the rest as constants."""
    tensors = {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in changes.items() if name not in tensors}
    torch._dynamo.reset()
    return torch.compile(lambda given: function(**given, **rest), fullgraph=True, backend=backend)(tensors)


@pytest.mark.parametrize("name", [*MISTAKES, *PYTHON_ONLY])
def test_compiled_calls_show_the_same_sentence(name):
    changes = {**MISTAKES, **PYTHON_ONLY}[name]
    kind, _, sentence = refusal(public, **changes).partition(": ")
    text = refusal(compiled, public, {**GOOD, **changes}, "eager")
    assert re.search(rf"{kind}\((\[ConstantVariable\(str: )?{re.escape(repr(sentence))}", text), text  # so torch 2.11
    assert torch.equal(compiled(public, GOOD, "eager"), TOKENS)


@pytest.mark.parametrize("name", MISTAKES)
def test_compiled_raw_calls_are_refused(name):
    changes = MISTAKES[name]
    text = refusal(compiled, raw, raw_arguments(changes), "aot_eager")
    assert any(argument in text for argument in changes), text
    assert torch.equal(compiled(raw, GOOD, "aot_eager"), TOKENS)


# ---- devices -------------------------------------------------------------------------------------------------------


def test_meta_and_fake_tensors_have_shapes_only():
    meta = TOKENS.to("meta")
    out, lse = natten_ops.na2d(meta, meta, meta, kernel_size=3, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", TOKENS.shape, TOKENS.shape[:-1])
    assert natten_ops.na2d(meta, meta, meta, kernel_size=3, backend="reference").shape == TOKENS.shape
    with FakeTensorMode():
        fake = torch.empty(1, 6, 8, 4, 8, device="cuda")
        assert natten_ops.na2d(fake, fake, fake, kernel_size=3).device.type == "cuda"


@pytest.mark.skipif(natten_ops._library.has_cuda_kernels, reason="shows what an install without CUDA kernels says")
def test_cuda_tensors_without_cuda_kernels():
    """On a machine without CUDA: the rule of choice, a compile for CUDA, and the kernel that stands in."""
    with pytest.raises(ValueError) as caught:
        backends.choose(backends.Problem("cuda", torch.float32))
    assert_expected_inline(
        str(caught.value).replace(natten_ops._library.why_no_cuda_kernels(), "HOW IT WAS BUILT, THE WAY TO KERNELS"),
        """\
no kernel of natten_ops runs float32 tensors on cuda:
  cpu-tiled: runs on cpu tensors, not on cuda
  cpu-general: runs on cpu tensors, not on cuda
  cuda-wgmma: is part of libnatten_ops_cuda.so, which is not loaded; takes float16, bfloat16, not float32
  cuda-mma: is part of libnatten_ops_cuda.so, which is not loaded; takes float16, bfloat16, not float32
  cuda-mma-tf32: is part of libnatten_ops_cuda.so, which is not loaded
  cuda-general: is part of libnatten_ops_cuda.so, which is not loaded
  HOW IT WAS BUILT, THE WAY TO KERNELS
The way out: move the tensors to the CPU, or pass backend="reference" (plain torch, slow, any device).""",
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(1, 6, 8, 4, 8, device="cuda")
        named = {**GOOD, "query": fake, "key": fake, "value": fake}
        with pytest.raises(CLEAN, match="no kernel of natten_ops runs float32 tensors on cuda"):
            compiled(public, named, "eager")
        with pytest.raises(ValueError, match="on cuda: it runs on cpu tensors, not on cuda"):
            public(**named, backend="cpu-general")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op, arguments = torch.ops.natten.neighborhood_attention_lse.default, raw_arguments({})
    assert "move the tensors to the CPU" in refusal(op.redispatch, keys, **arguments)


def test_a_named_backend_never_falls_back():
    meta = TOKENS.to("meta")
    text = refusal(natten_ops.na2d, meta, meta, meta, kernel_size=3, backend="cpu-general")
    assert_expected_inline(
        text,
        """ValueError: backend='cpu-general' cannot run float32 tensors on meta: it runs on cpu tensors, not on meta""",
    )
