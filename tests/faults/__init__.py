"""Typical faults of an exporter, injected into the weights, nodes, op bodies, indices or state of a correct graph.

Each fault breaks the first layer of a kind, so that a test knows which layer must be named.
"""

from faults import attention, experts, limits, logits, norms, recurrence, residual, weights
from faults.graph import Fault, Graph, broken

FAMILIES: dict[str, tuple[Fault, ...]] = {
    "norms": norms.FAULTS,
    "residual": residual.FAULTS,
    "weights": weights.FAULTS,
    "experts": experts.FAULTS,
    "recurrence": recurrence.FAULTS,
    "attention": attention.FAULTS,
    "limits": limits.FAULTS,
    "logits": logits.FAULTS,
}
"""The faults of each family, which a file of this folder has."""

FAULTS = tuple(fault for faults in FAMILIES.values() for fault in faults)

__all__ = ["FAMILIES", "FAULTS", "Fault", "Graph", "broken"]
