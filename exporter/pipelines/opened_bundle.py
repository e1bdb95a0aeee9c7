"""A bundle opened to be judged again: the model that its graph must be, and what that was quantized from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel, WeightSource
from nemotrt.exporter.checkpoint.quant_config import with_recipe
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.checkpoint.side_files import parse_config
from nemotrt.exporter.config import BuildConfig, Precision
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.candidates import graph_of
from nemotrt.model.checkpoint import Transform, tensor_sources
from nemotrt.plugins.contract import DType


@dataclass(frozen=True)
class Subject:
    """A bundle as it is judged again: the model that its graph must be, and what that was quantized from."""

    manifest: Manifest
    config: BuildConfig
    graph: OnnxGraph
    model: LoadedModel
    base: LoadedModel | None
    """None where the bundle is not quantized, or what it was quantized from is not known."""


def subject_of(bundle: Path, checkpoint: Path | None, base: Path | None) -> Subject:
    """The bundle as it is judged again; raises BundleError where it is not whole, UsageError on what is not its own."""
    manifest = manifests.verify(bundle, deep=False)
    config = _config(bundle, manifest, checkpoint or bundle)
    graph = OnnxGraph.read(graph_of(bundle, manifest))
    source = _from(checkpoint, manifest) if checkpoint else None
    # A build that quantized kept its FP8 weights in the bundle alone.
    was_quantized = config.precision == "fp8" and source is not None and not source.config.recipe
    model = _from_bundle(bundle, manifest, graph) if source is None or was_quantized else source
    before = load(base, _choice(manifest)) if base else source if was_quantized else None
    if before and before.config.recipe:
        raise UsageError(f"{base} is quantized itself", hint="--base is what the bundle was quantized from")
    if before and before.config.unquantized() != model.config.unquantized():
        raise UsageError(
            f"{before.folder} is another model than the bundle's", hint="their config.json differ"
        )
    return Subject(manifest, config, graph, model, before)


def _config(bundle: Path, manifest: Manifest, checkpoint: Path) -> BuildConfig:
    """The configuration that the bundle was built with, as far as it concerns the comparison."""
    graph_of(bundle, manifest)
    profile = next(profile for profile in manifest.profiles if profile.runtime == "onnx")
    state = {pool.dtype for pool in manifest.graph.pools if pool.kind == "ssm_state"}
    cache = {pool.dtype for pool in manifest.graph.pools if pool.kind == "kv_cache"}
    return BuildConfig(
        checkpoint=checkpoint,
        output=bundle,
        precision=manifest.model.precision,
        runtime="onnx",
        max_tokens=profile.max_tokens,
        max_sequences=profile.max_sequences,
        max_context=profile.max_context,
        page_size=profile.page_size,
        state_dtype=Precision.of(state.pop()) if state else "fp32",
        kv_dtype="bf16" if cache == {"bfloat16"} else "auto",
    )


def _from(checkpoint: Path, manifest: Manifest) -> LoadedModel:
    model = load(checkpoint, _choice(manifest))
    stored = {tensor.path for weight in model.weights.values() for tensor in weight.tensors}
    sizes = {path.name: path.stat().st_size for path in stored}
    digest = sha256(checkpoint / "config.json")
    differing = "config.json" if digest != manifest.source.config_sha256 else ""
    for name, size in manifest.source.files.items():
        if sizes.pop(name, None) != size:
            differing = differing or name
    differing = differing or next(iter(sizes), "")
    if differing:
        raise UsageError(
            f"{checkpoint} is not what the bundle was built from: {differing} differs",
            hint=f"name the checkpoint {manifest.source.name}, or leave out --checkpoint",
        )
    return model


def _choice(manifest: Manifest) -> str:
    """The layers of a partial bundle as --layers takes them."""
    return ",".join(map(str, manifest.model.chosen_layers))


def _from_bundle(bundle: Path, manifest: Manifest, graph: OnnxGraph) -> LoadedModel:
    """The model whose weights lie in the graph's external data, where each parameter has its own name."""
    weights: dict[str, WeightSource] = {}
    for tensor in graph.proto.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        lying = StoredTensor(
            name=tensor.name,
            dtype=DType.from_onnx(tensor.data_type),
            shape=tuple(tensor.dims),
            path=bundle / place["location"],
            offset=int(place["offset"]),
            length=int(place["length"]),
        )
        weights[tensor.name] = WeightSource((lying,), Transform.COPY)
    stored = {name: source.tensors[0] for name, source in weights.items()}
    config = with_recipe(parse_config(bundle / "config.json"), stored, bundle)
    if manifest.partial:
        config = config.only(manifest.model.chosen_layers)
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["backbone.embeddings.weight"])
    missing = [name for name in tensor_sources(config) if name not in weights]
    if missing:
        raise BundleError(f"the graph of {bundle} has no weight {missing[0]}")
    return LoadedModel(bundle, config, weights, manifest.not_exported, ())
