"""A graph that chooses experts as it is told: beside a reference that cannot be run again on the graph's own choice.

Each MoE layer's router logits are replaced, for the tokens that are told, on their way into the op; nothing else of the
graph changes.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.graph_file import PROVIDERS, read_proto, router_logits_names
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.base import Array
from nemotrt.exporter.validation.runners.onnx_part import PartSession
from nemotrt.plugins.contract import LOGITS, NEXT

if TYPE_CHECKING:
    from onnx import ModelProto

TOLD = "told."
"""Begins the name of the input for a MoE layer's number: router logits [T, E], NaN where the graph's own count."""


def led(model: ModelProto) -> ModelProto:
    """The graph with that input for every MoE layer, and its own router logits as outputs."""
    from onnx import ModelProto, TensorProto, helper

    rewired = ModelProto()
    rewired.CopyFrom(model)
    graph = rewired.graph
    num_experts = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    nodes = []
    names = router_logits_names(model)
    for node in graph.node:
        if node.op_type == "NemoMoeDispatch":
            own, bias = node.input[1:3]
            told, is_own, taken = f"{TOLD}{names.index(own)}", f"{own}.is_own", f"{own}.taken"
            for name, edges in ((told, graph.input), (own, graph.output)):
                shape = ["T", num_experts[bias]]
                edges.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            nodes.append(helper.make_node("IsNaN", [told], [is_own], name=f"{node.name}.is_own"))
            nodes.append(helper.make_node("Where", [is_own, own, told], [taken], name=f"{node.name}.taken"))
            node.input[1] = taken
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return rewired


class LedGraphRunner:
    """A lowered graph in ONNX Runtime whose experts can be told to it; pools are fed and fetched."""

    def __init__(self, graph: Path, providers: Sequence[str] = PROVIDERS["cpu"]) -> None:
        proto = read_proto(graph)
        model, self._routers = led(proto), router_logits_names(proto)
        told = [value.type.tensor_type.shape for value in model.graph.input if value.name.startswith(TOLD)]
        self._num_experts = [shape.dim[1].dim_value for shape in told]
        self._session = PartSession(model, graph, providers)
        self._pools: dict[str, NDArray[Any]] = {}
        self._shown: dict[str, NDArray[Any]] = {}

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool."""
        self._pools = dict(pools)

    def step(self, inputs: StepInputs) -> Array:
        """The logits [R, V] of one step, on the graph's own experts."""
        return self.step_as_told(inputs, ())

    def step_as_told(self, inputs: StepInputs, told: RouterLogits) -> Array:
        """As `step`, by these router logits of the step's first tokens; by the graph's own where they are NaN."""
        padded = {}
        for number, size in enumerate(self._num_experts):
            padded_TE = np.full((len(inputs.input_ids), size), np.nan, dtype=np.float32)
            if told:
                padded_TE[: len(told[number])] = told[number]
            padded[f"{TOLD}{number}"] = padded_TE
        self._shown = self._session.run(inputs.as_dict() | padded | self._pools)
        self._pools = {name: self._shown[f"{NEXT}{name}"] for name in self._pools}
        return self._shown[LOGITS].astype(np.float64)

    def pools(self) -> dict[str, Array]:
        """Every pool's values."""
        return {name: values.astype(np.float64) for name, values in self._pools.items()}

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens: the graph's own, before what it was told took their place."""
        return tuple(self._shown[name] for name in self._routers)
