"""Safetensors files: everything that the format allows is read, anything else is a CheckpointError."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nemotrt.exporter.checkpoint.safetensors_reader import (
    INDEX,
    SINGLE,
    StoredTensor,
    open_checkpoint,
    read_header,
    read_json,
    read_pieces,
)
from nemotrt.exporter.errors import CheckpointError

TENSORS = {
    "b.bf16": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "a.fp32": torch.arange(5, dtype=torch.float32),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
    "fp8": torch.ones(4, dtype=torch.float8_e4m3fn),
    "int": torch.arange(3, dtype=torch.int8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path / SINGLE


def values(tensor: StoredTensor, piece_bytes: int = 1 << 20) -> torch.Tensor:
    data = b"".join(bytes(piece) for piece in read_pieces(tensor, piece_bytes))
    dtype = getattr(torch, tensor.dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
    return flat.reshape(tensor.shape)


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def write_entries(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    return write(path, json.dumps(entries).encode(), data)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("piece_bytes", [2, 8, 1 << 20])
def test_what_the_library_writes_is_read(file: Path, piece_bytes: int) -> None:
    found = read_header(file)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = values(found[name], piece_bytes)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.float(), tensor.float())


def test_pieces_are_bounded(file: Path) -> None:
    pieces = list(read_pieces(read_header(file)["b.bf16"], 10))
    assert [len(piece) for piece in pieces] == [10, 10, 4]


def test_a_file_that_shrinks_while_it_is_read(file: Path) -> None:
    tensor = read_header(file)["a.fp32"]
    os.truncate(file, tensor.offset + 4)
    with pytest.raises(CheckpointError, match=r"ended while a\.fp32 was read"):
        list(read_pieces(tensor, 1 << 20))


def test_a_disk_that_fails_while_it_is_read(file: Path) -> None:
    """Reading the first bytes of a process's memory is an input/output error."""
    tensor = replace(read_header(file)["a.fp32"], path=Path("/proc/self/mem"), offset=0)
    with pytest.raises(CheckpointError, match=r"mem: a\.fp32 cannot be read: Input/output error"):
        list(read_pieces(tensor, 1 << 20))


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "b overlaps another tensor"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlaps another tensor"),
        ({"a": entry(0, 2), "b": entry(3, 5)}, b"12345", "b leaves a gap before it"),
        ({"a": entry(1, 3)}, b"123", "a leaves a gap before it"),
        ({"a": entry(0, 8)}, b"1234", "truncated"),
        ({"a": entry(0, 2)}, b"1234", "2 bytes that belong to no tensor"),
        ({"a": entry(4, 2, [])}, b"1234", r"a is U8 \[\], but its bytes are 4 to 2"),
        ({"a": entry(0, 4, [2, 1])}, b"1234", r"a is U8 \[2, 1\], but its bytes are 0 to 4"),
        ({"a": entry(0, 4, [-2, -2])}, b"1234", "not a non-negative integer"),
        ({"a": entry(0, 4, [4.0])}, b"1234", "not a non-negative integer"),  # type: ignore[list-item]
        ({"a": entry(0, 4, [True])}, b"1234", "not a non-negative integer"),
        ({"a": entry(0, 4, [1 << 63])}, b"1234", "not a non-negative integer of 64 bits"),
        ({"a": entry(0, 4, dtype="F4")}, b"1234", "has unknown dtype F4"),
        ({"a": entry(0, 4) | {"dtype": []}}, b"1234", "has unknown dtype"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, b"1234", "no dtype, shape or data_offsets"),
        ({"a": {"dtype": "U8"}}, b"", "no dtype, shape or data_offsets"),
        ({"a": None}, b"", "no dtype, shape or data_offsets"),
    ],
)
def test_a_header_that_contradicts_the_format(
    tmp_path: Path, entries: dict[str, Any], data: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write_entries(tmp_path / SINGLE, entries, data))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "header of .* is not valid JSON"),
        (b"{", "header of .* is not valid JSON"),
        (b"\xff\xfe{}", "header of .* is not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": {}, "a": {}}', "duplicate key a"),
        (b"[" * 100_000, "header of .* is not valid JSON"),
    ],
)
def test_a_header_that_is_no_json_object(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / SINGLE, header))


@pytest.mark.parametrize("size", [100_000_001, 5_000_000_000])
def test_a_header_longer_than_the_library_accepts(tmp_path: Path, size: int) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(size.to_bytes(8, "little"))
    os.truncate(path, size + 8)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"a header of {size} bytes"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


HEADER = json.dumps({"a": entry(0, 4), "b": entry(4, 8, [1], "F32")}).encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(HEADER) + 15), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    path = write(tmp_path / SINGLE, HEADER, b"12345678")
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[place] = value
    path.write_bytes(data)
    with suppress(CheckpointError):
        assert sum(tensor.length for tensor in read_header(path).values()) == 8


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_as_header_is_refused_or_describes_the_file(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / SINGLE, json.dumps({"a": header}).encode())
    with pytest.raises(CheckpointError):
        read_header(path)


def shards(folder: Path) -> dict[str, str]:
    """Two shards and their index; gives the index's map."""
    names = sorted(TENSORS)
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: TENSORS[name] for name in part}, folder / f"model-{number}.safetensors")
    weight_map = {name: f"model-{int(i > 2)}.safetensors" for i, name in enumerate(names)}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    shards(tmp_path)
    found = open_checkpoint(tmp_path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }


