"""Router logits that send tokens to every expert in turn, because a router of a trained model leaves some unused.

Legend: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.model.config import ModelConfig

NOT_CHOSEN, CHOSEN = -20.0, (3.0, 8.0)
"""Router logits of the experts that a token does not go to, and the range of those that it goes to: scores next to 0
and to 1, so that an expert has a token whatever its correction bias is, unless no router could choose it."""


def all_experts(
    config: ModelConfig, steps: Sequence[tuple[Tensor, StepInputs]], seed: int
) -> tuple[list[tuple[Tensor, StepInputs]], list[NDArray[np.float32]]]:
    """The steps, in turn as often as needed until each expert has a token, and the router logits [T, E] of each.

    Every other token goes to the next k experts; the rest is NaN, which keeps the router's own.
    """
    generator = np.random.default_rng(seed)
    longer: list[tuple[Tensor, StepInputs]] = []
    imposed: list[NDArray[np.float32]] = []
    num_chosen = 0
    while num_chosen < config.n_routed_experts or len(longer) < len(steps):
        flow, inputs = steps[len(longer) % len(steps)]
        logits_TE = np.full((len(inputs.input_ids), config.n_routed_experts), np.nan, dtype=np.float32)
        forced = np.arange(0, inputs.query_start[-1], 2)
        count = len(forced) * config.num_experts_per_tok
        chosen = (num_chosen + np.arange(count)).reshape(len(forced), -1) % config.n_routed_experts
        logits_TE[forced] = NOT_CHOSEN
        logits_TE[forced[:, None], chosen] = generator.uniform(*CHOSEN, chosen.shape)
        longer.append((flow, inputs))
        imposed.append(logits_TE)
        num_chosen += count
    return longer, imposed
