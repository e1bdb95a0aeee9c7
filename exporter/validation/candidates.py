"""The candidates of a validation: a graph in ONNX Runtime, or an engine."""

from pathlib import Path

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.report.model import NotCompared, Omitted
from nemotrt.exporter.runtime.cuda import CudaError, find_gpu
from nemotrt.exporter.runtime.engine_session import engine_profile
from nemotrt.exporter.runtime.graph_file import PROVIDERS, OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.validation.comparison import Candidate
from nemotrt.exporter.validation.envelope import PoolSizes
from nemotrt.exporter.validation.request import ValidationRequest
from nemotrt.exporter.validation.runners.base import EngineRunner, ForcedRoutingRunner, GraphRunner, Mode

ENGINE = NotCompared(Omitted.ENGINE, "not executed")
UNSEEN_ROUTERS = NotCompared(
    Omitted.ROUTERS, "an engine does not output its router logits, so near ties are not excused"
)
PARTS_ON_CPU = NotCompared(Omitted.PARTS, "they run on the CPU, not on CUDA")
WHOLE = NotCompared(Omitted.PARTS, "an engine cannot be split into its layers")


def graph_candidate(graph: OnnxGraph, provider: str = "cpu") -> Candidate:
    """A graph in ONNX Runtime, with pools updated in place and with pools copied; `provider` is one of PROVIDERS."""
    providers = PROVIDERS[provider]

    def open_runner(sizes: PoolSizes, mode: Mode) -> GraphRunner:
        return GraphRunner(graph, **sizes._asdict(), mode=mode, providers=providers)

    on_gpu = provider == "cuda"
    return Candidate(
        title="ONNX Runtime on CUDA" if on_gpu else "ONNX Runtime",
        modes=(Mode.BOUND, Mode.UNBOUND),
        open=open_runner,
        not_compared=(ENGINE, PARTS_ON_CPU) if on_gpu else (ENGINE,),
        graph=graph,
        open_forced=lambda: ForcedRoutingRunner(graph, providers),
    )


def engine_candidate(bundle: Path, manifest: Manifest) -> Candidate:
    """A bundle's engine on this machine's GPU, with decode steps captured as CUDA graphs and without.

    Raises BundleError if the bundle has no engine, UsageError if the machine has no GPU.
    """
    profile = engine_profile(bundle, manifest)
    try:
        find_gpu()
    except CudaError as error:
        raise UsageError(
            f"an engine runs on a GPU only: {error}", hint="without --engine the graph runs in ONNX Runtime"
        ) from error

    def open_runner(sizes: PoolSizes, mode: Mode) -> EngineRunner:
        return EngineRunner(bundle, **sizes._asdict(), mode=mode)

    has_routers = bool(manifest.model.layers.get("moe"))
    not_compared = (UNSEEN_ROUTERS, WHOLE) if has_routers else (WHOLE,)
    return Candidate(profile.runtime, (Mode.CAPTURED, Mode.UNCAPTURED), open_runner, not_compared)


def candidate_of(
    bundle: Path, manifest: Manifest, request: ValidationRequest, graph: OnnxGraph | None = None
) -> Candidate:
    """The bundle's engine, or its graph, which is read unless given; raises BundleError if it has none."""
    if request.engine:
        return engine_candidate(bundle, manifest)
    return graph_candidate(graph or OnnxGraph.read(graph_of(bundle, manifest)), request.provider or "cpu")


def graph_of(bundle: Path, manifest: Manifest) -> Path:
    """The path of the bundle's graph; raises BundleError if it has none that ONNX Runtime runs."""
    if not any(profile.runtime == "onnx" for profile in manifest.profiles) or not manifest.of_role("graph"):
        raise BundleError(f"{bundle} has no graph for ONNX Runtime")
    return bundle / manifest.of_role("graph")[0]
