# SPDX-License-Identifier: MIT
"""Every module of every level, and the 3-D functions of 0.15 in both forms of their arguments, as one graph."""

import inspect

import pytest
import torch

import natten_ops
from natten_ops import compat
from natten_ops.compat.nn_modules import PADDED

MODULES = [
    (level, name)
    for level in compat.LEVELS
    for name, value in sorted(vars(compat.natten(level)).items())
    if isinstance(value, type) and issubclass(value, torch.nn.Module)
]
SETTINGS = {"dim": 8, "embed_dim": 8, "num_heads": 2, "kernel_size": 3, "kernel_size_d": 2, "dilation": 2,
            "dilation_d": 3, "bias": True, "rel_pos_bias": True}  # fmt: skip


def one_graph(function, *inputs):
    """Eager and compiled results with the gradients of all inputs; the graph is one, or there is an error."""
    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = call(*inputs)
        results.append((out.detach(), torch.autograd.grad(out.sin().sum(), inputs)))
    return results


def test_every_level_has_modules():
    ranks = {
        level: {name[-2:] for at, name in MODULES if at == level and name.endswith("D")} for level in compat.LEVELS
    }
    assert ranks == {level: {"1D", "2D"} if level < "0.15" else {"1D", "2D", "3D"} for level in compat.LEVELS}


@pytest.mark.parametrize(("level", "name"), MODULES)
def test_a_module_is_one_graph(level, name):
    """Where the level pads, an input shorter than the window: the padding and the crop are in the graph too."""
    torch.manual_seed(0)
    module_class = getattr(compat.natten(level), name)
    known = inspect.signature(module_class).parameters
    module = module_class(**{key: value for key, value in SETTINGS.items() if key in known}).double()
    rank = int(name[-2]) if name.endswith("D") else 2
    x = torch.randn(2, *((4, 7, 5) if level in PADDED else (7, 8, 6))[:rank], 8, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values)), x)

    eager, compiled = one_graph(run, x.requires_grad_(), *parameters.values())
    assert eager[0].shape == x.shape and all(slope.any() for slope in eager[1])
    torch.testing.assert_close(compiled, eager)


WINDOWS = {  # arguments of the release: the first axis apart, or two numbers for a cube
    "apart": ((2, 3, 3, 2), {"kernel_size": (2, 3, 3), "dilation": (3, 2, 2)}),
    "cube": ((2, 2), {"kernel_size": 2, "dilation": 2}),
}


@pytest.mark.parametrize("names", ["na3d_qk na3d_av", "natten3dqk natten3dav", "natten3dqkrpb natten3dav"])
@pytest.mark.parametrize("form", WINDOWS)
def test_volumes_of_0_15_are_one_graph_in_both_forms(names, form):
    window, ours = WINDOWS[form]
    qk, av = (getattr(compat.natten("0.15").functional, name) for name in names.split())
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 6, 7, 8, generator=generator, dtype=torch.float64).unbind()
    kernel = (2,) * 3 if form == "cube" else ours["kernel_size"]
    table = torch.randn(2, *(2 * size - 1 for size in kernel), generator=generator, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (query, key, value, *([table] if "rpb" in names else []))]

    def old(query, key, value, *rpb):
        return av(qk(query, key, *rpb, *window).softmax(-1), value, *window)

    def new(query, key, value, rpb=None):
        return natten_ops.na3d_av(natten_ops.na3d_qk(query, key, **ours, rpb=rpb).softmax(-1), value, **ours)

    eager, compiled = one_graph(old, *inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(eager, one_graph(new, *inputs)[0])
