# SPDX-License-Identifier: MIT
"""Models written for natten run unchanged: each, at the releases it was written for, trains as its twin on natten_ops.

`consumers/` holds small models in the manner of projects that use natten. They import it as those projects do, after
`natten_ops.compat.install_as_natten`; the twins of `consumers/twins.py` never see it.
"""

import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from consumers import twins
from torch._dynamo.backends.debugging import aot_eager

from natten_ops import compat


class Case(NamedTuple):
    """A consumer at a release; the method of its attention that a twin replaces, or the module in its stead."""

    name: str
    level: str
    attention: str
    attend: Callable | None = None
    module: Callable | None = None
    build: str = "build"


DINAT = ("NeighborhoodAttention", twins.scaled_and_biased)
CASES = [
    Case("dinat_early", "0.14", *DINAT),
    Case("dinat", "0.14.5", *DINAT),
    Case("dinat", "0.15", *DINAT),
    Case("dinat", "0.17", *DINAT),
    Case("hdit_early", "0.14.5", "SelfAttention", twins.unit_scale),
    Case("hdit_early", "0.15", "SelfAttention", twins.unit_scale),
    Case("hdit", "0.17", "SelfAttention", twins.unit_scale),
    Case("allin1", "0.14.5", *DINAT),
    Case("allin1", "0.15", *DINAT),
    Case("allin1", "0.17", *DINAT),
    Case("stylenat", "0.17", "HydraAttention", twins.group_of_heads),
    Case("nat", "0.14", "NeighborhoodAttention", module=twins.classifier_module(True), build="build_padded"),
    Case("nat", "0.15", "NeighborhoodAttention", module=twins.classifier_module(True), build="build_padded"),
    Case("nat", "0.17", "NeighborhoodAttention", module=twins.classifier_module(False)),
    Case("agileformer", "0.15", "DeformableNeighborhoodAttention", twins.scaled_and_biased),
    Case("agileformer", "0.17", "DeformableNeighborhoodAttention", twins.scaled_and_biased),
    Case("forecast_mae", "0.14.5", "NeighborhoodAttention1D", module=twins.trajectory_module),
    Case("forecast_mae", "0.17", "NeighborhoodAttention1D", module=twins.trajectory_module),
    Case("physicsnemo", "0.20", "NeighborhoodAttention", twins.volume),
    Case("physicsnemo", "0.21", "NeighborhoodAttention", twins.volume),
    Case("cosmos", "0.21", "VideoAttention", twins.video_and_text),
]
NEWEST = list({case.name: case for case in CASES}.values())
UNFUSED = {"na_qk", "na_av"}
OPS = dict.fromkeys([case.name for case in CASES], UNFUSED) | {
    "hdit": {"na2d"},
    "nat": {"na2d"},
    "forecast_mae": {"na1d"},
    "physicsnemo": {"na3d"},
    "cosmos": {"neighborhood_attention_lse", "merge_attentions"},
}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def label(value):
    return f"{value.name}-{value.level}" if isinstance(value, Case) else None


@pytest.fixture
def load():
    """Imports a consumer after a release has been installed; afterwards both are gone."""

    def install_and_import(name, level):
        compat.install_as_natten(version=level)
        return importlib.import_module(f"consumers.{name}")

    yield install_and_import
    for name in [name for name in sys.modules if name.startswith("consumers.") and name != twins.__name__]:
        del sys.modules[name]
    compat.reset()
    compat.uninstall()


def twin_attention(consumer, case):
    if case.module is not None:
        return case.module
    return type("Twin", (getattr(consumer, case.attention),), {"attend": case.attend})


def model_and_twin(consumer, case, dtype):
    """Both with the same state, whose keys must be the same."""
    torch.manual_seed(0)
    build = getattr(consumer, case.build)
    model, twin = build(), build(twin_attention(consumer, case))
    twin.load_state_dict(model.state_dict())
    return model.to(dtype), twin.to(dtype)


def batch(consumer, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in consumer.INPUT_SHAPES]


def steps(model, inputs, count=3):
    """Loss, output and gradients of each step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    for _ in range(count):
        out = model(*inputs)
        loss = (out - torch.linspace(-1, 1, out.shape[-1]).to(out)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        yield loss.detach(), out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()


@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES] + [(case, torch.float64) for case in NEWEST],
    ids=lambda value: label(value) or str(value).removeprefix("torch."),
)
def test_a_consumer_trains_as_its_twin(load, case, dtype):
    consumer = load(case.name, case.level)
    model, twin = model_and_twin(consumer, case, dtype)
    inputs, tolerance = batch(consumer, dtype), TOLERANCES[dtype]
    have, want = list(steps(model, inputs)), list(steps(twin, inputs))
    torch.testing.assert_close(have, want, atol=tolerance, rtol=tolerance)
    assert have[-1][0] < have[0][0]  # it learns
    unused = [name for name, gradient in have[0][2].items() if gradient.dim() > 1 and not gradient.any()]
    assert not unused  # what gets no gradient compares nothing


@pytest.mark.parametrize("case", NEWEST, ids=label)
def test_a_consumer_compiles_to_one_graph(load, case):
    """And the graph has our ops, not what they are made of."""
    consumer = load(case.name, case.level)
    model, _ = model_and_twin(consumer, case, torch.float32)
    inputs, graphs = batch(consumer, torch.float32), []

    def backend(graph, example_inputs):
        graphs.append(graph.graph)
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss, out, gradients = next(steps(compiled, inputs))
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close((loss, out, gradients), next(steps(model, inputs)), atol=1e-5, rtol=1e-5)
    (graph,) = graphs
    ops = {str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("natten.")}
    assert ops == OPS[case.name]


def test_the_unfused_path_of_hdit_is_the_fused_one(load, monkeypatch):
    case = next(case for case in CASES if case.name == "hdit")
    consumer = load(case.name, case.level)
    model, twin = model_and_twin(consumer, case, torch.float32)
    assert consumer.natten.has_fused_na()
    monkeypatch.setattr(consumer.natten, "has_fused_na", lambda: False)
    monkeypatch.setattr(consumer.natten.functional, "na2d", None)
    inputs = batch(consumer, torch.float32)
    torch.testing.assert_close(list(steps(model, inputs)), list(steps(twin, inputs)), atol=1e-5, rtol=1e-5)


def test_the_settings_of_stylenat_are_kept_until_reset(load):
    consumer = load("stylenat", "0.17")
    consumer.build()
    natten = consumer.natten
    assert natten.is_fused_na_enabled() and natten.is_autotuner_enabled_for_backward()
    compat.reset()
    assert not natten.is_autotuner_enabled_for_backward()


@pytest.mark.parametrize("level, name", [("0.14", "bias"), ("0.15", "bias"), ("0.17", "rel_pos_bias")])
def test_forecast_mae_tells_the_release(load, level, name):
    consumer = load("forecast_mae", level)
    assert consumer.BIAS[name] is True
    assert "first.attn.rpb" in consumer.build().state_dict()


def test_without_an_installation_there_is_no_natten(load):
    """What the tests above see is what `install_as_natten` put there, and `uninstall` took it away."""
    load("dinat", "0.14.5")
    compat.uninstall()
    del sys.modules["consumers.dinat"]
    for name in ("dinat", "nat", "cosmos"):
        with pytest.raises(ImportError, match="natten"):
            importlib.import_module(f"consumers.{name}")
