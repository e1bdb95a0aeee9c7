"""A long sequence in pieces: what comes out is the reference's, and nothing but its own pages grows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import FP32_RELATIVE_L2
from nemotrt.exporter.validation.runners.torch import TorchRunner

TOKENS, PIECE = 8192, 1000
"""8 pieces and a shorter one, which ends within a page."""


def piece(tokens: np.ndarray, done: int, pages: int) -> StepInputs:
    """The next tokens of the one sequence, the last of them wanting logits."""
    ids = tokens[done : done + PIECE]
    return StepInputs(
        input_ids=ids,
        query_start=np.asarray([0, len(ids)], dtype=np.int32),
        context_len=np.asarray([done], dtype=np.int32),
        slot=np.ones(1, dtype=np.int32),
        page_table=np.arange(1, pages + 1, dtype=np.int32)[None, ::-1].copy(),
        logits_row=np.asarray([len(ids) - 1], dtype=np.int32),
    )


@pytest.mark.slow
def test_a_long_sequence_in_pieces(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    config = BuildConfig(checkpoint=checkpoint, output=tmp_path, precision="fp32")
    lower(model, trace(model, config), tmp_path / "model.onnx")
    pages = pages_of(TOKENS, config.page_size)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS, dtype=np.int64)
    session = Session(tmp_path / "model.onnx", num_slots=2, num_pages=1 + pages)
    pools = model.pools(config)
    reference = TorchRunner(model, pools, torch.float32)
    reference.reset({spec.name: session.pool(spec.name) for spec in pools})
    where = {name: session._values[name].data_ptr() for name in session.pool_names}
    for done in range(0, TOKENS, PIECE):
        inputs = piece(tokens, done, pages)
        found, expected = session.step(inputs), reference.step(inputs)
        assert metrics.relative_l2(found.astype(np.float64), expected) < FP32_RELATIVE_L2, done
    assert where == {name: session._values[name].data_ptr() for name in session.pool_names}
    for name in session.pool_names:
        values = reference.pool(name)
        assert session.pool(name).shape == values.shape
        assert metrics.relative_l2(session.pool(name)[1:].astype(np.float64), values[1:]) < FP32_RELATIVE_L2
