"""A graph that can be forced to choose given experts, for references that cannot run again with the graph's choice.

Each MoE layer's router logits are replaced, for some tokens, before the op reads them; the rest of the graph stays.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.graph_file import PROVIDERS, OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.metrics import Array
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.base import router_logits_names
from nemotrt.exporter.validation.runners.onnx_part import PartSession
from nemotrt.plugins.contract import LOGITS, NEXT
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.onnx_op import operand

if TYPE_CHECKING:
    import onnx_ir as ir

FORCED = "forced."
"""Prefix of the added inputs, one per MoE layer: router logits [T, E], NaN where the graph uses its own."""


def with_forced_routing(model: ir.Model) -> ir.Model:
    """A copy of the graph with these inputs, and with its own router logits as outputs."""
    import onnx_ir as ir

    model = model.clone()
    graph = model.graph
    for number, node in enumerate([node for node in graph if node.op_type == MOE.name]):
        logits = operand(MOE, node, "router_logits")
        forced = ir.Value(name=f"{FORCED}{number}", type=logits.type, shape=logits.shape)
        is_own = ir.node("IsNaN", [forced], name=f"{node.name}.is_own")
        is_own.outputs[0].name = f"{logits.name}.is_own"
        routed = ir.node("Where", [is_own.outputs[0], logits, forced], name=f"{node.name}.routed")
        routed.outputs[0].name = f"{logits.name}.routed"
        graph.inputs.append(forced)
        graph.outputs.append(logits)
        graph.insert_before(node, [is_own, routed])
        node.replace_input_with(MOE.input_index("router_logits"), routed.outputs[0])
    return model


class ForcedRoutingRunner:
    """A graph in ONNX Runtime whose experts can be forced; pools are fed and fetched."""

    def __init__(self, graph: OnnxGraph, providers: Sequence[str] = PROVIDERS["cpu"]) -> None:
        import onnx_ir as ir

        model = with_forced_routing(graph.model)
        forced = {value.name: value for value in model.graph.inputs if str(value.name).startswith(FORCED)}
        self._num_experts = {str(name): int(value.shape[1]) for name, value in forced.items() if value.shape}  # type: ignore[arg-type]
        self._routers = router_logits_names(graph.model)
        self._session = PartSession(OnnxGraph(ir.to_proto(model), graph.path), providers)
        self._pools: dict[str, NDArray[Any]] = {}
        self._outputs: dict[str, NDArray[Any]] = {}

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool."""
        self._pools = dict(pools)

    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Array:
        """The logits [R, V] of one step with these router logits for its first tokens; NaN keeps the graph's own."""
        padded = {}
        for number, (name, num_experts) in enumerate(self._num_experts.items()):
            padded[name] = np.full((len(inputs.input_ids), num_experts), np.nan, dtype=np.float32)
            if forced:
                padded[name][: len(forced[number])] = forced[number]
        self._outputs = self._session.run(inputs.as_dict() | padded | self._pools)
        self._pools = {name: self._outputs[NEXT + name] for name in self._pools}
        return self._outputs[LOGITS].astype(np.float64)

    def pools(self) -> dict[str, Array]:
        """Every pool's values."""
        return {name: values.astype(np.float64) for name, values in self._pools.items()}

    def router_logits(self) -> RouterLogits:
        """The graph's own router logits of the last step, before any were replaced."""
        return tuple(self._outputs[name] for name in self._routers)
