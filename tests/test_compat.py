# SPDX-License-Identifier: MIT
"""What the functions and modules of every level compute: what natten_ops and the reference do, given the level's order."""

import doctest
import importlib
import logging

import pytest
import torch
from torch.nn.functional import pad

import natten_ops
from natten_ops import compat, flops, reference

QK = {n: getattr(natten_ops, f"na{n}d_qk") for n in (1, 2, 3)}
AV = {n: getattr(natten_ops, f"na{n}d_av") for n in (1, 2, 3)}
NA = {n: getattr(natten_ops, f"na{n}d") for n in (1, 2, 3)}
SPATIAL = {1: (17,), 2: (9, 11), 3: (6, 7, 8)}
LEVELS_OF_UNFUSED = {"0.14.5": (1, 2), "0.15": (1, 2), "0.17": (1, 2)}


@pytest.fixture(autouse=True)
def defaults():
    torch.manual_seed(0)
    yield
    compat.reset()


def heads_last(rank, count=3, heads=2, dtype=torch.float64):
    return torch.randn(count, 2, *SPATIAL[rank], heads, 8, dtype=dtype).unbind(0)


def heads_first(rank, count=3, **changes):
    return [tensor.movedim(-2, 1).contiguous() for tensor in heads_last(rank, count, **changes)]


def table(*kernel_size, dtype=torch.float64):
    return torch.randn(2, *(2 * kernel - 1 for kernel in kernel_size), dtype=dtype)


def function(level, name):
    return getattr(compat.natten(version=level).functional, name)


# ---- fused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", NA)
def test_the_level_decides_what_argument_five_is(rank):
    inputs = heads_last(rank)
    dilated, strided = NA[rank](*inputs, 3, dilation=2), NA[rank](*inputs, 3, stride=2)
    assert not torch.allclose(dilated, strided)
    assert torch.equal(function("0.17", f"na{rank}d")(*inputs, 3, 2), dilated)
    for level in ("0.20", "0.21"):
        assert torch.equal(function(level, f"na{rank}d")(*inputs, 3, 2), strided)
        assert torch.equal(function(level, "neighborhood_attention_generic")(*inputs, 3, 2), strided)


@pytest.mark.parametrize("rank", NA)
def test_fused_arguments_by_position_and_by_name(rank):
    query, key, value = heads_last(rank)
    more_keys, more_values = torch.randn(2, 2, 5, 2, 8, dtype=torch.float64)
    kernel, causal, rpb = (3,) * rank, (True,) + (False,) * (rank - 1), table(*(3,) * rank)
    extra = {"scale": 0.3, "additional_keys": more_keys, "additional_values": more_values}
    expected = NA[rank](query, key, value, kernel, dilation=2, is_causal=causal, rpb=rpb, **extra)
    oracle = reference.neighborhood_attention_lse(
        query, key, value, kernel, [1] * rank, [2] * rank, causal, 0.3, more_keys, more_values, rpb=rpb
    )
    torch.testing.assert_close(expected, oracle[0])
    found = function("0.17", f"na{rank}d")(query, key, value, kernel, 2, causal, rpb, 0.3, more_keys, more_values)
    assert torch.equal(found, expected)
    apart = more_keys.reshape(2, *(1,) * (rank - 1), 5, 2, 8), more_values.reshape(2, *(1,) * (rank - 1), 5, 2, 8)
    assert torch.equal(function("0.17", f"na{rank}d")(query, key, value, kernel, 2, causal, rpb, 0.3, *apart), expected)
    expected, lse = NA[rank](query, key, value, 3, stride=2, dilation=2, is_causal=causal, **extra, return_lse=True)
    module = compat.natten(version="0.21")
    found = getattr(module, f"na{rank}d")(query, key, value, 3, 2, 2, causal, 0.3, more_keys, more_values)
    assert torch.equal(found, expected)
    found = getattr(module, f"na{rank}d")(query, key, value, 3, 2, 2, causal, return_lse=True, **extra)
    assert torch.equal(found[0], expected) and torch.equal(found[1], lse)
    flex = getattr(compat.natten(version="0.17").flex, f"flex_na{rank}d")
    assert torch.equal(flex(query, key, value, 3, None, None), NA[rank](query, key, value, 3))


