"""The data file has the same bytes for any piece size, resumed or linked; sparse regions stay sparse."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint
from runtime_graph import one_sequence
from safetensors.torch import save_file

from nemotrt.exporter.checkpoint import safetensors_reader, weights, zero_weights
from nemotrt.exporter.checkpoint.loaded_model import WeightSource, stored_parameters
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, read_header
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError, UsageError
from nemotrt.exporter.lowering import data_layout, external_data
from nemotrt.exporter.lowering.data_layout import Placed, allocated_bytes, data_bytes, data_path, lay_out
from nemotrt.exporter.lowering.external_data import link, write
from nemotrt.exporter.pipelines import build
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.stages.load import load
from nemotrt.model.checkpoint import Transform
from nemotrt.plugins.contract import DType


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(3, 1000 + i, generator=generator).bfloat16() for i in range(4)}


@pytest.fixture
def sources(
    tmp_path: Path, stored: dict[str, torch.Tensor]
) -> tuple[WeightSource, WeightSource, WeightSource]:
    """One tensor, two stacked ones, and one that is transformed."""
    save_file(stored | {"t2": stored["t1"] * 2}, tmp_path / "model.safetensors")
    tensors = read_header(tmp_path / "model.safetensors")
    return (
        WeightSource((tensors["t0"],), Transform.COPY),
        WeightSource((tensors["t1"], tensors["t2"]), Transform.COPY),
        WeightSource((tensors["t3"],), Transform.NEG_EXP),
    )


def laid_out(
    sources: tuple[WeightSource, WeightSource, WeightSource], dtype: DType, *, link: bool = False
) -> tuple[Placed, ...]:
    shapes = ((3, 1000), (2, 3, 1001), (3, 1003))
    return lay_out([(source, shape, dtype) for source, shape in zip(sources, shapes, strict=True)], link=link)


def run(path: Path, placed: tuple[Placed, ...], resume_from: int = 0) -> list[int]:
    synced: list[int] = []
    write(path, placed, resume_from=resume_from, advance=lambda _: None, synced=synced.append)
    return synced


def values(path: Path, placed: Placed) -> torch.Tensor:
    data = bytearray((placed.linked or path).read_bytes()[placed.offset : placed.offset + placed.length])
    return torch.frombuffer(data, dtype=placed.dtype.torch).reshape(placed.shape)


@pytest.mark.parametrize("piece", [1 << 22, 256])
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32])
def test_every_value_is_in_its_place(
    tmp_path: Path,
    stored: dict[str, torch.Tensor],
    sources: tuple[WeightSource, WeightSource, WeightSource],
    dtype: DType,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(safetensors_reader, "PIECE_BYTES", piece)
    monkeypatch.setattr(external_data, "_buffers", external_data._Buffers())
    placed = laid_out(sources, dtype)
    run(tmp_path / "data", placed)
    expected = [
        stored["t0"].to(dtype.torch),
        torch.stack([stored["t1"], stored["t1"] * 2]).to(dtype.torch),
        (-torch.exp(stored["t3"].float())).to(dtype.torch),
    ]
    for one, wanted in zip(placed, expected, strict=True):
        assert torch.equal(values(tmp_path / "data", one), wanted)
        assert one.offset % data_layout.ALIGNMENT == 0
    assert (tmp_path / "data").stat().st_size == data_layout.data_bytes(placed)


reach = external_data._Syncer.reached


def reach_slowly(self: external_data._Syncer, position: int, written: int) -> None:
    """As when the disk is faster than the conversion."""
    if self._sync is not None:
        self._sync.result()
    reach(self, position, written)


def test_a_write_resumes_from_what_was_synced(
    tmp_path: Path, sources: tuple[WeightSource, WeightSource, WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_reader, "PIECE_BYTES", 512)
    monkeypatch.setattr(external_data, "_buffers", external_data._Buffers())
    monkeypatch.setattr(external_data, "SYNC_BYTES", 1024)
    monkeypatch.setattr(external_data._Syncer, "reached", reach_slowly)
    placed = laid_out(sources, DType.BFLOAT16)
    synced = run(tmp_path / "whole", placed)
    assert synced == sorted(synced)
    assert synced
    whole = (tmp_path / "whole").read_bytes()
    for resume_from in (synced[0], synced[-1]):
        # Bytes after this position are written again, bytes before it are not.
        end = file_offset(placed, resume_from)
        (tmp_path / "again").write_bytes(b"\xee" * end + b"\xff" * (len(whole) - end))
        run(tmp_path / "again", placed, resume_from)
        data = (tmp_path / "again").read_bytes()
        assert data[:end] == b"\xee" * end
        for one in placed:
            begin = max(one.offset, end)
            assert data[begin : one.offset + one.length] == whole[begin : one.offset + one.length]


def file_offset(placed: tuple[Placed, ...], position: int) -> int:
    """The offset in the file of a position that counts the parameters' bytes."""
    for place in placed:
        if position <= place.length:
            return place.offset + position
        position -= place.length
    raise AssertionError(position)


