"""The contents of a checkpoint, an ONNX file or a bundle, as data.

No weight is read, and PyTorch is not needed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.checkpoint.other_formats import other_format
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, open_checkpoint
from nemotrt.exporter.checkpoint.side_files import read_config
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import KIND_OF_OP, OnnxGraph
from nemotrt.exporter.runtime.manifest import GraphSummary, Manifest
from nemotrt.model.checkpoint import is_mtp
from nemotrt.model.step import pool_specs
from nemotrt.plugins.contract import EMBEDDINGS, HEAD, LayerName, PoolSpec

if TYPE_CHECKING:
    from onnx import ModelProto

OTHER, MTP = "other", "mtp"
"""A graph's constants, and multi-token prediction, which is not exported."""


@dataclass(frozen=True)
class Weight:
    """One stored tensor; `dtype` is NumPy's name, because another tool's graph may have types that DType lacks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str


@dataclass(frozen=True)
class Part:
    """All layers of one kind together, or the embeddings, the head, constants or multi-token prediction."""

    kind: str
    num_layers: int
    num_tensors: int
    num_parameters: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    """Largest first."""
    state_bytes: int
    """Recurrent state of one sequence."""
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Inspection:
    """The contents of a checkpoint, an ONNX file or a bundle; what a format does not have is empty."""

    what: str
    """checkpoint, graph or bundle."""
    path: str
    layers: dict[int, str]
    """Layer index in the checkpoint → kind."""
    parts: tuple[Part, ...]
    graph: GraphSummary | None = None
    opsets: dict[str, int] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    """Operator, with its domain unless that is ONNX's own → number of nodes, most frequent first."""
    functions: dict[str, int] = field(default_factory=dict)
    """Function → number of nodes in its body."""
    manifest: Manifest | None = None
    inert: dict[str, str] = field(default_factory=dict)
    """Field of the checkpoint's configuration that has no effect → reason."""
    layer: int | None = None
    weights: tuple[Weight, ...] = ()
    """The tensors of `layer`."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Node of `layer` → operator, in execution order."""


def inspect(path: Path, layer: int | None = None) -> Inspection:
    """The contents of `path`; with `layer`, that layer's tensors and nodes too.

    Raises UsageError if the path is neither a checkpoint nor an ONNX file nor a bundle, and CheckpointError or
    BundleError if it is damaged.
    """
    if path.is_file() and not other_format(path):
        return _inspect_graph(path, path, layer)
    if (path / manifests.NAME).exists():
        manifest = manifests.verify(path, deep=False)
        graphs = manifest.of_role("graph")
        if not graphs:
            raise BundleError(f"{path} has no graph")
        return _inspect_graph(path, path / graphs[0], layer, manifest)
    if (path / "config.json").exists():
        return _inspect_checkpoint(path, layer)
    raise other_format(path) or UsageError(
        f"{path} is not a checkpoint, an ONNX file or a bundle",
        hint="a checkpoint has config.json, a bundle has manifest.json",
    )


def _inspect_checkpoint(folder: Path, layer: int | None) -> Inspection:
    config, weights = read_config(folder), stored_weights(open_checkpoint(folder))
    _check_layer(layer, config.numbered_layers)
    return Inspection(
        what="checkpoint",
        path=str(folder),
        layers=config.numbered_layers,
        parts=parts_of(config.numbered_layers, weights, pool_specs(config, page_size=1, dtype=config.dtype)),
        inert=config.inert,
        layer=layer,
        weights=tuple(weight for weight in weights if _is_in(weight.name, layer)),
    )


def stored_weights(stored: Mapping[str, StoredTensor]) -> list[Weight]:
    """The tensors of a checkpoint."""
    return [Weight(t.name, t.dtype, t.shape, t.length, t.path.name) for t in stored.values()]


