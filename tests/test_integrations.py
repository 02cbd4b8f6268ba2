# SPDX-License-Identifier: MIT
"""transformers itself, its models unchanged, on natten_ops: `make test-integrations`.

Tiny models with random weights run forward, backward and compiled, and give what they give when the two functions that
they import from natten are plain torch. Releases from 4.54 to 4.57 cannot run Dinat with any natten: its attention unpacks
a shape of three where the layer hands it a grid, which has four. There, and only there, a few lines put the grid back.
"""

import importlib
import math
import sys
from typing import NamedTuple

import pytest
import torch

from natten_ops import reference

pytestmark = pytest.mark.integrations
LEVEL = "0.14.5"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
DINAT, NAT = "transformers.models.dinat.modeling_dinat", "transformers.models.deprecated.nat.modeling_nat"
GRID = {"patch_size": 4, "embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 4], "kernel_size": 3}
NO_DROPS = {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DILATIONS = {"dilations": [[1, 5], [2], [1], [1]]}  # of 16, 8, 4 and 2 tokens an axis: the last is padded
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
ONEFORMER = {
    "hidden_dim": 32, "num_attention_heads": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16, "encoder_layers": 1,
    "decoder_layers": 2, "mask_dim": 32, "conv_dim": 32, "num_queries": 6, "query_dec_layers": 1, "task_seq_len": 5,
    "text_encoder_width": 32, "text_encoder_num_layers": 1, "text_encoder_context_length": 7,
    "text_encoder_vocab_size": 20, "use_pretrained_backbone": False,
}  # fmt: skip


class Model(NamedTuple):
    """A class of transformers, its settings, where it lies, and the part of it that becomes one graph."""

    name: str
    settings: dict
    library: str = "transformers"
    config: str = "DinatConfig"
    file: str = DINAT
    backend: str = "aot_eager"
    part: str = ""


MODELS = [
    Model("DinatModel", DILATIONS),
    Model("DinatForImageClassification", DILATIONS, backend="inductor"),
    Model("DinatBackbone", {**DILATIONS, **STAGES}),
    Model("NatForImageClassification", {}, "transformers.models.deprecated.nat", "NatConfig", NAT),
    # What follows the backbone asks for sizes that only the data tell: no release becomes one graph as a whole.
    Model("OneFormerModel", {**DILATIONS, **STAGES}, part="pixel_level_module.encoder"),
]


@pytest.fixture(scope="module")
def transformers():
    """It looks for natten once, when it is imported."""
    from natten_ops import compat

    assert "transformers" not in sys.modules, "run this file alone"
    compat.install_as_natten(version=LEVEL)
    yield importlib.import_module("transformers")
    compat.reset()
    compat.uninstall()


def plain_scores(query, key, rpb, kernel_size, dilation):
    return reference.qk(query, key, [kernel_size] * 2, [1, 1], [dilation] * 2, [False] * 2, rpb=rpb)


def plain_values(attn, value, kernel_size, dilation):
    return reference.av(attn, value, [kernel_size] * 2, [1, 1], [dilation] * 2, [False] * 2)


def attention_on_the_grid(self, hidden_states, output_attentions=False):
    """What the attention of Dinat did until 4.53, around the functions that the release imported."""
    module = sys.modules[DINAT]
    heads = (-1, self.num_attention_heads, self.attention_head_size)
    query, key, value = (
        layer(hidden_states).unflatten(-1, heads[1:]).permute(0, 3, 1, 2, 4)
        for layer in (self.query, self.key, self.value)
    )
    query = query / math.sqrt(self.attention_head_size)
    scores = module.natten2dqkrpb(query, key, self.rpb, self.kernel_size, self.dilation)
    weights = self.dropout(scores.softmax(dim=-1))
    context = module.natten2dav(weights, value, self.kernel_size, self.dilation).permute(0, 2, 3, 1, 4).flatten(-2)
    return (context, weights) if output_attentions else (context,)


@pytest.fixture(autouse=True)
def runnable_dinat(transformers, monkeypatch):
    """Mends the attention of a release whose own code cannot run, and no other."""
    module = importlib.import_module(DINAT)
    attention = module.NeighborhoodAttention(transformers.DinatConfig(**GRID), 8, 2, 3, 1)
    try:
        attention(torch.randn(1, 4, 5, 8))
    except ValueError as problem:
        assert "too many values to unpack" in str(problem)
        monkeypatch.setattr(module.NeighborhoodAttention, "forward", attention_on_the_grid)


def make(model):
    """The model with random weights, the bias tables too, which transformers starts at zero."""
    torch.manual_seed(0)
    library = importlib.import_module(model.library)
    config = getattr(library, model.config)(**GRID, **NO_DROPS, **model.settings)
    if model.name == "OneFormerModel":
        config = library.OneFormerConfig(backbone_config=config, **ONEFORMER)
    made = getattr(library, model.name)(config)
    for name, parameter in made.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return made.eval()


def inputs_of(model, part=""):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    if model.name == "OneFormerModel" and not part:
        return {"pixel_values": pixels, "task_inputs": torch.arange(10).reshape(2, 5)}
    labels = {"labels": torch.tensor([0, 1])} if "Classification" in model.name else {}
    return {"pixel_values": pixels, **labels}


def outputs_and_gradients(module, inputs):
    """Every tensor that the module returns, and the gradients of their squares."""
    outputs = [t for t in torch.utils._pytree.tree_leaves(tuple(module(**inputs).values())) if torch.is_tensor(t)]
    module.zero_grad()
    sum(t.square().mean() for t in outputs if t.requires_grad).backward()
    gradients = {name.replace("_orig_mod.", ""): p.grad for name, p in module.named_parameters()}
    return [t.detach() for t in outputs], gradients


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_gives_what_plain_torch_gives(monkeypatch, model):
    made, inputs = make(model), inputs_of(model)
    have = outputs_and_gradients(made, inputs)
    monkeypatch.setattr(importlib.import_module(model.file), "natten2dqkrpb", plain_scores)
    monkeypatch.setattr(importlib.import_module(model.file), "natten2dav", plain_values)
    torch.testing.assert_close(have, outputs_and_gradients(made, inputs), **TOLERANCE)
    tables = [gradient for name, gradient in have[1].items() if name.endswith("rpb")]
    assert len(tables) == sum(GRID["depths"]) and all(table.any() for table in tables)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_compiles_to_one_graph(model):
    made = make(model)
    module, inputs = made.get_submodule(model.part), inputs_of(model, model.part)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=model.backend)
    want = outputs_and_gradients(module, inputs)
    torch.testing.assert_close(outputs_and_gradients(compiled, inputs), want, **TOLERANCE)


def test_attention_maps_are_distributions_over_the_window():
    made = make(MODELS[0])
    maps = made(**inputs_of(MODELS[0]), output_attentions=True).attentions
    assert [tuple(m.shape[1:]) for m in maps] == [(1, 16, 16, 9), (2, 8, 8, 9), (2, 4, 4, 9), (4, 3, 3, 9)]
    for m in maps:
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:-1]))


def test_transformers_takes_ours_for_a_release(transformers):
    functional, module = sys.modules["natten"].functional, importlib.import_module(DINAT)
    assert transformers.utils.is_natten_available()
    transformers.dependency_versions_check.dep_version_check("natten")  # raises if its demand on the version is not met
    assert module.natten2dqkrpb is functional.natten2dqkrpb and module.natten2dav is functional.natten2dav