def test_a_linked_parameter_is_not_checked_again_on_resuming(
    tmp_path: Path, sources: tuple[WeightSource, WeightSource, WeightSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = laid_out(sources, DType.BFLOAT16, link=True)
    run(tmp_path / "data", placed)
    checked: list[str] = []
    convert_piece = weights.convert_piece

    def note(tensor: StoredTensor, *arguments: Any) -> torch.Tensor:
        checked.append(tensor.name)
        return convert_piece(tensor, *arguments)

    monkeypatch.setattr(weights, "convert_piece", note)
    run(tmp_path / "data", placed, placed[0].length)
    assert sorted(checked) == ["t1", "t2", "t3"]


def test_a_linked_parameter_is_checked_and_not_written(
    tmp_path: Path, sources: tuple[WeightSource, WeightSource, WeightSource]
) -> None:
    placed = laid_out(sources, DType.BFLOAT16, link=True)
    assert [one.linked is not None for one in placed] == [True, False, False]
    run(tmp_path / "data", placed)
    assert (
        (tmp_path / "data").stat().st_size
        == data_layout.data_bytes(placed)
        < 2 * 3 * 1001 * 2 + 3 * 1003 * 2 + 8192
    )
    tensor = sources[0].tensors[0]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + 4)
        file.write(b"\xc0\x7f")
    with pytest.raises(CheckpointError, match="t0 holds NaN"):
        run(tmp_path / "data", placed)


def test_sparse_regions_stay_sparse(tmp_path: Path) -> None:
    size = 64 << 20
    path = tmp_path / "model.safetensors"
    header = b'{"t":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' % (size // 2, size)
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    source = WeightSource((read_header(path)["t"],), Transform.COPY)
    if os.stat(path).st_blocks * 512 >= size:
        pytest.skip("this file system has no holes")
    placed = lay_out([(source, (size // 2,), DType.FLOAT32)], link=False)
    written = write(tmp_path / "data", placed, advance=lambda _: None, synced=lambda _: None)
    assert (
        written == allocated_bytes(placed) <= safetensors_reader.PIECE_BYTES * 2
    )  # the piece that shares a block with the header
    assert (tmp_path / "data").stat().st_size == 2 * size
    assert os.stat(tmp_path / "data").st_blocks * 512 <= written + 65536


def test_a_disk_that_fails_while_weights_are_read(tmp_path: Path) -> None:
    """Both names, and not the output's: reading the first bytes of a process's memory is an input/output error."""
    tensor = StoredTensor("t", DType.FLOAT32, (2, 3), Path("/proc/self/mem"), 0, 24)
    source = WeightSource((tensor,), Transform.COPY)
    message = "mem: t cannot be read: Input/output error"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "data", lay_out([(source, (2, 3), DType.FLOAT32)], link=False))
    with pytest.raises(CheckpointError, match=message):
        zero_weights.find({"t": source}, tmp_path)


def test_an_impossible_link_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shard").write_bytes(b"x")
    (tmp_path / "bundle").mkdir()

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(external_data.fcntl, "ioctl", refuse)
    with pytest.raises(UsageError, match="Invalid cross-device link") as caught:
        link(tmp_path / "shard", tmp_path / "bundle")
    assert "--weights copy" in caught.value.hint
    assert not any((tmp_path / "bundle").iterdir())


def built(checkpoint: Path, output: Path, **options: str) -> Path:
    config = BuildConfig(checkpoint=checkpoint, output=output, runtime="onnx", validate=False, **options)  # type: ignore[arg-type]
    build.build(config)
    return output


def test_the_onnx_package_refuses_hard_links_and_takes_a_copy(checkpoint: Path, tmp_path: Path) -> None:
    """As docs/comparing.md says; a file system that clones makes no hard links."""
    linked = built(checkpoint, tmp_path / "linked", weights="link")
    if (linked / "model.safetensors").stat().st_nlink > 1:
        with pytest.raises(onnx.checker.ValidationError, match="multiple hard links"):
            onnx.load(linked / "model.onnx")
    shutil.copytree(linked, tmp_path / "copy")
    assert onnx.load(tmp_path / "copy" / "model.onnx").graph.initializer


def test_a_linked_bundle_is_complete_and_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    copied, linked = (
        built(checkpoint, tmp_path / "copied"),
        built(checkpoint, tmp_path / "linked", weights="link"),
    )
    assert (linked / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert (
        data_path(linked / "model.onnx").stat().st_size < data_path(copied / "model.onnx").stat().st_size / 2
    )
    manifest.verify(linked, deep=True)
    step = one_sequence(range(5), pages=(1,))
    logits = [Session(at / "model.onnx", num_slots=2, num_pages=2).step(step) for at in (copied, linked)]
    np.testing.assert_array_equal(*logits)


def test_a_build_that_is_interrupted_in_its_weights_resumes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = data_path(built(checkpoint, tmp_path / "whole") / "model.onnx").read_bytes()
    monkeypatch.setattr(external_data, "SYNC_BYTES", 4096)

    reached: list[int] = []

    def reach_and_stop(self: external_data._Syncer, position: int, written: int) -> None:
        reached.append(position)
        reach_slowly(self, position, written)
        if len(reached) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(external_data._Syncer, "reached", reach_and_stop)
    with pytest.raises(KeyboardInterrupt):
        built(checkpoint, tmp_path / "out")
    monkeypatch.setattr(external_data._Syncer, "reached", reach)
    resumed: list[int] = []
    genuine_write = external_data.write

    def note(*arguments: object, **options: int) -> int:
        resumed.append(options["resume_from"])
        return genuine_write(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(external_data, "write", note)
    assert data_path(built(checkpoint, tmp_path / "out") / "model.onnx").read_bytes() == expected
    assert resumed[0] > 0


@pytest.mark.parametrize("how", ["copy", "link"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_of_the_data_file_is_known_before(tmp_path: Path, how: str, tied: bool) -> None:
    model = load(write_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=tied))
    placed = lay_out(stored_parameters(model.config, model.weights, DType.FLOAT32), link=how == "link")
    data = data_path(built(tmp_path / "checkpoint", tmp_path / "out", weights=how) / "model.onnx")
    assert data_bytes(placed) == data.stat().st_size
    assert allocated_bytes(placed) == sum(one.length for one in placed)
