"""A hook on the routers of a PyTorch model: it records their logits, and can force another runner's routing.

Legend: T tokens, E experts.
"""

import weakref
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.model.moe import MoE, Router
from nemotrt.plugins.moe_dispatch.reference import route


class RouterTap:
    """Records the router logits of a model's MoE layers, and can force the routing of another runner.

    A token's logits are replaced by the other runner's only if these lead to other experts, or if they are imposed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.logits: list[NDArray[np.float32]] = []
        """The model's own router logits in the last step, per MoE layer."""
        self._forced: RouterLogits = ()
        self._is_imposed_T: Tensor | None = None
        self._layers = [module for module in network.modules() if isinstance(module, MoE)]
        # A strong reference to the tap would make a cycle that keeps the weights until a garbage collection.
        tap = weakref.ref(self)
        for moe in self._layers:
            moe.gate.register_forward_hook(partial(_hook, tap))

    def begin(self, forced: RouterLogits = (), is_imposed_T: NDArray[np.bool_] | None = None) -> None:
        """Start a step; `forced` router logits, one row for each of its first tokens, choose the experts.

        Rows that are imposed also give the experts' weights, whichever experts they lead to.
        """
        self.logits, self._forced = [], forced
        self._is_imposed_T = None if is_imposed_T is None else torch.from_numpy(is_imposed_T)

    def routed(self, logits_TE: Tensor) -> Tensor:
        """The next layer's router logits: its own, or the forced ones of tokens for which these differ in experts."""
        layer = len(self.logits)
        self.logits.append(logits_TE.numpy().copy())
        if not self._forced:
            return logits_TE
        forced_TE = torch.from_numpy(self._forced[layer])
        own_TE = logits_TE[: len(forced_TE)]
        moe = self._layers[layer]
        differs_T = (_experts(moe, own_TE) != _experts(moe, forced_TE)).any(1)
        if self._is_imposed_T is not None:
            differs_T |= self._is_imposed_T
        return torch.cat([torch.where(differs_T[:, None], forced_TE, own_TE), logits_TE[len(forced_TE) :]])


def _hook(tap: weakref.ref[RouterTap], gate: Router, args: tuple[Tensor], logits_TE: Tensor) -> Tensor:
    alive = tap()
    return logits_TE if alive is None else alive.routed(logits_TE)


def _experts(moe: MoE, logits_TE: Tensor) -> Tensor:
    """The experts of each token in ascending order, chosen by the op's own reference."""
    return route(logits_TE, moe.gate.e_score_correction_bias, **moe.routing)[0].sort(1).values
