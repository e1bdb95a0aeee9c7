"""Gates on the dtypes that a graph declares, against the dtypes of the model.

Comparing values does not show every wrong dtype: rounding the recurrent state to FP16 in each step adds no more error
than the activations have, until a long decode. So the dtypes are read from the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.report.model import Gate, Metric
from nemotrt.plugins.contract import NEXT, DType
from nemotrt.plugins.spec import DOMAIN, ops

if TYPE_CHECKING:
    import onnx_ir as ir

SCENARIO = "dtypes"

ExpectedDtypes = dict[str, dict[str, str]]
"""`weights` and `pools`: name → dtype."""


def expected_dtypes(model: LoadedModel, config: BuildConfig) -> ExpectedDtypes:
    """The dtypes of the weights and pools that a graph built with `config` must have."""
    from nemotrt.model.hybrid import NemotronH

    network = NemotronH(model.config, dtype=config.dtype.torch, device="meta")
    weights = {name: str(DType.from_torch(value.dtype)) for name, value in network.named_parameters()}
    pools = {prefix + pool.name: str(pool.dtype) for pool in model.pools(config) for prefix in ("", NEXT)}
    return {"weights": weights, "pools": pools}


def dtype_gates(model: ir.Model, expected: ExpectedDtypes) -> list[Gate]:
    """Gates on the number of weights, pools and FP32 inputs of ops that have another dtype or are cast to one.

    Only the graph's own nodes are read: the ops' conformance tests cover the values inside an op.
    """
    import onnx_ir as ir

    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    casts = [node for node in graph if node.op_type == "Cast"]
    cast_names = {value.name for node in casts for value in (*node.inputs, *node.outputs) if value}
    groups = {
        "weights": (expected["weights"], graph.initializers),
        "pools": (expected["pools"], values),
        "ops' FP32 inputs": (dict.fromkeys(_fp32_inputs(graph), DType.FLOAT32.value), values),
    }
    return [_gate(group, *dtypes, cast_names) for group, dtypes in groups.items()]


def _gate(
    group: str, expected: Mapping[str, str], values: Mapping[str, ir.Value], cast_names: set[str | None]
) -> Gate:
    diverging = [
        name
        for name, dtype in expected.items()
        if name not in values or _dtype(values[name]) != DType(dtype).onnx or name in cast_names
    ]
    output = diverging[0] if diverging else group
    return Gate(SCENARIO, output, Metric.DTYPE, float(len(diverging)), 0.0)


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The dtype of a weight's bytes, whatever the graph declares, or the declared dtype of another value."""
    return value.const_value.dtype if value.const_value is not None else value.dtype


def _fp32_inputs(graph: ir.Graph) -> list[str]:
    """The inputs that ops take in FP32 whatever the model's dtype: decay, step size, router logits, scales."""
    positions = {
        spec.name: [i for i, tensor in enumerate(spec.inputs) if tensor.dtype == "float32"] for spec in ops()
    }
    nodes = (node for node in graph if node.domain == DOMAIN)
    return [str(value.name) for node in nodes for i in positions[node.op_type] if (value := node.inputs[i])]
