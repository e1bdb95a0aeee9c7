"""The corrected defects of transformers exist: without the corrections, its prefill and its steps disagree."""

from __future__ import annotations

from typing import Any

import torch
from packed import relative_l2
from transformers_model import FINITE, TransformersModel, build, run

CASE = "mlp, head dim 80, state 128, 1 group, 1 kv head"
TOKENS = torch.arange(20)


def disagreement(model: TransformersModel) -> float:
    """The difference in transformers between one prefill of all tokens and one step per token."""
    at_once = run(model, TOKENS, 1, prefill_only=True)
    stepwise = run(model, TOKENS, 1)
    return relative_l2(stepwise.logits, at_once.logits)


def mixers(model: TransformersModel) -> list[Any]:
    return [layer.mixer for layer in model.model.layers if layer.block_type == "linear_attention"]


def small_steps() -> TransformersModel:
    """A model with time steps below time_step_min: softplus(−8) = 3e-4."""
    model = build(CASE)
    for mixer in mixers(model):
        mixer.dt_bias.fill_(-8.0)
    return model


def test_its_prefill_clamps_time_steps_that_the_config_does_not_limit() -> None:
    model = small_steps()
    for mixer in mixers(model):
        mixer.time_step_limit = (model.config.time_step_min, float("inf"))  # as set by its constructor
    assert disagreement(model) > 1e-3


def test_with_the_configs_limit_its_prefill_and_its_steps_agree() -> None:
    assert disagreement(small_steps()) <= 1e-5


def test_its_one_token_step_ignores_a_finite_limit() -> None:
    assert disagreement(build(FINITE)) > 1e-3
