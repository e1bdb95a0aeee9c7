"""A graph, or a part of one, in ONNX Runtime: every run takes all inputs and gives all outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.runtime.graph_file import CPU, ORT_DTYPES, OnnxGraph, open_graph
from nemotrt.exporter.runtime.ort import Interruptible


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
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name; `feeds` may hold more than the graph's inputs."""
        inputs = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in self._dtypes.items()}
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
