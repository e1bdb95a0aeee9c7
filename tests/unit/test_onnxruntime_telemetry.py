"""Running a graph leaves no telemetry behind: no device id, no database of events, no connection."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runtime_graph import write_graph

PROGRAM = """
import sys
from pathlib import Path
from nemotrt.exporter.runtime.session import Session
Session(Path(sys.argv[1]), num_slots=2, num_pages=2, threads=1)
"""


def test_a_fresh_home_stays_empty_and_nothing_connects(tmp_path: Path) -> None:
    graph, home, trace = write_graph(tmp_path / "graph"), tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        environment.pop(name, None)
    strace = shutil.which("strace")
    tracing = [strace, "-f", "-e", "trace=connect", "-o", str(trace)] if strace else []
    command = [*tracing, sys.executable, "-c", PROGRAM, str(graph)]
    result = subprocess.run(
        command,
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if tracing and "ptrace" in result.stderr:
        pytest.skip(f"strace may not trace here: {result.stderr}")
    assert result.returncode == 0, result.stderr
    # ONNX Runtime 1.32 would write .cache/Microsoft/DeveloperTools/.onnxruntime/{deviceid,onnxruntime.db}.
    assert list(home.rglob("*")) == []
    if tracing:
        assert "AF_INET" not in trace.read_text()
