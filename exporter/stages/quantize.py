"""Quantize: write a checkpoint in FP8 with static scales, in ModelOpt's layout, one tensor at a time."""

import json
import shutil
from collections import defaultdict
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
from nemotrt.exporter.checkpoint.side_files import code_files
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.quantization.calibration import Ranges, calibrate
from nemotrt.exporter.quantization.text import Sequences
from nemotrt.model.checkpoint import Transform
from nemotrt.model.recipe import EXPERTS, Recipe
from nemotrt.plugins.contract import DType
from nemotrt.plugins.e4m3 import FP8_MAX, to_e4m3


@dataclass(frozen=True)
class WeightToQuantize:
    """One module's weight before quantization."""

    module: str
    """The module's published name, with the expert's number."""
    stored: StoredTensor
    per_output: bool
    """Whether each output gets a scale, not each weight."""

    def entries(self) -> tuple[Entry, Entry]:
        """The weight in FP8, and its scale (or one scale for each output); both follow from the weight alone.

        Raises CheckpointError on a value that is not finite.
        """
        # A magnitude for each row [O, 1], or for each flat piece [1].
        largest = torch.cat([piece.abs().amax(-1, keepdim=True) for piece in self._pieces()]).float()
        largest = largest if self.per_output else largest.max()
        scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)

        def data() -> Iterator[bytes]:
            for piece in self._pieces():
                yield to_e4m3(piece, scale).view(torch.uint8).numpy().tobytes()

        return (
            Entry(f"{self.module}.weight", DType.FLOAT8_E4M3, self.stored.shape, data),
            _scale_entry(f"{self.module}.weight_scale", scale.squeeze(-1)),
        )

    def _pieces(self) -> Iterator[Tensor]:
        flat = weights.convert(self.stored, Transform.COPY, self.stored.dtype)
        return iter([torch.cat(list(flat)).reshape(self.stored.shape)]) if self.per_output else flat


def quantize(
    model: LoadedModel, recipe: Recipe, text: Sequences, folder: Path, *, advance: Advance = ignore
) -> QuantizedCheckpoint:
    """The model as an FP8 checkpoint in the empty `folder`; `advance` counts calibrated layers.

    Raises UsageError as `calibrate` does, CheckpointError on a weight that is not finite.
    """
    ranges = calibrate(model, recipe, text, advance)
    write_shards(folder, list(_entries(model, recipe, ranges)))
    for name in (*model.side_files, *code_files(model.folder)):
        shutil.copyfile(model.folder / name, folder / name)
    quantization, hf_quant_config = quant_config.describe(
        recipe, model.config, has_mtp=bool(model.not_exported)
    )
    config = read_json(model.folder / "config.json") | {"quantization_config": quantization}
    for name, content in (("config.json", config), (quant_config.HF_QUANT_CONFIG, hf_quant_config)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return QuantizedCheckpoint(
        folder=folder,
        num_modules=len(recipe.modules),
        left_out=tuple(name for name in model.config.quantizable_modules() if name not in recipe.modules),
        kv_cache=recipe.kv_cache,
        num_tokens=sum(map(len, text)),
        starved_experts=tuple(ranges.starved),
    )


def _entries(model: LoadedModel, recipe: Recipe, ranges: Ranges) -> Iterator[Entry]:
    """Every tensor of the new checkpoint; what is not quantized keeps its bytes."""
    to_quantize = weights_to_quantize(model, recipe)
    exported = {tensor.name for source in model.weights.values() for tensor in source.tensors}
    for name, tensor in open_checkpoint(model.folder).items():
        if name in to_quantize:
            for weight in to_quantize[name]:
                yield from weight.entries()
                largest = ranges.inputs[weight.module]
                yield _scale_entry(f"{weight.module}.input_scale", torch.tensor(largest / FP8_MAX))
        elif name in exported or name in model.not_exported:
            yield Entry(name, tensor.dtype, tensor.shape, partial(read_pieces, tensor))
    for name, largest in ranges.caches.items():
        yield _scale_entry(name, torch.tensor(largest / FP8_MAX))


def weights_to_quantize(model: LoadedModel, recipe: Recipe) -> dict[str, list[WeightToQuantize]]:
    """A stored tensor → the modules' weights that it has, to be quantized."""
    result = defaultdict(list)
    for module in sorted(recipe.modules):
        if not module.endswith(f".{EXPERTS}"):
            (tensor,) = model.weights[f"{module}.weight"].tensors
            result[tensor.name].append(WeightToQuantize(module, tensor, per_output=False))
            continue
        for stack, projection in (("up", "up_proj"), ("down", "down_proj")):
            tensors = model.weights[f"{module}.{stack}"].tensors
            is_stacked = len(tensors) == 1 and len(tensors[0].shape) == 3
            for expert in range(model.config.n_routed_experts):
                tensor = tensors[0 if is_stacked else expert]
                weight = tensor.part(expert) if is_stacked else tensor
                name, per_output = f"{module}.{expert}.{projection}", module in recipe.per_channel
                result[tensor.name].append(WeightToQuantize(name, weight, per_output))
    return result


def _scale_entry(name: str, value: Tensor) -> Entry:
    """A scale in FP32."""
    data = value.float().numpy().tobytes()
    return Entry(name, DType.FLOAT32, tuple(value.shape), lambda: iter((data,)))
