"""The table of sources covers the model exactly, and a checkpoint that does not fit it is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checkpoints import load_into
from torch import Tensor

from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import is_mtp, parameters, stored_names, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.recipe import LATENT, PROJECTIONS, Recipe
from nemotrt.plugins.contract import DType

CONFIG = ModelConfig(
    hidden_size=6,
    vocab_size=10,
    layers=("mamba", "attention", "mlp", "moe"),
    mamba_num_heads=4,
    mamba_head_dim=2,
    ssm_state_size=3,
    n_groups=2,
    conv_kernel=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=7,
    n_routed_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=5,
    moe_latent_size=4,
    moe_shared_expert_intermediate_size=8,
)

PUBLISHED = {
    "backbone.embeddings.weight": (10, 6),
    "backbone.layers.0.norm.weight": (6,),
    "backbone.layers.0.mixer.in_proj.weight": (8 + 20 + 4, 6),
    "backbone.layers.0.mixer.conv1d.weight": (20, 1, 4),
    "backbone.layers.0.mixer.conv1d.bias": (20,),
    "backbone.layers.0.mixer.A_log": (4,),
    "backbone.layers.0.mixer.D": (4,),
    "backbone.layers.0.mixer.dt_bias": (4,),
    "backbone.layers.0.mixer.norm.weight": (8,),
    "backbone.layers.0.mixer.out_proj.weight": (6, 8),
    "backbone.layers.1.norm.weight": (6,),
    "backbone.layers.1.mixer.q_proj.weight": (8, 6),
    "backbone.layers.1.mixer.k_proj.weight": (4, 6),
    "backbone.layers.1.mixer.v_proj.weight": (4, 6),
    "backbone.layers.1.mixer.o_proj.weight": (6, 8),
    "backbone.layers.2.norm.weight": (6,),
    "backbone.layers.2.mixer.up_proj.weight": (7, 6),
    "backbone.layers.2.mixer.down_proj.weight": (6, 7),
    "backbone.layers.3.norm.weight": (6,),
    "backbone.layers.3.mixer.gate.weight": (3, 6),
    "backbone.layers.3.mixer.gate.e_score_correction_bias": (3,),
    "backbone.layers.3.mixer.experts.0.up_proj.weight": (5, 4),
    "backbone.layers.3.mixer.experts.1.up_proj.weight": (5, 4),
    "backbone.layers.3.mixer.experts.2.up_proj.weight": (5, 4),
    "backbone.layers.3.mixer.experts.0.down_proj.weight": (4, 5),
    "backbone.layers.3.mixer.experts.1.down_proj.weight": (4, 5),
    "backbone.layers.3.mixer.experts.2.down_proj.weight": (4, 5),
    "backbone.layers.3.mixer.shared_experts.up_proj.weight": (8, 6),
    "backbone.layers.3.mixer.shared_experts.down_proj.weight": (6, 8),
    "backbone.layers.3.mixer.fc1_latent_proj.weight": (4, 6),
    "backbone.layers.3.mixer.fc2_latent_proj.weight": (6, 4),
    "backbone.norm_f.weight": (6,),
    "lm_head.weight": (10, 6),
}
"""A checkpoint of CONFIG under the names that NVIDIA publishes."""

EXPERT = "backbone.layers.3.mixer.experts.{}.up_proj.weight"


def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in PUBLISHED.items()}


def loaded(tensors: dict[str, Tensor], config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    model = NemotronH(config)
    load_into(model, tensors)
    return dict(model.state_dict())


FP8_MODULES = frozenset(
    f"backbone.layers.{layer}.mixer.{name}"
    for layer, kind in CONFIG.numbered_layers.items()
    for name in (*PROJECTIONS[kind], *(LATENT if kind == "moe" else ()))
)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"moe_latent_size": 0},
        {"n_routed_experts": 1, "num_experts_per_tok": 1},
        {"use_conv_bias": False},
        {"use_bias": True, "attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"recipe": Recipe(FP8_MODULES, kv_cache=True)},
        {"recipe": Recipe(FP8_MODULES, FP8_MODULES, kv_cache=True, kv_scales=True)},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_the_table_has_every_parameter_with_its_shape_and_dtype(
    change: dict[str, object], dtype: DType
) -> None:
    config = dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]
    network = NemotronH(config, dtype=dtype.torch, device="meta")
    assert set(tensor_sources(config)) == set(network.state_dict())
    assert parameters(config, dtype) == {
        name: (tuple(parameter.shape), DType.from_torch(parameter.dtype))
        for name, parameter in network.named_parameters()
    }


def test_the_published_names_fill_the_model() -> None:
    tensors = checkpoint()
    state = loaded(tensors)
    assert torch.equal(state["backbone.layers.0.mixer.A"], -tensors["backbone.layers.0.mixer.A_log"].exp())
    conv = tensors["backbone.layers.0.mixer.conv1d.weight"]
    assert torch.equal(state["backbone.layers.0.mixer.conv1d.weight"], conv[:, 0])
    stacked = torch.stack([tensors[EXPERT.format(e)] for e in range(3)])
    assert torch.equal(state["backbone.layers.3.mixer.experts.up"], stacked)
    assert torch.equal(state["lm_head.weight"], tensors["lm_head.weight"])
    for name in ("up_scale", "down_scale", "input_scale", "hidden_scale"):
        assert state[f"backbone.layers.3.mixer.experts.{name}"].eq(1).all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_output_of_an_fp8_expert_has_a_scale(per_channel: bool) -> None:
    module = "backbone.layers.3.mixer.experts"
    recipe = Recipe(frozenset({module}), frozenset({module} if per_channel else ()))
    tensors = checkpoint()
    scales = {}
    for own, outputs in (("up", 5), ("down", 4)):
        scales[own] = torch.rand(3, outputs if per_channel else 1) + 0.1
        for e in range(3):
            name = f"{module}.{e}.{own}_proj"
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scales[own][e] if per_channel else scales[own][e, 0]
            tensors[f"{name}.input_scale"] = torch.tensor(0.5 + e)
    state = loaded(tensors, CONFIG.with_recipe(recipe))
    for own, outputs in (("up", 5), ("down", 4)):
        assert torch.equal(state[f"{module}.{own}_scale"], scales[own].expand(3, outputs))
    assert state[f"{module}.input_scale"].tolist() == [2.5]


@pytest.mark.parametrize("table", ["backbone.embedding.weight", "model.embeddings.weight"])
def test_other_writers_names_fill_the_same_model(table: str) -> None:
    tensors = checkpoint()
    expected = loaded(tensors)
    renamed = {name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}
    renamed[table] = renamed.pop("model.embeddings.weight")
    for projection in ("up_proj", "down_proj"):
        one = f"model.layers.3.mixer.experts.{{}}.{projection}.weight"
        stack = torch.stack([renamed.pop(one.format(e)) for e in range(3)])
        renamed[f"model.layers.3.mixer.experts.{projection}"] = stack
    state = loaded(renamed)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_convolution_without_bias_gets_zeros() -> None:
    tensors = checkpoint()
    del tensors["backbone.layers.0.mixer.conv1d.bias"]
    state = loaded(tensors, dataclasses.replace(CONFIG, use_conv_bias=False))
    assert state["backbone.layers.0.mixer.conv1d.bias"].eq(0).all()


def test_a_tied_head_is_the_embedding_table() -> None:
    tensors = checkpoint()
    del tensors["lm_head.weight"]
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert torch.equal(loaded(tensors, tied)["lm_head.weight"], tensors["backbone.embeddings.weight"])
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from backbone.embeddings"):
        loaded(checkpoint(), tied)


def test_multi_token_prediction_is_left_out() -> None:
    name = "mtp.layers.0.eh_proj.weight"
    assert is_mtp(name)
    assert not any(is_mtp(name) for name in PUBLISHED)
    loaded(checkpoint() | {name: torch.zeros(6, 12)})


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        ({}, EXPERT.format(1), r"experts.1.up_proj.weight is missing"),
        ({}, "backbone.norm_f.weight", r"backbone.norm_f.weight is missing"),
        (
            {EXPERT.format(3): (5, 4)},
            "",
            r"experts.3.up_proj.weight is in the checkpoint, but not in the model",
        ),
        (
            {"backbone.layers.4.norm.weight": (6,)},
            "",
            r"layers.4.norm.weight is in the checkpoint, but not in the model",
        ),
        ({"lm_head.weight": (6, 10)}, "", r"lm_head.weight has shape \[6, 10\], .* requires \[10, 6\]"),
        ({"model.norm_f.weight": (6,)}, "", r"backbone.norm_f.weight and model.norm_f.weight are two names"),
        (
            {"backbone.layers.3.mixer.experts.up_proj": (3, 5, 4)},
            "",
            r"experts.0.up_proj.weight is in the checkpoint, but not in the model",
        ),
        (
            {"model.layers.3.mixer.experts.up_proj": (2, 5, 4)},
            "",
            r"experts.up_proj has shape \[2, 5, 4\], .* requires \[3, 5, 4\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    added: dict[str, tuple[int, ...]], removed: str, message: str
) -> None:
    tensors = checkpoint() | {name: torch.zeros(shape) for name, shape in added.items()}
    tensors.pop(removed, None)
    with pytest.raises(CheckpointError, match=message):
        loaded(tensors)


def test_stored_names_are_in_stacking_order() -> None:
    sources = tensor_sources(CONFIG)
    up = sources["backbone.layers.3.mixer.experts.up"]
    assert stored_names(up, PUBLISHED) == tuple(EXPERT.format(e) for e in range(3))
    assert stored_names(sources["backbone.layers.3.mixer.experts.up_scale"], PUBLISHED) == ()


def test_values_take_the_parameters_dtype() -> None:
    model = NemotronH(CONFIG, dtype=torch.float16)
    load_into(model, {name: tensor.bfloat16() for name, tensor in checkpoint().items()})
    exact = checkpoint()["backbone.layers.0.mixer.A_log"].bfloat16().float()
    assert torch.equal(model.state_dict()["backbone.layers.0.mixer.A"], -exact.exp())
    assert model.state_dict()["lm_head.weight"].dtype == torch.float16
