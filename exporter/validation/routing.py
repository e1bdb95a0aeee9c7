"""Which experts a runner chose, told from the router logits that it shows.

Choosing is a step function: where two experts are nearly tied, runs that agree to the last rounding may choose
differently, and all that follows then differs, rightly. So choosing and computing are judged apart: the router's
scores against their own baseline, and the rest with the reference on the candidate's choices.

Legend: T tokens, E experts, G groups, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RouterLogits = tuple[NDArray[np.float32], ...]
"""Of one step, [T, E] for each MoE layer in order; nothing where a runner does not show them."""


def scores(router_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The router's scores in [0, 1], by which experts are chosen."""
    return 1 / (1 + np.exp(-router_logits.astype(np.float64)))


@dataclass(frozen=True)
class Choosing:
    """One MoE layer's way from router logits to experts: `plugins/moe_dispatch/reference.route`, in NumPy."""

    layer: int
    correction_bias: NDArray[np.float32]
    top_k: int
    num_groups: int
    topk_group: int

    def ranked(self, logits_TE: NDArray[np.float32]) -> NDArray[np.float64]:
        """By what the experts are chosen [T, E]: score and correction, −inf in groups that are left out."""
        grouped_TGE, best_TG = self._groups(logits_TE)
        kept_TG = _top(best_TG, self.topk_group)
        is_out_TG = np.ones_like(best_TG, dtype=bool)
        np.put_along_axis(is_out_TG, kept_TG, False, axis=1)
        return np.where(is_out_TG[..., None], -np.inf, grouped_TGE).reshape(logits_TE.shape)

    def _groups(self, logits_TE: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Score and correction by group, and what each group is ranked by: its two best experts together."""
        ranked_TE = scores(logits_TE) + self.correction_bias
        grouped_TGE = ranked_TE.reshape(len(ranked_TE), self.num_groups, -1)
        return grouped_TGE, np.sort(grouped_TGE, axis=2)[:, :, -2:].sum(2)

    def chosen(self, logits_TE: NDArray[np.float32]) -> NDArray[np.int64]:
        """The experts of each token [T, k], in ascending order."""
        return np.sort(_top(self.ranked(logits_TE), self.top_k), axis=1)

    def margin(self, logits_TE: NDArray[np.float32]) -> NDArray[np.float64]:
        """By how much each token's last expert is before the next one [T]; infinite where there is no next."""
        ranked_TE = -np.sort(-self.ranked(logits_TE), axis=1)
        if self.top_k >= ranked_TE.shape[1]:
            return np.full(len(ranked_TE), np.inf)
        return ranked_TE[:, self.top_k - 1] - ranked_TE[:, self.top_k]

    def near_tie(self, logits_TE: NDArray[np.float32], error: float) -> NDArray[np.bool_]:
        """Which tokens may rightly get other experts, where each score may be off by `error` [T]."""
        near_T = self.margin(logits_TE) <= 2 * error
        if self.num_groups == 1:
            return near_T
        # A group's rank is the sum of two scores.
        best_TG = -np.sort(-self._groups(logits_TE)[1], axis=1)
        between_T = best_TG[:, self.topk_group - 1] - best_TG[:, min(self.topk_group, self.num_groups - 1)]
        return near_T | ((between_T <= 4 * error) & (self.topk_group < self.num_groups))

    def differ(self, ours_TE: NDArray[np.float32], others_TE: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which tokens get other experts [T]."""
        return (self.chosen(ours_TE) != self.chosen(others_TE)).any(1)  # type: ignore[no-any-return]


def _top(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The largest of each row; of equal ones the first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def mismatches(
    choosing: Sequence[Choosing], ours: Sequence[RouterLogits], others: Sequence[RouterLogits]
) -> list[list[NDArray[np.bool_]]]:
    """Which tokens get other experts: [T] for each layer of each step; nothing where one side shows none."""
    if not any(ours) or not any(others):
        return []
    return [
        [layer.differ(a, b) for layer, a, b in zip(choosing, *step, strict=True)]
        for step in zip(ours, others, strict=True)
    ]


def num_mismatches(
    choosing: Sequence[Choosing], ours: Sequence[RouterLogits], others: Sequence[RouterLogits]
) -> int:
    """How many choices differ over the steps: a token counts once in each layer."""
    return sum(int(layer.sum()) for step in mismatches(choosing, ours, others) for layer in step)


def joined(steps: Sequence[RouterLogits]) -> RouterLogits:
    """The steps one after the other, [ΣT, E] for each MoE layer."""
    return tuple(np.concatenate(layer) for layer in zip(*steps, strict=True))
