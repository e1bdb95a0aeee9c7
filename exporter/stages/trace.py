"""Trace: the model's parts as PyTorch graphs, with one `torch.export` for each distinct part, on meta tensors.

Layers of one kind differ only in their weights. Each kind is traced once, or once for each combination of FP8 and other
weights, so the time does not grow with depth.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from nemotrt.exporter.artifacts import TracedModel, TracedPart
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.step import Step, empty_pools
from nemotrt.plugins.contract import PoolSpec

# Sizes to trace with. They must be distinct, and above 1, which PyTorch would specialize on.
TOKENS, SEQUENCES, SLOTS, PAGES, TABLE, ROWS = 11, 3, 5, 7, 2, 4


def trace(model: LoadedModel, config: BuildConfig) -> TracedModel:
    """Every part of the model in order; layers of one kind whose weights have the same dtypes share a program."""
    dtype = config.dtype
    pools = model.pools(config)
    network = NemotronH(model.config, dtype=dtype.torch, device="meta")
    with torch.device("meta"):
        tokens = torch.zeros(TOKENS, dtype=torch.int64)
        x_TD = torch.zeros(TOKENS, model.config.hidden_size, dtype=dtype.torch)
        rows = torch.zeros(ROWS, dtype=torch.int32)
        step = Step(
            query_start=torch.zeros(SEQUENCES + 1, dtype=torch.int32),
            context_len=torch.zeros(SEQUENCES, dtype=torch.int32),
            slot=torch.zeros(SEQUENCES, dtype=torch.int32),
            page_table=torch.zeros(SEQUENCES, TABLE, dtype=torch.int32),
        )

    # Tied embeddings are one parameter, under the first of its names.
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def part(
        module: nn.Module, program: ExportedProgram, prefix: str, pools: tuple[PoolSpec, ...] = ()
    ) -> TracedPart:
        parameters = {name: names[id(parameter)] for name, parameter in module.named_parameters()}
        return TracedPart(program, prefix, parameters, pools)

    embeddings, head = network.backbone.embeddings, network.head()
    parts = [part(embeddings, _export(embeddings, (tokens,)), "embeddings")]
    programs: dict[tuple[str, frozenset[tuple[str, torch.dtype]]], ExportedProgram] = {}
    for index, kind in model.config.numbered_layers.items():
        layer_pools = tuple(pool for pool in pools if pool.layer == index)
        block = network.backbone.layers[str(index)]
        form = (kind, frozenset((name, value.dtype) for name, value in block.named_parameters()))
        if form not in programs:
            arguments = (x_TD, step, *empty_pools(layer_pools, SLOTS, PAGES, "meta"))
            programs[form] = _export(block, arguments)
        parts.append(part(block, programs[form], f"layers.{index}", layer_pools))
    parts.append(part(head, _export(head, (x_TD, rows)), "head"))
    return TracedModel(tuple(parts), pools, dict(network.state_dict()), dtype)


def _export(module: nn.Module, arguments: Sequence[Any]) -> ExportedProgram:
    """The module's graph, in which the first axis of each input is dynamic, and the page table's second."""

    def dynamic(argument: Any) -> Any:
        first: Any = {0: Dim.DYNAMIC}
        if isinstance(argument, Step):
            return Step(first, first, first, page_table=first | {1: Dim.DYNAMIC})
        return first

    shapes: list[Any] = [dynamic(argument) for argument in arguments]
    if len(arguments) > 2:  # a block's pools are varargs, which dynamic_shapes takes as one tuple
        shapes[2:] = [tuple(shapes[2:])]
    return torch.export.export(module, tuple(arguments), dynamic_shapes=tuple(shapes))
