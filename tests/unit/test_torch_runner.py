"""The PyTorch model as a runner."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import torch

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.validation.runners.torch import TorchRunner


def test_its_weights_go_with_it(checkpoint: Path) -> None:
    """At once, not when garbage is looked for: a validation makes several, and has memory for one."""
    model = load(checkpoint)
    runner = TorchRunner(model, model.pools(BuildConfig(checkpoint, Path(), precision="fp32")), torch.float32)
    held = [weakref.ref(value) for value in runner._network.parameters()]
    gc.disable()
    try:
        del runner
        assert not any(value() is not None for value in held)
    finally:
        gc.enable()
