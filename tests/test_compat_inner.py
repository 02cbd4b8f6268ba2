# SPDX-License-Identifier: MIT
"""What models took from inside of natten: attributes of its modules, autograd functions, handles of counters, helpers."""

import sys
import threading
from unittest import mock

import numpy as np
import pytest
import torch

import natten_ops
from natten_ops import compat, flops
from natten_ops.compat.functions import AV, QK
from natten_ops.compat.types import MemoryUsagePreference as Memory


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def at(level):
    return compat.natten(version=level)


# ---- attributes ----------------------------------------------------------------------------------------------------

# level -> constructor, and what a 2-D module of 16 channels and 2 heads then has
ATTRIBUTES = {
    "0.14": ((16, 3, 2), {"kernel_size": 3, "dilation": 1, "window_size": 3}),
    "0.14.5": ((16, 2, 3, 2), {"kernel_size": 3, "dilation": 2, "window_size": 6}),
    "0.15": ((16, 2, 3, 2), {"kernel_size": 3, "dilation": 2, "window_size": 6}),
    "0.17": ((16, 2, 3, 2), {"kernel_size": (3, 3), "dilation": (2, 2), "attn_drop_rate": 0.0, "use_experimental_ops": False}),
    "0.21": ((16, 2, 3, 2), {"kernel_size": (3, 3), "stride": (2, 2), "na_dim": 2, "expected_input_tensor_rank": 4}),
}  # fmt: skip


@pytest.mark.parametrize("level", ATTRIBUTES)
def test_modules_have_the_attributes_of_their_level(level):
    arguments, expected = ATTRIBUTES[level]
    module = at(level).NeighborhoodAttention2D(*arguments)
    assert {name: getattr(module, name) for name in expected} == expected
    assert module.scale == 8**-0.5 and (module.num_heads, module.head_dim) == (2, 8)
    assert module.proj_drop.p == 0 and (level == "0.21" or module.attn_drop.p == 0)
    assert module.extra_repr().startswith("head_dim=8, num_heads=2, kernel_size=")
    assert ("rel_pos_bias" in module.extra_repr()) == (level != "0.21")


def test_volumes_of_0_15_have_attributes_of_their_first_axis():
    old = at("0.15").NeighborhoodAttention3D(8, 2, 3, 5, 1, 2)
    assert (old.kernel_size, old.kernel_size_d, old.dilation, old.dilation_d) == (3, 5, 1, 2)
    assert (old.window_size, old.window_size_d) == (3, 10)
    assert "kernel_size_d=5" in old.extra_repr()
    cube = at("0.15").NeighborhoodAttention3D(8, 2, 3)
    assert (cube.kernel_size_d, cube.dilation_d, cube.window_size_d) == (3, 1, 3)


@pytest.mark.parametrize("level", ["0.14", "0.14.5", "0.15", "0.17", "0.21"])
def test_what_attributes_hold_counts(level):
    """As in natten, whose forward reads them: a subclass may set a scale, a caller another window."""
    arguments, _ = ATTRIBUTES[level]
    module = at(level).NeighborhoodAttention2D(*arguments)
    x = torch.randn(1, 12, 12, 16)
    module.scale = 0.5
    module.kernel_size = 5
    module.rpb = None
    heads = module.qkv(x).unflatten(-1, (3, 2, 8)).movedim(-3, 0)
    settings = {"stride": module.stride} if level == "0.21" else {"dilation": module.dilation}
    out = natten_ops.na2d(*heads, kernel_size=5, scale=0.5, **settings)
    torch.testing.assert_close(module(x), module.proj(out.flatten(-2)))
    module.scale = torch.nn.Parameter(torch.ones(1))  # for a forward of the subclass's own
    assert "scale" in dict(module.named_parameters())


def test_a_subclass_with_a_forward_in_natten_s_way():
    natten = at("0.15")

    class Mine(natten.NeighborhoodAttention2D):
        def forward(self, x):
            assert min(x.shape[1:3]) >= self.window_size
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(3, 0, 4, 1, 2, 5)
            logits = natten.functional.natten2dqkrpb(query * self.scale, key, self.rpb, self.kernel_size, self.dilation)
            weights = self.attn_drop(logits.softmax(-1))
            out = natten.functional.natten2dav(weights, value, self.kernel_size, self.dilation)
            return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).flatten(-2)))

    torch.manual_seed(0)
    mine, plain = Mine(16, 2, 3, 2), natten.NeighborhoodAttention2D(16, 2, 3, 2)
    plain.load_state_dict(mine.state_dict())
    x = torch.randn(1, 7, 9, 16)
    torch.testing.assert_close(mine(x), plain(x))


