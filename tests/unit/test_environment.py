"""What the machine is asked, and what is done about a processor that promises more than it has."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from nemotrt.exporter import environment

VARIABLE = "ONEDNN_MAX_CPU_ISA"


@pytest.mark.parametrize(
    ("flags", "palette", "hidden"),
    [
        ("avx512f amx_tile avx512_fp16", 0, "AVX512_CORE_FP16"),
        ("avx512f amx_tile avx512_fp16", 1, None),
        ("avx512f amx_tile avx512_fp16", None, None),
        ("avx512f avx512_fp16", 0, None),
    ],
)
def test_amx_without_tiles_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, palette: int | None, hidden: str | None
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} arat\n")
    monkeypatch.setattr(environment, "CPU_FLAGS", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment, "_max_tile_palette", lambda: palette)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    environment.hide_unusable_amx()
    assert os.environ.get(VARIABLE) == hidden


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_max_tile_palette", lambda: 0)
    monkeypatch.setenv(VARIABLE, "AVX2")
    environment.hide_unusable_amx()
    assert os.environ[VARIABLE] == "AVX2"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is x86-64's")
def test_the_processor_answers() -> None:
    assert environment._max_tile_palette() in (0, 1, None)
