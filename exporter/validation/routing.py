"""How routers choose experts, recomputed from their logits.

Routing is a step function: if two experts are nearly tied, two runs that agree to the last rounding may choose
differently, and everything after that differs, correctly. So routing and arithmetic are compared separately: router
scores against their own baseline, and everything else with the same routing on both sides.

Legend: T tokens, E experts, G groups, k experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, read_pieces

RouterLogits = tuple[NDArray[np.float32], ...]
"""One step's router logits, [T, E] per MoE layer in order; empty if the runner does not output them."""


def scores(router_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The router's scores in [0, 1]."""
    return 1 / (1 + np.exp(-router_logits.astype(np.float64)))


def score_error(candidate_TE: NDArray[np.float32], reference_TE: NDArray[np.float32]) -> float:
    """The largest difference of any token's score for any expert."""
    return float(np.abs(scores(candidate_TE) - scores(reference_TE)).max(initial=0.0))


@dataclass(frozen=True)
class RouterPolicy:
    """How one MoE layer chooses experts from router logits: `plugins/moe_dispatch/reference.route`, in NumPy."""

    layer: int
    correction_bias: NDArray[np.float32]
    top_k: int
    num_groups: int
    topk_group: int

    def ranking(self, logits_TE: NDArray[np.float32]) -> NDArray[np.float64]:
        """The number by which experts are chosen [T, E]: score plus correction, −inf in groups that are not chosen."""
        grouped_TGE, group_TG = self._groups(logits_TE)
        chosen_TG = _top(group_TG, self.topk_group)
        is_out_TG = np.ones_like(group_TG, dtype=bool)
        np.put_along_axis(is_out_TG, chosen_TG, False, axis=1)
        return np.where(is_out_TG[..., None], -np.inf, grouped_TGE).reshape(logits_TE.shape)

    def _groups(self, logits_TE: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Score plus correction by group, and the rank of each group: the sum of its two best experts."""
        ranked_TE = scores(logits_TE) + self.correction_bias
        grouped_TGE = ranked_TE.reshape(len(ranked_TE), self.num_groups, -1)
        return grouped_TGE, np.sort(grouped_TGE, axis=2)[:, :, -2:].sum(2)

    def experts(self, logits_TE: NDArray[np.float32]) -> NDArray[np.int64]:
        """The experts of each token [T, k], in ascending order."""
        return np.sort(_top(self.ranking(logits_TE), self.top_k), axis=1)

    def margin(self, logits_TE: NDArray[np.float32]) -> NDArray[np.float64]:
        """The distance between each token's last chosen expert and the next one [T]; infinite if there is no next."""
        ranked_TE = -np.sort(-self.ranking(logits_TE), axis=1)
        if self.top_k >= ranked_TE.shape[1]:
            return np.full(len(ranked_TE), np.inf)
        return ranked_TE[:, self.top_k - 1] - ranked_TE[:, self.top_k]

    def near_tie(self, logits_TE: NDArray[np.float32], error: float) -> NDArray[np.bool_]:
        """Which tokens [T] may get other experts if each score is off by at most `error`."""
        near_T = self.margin(logits_TE) <= 2 * error
        if self.num_groups == 1:
            return near_T
        # A group's rank is the sum of two scores.
        group_TG = -np.sort(-self._groups(logits_TE)[1], axis=1)
        between_T = group_TG[:, self.topk_group - 1] - group_TG[:, min(self.topk_group, self.num_groups - 1)]
        return near_T | ((between_T <= 4 * error) & (self.topk_group < self.num_groups))

    def differs(self, ours_TE: NDArray[np.float32], others_TE: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which tokens [T] get other experts."""
        return (self.experts(ours_TE) != self.experts(others_TE)).any(1)  # type: ignore[no-any-return]


def router_policies(model: LoadedModel) -> tuple[RouterPolicy, ...]:
    """How each MoE layer of the model chooses experts; only their correction biases are read."""
    config = model.config
    sources = {
        layer: model.weights[f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias"]
        for layer, kind in config.numbered_layers.items()
        if kind == "moe"
    }
    return tuple(
        RouterPolicy(
            layer,
            _in_fp32(source.tensors[0]),
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        for layer, source in sources.items()
    )


def _in_fp32(tensor: StoredTensor) -> NDArray[np.float32]:
    return np.frombuffer(b"".join(read_pieces(tensor)), tensor.dtype.numpy).astype(np.float32)


def _top(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The largest of each row; of equal ones the first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def num_mismatches(
    policies: Sequence[RouterPolicy], ours: Sequence[RouterLogits], others: Sequence[RouterLogits]
) -> int:
    """How often a token is routed to other experts, over all steps and layers; 0 if one side has no router logits."""
    if not any(ours) or not any(others):
        return 0
    return sum(
        int(policy.differs(a, b).sum())
        for step in zip(ours, others, strict=True)
        for policy, a, b in zip(policies, *step, strict=True)
    )


def concatenated(steps: Sequence[RouterLogits]) -> RouterLogits:
    """All steps' router logits, [ΣT, E] per MoE layer."""
    return tuple(np.concatenate(layer) for layer in zip(*steps, strict=True))