def test_none_is_the_default_and_tuning_changes_nothing(caplog):
    inputs, module = heads_last(2, dtype=torch.float32), compat.natten(version="0.20")
    plain, whole = natten_ops.na2d(*inputs, 3), natten_ops.na2d(*inputs, SPATIAL[2])
    caplog.set_level(logging.DEBUG, logger="natten_ops")
    assert torch.equal(module.na2d(*inputs, 3, None, None, None), plain)
    assert "names a kernel of natten" not in caplog.text
    tuning = {"q_tile_shape": (8, 8), "kernel_schedule": "pp", "run_persistent_kernel": False, "torch_compile": True}
    for name in ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna"):
        caplog.clear()
        assert torch.equal(module.na2d(*inputs, 3, backend=name, **tuning), plain)
        assert sum("names a kernel of natten" in line for line in caplog.messages) == 1
        assert torch.equal(
            module.na2d(*inputs, SPATIAL[2], backend=name, attention_kwargs={"backend": "cutlass-fmha"}), whole
        )
    torch.testing.assert_close(module.na2d(*inputs, 3, backend="reference"), plain)


# ---- unfused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, rank", [(level, rank) for level, ranks in LEVELS_OF_UNFUSED.items() for rank in ranks])
def test_unfused_functions_with_their_old_names(level, rank):
    query, key, value = heads_first(rank)
    rpb = table(*(3,) * rank)
    biased = QK[rank](query, key, 3, dilation=2, rpb=rpb)
    window = [3] * rank, [1] * rank, [2] * rank, [False] * rank
    torch.testing.assert_close(biased, reference.qk(query, key, *window, rpb=rpb))
    attn = biased.softmax(-1)
    out = AV[rank](attn, value, 3, dilation=2)
    torch.testing.assert_close(out, reference.av(attn, value, *window))
    assert torch.equal(function(level, f"natten{rank}dqkrpb")(query, key, rpb, 3, 2), biased)
    assert torch.equal(function(level, f"natten{rank}dqk")(query, key, 3, 2), QK[rank](query, key, 3, dilation=2))
    assert torch.equal(function(level, f"natten{rank}dav")(attn, value, 3, 2), out)


@pytest.mark.parametrize("rank", (1, 2))
@pytest.mark.parametrize("kernel_size", (2, 3, 5))
def test_before_0_14_5_kernel_sizes_are_read_off_shapes(rank, kernel_size):
    query, key, value = heads_first(rank)
    rpb = table(*(kernel_size,) * rank)
    attn = function("0.14", f"natten{rank}dqkrpb")(query, key, rpb, 1)
    assert torch.equal(attn, QK[rank](query, key, kernel_size, rpb=rpb))
    assert torch.equal(function("0.14.4", f"natten{rank}dav")(attn, value, 1), AV[rank](attn, value, kernel_size))


@pytest.mark.parametrize("level", ("0.15", "0.17"))
@pytest.mark.parametrize("rank", QK)
def test_unfused_functions_with_bias_and_additional_tokens(level, rank):
    query, key, value = heads_first(rank)
    more_keys, more_values = torch.randn(2, 2, 2, 5, 8, dtype=torch.float64)
    kernel, dilation = ((3, 2, 2), (1, 2, 2)) if rank == 3 else (3, 2)
    window = (3, 2, 1, 2) if rank == 3 else (3, 2)  # the first axis apart
    rpb = table(*((3,) * rank if rank < 3 else kernel))
    biased = QK[rank](query, key, kernel, dilation=dilation, additional_keys=more_keys, rpb=rpb)
    plain = QK[rank](query, key, kernel, dilation=dilation, additional_keys=more_keys)
    summed = AV[rank](plain, value, kernel, dilation=dilation, additional_values=more_values)
    assert torch.equal(function(level, f"na{rank}d_qk_with_bias")(query, key, rpb, *window, more_keys), biased)
    assert torch.equal(function(level, f"natten{rank}dqkrpb")(query, key, rpb, *window), biased[..., :-5])
    arguments = window if level == "0.15" else (kernel, dilation)
    assert torch.equal(function(level, f"na{rank}d_qk")(query, key, *arguments, more_keys), plain)
    assert torch.equal(function(level, f"na{rank}d_av")(plain, value, *arguments, more_values), summed)
    torch.testing.assert_close(plain[..., -5:], torch.einsum("bh...d,bhtd->bh...t", query, more_keys))


