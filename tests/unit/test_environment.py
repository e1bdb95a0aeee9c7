"""The process-wide settings of libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nemotrt.exporter import environment

VARIABLE = "ONEDNN_MAX_CPU_ISA"


@pytest.mark.parametrize(("before", "after"), [(None, "AVX512_CORE_FP16"), ("AVX2", "AVX2")])
def test_amx_is_disabled_unless_the_user_chose_an_instruction_set(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv(VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(VARIABLE)
    environment.disable_amx()
    assert os.environ[VARIABLE] == after


def test_reading_weights_disables_amx() -> None:
    """PyTorch computes nothing before the module is imported that reads its weights."""
    code = "import os; import nemotrt.exporter.checkpoint.weights; print(os.environ['ONEDNN_MAX_CPU_ISA'])"
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "AVX512_CORE_FP16"
