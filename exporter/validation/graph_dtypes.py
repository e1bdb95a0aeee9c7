"""What a graph keeps in which dtype, against what the model asks for.

A recurrent state that passes through FP16 in every step is off by no more than the activations are, so that no
comparison of values sees it before a long decode. Its dtype has to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.exporter.report.model import Gate, Metric
from nemotrt.plugins.contract import NEXT
from nemotrt.plugins.spec import DOMAIN, ops

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

SCENARIO = "dtypes"

ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "float8_e4m3fn": 17}
"""torch's name → onnx.TensorProto's number."""

WantedDtypes = dict[str, dict[str, str]]
"""Weights, and pools, by name → torch's name of their dtype."""


def wanted_dtypes(model: LoadedModel, config: BuildConfig) -> WantedDtypes:
    """What the model asks of the graph that `config` asks for."""
    import torch

    from nemotrt.model.hybrid import NemotronH

    network = NemotronH(model.config, dtype=getattr(torch, COMPUTE_DTYPES[config.precision]), device="meta")
    weights = {name: str(value.dtype).removeprefix("torch.") for name, value in network.named_parameters()}
    pools: dict[str, str] = {
        prefix + pool.name: pool.dtype for pool in model.pools(config) for prefix in ("", NEXT)
    }
    return {"weights": weights, "pools": pools}


def dtype_gates(graph: ModelProto, wanted: WantedDtypes) -> list[Gate]:
    """How many weights, pools, and FP32 inputs of ops have another dtype than the model's, or are cast to one.

    Of the graph's own nodes: what an op does inside is held to its tolerance by the op's own tests.
    """
    wanted = wanted | {"ops' FP32 inputs": dict.fromkeys(_wide_inputs(graph.graph), "float32")}
    stored = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    values = chain(graph.graph.value_info, graph.graph.input, graph.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values} | stored
    casts = [node for node in graph.graph.node if node.op_type == "Cast"]
    is_cast = {name for node in casts for name in (*node.input, *node.output)}
    return [
        _gate(what, dtypes, stored if what == "weights" else types, is_cast)
        for what, dtypes in wanted.items()
    ]


def _gate(what: str, wanted: Mapping[str, str], types: Mapping[str, int], is_cast: set[str]) -> Gate:
    diverging = [
        name for name, dtype in wanted.items() if types.get(name) != ELEMENT_TYPES[dtype] or name in is_cast
    ]
    return Gate(SCENARIO, diverging[0] if diverging else what, Metric.DTYPE, float(len(diverging)), 0.0)


def _wide_inputs(graph: GraphProto) -> list[str]:
    """What the ops take in FP32 whatever the model's dtype: decay, step size, router logits, scales."""
    wide = {
        spec.name: [i for i, tensor in enumerate(spec.inputs) if tensor.dtype == "float32"] for spec in ops()
    }
    return [node.input[i] for node in graph.node if node.domain == DOMAIN for i in wide[node.op_type]]
