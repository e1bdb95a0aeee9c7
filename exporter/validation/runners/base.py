"""What a scenario is driven through, behind one interface: a graph in ONNX Runtime, an engine; no PyTorch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.engine_session import EngineSession
from nemotrt.exporter.runtime.graph_file import PROVIDERS, read_proto, recurrence_inputs, router_logits_names
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.routing import RouterLogits

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

    def step_as_told(self, inputs: StepInputs, told: RouterLogits) -> Array:
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
        graph: Path,
        *,
        num_slots: int,
        num_pages: int,
        bound: bool = True,
        watched: bool = False,
        providers: Sequence[str] = PROVIDERS["cpu"],
    ) -> None:
        proto = read_proto(graph)
        self._routers = () if bound else router_logits_names(proto)
        self._recurrences = recurrence_inputs(proto) if watched else {}
        shown = [*self._routers, *(name for names in self._recurrences.values() for name in names)]
        self._graph = Session(
            graph,
            num_slots=num_slots,
            num_pages=num_pages,
            bound=bound,
            shown=shown,
            providers=providers,
        )
        super().__init__(self._graph)

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens, if unbound."""
        return tuple(self._graph.shown[name] for name in self._routers)

    def recurrences(self) -> dict[str, Recurrence]:
        """Of the last step, if watched."""
        shown = self._graph.shown
        return {
            pool: Recurrence(*(shown[name].astype(np.float32) for name in names))
            for pool, names in self._recurrences.items()
        }


class EngineRunner(SessionRunner):
    """A bundle's engine on a GPU; with `capture` steps that decode are launched as CUDA graphs."""

    def __init__(self, bundle: Path, *, num_slots: int, num_pages: int, capture: bool = True) -> None:
        super().__init__(EngineSession(bundle, num_slots=num_slots, num_pages=num_pages, capture=capture))
