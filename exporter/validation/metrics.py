"""How far a candidate is from a reference, in numbers that a gate can judge. All take float64 NumPy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TIE = 1e-4
"""Tokens this near, relative to the largest logit, are as good as equal in FP32."""


def relative_l2(candidate: Array, reference: Array) -> float:
    """‖candidate − reference‖ / ‖reference‖; 0 when both are 0, infinite when only the reference is."""
    error, norm = float(np.linalg.norm(candidate - reference)), float(np.linalg.norm(reference))
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return error / norm


def norm_ratio_error(candidate: Array, reference: Array) -> float:
    """|‖candidate‖ / ‖reference‖ − 1|: what cosine does not see, such as logits scaled by 1.5."""
    norm = float(np.linalg.norm(reference))
    if norm == 0:
        return 0.0 if not candidate.any() else float("inf")
    return abs(float(np.linalg.norm(candidate)) / norm - 1)


def cosine(candidate: Array, reference: Array) -> float:
    """The cosine of the angle between the two, flattened; 1 when both are 0."""
    norms = float(np.linalg.norm(candidate) * np.linalg.norm(reference))
    if norms == 0:
        return 1.0 if not candidate.any() and not reference.any() else 0.0
    return float(np.vdot(candidate, reference)) / norms


def kl_divergence(candidate_RV: Array, reference_RV: Array) -> Array:
    """KL(reference ‖ candidate) of the next-token distributions, in nats, a row each [R]."""
    log_p, log_q = log_softmax(reference_RV), log_softmax(candidate_RV)
    # Rounding can leave −1e-17 where both are equal.
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)  # type: ignore[no-any-return]


def log_softmax(logits_RV: Array) -> Array:
    """log softmax along the vocabulary."""
    shifted = logits_RV - logits_RV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def flips(candidate_RV: Array, reference_RV: Array) -> Array:
    """For each row where the best token differs, by how much the reference prefers its own [flips]; empty if none."""
    own, other = reference_RV.argmax(-1), candidate_RV.argmax(-1)
    rows = np.flatnonzero(own != other)
    return reference_RV[rows, own[rows]] - reference_RV[rows, other[rows]]  # type: ignore[no-any-return]


def mean_and_error(values: Array) -> tuple[float, float]:
    """The mean, and its standard error: that of values which do not depend on each other."""
    error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return float(values.mean()), error


def surprise(logits_RV: Array, next_token_R: NDArray[np.int64]) -> Array:
    """−log of the probability of the token that follows, in nats, a row each [R]."""
    return -log_softmax(logits_RV)[np.arange(len(next_token_R)), next_token_R]
