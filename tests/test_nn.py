# SPDX-License-Identifier: MIT
"""The modules: the op between two projections, their settings, their state."""

import pytest
import torch
from expecttest import assert_expected_inline

import natten_ops
from natten_ops.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_the_module_is_the_op_between_projections(rank, kv_heads):
    torch.manual_seed(0)
    module = MODULES[rank](12, 4, 3, dilation=2, is_causal=True, rel_pos_bias=True, num_kv_heads=kv_heads, qk_scale=0.4)
    x = torch.randn(2, *(7, 6, 6)[:rank], 12)
    heads = module.qkv(x).unflatten(-1, (-1, 3))
    count = 4 if kv_heads is None else kv_heads
    query, key, value = heads[..., :4, :], heads[..., 4 : 4 + count, :], heads[..., 4 + count :, :]
    out = getattr(natten_ops, f"na{rank}d")(query, key, value, 3, dilation=2, is_causal=True, scale=0.4, rpb=module.rpb)
    torch.testing.assert_close(module(x), module.proj(out.flatten(-2)))


def test_state_has_the_keys_that_checkpoints_have():
    plain = NeighborhoodAttention2D(8, 2, kernel_size=3)
    biased = NeighborhoodAttention2D(8, 2, kernel_size=(3, 5), rel_pos_bias=True, qkv_bias=False, num_kv_heads=1)
    assert list(plain.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    shapes = {name: tuple(t.shape) for name, t in biased.state_dict().items()}
    assert shapes == {"rpb": (2, 5, 9), "qkv.weight": (16, 8), "proj.weight": (8, 8), "proj.bias": (8,)}
    twin = NeighborhoodAttention2D(8, 2, kernel_size=(3, 5), rel_pos_bias=True, qkv_bias=False, num_kv_heads=1)
    twin.load_state_dict(biased.state_dict())
    x = torch.randn(1, 6, 6, 8)
    assert torch.equal(twin(x), biased(x))


def test_printing_tells_the_settings():
    assert_expected_inline(
        str(
            NeighborhoodAttention2D(
                8, 2, 3, dilation=(2, 1), is_causal=(True, False), rel_pos_bias=True, num_kv_heads=1
            )
        ),
        """\
NeighborhoodAttention2D(
  embed_dim=8, num_heads=2, kernel_size=(3, 3), num_kv_heads=1, dilation=(2, 1), is_causal=(True, False), rel_pos_bias=True
  (qkv): Linear(in_features=8, out_features=16, bias=True)
  (proj): Linear(in_features=8, out_features=8, bias=True)
  (proj_drop): Dropout(p=0.0, inplace=False)
)""",
    )


def test_factory_arguments_and_training():
    module = NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True, dtype=torch.float64, device="cpu", proj_drop=0.5)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    x = torch.randn(4, 9, 8, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))  # dropout
    module.eval()
    module(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in module.parameters())
    skeleton = NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=True, device="meta")
    assert skeleton(torch.empty(1, 5, 8, device="meta")).shape == (1, 5, 8)


def test_the_bias_table_learns():
    """A target that depends on the relative position alone can only be met by the table."""
    torch.manual_seed(0)
    module = NeighborhoodAttention1D(4, 1, 3, rel_pos_bias=True)
    optimizer = torch.optim.Adam([module.rpb], lr=0.1)
    x = torch.randn(2, 12, 4)
    with torch.no_grad():
        teacher = NeighborhoodAttention1D(4, 1, 3, rel_pos_bias=True)
        teacher.load_state_dict(module.state_dict())
        teacher.rpb.copy_(torch.tensor([[0.0, 2.0, 0.0, -2.0, 0.0]]))
        target = teacher(x)
    losses = []
    for _ in range(60):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("rank", MODULES)
def test_modules_are_picklable_and_deepcopyable(rank):
    import copy
    import pickle

    module = MODULES[rank](8, 2, 3)
    x = torch.randn(1, *(5, 4, 4)[:rank], 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is MODULES[rank] and torch.equal(twin(x), module(x))


@pytest.mark.parametrize("rank", MODULES)
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_the_attention_map_is_what_the_output_was_made_of(rank, kv_heads):
    """The output does not change by being looked at, and the map sums the values to it."""
    torch.manual_seed(0)
    settings = {"dilation": 2, "rel_pos_bias": True, "num_kv_heads": kv_heads, "qk_scale": 0.4}
    module = MODULES[rank](8, 2, 3, **settings).double()
    x = torch.randn(2, *(7, 6, 6)[:rank], 8, dtype=torch.float64)
    out, weights = module(x, return_attention=True)
    torch.testing.assert_close(out, module(x))
    assert weights.shape == (2, 2, *x.shape[1:-1], 3**rank)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    value = (
        module.qkv(x)
        .unflatten(-1, (-1, 4))[..., -(kv_heads or 2) :, :]
        .movedim(-2, 1)
        .expand(-1, 2, *[-1] * (rank + 1))
    )
    summed = getattr(natten_ops, f"na{rank}d_av")(weights, value, 3, dilation=2)
    torch.testing.assert_close(module.proj(summed.movedim(1, -2).flatten(-2)), out)


def test_what_takes_the_place_of_the_dropout_counts():
    """Nothing, an Identity, a flag of its own (dropout of Monte Carlo), and another module."""
    torch.manual_seed(0)
    module = NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 6, 6, 8)
    plain = module.eval()(x)
    module.attn_drop.train()
    assert not torch.allclose(module(x), plain, atol=1e-3)
    module.train()
    for nothing in (None, torch.nn.Identity(), torch.nn.Dropout(0.0)):
        module.attn_drop = nothing
        assert torch.equal(module(x), plain)
    module.attn_drop = torch.nn.Threshold(2, 0)  # no weight is above 2
    torch.testing.assert_close(module(x), module.proj.bias.expand_as(x))


def test_attention_dropout_is_applied_in_training_only():
    torch.manual_seed(0)
    plain = NeighborhoodAttention2D(8, 2, 3)
    dropping = NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(1, 12, 12, 8)
    assert torch.equal(dropping.eval()(x), plain(x))
    dropping.train()
    torch.manual_seed(1)
    have = dropping(x)
    _, weights = plain(x, return_attention=True)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(weights, 0.5)
    value = plain.qkv(x).unflatten(-1, (6, 4))[..., 4:, :].movedim(-2, 1)
    want = plain.proj(natten_ops.na2d_av(dropped, value, 3).movedim(1, -2).flatten(-2))
    torch.testing.assert_close(have, want)
    assert not torch.allclose(have, plain(x), atol=1e-3)
    for value in (1.5, -0.1, float("nan"), "0.1", True):
        for name in ("attn_drop", "proj_drop"):
            with pytest.raises((ValueError, TypeError), match=f"{name}=.*give a number from 0 to 1"):
                NeighborhoodAttention2D(8, 2, 3, **{name: value})
