"""Opens a bundle for validation: its graph, the model that the graph implements, and the model before quantization."""

from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel, WeightSource
from nemotrt.exporter.checkpoint.quant_config import with_recipe
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.checkpoint.side_files import parse_config
from nemotrt.exporter.config import BuildConfig, Precision
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.report.model import NotCompared, Omitted
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.candidates import graph_of
from nemotrt.model.checkpoint import Transform, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType

OWN_WEIGHTS = NotCompared(Omitted.CHECKPOINT, "PyTorch ran with the bundle's own weights")


@dataclass(frozen=True)
class OpenedBundle:
    """A bundle, and the models to compare it with."""

    manifest: Manifest
    config: BuildConfig
    graph: OnnxGraph
    model: LoadedModel
    base: LoadedModel | None
    """The model before quantization; None if the bundle is not quantized, or if that model is unknown."""

    @property
    def folder(self) -> Path:
        """The bundle's folder."""
        return self.config.output

    @property
    def has_own_weights(self) -> bool:
        """Whether the model's weights are read from the bundle, and not from a checkpoint."""
        return self.model.folder == self.folder

    @property
    def not_compared(self) -> tuple[NotCompared, ...]:
        """The checkpoint, if the model's weights are read from the bundle instead, and ignored fields."""
        weights = (OWN_WEIGHTS,) if self.has_own_weights else ()
        return *weights, *ignored_fields(self.model.config)


def ignored_fields(config: ModelConfig) -> tuple[NotCompared, ...]:
    """The fields of config.json that the build was asked to ignore."""
    return tuple(
        NotCompared(Omitted.FIELD, f"{name}, ignored as requested") for name in config.ignored_fields
    )


def open_bundle(bundle: Path, checkpoint: Path | None = None, base: Path | None = None) -> OpenedBundle:
    """Open a bundle; raises BundleError if it is damaged, UsageError if `checkpoint` or `base` does not match."""
    manifest = manifests.verify(bundle, deep=False)
    config = _config(bundle, manifest, checkpoint or bundle)
    graph = OnnxGraph.read(graph_of(bundle, manifest))
    source = _from_checkpoint(checkpoint, manifest) if checkpoint else None
    # If the build quantized the model, only the bundle has the FP8 weights.
    was_quantized = config.precision == "fp8" and source is not None and not source.config.recipe
    model = _from_bundle(bundle, manifest, graph) if source is None or was_quantized else source
    before = _load(base, manifest) if base else source if was_quantized else None
    if before and before.config.recipe:
        raise UsageError(f"{base} is quantized itself", hint="--base is what the bundle was quantized from")
    if before and before.config.unquantized() != model.config.unquantized():
        raise UsageError(f"{before.folder} is not the bundle's model", hint="their config.json differ")
    return OpenedBundle(manifest, config, graph, model.with_cache(config.kv_dtype), before)


def _config(bundle: Path, manifest: Manifest, checkpoint: Path) -> BuildConfig:
    """The options that the bundle was built with, as far as they matter to a comparison."""
    graph_of(bundle, manifest)
    profile = next(profile for profile in manifest.profiles if profile.runtime == "onnx")
    pool_dtypes = {pool.kind: pool.dtype for pool in manifest.graph.pools}
    return BuildConfig(
        checkpoint=checkpoint,
        output=bundle,
        precision=manifest.model.precision,
        runtime="onnx",
        max_tokens=profile.max_tokens,
        max_sequences=profile.max_sequences,
        max_context=profile.max_context,
        page_size=profile.page_size,
        state_dtype=Precision.of(pool_dtypes.get("ssm_state", DType.FLOAT32)),
        kv_dtype="bf16" if pool_dtypes.get("kv_cache") == DType.BFLOAT16 else "auto",
    )


def _from_checkpoint(checkpoint: Path, manifest: Manifest) -> LoadedModel:
    model = _load(checkpoint, manifest)
    stored = {tensor.path for weight in model.weights.values() for tensor in weight.tensors}
    sizes = {path.name: path.stat().st_size for path in stored}
    expected = manifest.source.files
    differing = [name for name in expected | sizes if expected.get(name) != sizes.get(name)]
    if sha256(checkpoint / "config.json") != manifest.source.config_sha256:
        differing.insert(0, "config.json")
    if differing:
        raise UsageError(
            f"{checkpoint} is not the checkpoint that the bundle was built from: {differing[0]} differs",
            hint=f"name the checkpoint {manifest.source.name}, or leave out --checkpoint",
        )
    return model


def _load(checkpoint: Path, manifest: Manifest) -> LoadedModel:
    """A checkpoint, with the layers and the ignored fields of the bundle."""
    layers = ",".join(map(str, manifest.model.chosen_layers))
    return load(checkpoint, layers, manifest.model.ignored_fields)


def _from_bundle(bundle: Path, manifest: Manifest, graph: OnnxGraph) -> LoadedModel:
    """The model with the weights in the graph's external data, which are named like the parameters."""
    stored: dict[str, StoredTensor] = {}
    for tensor in graph.proto.graph.initializer:
        if place := {entry.key: entry.value for entry in tensor.external_data}:
            dtype, shape, path = (
                DType.lookup("onnx", tensor.data_type),
                tuple(tensor.dims),
                bundle / place["location"],
            )
            offset, length = int(place["offset"]), int(place["length"])
            stored[tensor.name] = StoredTensor(tensor.name, dtype, shape, path, offset, length)
    weights = {name: WeightSource((tensor,), Transform.COPY) for name, tensor in stored.items()}
    config = parse_config(bundle / "config.json", manifest.model.ignored_fields)
    config = with_recipe(config, stored, bundle)
    if manifest.partial:
        config = config.only(manifest.model.chosen_layers)
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["backbone.embeddings.weight"])
    missing = [name for name in tensor_sources(config) if name not in weights]
    if missing:
        raise BundleError(f"the graph of {bundle} has no weight {missing[0]}")
    return LoadedModel(bundle, config, weights, manifest.not_exported, ())
