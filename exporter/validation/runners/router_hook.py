"""The routers of a PyTorch model, seen, and made to choose as another runner did.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nemotrt.exporter.validation.routing import Choosing, RouterLogits
from nemotrt.model.moe import MoE, Router
from nemotrt.plugins.moe_dispatch.reference import route

OPTIONS = ("top_k", "num_groups", "topk_group", "norm_topk_prob", "routed_scaling_factor")


class RouterTap:
    """Sees the router logits of a model's MoE layers, and makes it choose as another runner did.

    A token's logits are replaced by the other's only where they lead to other experts.
    """

    def __init__(self, network: nn.Module) -> None:
        self.seen: list[NDArray[np.float32]] = []
        self._leader: RouterLogits = ()
        self._layers = [module for module in network.modules() if isinstance(module, MoE)]
        # A hook that held the tap, which holds the layers, would keep the weights until a look for garbage.
        tap = weakref.ref(self)
        for moe in self._layers:
            moe.gate.register_forward_hook(partial(_pass, tap))

    def choosing(self, indices: list[int]) -> tuple[Choosing, ...]:
        """How each layer chooses, by the layers' indices in the model."""
        return tuple(
            Choosing(
                index, moe.gate.e_score_correction_bias.numpy(), moe.top_k, moe.num_groups, moe.topk_group
            )
            for index, moe in zip(indices, self._layers, strict=True)
        )

    def begin(self, leader: RouterLogits = ()) -> None:
        """Forget the last step; in the next, choose as in `leader`, whose rows are the step's first ones."""
        self.seen, self._leader = [], leader

    def led(self, logits_TE: Tensor) -> Tensor:
        """The next layer's router logits, seen, or the leader's where those lead to other experts."""
        layer = len(self.seen)
        self.seen.append(logits_TE.numpy().copy())
        if not self._leader:
            return logits_TE
        led_TE = torch.from_numpy(self._leader[layer])
        ours_TE = logits_TE[: len(led_TE)]
        moe = self._layers[layer]
        differs_T = (_experts(moe, ours_TE) != _experts(moe, led_TE)).any(1)
        return torch.cat([torch.where(differs_T[:, None], led_TE, ours_TE), logits_TE[len(led_TE) :]])


def _pass(tap: weakref.ref[RouterTap], gate: Router, args: tuple[Tensor], logits_TE: Tensor) -> Tensor:
    found = tap()
    return logits_TE if found is None else found.led(logits_TE)


def _experts(moe: MoE, logits_TE: Tensor) -> Tensor:
    """The experts of each token, in ascending order: as the op itself chooses, to the last bit."""
    options: dict[str, Any] = {name: getattr(moe, name) for name in OPTIONS}
    return route(logits_TE, moe.gate.e_score_correction_bias, **options)[0].sort(1).values
