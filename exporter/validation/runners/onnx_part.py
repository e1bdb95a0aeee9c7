"""A part of a graph in ONNX Runtime, run once at a time on the inputs it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.graph_file import CPU, DTYPES, open_model
from nemotrt.exporter.runtime.interruptible import Interruptible

if TYPE_CHECKING:
    from onnx import ModelProto


FOLDING = "ConstantFolding"
"""It would widen every weight of a twin when the part is loaded, in three copies, to save doing so in a step."""


class PartSession:
    """A model in memory whose external data lies beside a graph; it holds no state."""

    def __init__(self, model: ModelProto, graph: Path, providers: Sequence[str] = (CPU,)) -> None:
        """Load it; raises as `open_graph` does."""
        thread = Interruptible()
        self._session, self.runs_as = open_model(
            model, graph, threads=0, providers=providers, thread=thread, unoptimised=(FOLDING,)
        )
        self._dtypes = {value.name: DTYPES[value.type] for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by its name, of the inputs that the part takes of `feeds`, which may hold others."""
        taken = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in self._dtypes.items()}
        return dict(zip(self._outputs, self._session.run(self._outputs, taken), strict=True))
