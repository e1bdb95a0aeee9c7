"""What every test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from nemotrt.exporter import environment


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random FP32 checkpoint with every kind of layer; not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


def pytest_configure() -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # several tests import ONNX Runtime themselves
    # Tensors are tiny: a second thread only waits, and the tests run on all cores already.
    torch.set_num_threads(1)
    environment.disable_amx()
    # A shell that runs the tests in the background has them ignore Ctrl-C, and so every child that is to answer it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--examples", type=int, default=0, help="random examples of each family of tests/e2e/test_fuzz.py"
    )
