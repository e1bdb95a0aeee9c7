"""What a checkpoint, an ONNX file or a bundle holds, as data: no weight is read, no PyTorch is needed."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.checkpoint.safetensors_reader import open_checkpoint
from nemotrt.exporter.checkpoint.side_files import read_config
from nemotrt.exporter.config import COMPUTE_DTYPES
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_summary import KIND_OF_OP
from nemotrt.exporter.runtime.manifest import GraphSummary, Manifest
from nemotrt.model.checkpoint import is_mtp
from nemotrt.model.config import ModelConfig
from nemotrt.model.pools import pool_specs
from nemotrt.plugins.contract import DType, PoolSpec

if TYPE_CHECKING:
    from onnx import ModelProto

LAYER = re.compile(r"(?:^|\.)(?:layers|conv_state|ssm_state|kv_cache)\.(\d+)(?:\.|$)")
"""What a layer's index looks like in the name of a tensor, a node or a pool."""

EMBEDDINGS, HEAD, OTHER, MTP = "embeddings", "head", "other", "mtp"
"""What stands beside the layers: `other` are a graph's constants, `mtp` is not exported."""


@dataclass(frozen=True)
class Weight:
    """One stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str


@dataclass(frozen=True)
class Node:
    """One node of a graph."""

    name: str
    op: str


@dataclass(frozen=True)
class Part:
    """All layers of one kind together, or what stands beside them."""

    kind: str
    num_layers: int
    num_tensors: int
    num_parameters: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    """The precision map: a dtype → bytes that are stored in it, the most first."""
    state_bytes: int
    """Recurrent state of one sequence."""
    cache_bytes_per_token: int
    """KV cache of one token."""


@dataclass(frozen=True)
class Graph:
    """An ONNX graph in numbers."""

    opsets: dict[str, int]
    num_nodes: int
    ops: dict[str, int]
    """An operator, with its domain unless that is ONNX's own → how many nodes, the most first."""
    functions: dict[str, int]
    """A function's name → nodes in its body."""
    edges: GraphSummary


@dataclass(frozen=True)
class Inspection:
    """What was found, in one shape for a checkpoint, an ONNX file and a bundle."""

    what: str
    """checkpoint, graph or bundle."""
    path: str
    layers: dict[int, str]
    """Each layer's index in its checkpoint → its kind."""
    parts: tuple[Part, ...]
    graph: Graph | None = None
    manifest: Manifest | None = None
    inert: dict[str, str] = field(default_factory=dict)
    """Fields of a checkpoint's configuration that change nothing, with the reason."""
    layer: int | None = None
    weights: tuple[Weight, ...] = ()
    """Of `layer`, where one was asked for."""
    nodes: tuple[Node, ...] = ()
    """Of `layer`, in the order in which they run."""


def inspect(path: Path, layer: int | None = None) -> Inspection:
    """What the path holds; with `layer`, that layer's tensors and nodes too.

    Raises UsageError on a path that is none of the three, CheckpointError or BundleError on a broken one.
    """
    if path.is_file():
        return _graph(path, layer, "graph", path, None)
    if (path / manifests.NAME).exists():
        manifest = manifests.verify(path, deep=False)
        graphs = manifest.of_role("graph")
        if not graphs:
            raise BundleError(f"{path} has no graph")
        return _graph(path, layer, "bundle", path / graphs[0], manifest)
    if (path / "config.json").exists():
        return _checkpoint(path, layer)
    raise UsageError(
        f"{path} is no checkpoint, ONNX file or bundle",
        hint="a checkpoint has config.json, a bundle has manifest.json",
    )


def _checkpoint(folder: Path, layer: int | None) -> Inspection:
    config = read_config(folder)
    weights = [
        Weight(tensor.name, tensor.dtype, tensor.shape, tensor.length, tensor.path.name)
        for tensor in open_checkpoint(folder).values()
    ]
    _check_layer(layer, config.numbered_layers)
    return Inspection(
        what="checkpoint",
        path=str(folder),
        layers=config.numbered_layers,
        parts=parts(config.numbered_layers, weights, state_of(config, COMPUTE_DTYPES["fp32"])),
        inert=config.inert,
        layer=layer,
        weights=_of_layer(weights, layer),
    )


def state_of(config: ModelConfig, state_dtype: DType) -> tuple[PoolSpec, ...]:
    """The pools of a model whose KV cache has its own dtype, one token a page."""
    return pool_specs(config, page_size=1, dtype=config.dtype, state_dtype=state_dtype)


