"""The tensors of a checkpoint without its weight files: from a table, or from its configuration alone."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, read_json
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import Source, Transform, is_fp8, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType

FIRST_EXPERT = re.compile(r"(.*\.experts\.)0(\..*)")


def read_table(file: Path, config: ModelConfig) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors of a table {name: [dtype, shape]}, where expert 0 may represent all experts, and notes on it.

    Raises CheckpointError on an entry that is not a safetensors dtype and a shape.
    """
    table = read_json(file)
    stored: dict[str, StoredTensor] = {}
    notes: tuple[str, ...] = ("no weights were read: there is only a table of tensors",)
    for name, entry in table.items():
        names = [name]
        first = FIRST_EXPERT.fullmatch(name)
        if first and f"{first[1]}1{first[2]}" not in table:
            names = [f"{first[1]}{expert}{first[2]}" for expert in range(config.n_routed_experts)]
            notes = (f"expert 0 of the table represents all {config.n_routed_experts}", notes[-1])
        dtype, shape = _entry(file, name, entry)
        stored |= {each: _tensor(file, each, dtype, shape) for each in names}
    return stored, notes


def _entry(file: Path, name: str, entry: Any) -> tuple[DType, tuple[int, ...]]:
    try:
        dtype, shape = entry
        sizes = tuple(shape)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} is not [dtype, shape]") from error
    known = {dtype.safetensors: dtype for dtype in DType}
    if not isinstance(dtype, str) or dtype not in known:
        raise CheckpointError(f"{file}: {name} has dtype {dtype}", hint="known: " + " ".join(known))
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise CheckpointError(f"{file}: {name} has shape {shape}, which is not a list of counts")
    return known[dtype], sizes


def _tensor(file: Path, name: str, dtype: DType, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, dtype, shape, file, 0, math.prod(shape) * dtype.itemsize)


def described_tensors(file: Path, config: ModelConfig) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors that the configuration in `file` requires, as a checkpoint would store them, and a note on them."""
    tensors = {
        name: _tensor(file, name, dtype, source.shape)
        for parameter, source in tensor_sources(config).items()
        for name, dtype in _names(config, parameter, source)
    }
    return tensors, ("no tensors were read: they are those that config.json describes",)


def _names(config: ModelConfig, parameter: str, source: Source) -> Iterator[tuple[str, DType]]:
    dtype = config.dtype
    if source.transform in (Transform.SCALE, Transform.LARGEST):
        dtype = DType.FLOAT32
    elif is_fp8(config, parameter):
        dtype = DType.FLOAT8_E4M3
    yield from ((names[0], dtype) for names in source.names)
