"""A cubin that was changed or removed is refused, and the cache returns only what was stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotrt.plugins.kernel_index import Kernel, KernelError, KernelIndex
from nemotrt.plugins.kernel_store import KernelStore, cache_folder, digest
from nemotrt.plugins.variant import Variant


@pytest.fixture
def index(tmp_path: Path) -> KernelIndex:
    (tmp_path / "k.cubin").write_bytes(b"cubin")
    sha256 = "b71c3a3d1a5d2f6d1f1ecb4fa8b3d3e9" * 2
    variant = Variant("conv", {"x": "*fp16"}, {"TAPS": 4, "IS_FIRST": True}, 4, 1, ("x",))
    kernel = Kernel("conv", 90, variant, "k.cubin", sha256, 5, "conv", "sm_90a", 2, 0, 32, 0, 0, 0)
    return KernelIndex(tmp_path, "3.7.1", (kernel,))


def test_a_changed_or_missing_cubin(index: KernelIndex) -> None:
    with pytest.raises(KernelError, match="has changed since it was compiled"):
        index.cubin(index.kernels[0])
    (index.folder / "k.cubin").unlink()
    with pytest.raises(KernelError, match="is missing: compile the kernels again"):
        index.cubin(index.kernels[0])


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
    assert cache_folder() == Path("/home/me/.cache/nemo-export")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_folder() == Path("/fast/nemo-export")
    monkeypatch.setenv("NEMO_EXPORT_CACHE", "~/mine")
    assert cache_folder() == Path("/home/me/mine")


def test_a_cubin_is_stored_with_its_ptx(tmp_path: Path) -> None:
    store = KernelStore(tmp_path)
    facts = {"sha256": digest(b"cubin")}
    store.put("ab01", b"cubin", "ret;\n" * 1000, facts)
    assert store.get("ab01") == (b"cubin", facts)
    assert store.ptx(facts["sha256"]) == "ret;\n" * 1000
    (ptx,) = tmp_path.rglob("*.ptx.gz")
    assert ptx.stat().st_size < 100
    ptx.unlink()
    assert store.get("ab01") is None