def _inspect_graph(path: Path, file: Path, layer: int | None, manifest: Manifest | None = None) -> Inspection:
    graph = OnnxGraph.read(file)
    model, summary = graph.proto, graph.summary
    layers, weights = _layers_of(model), _initializers(model, file)
    _check_layer(layer, layers)
    nodes = [(node.name, f"{node.domain}.{node.op_type}".lstrip(".")) for node in model.graph.node]
    return Inspection(
        what="bundle" if manifest else "graph",
        path=str(path),
        layers=layers,
        parts=parts_of(layers, weights, summary.pools),
        graph=summary,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        ops=dict(Counter(operator for _, operator in nodes).most_common()),
        functions={function.name: len(function.node) for function in model.functions},
        manifest=manifest,
        layer=layer,
        weights=tuple(weight for weight in weights if _is_in(weight.name, layer)),
        nodes={name: operator for name, operator in nodes if _is_in(name, layer)},
    )


def _layers_of(model: ModelProto) -> dict[int, str]:
    """Layer index → kind, in order; empty for a graph that another tool wrote."""
    kinds: dict[int, str] = {}
    for node in model.graph.node:
        index = _layer_index(node.name)
        if index is not None:
            kinds[index] = KIND_OF_OP.get(node.op_type, kinds.get(index, "mlp"))
    return dict(sorted(kinds.items()))


def _initializers(model: ModelProto, file: Path) -> list[Weight]:
    from onnx import helper

    weights = []
    for tensor in model.graph.initializer:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", file.name)
        shape = tuple(tensor.dims)
        weights.append(Weight(tensor.name, dtype.name, shape, math.prod(shape) * dtype.itemsize, location))
    return weights


def _layer_index(name: str) -> int | None:
    parsed = LayerName.parse(name)
    return parsed.layer if parsed else None


def _check_layer(layer: int | None, layers: Collection[int]) -> None:
    if layer is None or layer in layers:
        return
    if not layers:
        choices = "it has none"
    elif len(layers) > max(layers):
        choices = f"they go from 0 to {max(layers)}"
    else:
        choices = f"it has {', '.join(map(str, layers))}"
    raise UsageError(f"--layer {layer} is not a layer of this model: {choices}")


def _is_in(name: str, layer: int | None) -> bool:
    return layer is not None and _layer_index(name) == layer


def parts_of(
    layers: Mapping[int, str], weights: Iterable[Weight], pools: Iterable[PoolSpec]
) -> tuple[Part, ...]:
    """The embeddings, the layers by kind with the largest first, the head, constants, multi-token prediction.

    `layers` maps a layer's index to its kind.
    """
    weights_by_kind: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        weights_by_kind[_kind(weight.name, layers)].append(weight)
    state_bytes: Counter[str] = Counter()
    cache_bytes: Counter[str] = Counter()
    for pool in pools:
        if pool.is_paged:
            cache_bytes[_kind(pool.name, layers)] += pool.row_bytes // pool.page_size
        else:
            state_bytes[_kind(pool.name, layers)] += pool.row_bytes
    num_layers = Counter(layers.values())
    kinds = sorted(num_layers, key=lambda kind: -sum(weight.bytes for weight in weights_by_kind[kind]))
    parts = []
    for kind in (EMBEDDINGS, *kinds, HEAD, OTHER, MTP):
        if not (weights_of_kind := weights_by_kind[kind]):
            continue
        by_dtype: Counter[str] = Counter()
        for weight in weights_of_kind:
            by_dtype[weight.dtype] += weight.bytes
        num_parameters = sum(math.prod(weight.shape) for weight in weights_of_kind)
        counts = (num_layers[kind], len(weights_of_kind), num_parameters, by_dtype.total())
        sizes = dict(by_dtype.most_common())
        parts.append(Part(kind, *counts, sizes, state_bytes[kind], cache_bytes[kind]))
    return tuple(parts)


def _kind(name: str, layers: Mapping[int, str]) -> str:
    if is_mtp(name):
        return MTP
    parsed = LayerName.parse(name)
    if parsed is None or parsed.layer is None:
        return parsed.part if parsed else OTHER
    return layers.get(parsed.layer, OTHER)