def test_causal_windows_with_bias_at_0_17():
    query, key, value = heads_first(2)
    rpb, causal = table(3, 4), (True, False)
    attn = function("0.17", "na2d_qk")(query, key, (3, 4), 1, None, causal, rpb)
    assert torch.equal(attn, QK[2](query, key, (3, 4), is_causal=causal, rpb=rpb))
    assert (attn[:, :, 0, :, :8] > -torch.inf).sum() == 2 * 2 * 11 * 4  # the first row sees one row of keys
    out = function("0.17", "na2d_av")(attn.softmax(-1), value, (3, 4), 1, None, causal)
    fused = natten_ops.na2d(
        *(tensor.movedim(1, -2) for tensor in (query, key, value)), (3, 4), is_causal=causal, rpb=rpb, scale=1.0
    )
    torch.testing.assert_close(out.movedim(1, -2), fused)


@pytest.mark.parametrize("dtype, kept", [(torch.float16, True), (torch.bfloat16, True), (torch.float64, False)])
def test_a_float32_table_beside_other_dtypes(dtype, kept):
    query, key, _ = heads_first(2, dtype=dtype)
    rpb = table(3, 3, dtype=torch.float32)
    found = function("0.14.5", "natten2dqkrpb")(query, key, rpb, 3, 1)
    assert found.dtype == dtype
    assert torch.equal(found, QK[2](query, key, 3, rpb=rpb if kept else rpb.to(dtype)))


@pytest.mark.parametrize("level", ("0.14.5", "0.17"))
def test_gradients_flow_through_the_old_names(level):
    query, key, value = (t.requires_grad_() for t in heads_first(2))
    rpb = table(3, 3).requires_grad_()
    attn = function(level, "natten2dqkrpb")(query, key, rpb, 3, 1).softmax(-1)
    function(level, "natten2dav")(attn, value, 3, 1).square().sum().backward()
    tensors = [t.detach().movedim(1, -2).requires_grad_() for t in (query, key, value)]
    other = rpb.detach().requires_grad_()
    natten_ops.na2d(*tensors, 3, scale=1.0, rpb=other).square().sum().backward()
    for mine, fused in zip((query, key, value), tensors):
        torch.testing.assert_close(mine.grad.movedim(1, -2), fused.grad)
    torch.testing.assert_close(rpb.grad, other.grad)


# ---- compiled ------------------------------------------------------------------------------------------------------


OLD, FUSED, NEW = (compat.natten(version=level) for level in ("0.14.5", "0.17", "0.21"))


def old_attention(query, key, value):
    names = OLD.functional
    return names.natten2dav(names.natten2dqkrpb(query, key, query.new_ones(2, 5, 5), 3, 1).softmax(-1), value, 3, 1)


def fused_attention(query, key, value):
    assert FUSED.has_fused_na() and FUSED.has_bfloat() and not FUSED.is_fused_na_enabled()
    return FUSED.functional.na2d(query, key, value, 3, 2, scale=1.0)


def new_attention(query, key, value):
    return NEW.na2d(query, key, value, 3, 2, backend="cutlass-fna", return_lse=True)


def merged_attention(query, key, value):
    query, key, value = (tensor[:, 0] for tensor in (query, key, value))
    parts = [NEW.attention(query, k, v, return_lse=True) for k, v in zip(key.split(4, 1), value.split(4, 1))]
    return NEW.merge_attentions(*zip(*parts))


def packed_attention(query, key, value):
    starts = torch.tensor([0, 4, 4, 11])
    arguments = {"cumulative_seqlen_Q": starts, "cumulative_seqlen_KV": starts, "max_seqlen_Q": 7, "max_seqlen_KV": 7}
    return NEW.attention(query[:1, 0], key[:1, 0], value[:1, 0], is_causal=True, **arguments, return_lse=True)


