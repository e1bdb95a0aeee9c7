"""What a build will need, from shapes alone: no tensor is read."""

from __future__ import annotations

import math

from nemotrt.exporter.artifacts import LoadedModel
from nemotrt.exporter.config import COMPUTE_DTYPES

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def graph_bytes(model: LoadedModel, precision: str) -> int:
    """Bytes of the graph's weights, the FP32 ones counted as the others: they are a few rows each."""
    width = BYTES[COMPUTE_DTYPES[precision]]
    return sum(
        math.prod(tensor.shape) * width for weight in model.weights.values() for tensor in weight.tensors
    )
