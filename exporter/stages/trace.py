"""Trace: the model's parts as PyTorch graphs, one `torch.export` for each distinct part, on meta tensors.

Layers of one kind differ only in their weights, so each kind is traced once, or once for each set of its weights that
is FP8: cost does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nemotrt.exporter.artifacts import TracedModel, TracedPart
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.step import Step
from nemotrt.plugins.contract import PoolSpec

# Sizes to trace with: distinct, and above 1, which PyTorch would take for a constant.
TOKENS, SEQUENCES, SLOTS, PAGES, TABLE, ROWS = 11, 3, 5, 7, 2, 4


def trace(model: LoadedModel, config: BuildConfig) -> TracedModel:
    """Every part of the model in order; layers of one kind, with the same weights in FP8, share a program."""
    dtype = COMPUTE_DTYPES[config.precision]
    pools = model.pools(config)
    network = NemotronH(model.config, dtype=getattr(torch, dtype), device="meta")
    tokens = torch.zeros(TOKENS, dtype=torch.int64, device="meta")
    x_TD = torch.zeros(TOKENS, model.config.hidden_size, dtype=getattr(torch, dtype), device="meta")
    rows = torch.zeros(ROWS, dtype=torch.int32, device="meta")

    # Tied embeddings are one parameter, which goes by the first of its names.
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def part(
        module: nn.Module, program: ExportedProgram, prefix: str, own: tuple[PoolSpec, ...] = ()
    ) -> TracedPart:
        parameters = {name: names[id(parameter)] for name, parameter in module.named_parameters()}
        return TracedPart(program, prefix, parameters, own)

    embeddings, head = network.backbone.embeddings, network.head()
    parts = [part(embeddings, _export(embeddings, (tokens,)), "embeddings")]
    programs: dict[tuple[str, frozenset[tuple[str, torch.dtype]]], ExportedProgram] = {}
    for index, kind in model.config.numbered_layers.items():
        own = tuple(pool for pool in pools if pool.layer == index)
        block = network.backbone.layers[str(index)]
        form = (kind, frozenset((name, value.dtype) for name, value in block.named_parameters()))
        if form not in programs:
            programs[form] = _export(block, (x_TD, _step(), *(_pool(pool) for pool in own)))
        parts.append(part(block, programs[form], f"layers.{index}", own))
    parts.append(part(head, _export(head, (x_TD, rows)), "head"))
    return TracedModel(tuple(parts), pools, dict(network.state_dict()), dtype)


def _step() -> Step:
    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    return Step(
        query_start=integers(SEQUENCES + 1),
        context_len=integers(SEQUENCES),
        slot=integers(SEQUENCES),
        page_table=integers(SEQUENCES, TABLE),
    )


def _pool(pool: PoolSpec) -> Tensor:
    return torch.zeros(pool.shape(SLOTS, PAGES), dtype=pool.dtype.torch, device="meta")


def _export(module: nn.Module, arguments: Sequence[Any]) -> ExportedProgram:
    """The module's graph with every first axis free, and the page table's second."""

    def free(argument: Any) -> Any:
        if isinstance(argument, Step):
            first: Any = {0: Dim.DYNAMIC}
            return Step(first, first, first, page_table=first | {1: Dim.DYNAMIC})
        return {0: Dim.DYNAMIC}

    shapes: list[Any] = [free(argument) for argument in arguments]
    if len(arguments) > 2:  # a block's pools are varargs, which dynamic_shapes wants as one tuple
        shapes[2:] = [tuple(shapes[2:])]
    return torch.export.export(module, tuple(arguments), dynamic_shapes=tuple(shapes))
