"""The judge is set right where it is wrong: each fault shows as the judge contradicting itself."""

from __future__ import annotations

from typing import Any

import torch
from judge import FINITE, Judge, build, run
from packed import relative_l2

CASE = "mlp, head dim 80, state 128, 1 group, 1 kv head"
TOKENS = torch.arange(20)


def disagreement(model: Judge) -> float:
    """How far one prefill of all tokens is from the same tokens one by one, by the judge alone."""
    at_once = run(model, TOKENS, 1, prefill_only=True)
    stepwise = run(model, TOKENS, 1)
    return relative_l2(stepwise.logits, at_once.logits)


def mixers(model: Judge) -> list[Any]:
    return [layer.mixer for layer in model.model.layers if layer.block_type == "linear_attention"]


def small_steps() -> Judge:
    """A judge whose time steps lie below time_step_min: softplus(−8) = 3e-4."""
    model = build(CASE)
    for mixer in mixers(model):
        mixer.dt_bias.fill_(-8.0)
    return model


def test_its_prefill_clamps_time_steps_that_the_config_does_not_limit() -> None:
    model = small_steps()
    for mixer in mixers(model):
        mixer.time_step_limit = (model.config.time_step_min, float("inf"))  # as its constructor leaves it
    assert disagreement(model) > 1e-3


def test_with_the_configs_limit_its_prefill_and_its_steps_agree() -> None:
    assert disagreement(small_steps()) <= 1e-5


def test_its_one_token_step_ignores_a_finite_limit() -> None:
    assert disagreement(build(FINITE)) > 1e-3
