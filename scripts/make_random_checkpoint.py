#!/usr/bin/env python3
"""Writes a checkpoint of any size with random weights for a config.json, in the published layout and in shards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from nemotrt.exporter.checkpoint.layer_selection import chosen_layers
from nemotrt.model.checkpoint import Transform, tensor_sources
from nemotrt.model.config import ModelConfig

SHARD_BYTES = 1 << 30


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values for which every parameter has an effect and activations keep their scale from layer to layer."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return 1 + 0.1 * noise
    if name.endswith("A_log"):
        return 0.5 * noise
    if name.endswith("dt_bias"):
        return 0.5 * noise - 1
    if len(shape) == 1:
        return 0.1 * noise
    return noise / math.sqrt(shape[-1])


def write_checkpoint(
    raw: dict[str, object], output: Path, *, dtype: torch.dtype, layers: str = "", seed: int = 0
) -> None:
    """Write a checkpoint folder at `output`, which must not exist; memory is bounded by one shard.

    With `layers`, only the weights that `build --layers` uses are written.
    """
    config = ModelConfig.from_dict(dict(raw))
    if layers:
        config = config.only(chosen_layers(config.layers, layers))
    names = [
        (aliases[0], source.shape)
        for source in dict.fromkeys(tensor_sources(config).values())
        if source.transform not in (Transform.ZEROS, Transform.ONES)
        for aliases in source.names
    ]
    output.mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(raw, indent=2))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, output / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in names:
        shard[name] = random_tensor(name, shape, generator).to(dtype)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    if len(set(weight_map.values())) == 1:
        shutil.move(output / "model-00001.safetensors", output / "model.safetensors")
    else:
        (output / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(exists=False, path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="bfloat16", show_default=True
)
@click.option("--layers", default="", help="Write only the weights of these layers, as for build --layers.")
@click.option("--seed", default=0, show_default=True)
def main(config: Path, output: Path, dtype: str, layers: str, seed: int) -> None:
    """Write random weights for the config.json CONFIG to the new folder OUTPUT."""
    raw = json.loads(config.read_text())
    write_checkpoint(raw, output, dtype=getattr(torch, dtype), layers=layers, seed=seed)


if __name__ == "__main__":
    main()