def test_links_into_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "0123")
    (folder / SINGLE).symlink_to(Path("../../blobs/0123"))
    assert set(open_checkpoint(folder)) == set(TENSORS)


@pytest.mark.parametrize("below", ["", "bf16", "a/b"])
def test_links_of_a_subfolder_of_a_hugging_face_cache_are_followed(tmp_path: Path, below: str) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc" / below, tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "0123")
    (folder / SINGLE).symlink_to(blobs / "0123")
    assert set(open_checkpoint(folder)) == set(TENSORS)
    elsewhere = tmp_path / "other" / "blobs"
    elsewhere.mkdir(parents=True)
    (blobs / "0123").rename(elsewhere / "0123")
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(elsewhere / "0123")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(folder)


def test_a_folder_of_links_to_a_checkpoint_is_one(tmp_path: Path) -> None:
    """config.json says where the checkpoint is; the other links must end there too, over any number of links."""
    there, links, again = (tmp_path / name for name in ("there", "links", "again"))
    for folder in (there, links, again):
        folder.mkdir()
    shards(there)
    (there / "config.json").write_text("{}")
    for source, folder in ((there, links), (links, again)):
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)
        assert set(open_checkpoint(folder)) == set(TENSORS)
    (links / "config.json").unlink()
    (links / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(links)


def test_an_index_may_list_the_single_file(tmp_path: Path) -> None:
    """A save that would shard a larger model; a second file is a shard like any other."""
    save_file(TENSORS, tmp_path / SINGLE)
    write_index(tmp_path, dict.fromkeys(TENSORS, SINGLE))
    assert set(open_checkpoint(tmp_path)) == set(TENSORS)
    save_file({"mtp.x": torch.zeros(1)}, tmp_path / "mtp.safetensors")
    write_index(tmp_path, dict.fromkeys(TENSORS, SINGLE) | {"mtp.x": "mtp.safetensors"})
    assert set(open_checkpoint(tmp_path)) == {*TENSORS, "mtp.x"}
    write_index(tmp_path, {"mtp.x": "mtp.safetensors"})
    with pytest.raises(CheckpointError, match=r"has both .* which does not list it"):
        open_checkpoint(tmp_path)


def numbered_shards(folder: Path, total: int) -> None:
    names = sorted(TENSORS)
    for n in range(total):
        part = {name: TENSORS[name] for name in names[n::total]}
        save_file(part, folder / f"model-{n + 1:05}-of-{total:05}.safetensors")


def test_shards_tell_how_many_they_are(tmp_path: Path) -> None:
    numbered_shards(tmp_path, 3)
    assert set(open_checkpoint(tmp_path)) == set(TENSORS)
    extra = tmp_path / "model-00004-of-00003.safetensors"
    save_file({"x": torch.zeros(1)}, extra)
    with pytest.raises(CheckpointError, match="it has more shards than the 3 of one model"):
        open_checkpoint(tmp_path)
    extra.unlink()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no .*index.json, and model-00002-of-00003.safetensors is missing"
    ):
        open_checkpoint(tmp_path)


def drop_shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model-1.safetensors").unlink()


def name_a_file_outside(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, weight_map | {"scalar": "../model.safetensors"})


def name_an_absolute_file(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, weight_map | {"scalar": "/etc/passwd"})


def link_outside(folder: Path, weight_map: dict[str, str]) -> None:
    outside = folder.parent / f"{folder.name}.outside"
    (folder / "model-1.safetensors").rename(outside)
    (folder / "model-1.safetensors").symlink_to(outside)


def list_what_no_shard_holds(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, weight_map | {"other": "model-0.safetensors"})


def list_too_little(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, {name: shard for name, shard in weight_map.items() if name != "scalar"})


def list_in_the_wrong_shard(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, weight_map | {"scalar": "model-0.safetensors"})


def store_twice(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"fp8": TENSORS["fp8"], "scalar": TENSORS["scalar"]}, folder / "model-2.safetensors")
    write_index(folder, weight_map | {"x": "model-2.safetensors"})


def map_to_numbers(folder: Path, weight_map: dict[str, str]) -> None:
    write_index(folder, dict.fromkeys(weight_map, 1))


def leave_out_the_map(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text("{}")


def keep_a_single_file_too(folder: Path, weight_map: dict[str, str]) -> None:
    save_file(TENSORS, folder / SINGLE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "model-1.safetensors is missing"),
        (name_a_file_outside, "lists ../model.safetensors, which is not a file of"),
        (name_an_absolute_file, "lists /etc/passwd, which is not a file of"),
        (link_outside, "is a link to .*outside, outside the checkpoint"),
        (list_what_no_shard_holds, "lists other in model-0.safetensors, which does not contain it"),
        (list_too_little, "scalar is in model-1.safetensors, but .* lists it in nothing"),
        (list_in_the_wrong_shard, "scalar is in model-1.safetensors, but .* lists it in model-0.safetensors"),
        (store_twice, "is in two shards"),
        (map_to_numbers, "weight_map does not map tensors to files"),
        (leave_out_the_map, "weight_map does not map tensors to files"),
        (keep_a_single_file_too, "has both model.safetensors and"),
    ],
)
def test_an_index_that_is_not_true(
    tmp_path: Path, damage: Callable[[Path, dict[str, str]], None], message: str
) -> None:
    damage(tmp_path, shards(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickled weights, .* \(pytorch_model.bin\)"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has neither"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"[1]", "not a JSON object"), (b'{"a": 1, "a": 2}', "duplicate key a"), (b"\xff", "not valid JSON")],
)
def test_json_is_read_strictly(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)
