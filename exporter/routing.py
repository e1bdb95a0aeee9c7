"""Which experts a runner chose, and the reference made to choose the same where the two differ.

Choosing is a step function: where two experts are nearly tied, runs that agree to the last rounding may choose
differently, and all that follows then differs, rightly. So choosing and computing are judged apart: the router's
scores against their own floor, and the rest with the reference on the candidate's choices.

Legend: T tokens, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.model.moe import MoE, Router
from nemotrt.plugins.moe_dispatch.reference import route

if TYPE_CHECKING:
    from nemotrt.model.hybrid import NemotronH

RouterLogits = tuple[NDArray[np.float32], ...]
"""Of one step, [T, E] for each MoE layer in order; nothing where a runner does not show them."""


def scores(router_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The router's scores in [0, 1], by which experts are chosen."""
    return 1 / (1 + np.exp(-router_logits.astype(np.float64)))


@dataclass(frozen=True)
class Choosing:
    """One MoE layer's way from router logits to experts, without its experts."""

    correction_bias: Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, moe: MoE) -> Choosing:
        """A layer's own."""
        names = ("top_k", "num_groups", "topk_group", "norm_topk_prob", "routed_scaling_factor")
        return cls(moe.gate.e_score_correction_bias, {name: getattr(moe, name) for name in names})

    def differ(self, ours_TE: Tensor, others_TE: Tensor) -> Tensor:
        """Which tokens get other experts [T]."""
        return (self._chosen(ours_TE) != self._chosen(others_TE)).any(1)

    def _chosen(self, logits_TE: Tensor) -> Tensor:
        """The experts of each token [T, k], in ascending order."""
        chosen_Tk, _ = route(logits_TE, self.correction_bias, **self.options)
        return chosen_Tk.sort(1).values


class RouterTap:
    """Sees the router logits of a model's MoE layers, and makes it choose as another runner did.

    A token's logits are replaced by the other's only where they lead to other experts.
    """

    def __init__(self, network: NemotronH) -> None:
        self.seen: list[NDArray[np.float32]] = []
        self._leader: RouterLogits = ()
        layers = [module for module in network.modules() if isinstance(module, MoE)]
        self.choosing = tuple(Choosing.of(moe) for moe in layers)
        for moe in layers:
            moe.gate.register_forward_hook(self._pass)

    def begin(self, leader: RouterLogits = ()) -> None:
        """Forget the last step; in the next, choose as in `leader`, whose rows are the step's first ones."""
        self.seen, self._leader = [], leader

    def _pass(self, gate: Router, args: tuple[Tensor], logits_TE: Tensor) -> Tensor:
        layer = len(self.seen)
        self.seen.append(logits_TE.numpy().copy())
        if not self._leader:
            return logits_TE
        led_TE = torch.from_numpy(self._leader[layer])
        ours_TE = logits_TE[: len(led_TE)]
        differs_T = self.choosing[layer].differ(ours_TE, led_TE)
        return torch.cat([torch.where(differs_T[:, None], led_TE, ours_TE), logits_TE[len(led_TE) :]])


def num_rerouted(
    choosing: Sequence[Choosing], ours: Sequence[RouterLogits], others: Sequence[RouterLogits]
) -> int:
    """How many choices differ over the steps: a token counts once in each layer."""
    return sum(
        int(layer.differ(torch.from_numpy(a), torch.from_numpy(b)).sum())
        for step in zip(ours, others, strict=True)
        for layer, a, b in zip(choosing, *step, strict=True)
    )


def joined(steps: Sequence[RouterLogits]) -> RouterLogits:
    """The steps one after the other, [ΣT, E] for each MoE layer."""
    return tuple(np.concatenate(layer) for layer in zip(*steps, strict=True))
