#!/usr/bin/env python3
"""Writes sparse files with the names, dtypes, shards and index of a published checkpoint at full size.

Small tensors (norms, biases, scales, A_log) and the layers named by --real contain random values. All others are holes,
which read as zeros and take no disk space; a build accepts them with --allow-zero-weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

SHARD_BYTES = 5_000_000_000
"""The size of shards that transformers' save_pretrained writes."""

SMALL = 64 << 10
"""Bytes up to which a tensor always has values."""

CHUNK_BYTES = 16 << 20

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}

SCALE = re.compile(r"\.(weight_scale|input_scale|k_scale|v_scale)$")
LAYER = re.compile(r"^backbone\.layers\.(\d+)\.")

Entry = tuple[str, list[int]]
"""A tensor's dtype and shape."""


def every_tensor(
    table: dict[str, Entry], num_experts: int, *, unquantized: bool
) -> Iterator[tuple[str, Entry]]:
    """The table with expert 0 repeated for every expert; `unquantized` drops scales and replaces FP8 by BF16."""
    for name, (dtype, shape) in table.items():
        if unquantized and SCALE.search(name):
            continue
        entry = ("BF16" if unquantized and dtype == "F8_E4M3" else dtype, shape)
        if ".experts.0." not in name:
            yield name, entry
        else:
            for expert in range(num_experts):
                yield name.replace(".experts.0.", f".experts.{expert}."), entry


def shards(tensors: list[tuple[str, Entry]]) -> Iterator[list[tuple[str, Entry]]]:
    """The tensors sorted by name and split into shards."""
    shard: list[tuple[str, Entry]] = []
    filled = 0
    for name, entry in sorted(tensors):
        if shard and filled + size(entry) > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append((name, entry))
        filled += size(entry)
    yield shard


def size(entry: Entry) -> int:
    """Bytes of a tensor."""
    return math.prod(entry[1]) * WIDTHS[entry[0]]


def write_shard(
    path: Path, shard: list[tuple[str, Entry]], real: frozenset[int], generator: np.random.Generator
) -> int:
    """Write one file, wider dtypes first like the safetensors library; returns the bytes that have values."""
    ordered = sorted(shard, key=lambda item: (-WIDTHS[item[1][0]], item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, entry in ordered:
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [offset, offset + size(entry)]}
        offset += size(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, entry in ordered:
            layer = LAYER.match(name)
            if size(entry) <= SMALL or (layer and int(layer[1]) in real):
                file.seek(start + header[name]["data_offsets"][0])
                for chunk in random_bytes(name, entry, generator):
                    file.write(chunk)
                    written += len(chunk)
        file.truncate(start + offset)
    return written


def random_bytes(name: str, entry: Entry, generator: np.random.Generator) -> Iterator[bytes]:
    """Chunks of random values for which activations neither grow nor vanish."""
    dtype, shape = entry
    left = math.prod(shape)
    scale = 1.0 if len(shape) < 2 else 1 / math.sqrt(shape[-1])
    while left:
        count = min(left, CHUNK_BYTES // 4)
        noise = generator.standard_normal(count, dtype=np.float32)
        values = 0.01 + 0.001 * np.abs(noise) if SCALE.search(name) else noise * np.float32(scale)
        yield encoded(values, dtype)
        left -= count


def encoded(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> bytes:
    """FP32 values in a safetensors dtype."""
    import ml_dtypes

    types = {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
    }
    return values.astype(types[dtype]).tobytes()


def description(table: dict[str, Entry]) -> dict[str, Any]:
    """ModelOpt's quantization_config for a table: FP8, except for linears with other weights."""
    linears = [name for name, (_, shape) in table.items() if name.endswith(".weight") and len(shape) == 2]
    ignored = [name.removesuffix(".weight") for name in linears if table[name][0] != "F8_E4M3"]
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}
    if any(name.endswith(".k_scale") for name in table):
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return config


def write_checkpoint(
    raw: dict[str, Any],
    table: dict[str, Entry],
    output: Path,
    *,
    unquantized: bool = False,
    real: frozenset[int] = frozenset(),
    seed: int = 0,
) -> dict[str, int]:
    """Write a checkpoint folder at `output`, which must not exist; returns its sizes and counts."""
    output.mkdir(parents=True)
    if not unquantized:
        raw = raw | {"quantization_config": description(table)}
    (output / "config.json").write_text(json.dumps(raw, indent=2))
    all_shards = list(shards(list(every_tensor(table, raw["n_routed_experts"], unquantized=unquantized))))
    generator = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    written = 0
    for number, shard in enumerate(all_shards, 1):
        file = f"model-{number:05d}-of-{len(all_shards):05d}.safetensors"
        written += write_shard(output / file, shard, real, generator)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    total = sum(size(entry) for shard in all_shards for _, entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return {
        "bytes": total,
        "bytes_with_values": written,
        "tensors": len(weight_map),
        "shards": len(all_shards),
    }


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("tensor_table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(exists=False, path_type=Path))
@click.option("--unquantized", is_flag=True, help="Replace FP8 by BF16 and drop the scales.")
@click.option("--real", default="", help="Layers whose tensors all have random values, for example 0,1,5.")
@click.option("--seed", default=0, show_default=True)
def main(config: Path, tensor_table: Path, output: Path, unquantized: bool, real: str, seed: int) -> None:
    """Write a checkpoint for CONFIG (config.json) and TENSOR_TABLE ({name: [dtype, shape]}) to the folder OUTPUT.

    In the table, expert 0 represents all experts.
    """
    layers = frozenset(int(layer) for layer in real.split(",") if layer)
    raw, table = json.loads(config.read_text()), json.loads(tensor_table.read_text())
    counts = write_checkpoint(raw, table, output, unquantized=unquantized, real=layers, seed=seed)
    click.echo(json.dumps(counts))


if __name__ == "__main__":
    main()
