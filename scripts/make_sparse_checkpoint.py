#!/usr/bin/env python3
"""Writes a published checkpoint's layout at full size as sparse files: names, dtypes, shards and index are real.

Small tensors (norms, biases, scales, A_log) and those of the layers that --real names hold random values; all others
are holes, which read as zeros and take no place on a disk.
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
"""As transformers' save_pretrained cuts them."""

SMALL = 64 << 10
"""Bytes up to which a tensor always holds values."""

PIECE = 16 << 20

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}

SCALE = re.compile(r"\.(weight_scale|input_scale|k_scale|v_scale)$")
LAYER = re.compile(r"^backbone\.layers\.(\d+)\.")

Entry = tuple[str, list[int]]
"""A tensor's dtype and shape."""


def every_tensor(
    table: dict[str, Entry], num_experts: int, *, unquantized: bool
) -> Iterator[tuple[str, Entry]]:
    """The table with each expert that its expert 0 stands for; unquantized, without scales, and BF16 for FP8."""
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
    """The tensors in order of their names, cut where a shard is full."""
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
    """One file, wider dtypes first as the safetensors library has it; gives the bytes that hold values."""
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
                for piece in random_bytes(name, entry, generator):
                    file.write(piece)
                    written += len(piece)
        file.truncate(start + offset)
    return written


def random_bytes(name: str, entry: Entry, generator: np.random.Generator) -> Iterator[bytes]:
    """Values of a size at which activations neither grow nor vanish, in pieces."""
    dtype, shape = entry
    left = math.prod(shape)
    scale = 1.0 if len(shape) < 2 else 1 / math.sqrt(shape[-1])
    while left:
        count = min(left, PIECE // 4)
        drawn = generator.standard_normal(count, dtype=np.float32)
        values = 0.01 + 0.001 * np.abs(drawn) if SCALE.search(name) else drawn * np.float32(scale)
        yield encoded(values, dtype)
        left -= count


def encoded(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> bytes:
    """FP32 values in a safetensors dtype; BF16 is cut, not rounded: random bits are random bits."""
    import ml_dtypes

    types = {
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
    }
    return values.astype(types[dtype]).tobytes()


def description(table: dict[str, Entry]) -> dict[str, Any]:
    """What ModelOpt says of a table's quantization: FP8, but for the linears that have other weights."""
    linears = [name for name, (_, shape) in table.items() if name.endswith(".weight") and len(shape) == 2]
    ignored = [name.removesuffix(".weight") for name in linears if table[name][0] != "F8_E4M3"]
    found: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}
    if any(name.endswith(".k_scale") for name in table):
        found["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return found


def write_checkpoint(
    raw: dict[str, Any],
    table: dict[str, Entry],
    output: Path,
    *,
    unquantized: bool = False,
    real: frozenset[int] = frozenset(),
    seed: int = 0,
) -> dict[str, int]:
    """A checkpoint folder at `output`, which must not exist; gives its bytes, and those that hold values."""
    output.mkdir(parents=True)
    if not unquantized:
        raw = raw | {"quantization_config": description(table)}
    (output / "config.json").write_text(json.dumps(raw, indent=2))
    cut = list(shards(list(every_tensor(table, raw["n_routed_experts"], unquantized=unquantized))))
    generator = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    written = 0
    for number, shard in enumerate(cut, 1):
        file = f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        written += write_shard(output / file, shard, real, generator)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    total = sum(size(entry) for shard in cut for _, entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return {"bytes": total, "bytes_with_values": written, "tensors": len(weight_map), "shards": len(cut)}


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("tensor_table", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(exists=False, path_type=Path))
@click.option("--unquantized", is_flag=True, help="BF16 where the table has FP8, and no scales.")
@click.option("--real", default="", help="Layers whose tensors all hold random values, as 0,1,5.")
@click.option("--seed", default=0, show_default=True)
def main(config: Path, tensor_table: Path, output: Path, unquantized: bool, real: str, seed: int) -> None:
    """Write the checkpoint of CONFIG (config.json) and TENSOR_TABLE ({name: [dtype, shape]}) to the folder OUTPUT.

    In the table, expert 0 stands for all experts.
    """
    layers = frozenset(int(layer) for layer in real.split(",") if layer)
    raw, table = json.loads(config.read_text()), json.loads(tensor_table.read_text())
    found = write_checkpoint(raw, table, output, unquantized=unquantized, real=layers, seed=seed)
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