def _graph(path: Path, layer: int | None, what: str, file: Path, manifest: Manifest | None) -> Inspection:
    from nemotrt.exporter.runtime.graph_file import OnnxGraph
    from nemotrt.exporter.runtime.graph_summary import describe_graph

    graph = OnnxGraph.read(file)
    model, edges = graph.proto, describe_graph(graph)
    layers = _layers_of(model)
    weights = _initializers(model, file)
    _check_layer(layer, layers)
    ops = Counter(_op(node.domain, node.op_type) for node in model.graph.node)
    nodes = [Node(node.name, _op(node.domain, node.op_type)) for node in model.graph.node]
    return Inspection(
        what=what,
        path=str(path),
        layers=layers,
        parts=parts(layers, weights, edges.pools),
        graph=Graph(
            opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
            num_nodes=len(model.graph.node),
            ops=dict(ops.most_common()),
            functions={function.name: len(function.node) for function in model.functions},
            edges=edges,
        ),
        manifest=manifest,
        layer=layer,
        weights=_of_layer(weights, layer),
        nodes=tuple(node for node in nodes if layer is not None and _layer_index(node.name) == layer),
    )


def _layers_of(model: ModelProto) -> dict[int, str]:
    """Each layer of a graph that this tool wrote, in order; none of another's."""
    kinds: dict[int, str] = {}
    for node in model.graph.node:
        index = _layer_index(node.name)
        if index is not None:
            kinds[index] = KIND_OF_OP.get(node.op_type, kinds.get(index, "mlp"))
    return dict(sorted(kinds.items()))


def _initializers(model: ModelProto, file: Path) -> list[Weight]:
    from onnx import helper

    found = []
    for tensor in model.graph.initializer:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        location = {entry.key: entry.value for entry in tensor.external_data}.get("location", file.name)
        shape = tuple(tensor.dims)
        found.append(Weight(tensor.name, dtype.name, shape, math.prod(shape) * dtype.itemsize, location))
    return found


def _op(domain: str, name: str) -> str:
    return f"{domain}.{name}" if domain else name


def _layer_index(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found.group(1)) if found else None


def _check_layer(layer: int | None, layers: Collection[int]) -> None:
    if layer is None or layer in layers:
        return
    there = "it has none"
    if layers:
        is_whole = len(layers) > max(layers)
        there = f"they go from 0 to {max(layers)}" if is_whole else f"it has {', '.join(map(str, layers))}"
    raise UsageError(f"--layer {layer} is no layer of this model: {there}")


def _of_layer(weights: Iterable[Weight], layer: int | None) -> tuple[Weight, ...]:
    if layer is None:
        return ()
    return tuple(w for w in weights if not is_mtp(w.name) and _layer_index(w.name) == layer)


def parts(
    layers: Mapping[int, str], weights: Iterable[Weight], pools: Iterable[PoolSpec]
) -> tuple[Part, ...]:
    """The layers by kind, most bytes first, between the embeddings and the head; then what else there is.

    `layers` has each layer's index, as names have it, and its kind.
    """
    held: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        held[_kind(weight.name, layers)].append(weight)
    state: Counter[str] = Counter()
    cache: Counter[str] = Counter()
    for pool in pools:
        kind = _kind(pool.name, layers)
        if pool.is_paged:
            cache[kind] += pool.row_bytes // pool.page_size
        else:
            state[kind] += pool.row_bytes
    numbers = Counter(layers.values())
    kinds = sorted(numbers, key=lambda kind: -sum(weight.bytes for weight in held[kind]))
    order = [EMBEDDINGS, *kinds, HEAD, OTHER, MTP]
    return tuple(
        _part(kind, numbers[kind], held[kind], state[kind], cache[kind]) for kind in order if held[kind]
    )


def _kind(name: str, layers: Mapping[int, str]) -> str:
    if is_mtp(name):
        return MTP
    if (index := _layer_index(name)) is not None and index in layers:
        return layers[index]
    if "embedding" in name:
        return EMBEDDINGS
    return HEAD if "lm_head" in name or "norm_f" in name else OTHER


def _part(kind: str, num_layers: int, weights: list[Weight], state: int, cache: int) -> Part:
    by_dtype: Counter[str] = Counter()
    for weight in weights:
        by_dtype[weight.dtype] += weight.bytes
    return Part(
        kind=kind,
        num_layers=num_layers,
        num_tensors=len(weights),
        num_parameters=sum(math.prod(weight.shape) for weight in weights),
        bytes=by_dtype.total(),
        bytes_by_dtype=dict(by_dtype.most_common()),
        state_bytes=state,
        cache_bytes_per_token=cache,
    )