@pytest.mark.parametrize("level", ATTRIBUTES)
def test_a_scale_that_is_false_is_the_default(level):
    arguments, _ = ATTRIBUTES[level]
    module = at(level).NeighborhoodAttention2D(*arguments, qk_scale=False)
    assert module.scale == 8**-0.5
    if level in ("0.17", "0.21"):
        query, key, value = torch.randn(3, 1, 6, 6, 2, 8).unbind()
        have, want = (at(level).functional.na2d(query, key, value, 3, scale=scale) for scale in (False, None))
        assert torch.equal(have, want)


def test_numbers_of_numpy_and_flags_as_probabilities():
    module = at("0.15").NeighborhoodAttention3D(8, 2, np.int64(3), attn_drop=False, proj_drop=np.float32(0.5))
    assert module(torch.randn(1, 4, 4, 4, 8)).shape == (1, 4, 4, 4, 8) and module.window_size_d == 3
    assert (module.attn_drop.p, module.proj_drop.p) == (0, 0.5)


def test_the_oldest_name_is_the_same_class():
    assert at("0.14").NeighborhoodAttention is at("0.14").NeighborhoodAttention2D


# ---- functions -----------------------------------------------------------------------------------------------------

WINDOWS = {"kernel_size": 3, "dilation": 2}
OLD, NEW = ("NATTEN{n}DQKRPBFunction", "NATTEN{n}DAVFunction"), ("NeighborhoodAttention{n}DQKAutogradFunction",
                                                                   "NeighborhoodAttention{n}DAVAutogradFunction")  # fmt: skip
# level -> names, what follows (query, key, rpb) and (attn, value), ranks
APPLIED = [
    ("0.14", OLD, (2,), (2,), (1, 2)),
    ("0.14.5", OLD, (3, 2), (3, 2), (1, 2)),
    ("0.15", NEW, (None, 3, 2), (None, 3, 2), (1, 2)),
    ("0.15", NEW, (3, 2), (3, 2), (1, 2)),  # 0.15.0
    ("0.15", NEW, (None, 3, 3, 2, 2), (None, 3, 3, 2, 2), (3,)),
    ("0.15", NEW, (3, 3, 2, 2), (3, 3, 2, 2), (3,)),
    ("0.17", NEW, (None, 3, 2, False), (None, 3, 2, False), (1, 2, 3)),
]


@pytest.mark.parametrize("level, names, of_qk, of_av, ranks", APPLIED)
def test_autograd_functions_are_applied(level, names, of_qk, of_av, ranks):
    for rank in ranks:
        query, key, value = (t.requires_grad_() for t in torch.randn(3, 1, 2, *(6, 7, 6)[:rank], 4).unbind())
        table = torch.randn(2, *[5] * rank)
        qk, av = (getattr(at(level).functional, name.format(n=rank)).apply for name in names)
        have = av(qk(query, key, table, *of_qk).softmax(-1), value, *of_av)
        want = AV[rank](QK[rank](query, key, **WINDOWS, rpb=table).softmax(-1), value, **WINDOWS)
        assert torch.equal(have, want)
        gradients = (torch.autograd.grad(out.sin().sum(), [query, key, value]) for out in (have, want))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_handles_count_nodes_of_a_traced_graph(rank):
    """At 0.14, whose kernel sizes are read off shapes: sizes are tensors while a graph is traced."""
    home = at("0.14")
    query, key, value = torch.randn(3, 1, 2, *(6, 7)[:rank], 4).unbind()
    qk, av = (getattr(home.functional, f"natten{rank}d{name}") for name in ("qkrpb", "av"))

    def attend(query, key, value, table):
        return av(qk(query, key, table, 2).softmax(-1), value, 2)

    graph = torch.jit.trace(attend, (query, key, value, torch.randn(2, *[5] * rank))).graph
    name = "_1d" if rank == 1 else ""
    shapes = [tuple(t.shape) for t in (query, query, query.new_empty(*query.shape[:-1], 3**rank))]
    for kind, handle, wanted in (
        ("na_qk", f"qk{name}_rpb_flop", flops.na_qk_flop_count(*shapes[:2], **WINDOWS)),
        ("na_av", f"av{name}_flop", flops.na_av_flop_count(shapes[2], shapes[0], **WINDOWS)),
    ):
        (node,) = graph.findAllNodes(f"natten::{kind}")
        assert getattr(home.flops, handle)(list(node.inputs()), list(node.outputs())) == wanted
    newer = at("0.15").flops
    assert getattr(newer, f"av_{rank}d_flop")(list(node.inputs()), list(node.outputs())) == wanted