CALLS = [old_attention, fused_attention, new_attention, merged_attention, packed_attention]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_one_graph_under_torch_compile(call):
    inputs = [t.requires_grad_() for t in (heads_first if call is old_attention else heads_last)(2)]
    eager = call(*inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    results = []
    for out in (eager, compiled):
        total = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
        results.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(*results)


# ---- modules -------------------------------------------------------------------------------------------------------

MODULES = {
    "0.14": ((8, 3, 2), {"dilation": 2}),
    "0.14.5": ((8, 2, 3, 2), {}),
    "0.15": ((8, 2, 3), {"dilation": 2}),
    "0.17": ((8, 2, 3, 2, False, True), {}),
}


@pytest.mark.parametrize("level", MODULES)
def test_checkpoints_go_from_level_to_level_and_to_natten_ops(level):
    arguments, names = MODULES[level]
    old = compat.natten(version=level).NeighborhoodAttention2D(*arguments, **names)
    assert list(old.state_dict()) == ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    ours = natten_ops.nn.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True)
    ours.load_state_dict(old.state_dict())
    x = torch.randn(2, 7, 9, 8)
    torch.testing.assert_close(old(x), ours(x), rtol=0, atol=0)
    for other_level, (other, more) in MODULES.items():
        twin = compat.natten(version=other_level).NeighborhoodAttention2D(*other, **more)
        twin.load_state_dict(ours.state_dict())
        assert torch.equal(twin(x), ours(x))
        assert twin.scale == 4**-0.5


def test_modules_of_0_20_have_strides_and_no_bias():
    new = compat.natten(version="0.20").NeighborhoodAttention3D(
        8, 2, (3, 2, 3), (2, 1, 3), 1, (True, False, False), False, 0.3
    )
    ours = natten_ops.nn.NeighborhoodAttention3D(
        8, 2, (3, 2, 3), stride=(2, 1, 3), is_causal=(True, False, False), qkv_bias=False, qk_scale=0.3
    )
    ours.load_state_dict(new.state_dict())
    x = torch.randn(1, 4, 5, 6, 8)
    assert torch.equal(new(x), ours(x)) and new.scale == 0.3


@pytest.mark.parametrize("level", ("0.14", "0.14.5", "0.15"))
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 2), (9, 10)])
def test_small_inputs_are_padded_and_cropped(level, shape):
    arguments, names = MODULES[level]
    module = compat.natten(version=level).NeighborhoodAttention2D(*arguments, **names)
    ours = natten_ops.nn.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True)
    ours.load_state_dict(module.state_dict())
    x = torch.randn(2, *shape, 8)
    padded = pad(x, [0, 0, 0, max(0, 6 - shape[1]), 0, max(0, 6 - shape[0])])
    assert module(x).shape == x.shape
    torch.testing.assert_close(module(x), ours(padded)[:, : shape[0], : shape[1]])


def test_volumes_of_0_15_have_a_depth_of_their_own_and_are_padded():
    module = compat.natten(version="0.15").NeighborhoodAttention3D(8, 2, 3, 2, 1, 2, False)
    ours = natten_ops.nn.NeighborhoodAttention3D(8, 2, (2, 3, 3), dilation=(2, 1, 1))
    ours.load_state_dict(module.state_dict())
    x = torch.randn(1, 2, 3, 2, 8)
    expected = ours(pad(x, [0, 0, 0, 1, 0, 0, 0, 2]))[:, :2, :3, :2]
    torch.testing.assert_close(module(x), expected)
    large = torch.randn(1, 4, 4, 5, 8)
    assert torch.equal(module(large), ours(large))


@pytest.mark.parametrize("level, fused", [("0.14.5", False), ("0.17", False), ("0.17", True)])
def test_attention_dropout_is_applied_in_training_alone(level, fused):
    module = compat.natten(version=level)
    if fused:
        module.use_fused_na()
    layer, plain = (module.NeighborhoodAttention1D(8, 2, 5, attn_drop=drop) for drop in (1.0, 0.0))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 8)
    assert torch.equal(layer(x), layer.proj.bias.expand(2, 9, 8))  # all weights are dropped
    assert torch.equal(layer.eval()(x), plain(x)) and not torch.equal(plain(x), layer.proj.bias.expand(2, 9, 8))


MODULE_NAMES = ["errors", "full_attention", "install", "module", "settings"]


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"natten_ops.compat.{name}"))
    assert result.attempted > 1 and result.failed == 0


