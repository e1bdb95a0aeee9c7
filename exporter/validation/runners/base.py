"""Runners of what is validated: a graph in ONNX Runtime, or an engine; no PyTorch here."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.engine_session import EngineSession
from nemotrt.exporter.runtime.graph_file import PROVIDERS, OnnxGraph
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.metrics import Array
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.plugins.contract import LayerName
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.onnx_op import operand
from nemotrt.plugins.selective_scan import SPEC as SCAN

if TYPE_CHECKING:
    import onnx_ir as ir


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

    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Array:
        """The logits [R, V] of one step, which updates the pools.

        `forced` router logits of the step's first tokens choose their experts; only some runners take them.
        """

    def pools(self) -> dict[str, Array]:
        """Every pool's values, scratch row included."""

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
    """A runner of what was built."""

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

    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Array:
        """The logits [R, V] of one step; its routing cannot be forced."""
        assert not forced, "what runs in production takes no router logits"
        return self._session.step(inputs).astype(np.float64)

    def router_logits(self) -> RouterLogits:
        """Nothing: what runs in production does not output them."""
        return ()

    def recurrences(self) -> dict[str, Recurrence]:
        """Nothing: what runs in production does not output them."""
        return {}

    def pools(self) -> dict[str, Array]:
        """Every pool's values."""
        return {name: self._session.pool(name).astype(np.float64) for name in self._session.pool_names}


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
