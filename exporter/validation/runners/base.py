"""What a scenario is driven through, behind one interface: a graph in ONNX Runtime, an engine; no PyTorch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.engine_session import EngineSession
from nemotrt.exporter.runtime.graph_file import PROVIDERS, OnnxGraph
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.plugins.contract import LayerName
from nemotrt.plugins.moe_dispatch import SPEC as MOE
from nemotrt.plugins.onnx_op import operand
from nemotrt.plugins.selective_scan import SPEC as SCAN

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[np.float64]


class PoolShape(Protocol):
    """A pool as the model or a graph describes it."""

    @property
    def name(self) -> str:
        """The kind and the layer's index: `ssm_state.7`."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of a slot or a page."""

    @property
    def is_paged(self) -> bool:
        """Whether rows are pages."""


class Runner(Protocol):
    """Steps on pools that the runner holds."""

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool."""

    def step(self, inputs: StepInputs) -> Array:
        """The logits [R, V] of one step; the pools move on."""

    def pools(self) -> dict[str, Array]:
        """Every pool's values, scratch row included."""

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens, padding included; nothing where they cannot be seen."""


@dataclass(frozen=True)
class Recurrence:
    """What went into one layer's recurrence in a step; in NumPy's FP32."""

    x: NDArray[np.float32]
    """[T, H, P]"""
    dt: NDArray[np.float32]
    """[T, H], raw."""
    B: NDArray[np.float32]
    """[T, G, N]"""


class CandidateRunner(Runner, Protocol):
    """A runner of what was built."""

    runs_as: str
    """On what, in words."""

    def recurrences(self) -> dict[str, Recurrence]:
        """Of the last step, by the state's pool; nothing where they cannot be seen."""


class LedRunner(Runner, Protocol):
    """A runner whose experts can be told to it."""

    def step_with_routing(self, inputs: StepInputs, told: RouterLogits) -> Array:
        """As `step`, by these router logits; by the runner's own where they are NaN."""


class SessionRunner:
    """A session of either runtime."""

    def __init__(self, session: Session | EngineSession) -> None:
        self._session = session
        self.runs_as = session.runs_as

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        for name, values in pools.items():
            self._session.set_pool(name, values)

    def step(self, inputs: StepInputs) -> Array:
        """The logits [R, V] of one step."""
        return self._session.step(inputs).astype(np.float64)

    def router_logits(self) -> RouterLogits:
        """Nothing: what runs in production does not show them."""
        return ()

    def recurrences(self) -> dict[str, Recurrence]:
        """Nothing, as the router logits."""
        return {}

    def pools(self) -> dict[str, Array]:
        """Every pool's values."""
        return {name: self._session.pool(name).astype(np.float64) for name in self._session.pool_names}


class GraphRunner(SessionRunner):
    """A lowered graph in ONNX Runtime; `bound` pools are updated in place, others are fed and fetched.

    Unbound, the router logits are outputs too, and with `watched` what goes into the recurrences.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        *,
        num_slots: int,
        num_pages: int,
        bound: bool = True,
        watched: bool = False,
        providers: Sequence[str] = PROVIDERS["cpu"],
    ) -> None:
        self._routers = () if bound else router_logits_names(graph.model)
        self._recurrences = recurrence_inputs(graph.model) if watched else {}
        extra_outputs = [*self._routers, *chain.from_iterable(self._recurrences.values())]
        self._graph = Session(
            graph,
            num_slots=num_slots,
            num_pages=num_pages,
            bound=bound,
            extra_outputs=extra_outputs,
            providers=providers,
        )
        super().__init__(self._graph)

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens, if unbound."""
        return tuple(self._graph.extra_values[name] for name in self._routers)

    def recurrences(self) -> dict[str, Recurrence]:
        """Of the last step, if watched."""
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
    """A bundle's engine on a GPU; with `capture` steps that decode are launched as CUDA graphs."""

    def __init__(self, bundle: Path, *, num_slots: int, num_pages: int, capture: bool = True) -> None:
        super().__init__(EngineSession(bundle, num_slots=num_slots, num_pages=num_pages, capture=capture))