@pytest.mark.parametrize("level", ["0.15", "0.17"])
def test_helpers_of_tensors(level):
    utils = at(level).utils
    tokens, attn = torch.randn(2, 3, 5, 6, 4), torch.randn(2, 3, 5, 6, 11)
    extra = torch.randn(2, 3, 2, 4)
    assert utils.check_additional_keys(tokens, None) == 0 and utils.check_additional_keys(tokens, extra) == 2
    assert utils.check_additional_values(attn, extra, tokens, 9) == 2
    assert utils.make_attn_tensor_from_input(tokens.requires_grad_(), 9).shape == (2, 3, 5, 6, 9)
    for call in (
        lambda: utils.check_additional_keys(tokens, extra[:1]),
        lambda: utils.check_additional_values(attn, None, tokens, 9),
        lambda: utils.check_additional_values(attn, extra[0], tokens, 9),
    ):
        with pytest.raises(compat.ConstraintError, match="; give "):
            call()


def test_loggers_and_lengths_keep_what_they_have():
    logger = at("0.17").utils.log.get_logger("some.model")
    assert logger.name == "some.model" and not logger.handlers
    query = torch.randn(1, 7, 2, 4)
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    starts, *_ = at("0.21").utils.varlen.generate_varlen_parameters(query, query, query, lengths, lengths)
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 3, 7]
    many = torch.randn(1, 300, 2, 4)
    small = torch.tensor([100, 200], dtype=torch.uint8)  # whose sums do not fit into it
    starts, *_ = at("0.21").utils.varlen.generate_varlen_parameters(many, many, many, small, small)
    assert starts.tolist() == [0, 100, 300]


def test_contexts_are_classes_whose_attributes_are_the_settings():
    context = compat.natten(version="0.17").context
    natten, tuner = context.NattenContext, context.AutotunerContext
    assert isinstance(natten, type) and isinstance(tuner, type)
    natten.is_fused_na_enabled = True
    tuner.set_enabled_for_forward(True)
    tuner.set_steps_forward(None)  # leaves it
    natten.training_memory_preference = Memory.Strict
    assert context.is_fused_na_enabled() and context.is_autotuner_enabled_for_forward() and tuner.steps_forward == 5
    assert context.is_memory_usage_strict() and natten.is_fused_na_enabled
    natten.reset()
    assert not context.is_fused_na_enabled() and context.is_memory_usage_default() and tuner.enabled_for_forward
    compat.reset()
    assert not tuner.enabled_for_forward
    with mock.patch.object(natten, "is_fused_na_enabled", True):
        assert context.is_fused_na_enabled()
    assert not context.is_fused_na_enabled()
    with pytest.raises(AttributeError, match="no setting 'is_fast'; there are is_deterministic_mode_enabled"):
        natten.is_fast = True
    with pytest.raises(compat.ConstraintError, match="is_fused_na_enabled='yes' is a str"):
        natten.is_fused_na_enabled = "yes"
    with pytest.raises(compat.ConstraintError, match="is unknown; give one of 'default'"):
        natten.set_training_memory_preference(["strict"])
    natten().reset()


def test_missing_modules_say_which_levels_have_them():
    with pytest.raises(AttributeError, match="no 'flops'; levels 0.14, 0.14.5, 0.15, 0.17 have it"):
        at("0.21").flops  # noqa: B018


def test_threads_may_install_at_once():
    mistakes = []

    def install():
        for _ in range(40):
            try:
                compat.install_as_natten("0.17")
            except Exception as error:
                mistakes.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=install) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
        compat.uninstall()
    assert not mistakes