def test_checks_and_counts():
    module, new = compat.natten(version="0.17"), compat.natten(version="0.21")
    assert module.utils.check_all_args(2, 3, (1, 2), None) == ((3, 3), (1, 2), (False, False))
    assert new.utils.checks.check_all_args(2, 4, 2, None, True) == ((4, 4), (2, 2), (1, 1), (True, True))
    assert new.utils.checks.check_stride_arg(3, 2) == (2, 2, 2)
    assert module.utils.checks.check_causal_arg(2, [True, False]) == (True, False)
    assert module.utils.get_num_na_weights((3, 5)) == 15
    shape, causal = (2, 9, 11, 4, 8), (True, False)
    first = (2, 4, 9, 11, 8)
    count = flops.fna_flop_count(shape, shape, shape, (3, 5), dilation=(1, 2), is_causal=causal)
    names = module.flops
    assert names.fna_flop_count(shape, shape, shape, (3, 5), (1, 2), causal, True) == count
    assert names.fna_flop_count(first, first, first, (3, 5), (1, 2), causal, False, True) == count // 2
    halves = [names.na_qk_flop_count(shape, shape, (3, 5), (1, 2), causal, True)]
    halves += [names.na_av_flop_count((*first[:-1], 15), first, (3, 5), (1, 2), causal, False)]
    assert halves == [count // 2] * 2


def test_configurations_leave_everything_open():
    module = compat.natten(version="0.21")
    inputs = heads_last(2, dtype=torch.float32)
    ((q_tile, kv_tile),) = module.get_configs_for_cutlass_fna(*inputs)
    assert torch.equal(module.na2d(*inputs, 3, q_tile_shape=q_tile, kv_tile_shape=kv_tile), natten_ops.na2d(*inputs, 3))
    assert module.get_configs_for_cutlass_hopper_fna(*inputs) == [((None, None), None)]
    assert module.get_bwd_configs_for_cutlass_fmha(*inputs) == [(None, None, None, False)]
    assert module.get_configs_for_flex_fna(*(t.to("meta") for t in inputs)) == []
    assert module.HAS_LIBNATTEN is True


def test_volumes_of_015_take_the_first_axis_apart_or_a_cube():
    """The releases gave the first axis apart; two numbers, by position or name, are a cube's, as in other ranks."""
    functional = compat.natten("0.15").functional
    query, key = torch.randn(2, 1, 2, 4, 6, 6, 8).unbind()
    apart = functional.na3d_qk(query, key, 2, 3, 1, 2)
    assert torch.equal(apart, natten_ops.na3d_qk(query, key, (2, 3, 3), dilation=(1, 2, 2)))
    cube = natten_ops.na3d_qk(query, key, 2, dilation=2)
    assert torch.equal(functional.na3d_qk(query, key, 2, 2), cube)
    assert torch.equal(functional.na3d_qk(query, key, kernel_size=2, dilation=2), cube)
    assert torch.equal(functional.na3d_av(cube, key, 2, 2), natten_ops.na3d_av(cube, key, kernel_size=2, dilation=2))
    with pytest.raises(TypeError, match="misses dilation_d"):  # half of the longer form is no cube
        functional.na3d_qk(query, key, kernel_size_d=2, kernel_size=3)


def test_arguments_of_another_level_are_named():
    query = torch.randn(1, 9, 9, 2, 8)
    with pytest.raises(compat.ConstraintError, match="argument 7 of na1d, na2d and na3d is rpb at 0.17"):
        compat.natten("0.17").functional.na2d(query, query, query, 7, 1, False, 0.125)
    with pytest.raises(compat.ConstraintError, match="attn is without dimensions"):
        compat.natten("0.14").functional.natten2dav(torch.tensor(1.0), query, 1)


def test_options_of_attention_are_a_dict_without_our_backends():
    query = torch.randn(1, 9, 2, 8)
    na1d = compat.natten("0.21").na1d
    for options, message in (([1], "attention_kwargs is a list"), ({"backend": "reference"}, "give it as backend=")):
        with pytest.raises(compat.ConstraintError, match=message):
            na1d(query, query, query, 3, attention_kwargs=options)


def test_a_patched_module_goes_with_its_install():
    module = compat.install_as_natten(version="0.21")
    na2d = module.functional.na2d
    module.functional.na2d = "patched"
    compat.uninstall()
    assert compat.install_as_natten(version="0.21").functional.na2d is na2d
    compat.uninstall()
    assert compat.natten("0.21").functional.na2d is na2d
