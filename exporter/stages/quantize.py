"""Quantize: a checkpoint's weights in FP8 with static scales, written as ModelOpt writes them; a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemotrt.exporter.artifacts import QuantizedCheckpoint
from nemotrt.exporter.checkpoint import quant_config, weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.checkpoint.safetensors_reader import (
    StoredTensor,
    open_checkpoint,
    read_json,
    read_pieces,
)
from nemotrt.exporter.checkpoint.safetensors_writer import Entry, write_shards
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.quantization.calibration import Ranges, calibrate
from nemotrt.exporter.quantization.text import Sequences
from nemotrt.model.checkpoint import Transform
from nemotrt.model.recipe import EXPERTS, Recipe, quantizable
from nemotrt.plugins.e4m3 import FP8_MAX, to_e4m3


def quantize(
    model: LoadedModel,
    recipe: Recipe,
    text: Sequences,
    folder: Path,
    *,
    advance: Advance = ignore,
) -> QuantizedCheckpoint:
    """A checkpoint in `folder`, which is empty, in ModelOpt's layout; `advance` hears of the layers calibrated.

    Raises UsageError as `calibrate` does, CheckpointError on a weight that is not finite.
    """
    ranges = calibrate(model, recipe, text, advance)
    write_shards(folder, list(_entries(model, recipe, ranges)))
    described, hf_quant_config = quant_config.described(
        recipe, model.config, has_mtp=bool(model.not_exported)
    )
    for name in model.side_files:
        shutil.copyfile(model.folder / name, folder / name)
    raw = read_json(model.folder / "config.json") | {"quantization_config": described}
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    (folder / quant_config.HF_QUANT_CONFIG).write_text(
        json.dumps(hf_quant_config, indent=2), encoding="utf-8"
    )
    return QuantizedCheckpoint(
        folder=folder,
        num_modules=len(recipe.modules),
        left_out=tuple(name for name in quantizable(model.config) if name not in recipe.modules),
        kv_cache=recipe.kv_cache,
        num_tokens=sum(map(len, text)),
        starved_experts=tuple(ranges.starved),
    )


@dataclass(frozen=True)
class _Weight:
    """A stored weight that becomes FP8: its module as the layout names it, and where it lies in its tensor."""

    module: str
    tensor: StoredTensor
    index: int | None = None
    """Of the expert, in a tensor that holds all of them."""
    in_rows: bool = False
    """Whether each output has a scale of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.index is None else self.tensor.shape[1:]

    def pieces(self) -> Iterator[Tensor]:
        """Its values in the dtype that they are stored in: flat pieces, or all its rows at once."""
        dtype = getattr(torch, self.tensor.dtype)
        tensor = self.tensor
        if self.index is not None:
            length = tensor.length // tensor.shape[0]
            tensor = StoredTensor(
                f"{tensor.name}[{self.index}]",
                tensor.dtype,
                self.shape,
                tensor.path,
                tensor.offset + self.index * length,
                length,
            )
        flat = weights.convert(tensor, Transform.COPY, dtype)
        return iter([torch.cat(list(flat)).reshape(self.shape)]) if self.in_rows else flat


def _weights(model: LoadedModel, recipe: Recipe) -> Iterator[_Weight]:
    for module in sorted(recipe.modules):
        if not module.endswith(f".{EXPERTS}"):
            yield _Weight(module, model.weights[f"{module}.weight"].tensors[0])
            continue
        for own, projection in (("up", "up_proj"), ("down", "down_proj")):
            tensors = model.weights[f"{module}.{own}"].tensors
            is_stacked = len(tensors) == 1 and len(tensors[0].shape) == 3
            for expert in range(model.config.n_routed_experts):
                tensor, index = (tensors[0], expert) if is_stacked else (tensors[expert], None)
                name = f"{module}.{expert}.{projection}"
                yield _Weight(name, tensor, index, in_rows=module in recipe.per_channel)


def _entries(model: LoadedModel, recipe: Recipe, ranges: Ranges) -> Iterator[Entry]:
    """Every tensor of the new checkpoint: what is not quantized as it is stored, byte for byte."""
    by_tensor: dict[str, list[_Weight]] = {}
    for weight in _weights(model, recipe):
        by_tensor.setdefault(weight.tensor.name, []).append(weight)
    kept = {tensor.name for source in model.weights.values() for tensor in source.tensors}
    for name, tensor in open_checkpoint(model.folder).items():
        if name in by_tensor:
            for weight in by_tensor[name]:
                yield from _quantized(weight, ranges.inputs[weight.module])
        elif name in kept or name in model.not_exported:
            yield Entry(name, tensor.dtype, tensor.shape, partial(read_pieces, tensor, weights.PIECE_BYTES))
    for name, largest in ranges.caches.items():
        yield _scale(name, torch.tensor(largest / FP8_MAX))


def _quantized(weight: _Weight, largest_input: float) -> Iterator[Entry]:
    scale = _weight_scale(weight)

    def values() -> Iterator[bytes]:
        for piece in weight.pieces():
            yield to_e4m3(piece, scale).view(torch.uint8).numpy().tobytes()

    yield Entry(f"{weight.module}.weight", "float8_e4m3fn", weight.shape, values)
    yield _scale(f"{weight.module}.weight_scale", scale.squeeze(-1))
    yield _scale(f"{weight.module}.input_scale", torch.tensor(largest_input / FP8_MAX))


def _weight_scale(weight: _Weight) -> Tensor:
    """[], or of a weight in rows [O, 1]: what brings the largest magnitude to E4M3's; 1 where all are 0."""
    found = torch.cat([piece.abs().amax(-1, keepdim=True) for piece in weight.pieces()]).float()
    largest = found if weight.in_rows else found.max()
    return torch.where(largest > 0, largest / FP8_MAX, 1.0)


def _scale(name: str, value: Tensor) -> Entry:
    data = value.float().numpy().tobytes()
    return Entry(name, "float32", tuple(value.shape), lambda: iter((data,)))
