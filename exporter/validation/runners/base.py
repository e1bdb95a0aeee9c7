"""Runners of candidates: a graph in ONNX Runtime, or an engine; no PyTorch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.engine_session import EngineSession
from nemotrt.exporter.runtime.graph_file import CPU, ORT_DTYPES, PROVIDERS, OnnxGraph, open_graph
from nemotrt.exporter.runtime.ort import Interruptible
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.metrics import Values
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.plugins.contract import LOGITS, NEXT, LayerName
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.onnx_op import operand
from nemotrt.plugins.selective_scan import SPEC as SCAN

if TYPE_CHECKING:
    import onnx_ir as ir

FORCED = "forced."
"""Prefix of the added inputs, one per MoE layer: router logits [T, E], NaN where the graph uses its own."""


class Mode(StrEnum):
    """How a runner executes steps."""

    BOUND = "bound"
    """A graph updates its pools in place."""
    UNBOUND = "unbound"
    """A graph returns new pools in each step, and its router logits."""
    WATCHED = "watched"
    """Unbound, and the graph returns the inputs of its recurrences too."""
    CAPTURED = "captured"
    """An engine launches decode steps as CUDA graphs."""
    UNCAPTURED = "uncaptured"


class Runner(Protocol):
    """Executes steps on pools that it holds."""

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool."""

    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Values:
        """The logits [R, V] of one step, which updates the pools.

        `forced` router logits of the step's first tokens choose their experts; only some runners take them.
        """

    def pool(self, name: str) -> Values:
        """A pool's values, scratch row included."""

    def router_logits(self) -> RouterLogits:
        """The runner's own router logits in the last step, padding included; empty if it does not output them."""


class Recurrence(NamedTuple):
    """The inputs of one layer's recurrence in a step, in FP32."""

    x: NDArray[np.float32]
    """[T, H, P]"""
    dt: NDArray[np.float32]
    """[T, H], raw."""
    B: NDArray[np.float32]
    """[T, G, N]"""


class CandidateRunner(Runner, Protocol):
    """A runner of a candidate."""

    runs_as: str
    """What it runs on, in reports."""

    def recurrences(self) -> dict[str, Recurrence]:
        """The inputs of the recurrences in the last step, by the state's pool; empty if they are not visible."""


class SessionRunner:
    """Runs a session of either runtime."""

    def __init__(self, session: Session | EngineSession) -> None:
        self._session = session
        self.runs_as = session.runs_as

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        for name, values in pools.items():
            self._session.set_pool(name, values)

    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Values:
        """The logits [R, V] of one step; its routing cannot be forced."""
        assert not forced, "production sessions take no router logits"
        return self._session.step(inputs).astype(np.float32)

    def router_logits(self) -> RouterLogits:
        """Nothing: production sessions do not output them."""
        return ()

    def recurrences(self) -> dict[str, Recurrence]:
        """Nothing: production sessions do not output them."""
        return {}

    def pool(self, name: str) -> Values:
        """A pool's values."""
        return self._session.pool(name).astype(np.float32, copy=False)


class GraphRunner(SessionRunner):
    """Runs a graph in ONNX Runtime, in one of its three modes."""

    def __init__(
        self,
        graph: OnnxGraph,
        *,
        num_slots: int,
        num_pages: int,
        mode: Mode = Mode.BOUND,
        providers: Sequence[str] = PROVIDERS["cpu"],
    ) -> None:
        self._routers = () if mode is Mode.BOUND else router_logits_names(graph.model)
        self._recurrences = recurrence_inputs(graph.model) if mode is Mode.WATCHED else {}
        self._graph = Session(
            graph,
            num_slots=num_slots,
            num_pages=num_pages,
            bound=mode is Mode.BOUND,
            extra_outputs=[*self._routers, *chain.from_iterable(self._recurrences.values())],
            providers=providers,
        )
        super().__init__(self._graph)

    def router_logits(self) -> RouterLogits:
        """The graph's router logits in the last step; empty if its pools are bound."""
        return tuple(self._graph.extra_values[name] for name in self._routers)

    def recurrences(self) -> dict[str, Recurrence]:
        """The inputs of the recurrences in the last step; empty unless watched."""
        values = self._graph.extra_values
        return {
            pool: Recurrence(*(values[name].astype(np.float32) for name in names))
            for pool, names in self._recurrences.items()
        }


def router_logits_names(model: ir.Model) -> tuple[str, ...]:
    """The names of every MoE layer's router logits, in order."""
    nodes = (node for node in model.graph if node.op_type == MOE.name)
    return tuple(str(operand(MOE, node, "router_logits").name) for node in nodes)


def recurrence_inputs(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The names of x, dt and B of every recurrence, by the name of its state's pool."""
    inputs = {}
    for node in model.graph:
        layer = LayerName.parse(node.name or "")
        if node.op_type == SCAN.name and layer:
            names = (operand(SCAN, node, name).name for name in ("x", "dt", "B"))
            inputs[f"ssm_state.{layer.layer}"] = tuple(map(str, names))
    return inputs


class EngineRunner(SessionRunner):
    """Runs a bundle's engine on a GPU."""

    def __init__(self, bundle: Path, *, num_slots: int, num_pages: int, mode: Mode = Mode.CAPTURED) -> None:
        capture = mode is Mode.CAPTURED
        super().__init__(EngineSession(bundle, num_slots=num_slots, num_pages=num_pages, capture=capture))


class PartSession:
    """A graph in ONNX Runtime that keeps no state between runs."""

    def __init__(self, graph: OnnxGraph, providers: Sequence[str] = (CPU,)) -> None:
        """Load the graph; raises as `open_graph` does."""
        self.runs_as = graph.runs_as(providers)
        self._session = open_graph(
            graph,
            threads=0,
            providers=providers,
            thread=Interruptible(),
            # Folding would make three FP32 copies of every narrow weight to save casting it in a few steps.
            disabled_optimizers=("ConstantFolding",),
        )
        self._dtypes = {value.name: ORT_DTYPES[value.type].numpy for value in self._session.get_inputs()}
        self._shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def accepts(self, feeds: Mapping[str, NDArray[Any]]) -> bool:
        """Whether every input has the shape that the graph declares, in the axes whose size it fixes."""
        return all(
            len(shape) == feeds[name].ndim
            and all(
                size in (own, None) or isinstance(size, str)
                for size, own in zip(shape, feeds[name].shape, strict=True)
            )
            for name, shape in self._shapes.items()
        )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name; `feeds` may hold more than the graph's inputs."""
        inputs = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in self._dtypes.items()}
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


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

    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Values:
        """The logits [R, V] of one step with these router logits for its first tokens; NaN keeps the graph's own."""
        padded = {}
        for number, (name, num_experts) in enumerate(self._num_experts.items()):
            padded[name] = np.full((len(inputs.input_ids), num_experts), np.nan, dtype=np.float32)
            if forced:
                padded[name][: len(forced[number])] = forced[number]
        self._outputs = self._session.run(inputs.as_dict() | padded | self._pools)
        self._pools = {name: self._outputs[NEXT + name] for name in self._pools}
        return self._outputs[LOGITS].astype(np.float32)

    def pool(self, name: str) -> Values:
        """A pool's values."""
        return self._pools[name].astype(np.float32, copy=False)

    def router_logits(self) -> RouterLogits:
        """The graph's own router logits of the last step, before any were replaced."""
        return tuple(self._outputs[name] for name in self._routers)
