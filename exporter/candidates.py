"""What a comparison judges, opened in two ways that may not differ by a bit: a graph, or an engine."""

from __future__ import annotations

from pathlib import Path

from nemotrt.exporter.comparison import WATCHED, Candidate
from nemotrt.exporter.runners import EngineRunner, GraphRunner
from nemotrt.exporter.scenarios import NUM_SLOTS

ENGINE = "TensorRT engine: not executed"


def graph_candidate(graph: Path) -> Candidate:
    """A graph in ONNX Runtime: pools updated in place, and pools fed and fetched."""

    def open_runner(pages: int, way: str) -> GraphRunner:
        return GraphRunner(
            graph, num_slots=NUM_SLOTS, num_pages=pages, bound=way == "bound", watched=way == WATCHED
        )

    return Candidate("ONNX Runtime", ("bound", "unbound"), open_runner, (ENGINE,), graph)


def engine_candidate(bundle: Path, runtime: str) -> Candidate:
    """A bundle's engine on this machine's GPU: steps that decode captured as CUDA graphs, and not."""

    def open_runner(pages: int, way: str) -> EngineRunner:
        return EngineRunner(bundle, num_slots=NUM_SLOTS, num_pages=pages, capture=way == "captured")

    return Candidate(runtime, ("captured", "uncaptured"), open_runner, ())
