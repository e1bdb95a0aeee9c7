"""How a good checkpoint is damaged, and what a build says of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import random_tensors
from safetensors.torch import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny"
MLP_ONLY = {"hybrid_override_pattern": "-"}
"""One layer of one kind: what is only found in the weights' values is found after a short trace."""


@dataclass(frozen=True)
class Case:
    """How a good checkpoint is damaged, and what the one line of the error must hold."""

    says: str
    damage: Callable[[Path], None] = lambda folder: None
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its config.json that are not as in CONFIG; the tensors fit CONFIG with `model` instead."""
    model: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    code: int = 3


def without(ending: str) -> Callable[[Path], None]:
    """Leave out the first tensor whose name ends so."""

    def damage(folder: Path) -> None:
        tensors = stored(folder)
        del tensors[named(tensors, ending)]
        save_file(tensors, folder / SINGLE)

    return damage


def replaced(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change the first tensor whose name ends so."""

    def damage(folder: Path) -> None:
        tensors = stored(folder)
        name = named(tensors, ending)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / SINGLE)

    return damage


def added(name: str) -> Callable[[Path], None]:
    """Add a tensor."""

    def damage(folder: Path) -> None:
        save_file(stored(folder) | {name: torch.zeros(3)}, folder / SINGLE)

    return damage


def added_head(folder: Path) -> None:
    """Add a head that is not the embeddings that the configuration ties it to."""
    tensors = stored(folder)
    head = tensors["backbone.embeddings.weight"] + 1
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE)


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with its last value replaced."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that the checkpoint was written with."""
    return random_tensors(json.loads((folder / "config.json").read_text()))


def named(tensors: dict[str, torch.Tensor], ending: str) -> str:
    """The first name with that ending."""
    return next(name for name in tensors if name.endswith(ending))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the file and leave its data as it is."""

    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        changed = change(entries)
        text = changed if isinstance(changed, bytes) else json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def last(entries: dict[str, Any]) -> dict[str, Any]:
    """The entry whose data lie last."""
    tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
    return max(tensors, key=lambda entry: entry["data_offsets"][1])


def shift(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """Move the last tensor's place."""

    def change(entries: dict[str, Any]) -> None:
        offsets = last(entries)["data_offsets"]
        offsets[0] += begin
        offsets[1] += end

    return change


def set_last(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set one field of the last tensor's entry."""
    return lambda entries: last(entries).__setitem__(key, value)


def truncated(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    """Cut a file short."""
    return lambda folder: os.truncate(folder / name, keep((folder / name).stat().st_size))


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def sharded(then: Callable[[Path, dict[str, str]], None]) -> Callable[[Path], None]:
    """Two shards and their index in the file's place, and then the damage."""

    def damage(folder: Path) -> None:
        tensors = stored(folder)
        names = sorted(tensors)
        half = len(names) // 2
        (folder / SINGLE).unlink()
        for number, part in enumerate((names[:half], names[half:]), 1):
            save_file({name: tensors[name] for name in part}, folder / f"shard-{number}.safetensors")
        weight_map = {name: f"shard-{1 + (i >= half)}.safetensors" for i, name in enumerate(names)}
        index(folder, weight_map)
        then(folder, weight_map)

    return damage


def index(folder: Path, weight_map: dict[str, str]) -> None:
    """Write the index."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def mapped(shard: str) -> Callable[[Path, dict[str, str]], None]:
    """List one tensor in another file."""
    return lambda folder, weight_map: index(folder, weight_map | {"lm_head.weight": shard})


def held_twice(folder: Path, weight_map: dict[str, str]) -> None:
    """A tensor of the second shard in the first one too."""
    tensors = stored(folder)
    first = {name: tensors[name] for name, shard in weight_map.items() if shard == "shard-1.safetensors"}
    save_file(first | {"lm_head.weight": tensors["lm_head.weight"]}, folder / "shard-1.safetensors")
    index(folder, weight_map | {"lm_head.weight": "shard-1.safetensors"})


def repeated(folder: Path, weight_map: dict[str, str]) -> None:
    """One name twice in the index."""
    entries = json.dumps(weight_map)
    (folder / INDEX).write_text(
        f'{{"weight_map": {entries[:-1]}, "lm_head.weight": "shard-1.safetensors"}}}}'
    )


def linked_index(folder: Path, _: dict[str, str]) -> None:
    """Move the index out of the folder and link to it."""
    (folder / INDEX).rename(folder.parent / "elsewhere.json")
    (folder / INDEX).symlink_to(folder.parent / "elsewhere.json")


def linked_outside(folder: Path, _: dict[str, str]) -> None:
    """Move a shard out of the folder and link to it."""
    outside = folder.parent / "elsewhere.safetensors"
    (folder / "shard-2.safetensors").rename(outside)
    (folder / "shard-2.safetensors").symlink_to(outside)


def only_pickles(content: bytes) -> Callable[[Path], None]:
    """A pickle in the safetensors file's place."""

    def damage(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def of_another_format(*names: str, keep: str = "") -> Callable[[Path], None]:
    """Files of another format in place of everything but `keep`."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name != keep:
                path.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")

    return damage


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    """The tensors under other names."""

    def damage(folder: Path) -> None:
        save_file({rename(name): tensor for name, tensor in stored(folder).items()}, folder / SINGLE)

    return damage


def tokenizer(then: Callable[[Path], None]) -> Callable[[Path], None]:
    """A good tokenizer, and then the damage."""

    def damage(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(EXAMPLE / name, folder)
        then(folder)

    return damage


def linked_license(folder: Path) -> None:
    """A license file that leads out of the checkpoint."""
    (folder.parent / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(folder.parent / "secret")
