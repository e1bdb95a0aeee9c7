"""What was compiled is found again, or refused with what is there instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemotrt.plugins.kernel_index import Kernel, KernelError, KernelIndex
from nemotrt.plugins.kernel_store import KernelStore, cache_folder


@pytest.fixture
def index(tmp_path: Path) -> KernelIndex:
    (tmp_path / "k.cubin").write_bytes(b"cubin")
    sha256 = "b71c3a3d1a5d2f6d1f1ecb4fa8b3d3e9" * 2
    kernel = Kernel(
        *("conv", 90, "conv_fp16", "conv", "k.cubin", sha256, 5, "conv", "sm_90a", (), 2, {}),
        *(4, 1, 0, 32, 0, 0, 0),
    )
    index = KernelIndex(tmp_path, "3.7.1", (kernel,))
    index.save()
    return index


def test_what_is_not_there_is_named_with_what_is(index: KernelIndex) -> None:
    with pytest.raises(KernelError, match="no kernels of op scan; it has conv"):
        index.find("scan", 90, "conv_fp16")
    with pytest.raises(KernelError, match="no kernels of conv for SM 89; it has SM 90"):
        index.find("conv", 89, "conv_fp16")
    with pytest.raises(KernelError, match="no variant conv_bf16 of conv for SM 90"):
        index.find("conv", 90, "conv_bf16")


def test_a_changed_or_missing_cubin(index: KernelIndex) -> None:
    with pytest.raises(KernelError, match="has changed since it was compiled"):
        index.cubin(index.kernels[0])
    (index.folder / "k.cubin").unlink()
    with pytest.raises(KernelError, match="is missing: compile the kernels again"):
        index.cubin(index.kernels[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "is not JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "has schema 2, wanted 1"),
        (lambda text: "[]", "has schema None"),
        (lambda text: text.replace('"registers"', '"register"'), "lacks or adds a field"),
        (lambda text: text.replace('"triton"', '"triton_version"'), "lacks or adds a field"),
    ],
)
def test_an_index_that_is_not_one(index: KernelIndex, change: Callable[[str], str], message: str) -> None:
    path = index.folder / "kernels.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(KernelError, match=message):
        KernelIndex.load(index.folder)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"run python -m nemotrt\.plugins\.build --output"):
        KernelIndex.load(tmp_path)


def test_a_store_gives_back_only_what_was_put(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)
    assert store.get("ab01") is None
    store.put_note("ab01", {"sha256": "of something else"})
    (tmp_path / "ab" / "ab01.cubin").write_bytes(b"cubin")
    assert store.get("ab01") is None
    note = tmp_path / "ab" / "ab01.json"
    note.write_text(note.read_text().replace("something", "anything"))
    assert store.get_note("ab01") is None


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NEMO_EXPORT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/nemo-export/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_folder() == Path("/fast/nemo-export/kernels")
    monkeypatch.setenv("NEMO_EXPORT_CACHE", "~/mine")
    assert cache_folder() == Path("/home/me/mine/kernels")
