"""Attributes of ops in the tests."""

from typing import Any

MOE: dict[str, Any] = {
    "top_k": 2,
    "num_groups": 1,
    "topk_group": 1,
    "norm_topk_prob": 1,
    "routed_scaling_factor": 2.5,
    "first_expert": 0,
}
