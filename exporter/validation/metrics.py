"""Distances between a candidate and a reference, computed in FP64.

Legend: R rows of logits, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Values = NDArray[np.float32]
"""What a runner produced: every dtype of a pool or of logits fits FP32 exactly."""

BLOCK_ROWS = 32
"""Rows whose distributions are in memory at a time."""

TIE = 1e-4
"""Logits that are closer than this, relative to the largest, count as equal in FP32."""


def in_fp64(candidate: Values, reference: Values) -> tuple[Array, Array]:
    """Both as FP64, in which every distance is computed."""
    return candidate.astype(np.float64), reference.astype(np.float64)


def relative_l2(candidate: Array, reference: Array) -> float:
    """‖candidate − reference‖ / ‖reference‖; 0 if both are 0, infinite if only the reference is."""
    error, norm = float(np.linalg.norm(candidate - reference)), float(np.linalg.norm(reference))
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return error / norm


def norm_ratio_error(candidate: Array, reference: Array) -> float:
    """|‖candidate‖ / ‖reference‖ − 1|: unlike the cosine, it finds logits that are scaled by 1.5."""
    norm = float(np.linalg.norm(reference))
    if norm == 0:
        return 0.0 if not candidate.any() else float("inf")
    return abs(float(np.linalg.norm(candidate)) / norm - 1)


def cosine(candidate: Array, reference: Array) -> float:
    """The cosine of the angle between the two, flattened; 1 if both are 0."""
    norms = float(np.linalg.norm(candidate) * np.linalg.norm(reference))
    if norms == 0:
        return 1.0 if not candidate.any() and not reference.any() else 0.0
    return float(np.vdot(candidate, reference)) / norms


def kl_divergence(candidate_RV: Array, reference_RV: Array) -> Array:
    """KL(reference ‖ candidate) of the next-token distributions [R], in nats; R may be several axes."""
    blocks = (slice(first, first + BLOCK_ROWS) for first in range(0, max(1, len(reference_RV)), BLOCK_ROWS))
    return np.concatenate([_kl_divergence(candidate_RV[rows], reference_RV[rows]) for rows in blocks])


def _kl_divergence(candidate_RV: Array, reference_RV: Array) -> Array:
    log_p, log_q = log_softmax(reference_RV), log_softmax(candidate_RV)
    # Rounding can leave −1e-17 if both are equal.
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)  # type: ignore[no-any-return]


def log_softmax(logits_RV: Array) -> Array:
    """The log of the softmax over the vocabulary."""
    shifted = logits_RV - logits_RV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def mismatch_margins(candidate_RV: Array, reference_RV: Array) -> Array:
    """For each row [R], the reference's logit for its top-1 token minus its logit for the candidate's top-1 token."""
    chosen = np.take_along_axis(reference_RV, candidate_RV.argmax(-1)[:, None], 1)[:, 0]
    return reference_RV.max(-1) - chosen  # type: ignore[no-any-return]


def mean_and_error(values: Array) -> tuple[float, float]:
    """The mean and its standard error, for independent values."""
    error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return float(values.mean()), error


def negative_log_likelihood(logits_RV: Array, next_token_R: NDArray[np.int64]) -> Array:
    """The negative log-likelihood of the token that follows each row [R], in nats."""
    return -log_softmax(logits_RV)[np.arange(len(next_token_R)), next_token_R]
