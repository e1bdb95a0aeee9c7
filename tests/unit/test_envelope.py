"""The envelope reaches every limit of a profile with valid steps, and what stays below a limit fails a gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SMALL_LIMITS, write_checkpoint
from faults import Graph, broken, limits
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.engines.shape_profiles import COMPARED_ROWS
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.pipelines import estimates
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import check_step
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.validation import envelope as envelopes
from nemotrt.exporter.validation import gates
from nemotrt.exporter.validation.candidates import graph_candidate
from nemotrt.exporter.validation.envelope import Envelope, Limit, driven, reached
from nemotrt.exporter.validation.plan import plan_validation
from nemotrt.exporter.validation.same_program import SAME_PROGRAM
from nemotrt.exporter.validation.validate import validate, validate_parts

DEFAULT = Envelope(2048, 16, 8192, 128)


@st.composite
def profiles(draw: st.DrawFn) -> Envelope:
    sequences = draw(st.integers(1, 20))
    context = draw(st.integers(1, 3000))
    tokens = draw(st.integers(sequences, sequences * context)) % 3000
    return Envelope(max(sequences, tokens), sequences, context, draw(st.sampled_from([1, 8, 16, 128])))


@settings(max_examples=60, deadline=None)
@given(profiles(), st.integers(0, 3))
def test_every_limit_is_reached_by_valid_steps(envelope: Envelope, seed: int) -> None:
    steps = envelope.steps(vocab_size=50, seed=seed)
    slots, pages = envelope.sizes
    for inputs in steps:
        check_step(inputs, vocab_size=50, num_slots=slots, num_pages=pages, page_size=envelope.page_size)
        assert len(inputs.input_ids) <= envelope.max_tokens
        assert 0 < len(inputs.logits_row) <= max(COMPARED_ROWS, envelope.max_sequences)
        assert inputs.query_start[-1] - 1 in inputs.logits_row
    assert reached(steps, envelope.page_size) == envelope.promised


def test_the_default_profile_has_deep_and_long_and_empty_sequences() -> None:
    mixture, decode, prompt = DEFAULT.steps(vocab_size=1000, seed=0)
    lengths = np.diff(mixture.query_start)
    assert {0, 1, 63, 64, 65, 127, 128, 129} <= set(lengths.tolist())
    assert lengths.sum() == 2048
    ends = mixture.context_len + lengths
    assert ends.max() == 8192
    assert {127, 128, 129, 511, 512, 513, 2047, 2048, 2049} <= set(mixture.context_len.tolist())
    assert (decode.context_len.max(), len(decode.slot)) == (8191, 16)
    assert (len(prompt.slot), prompt.query_start[-1]) == (1, 2048)
    assert (np.diff(decode.slot) != 1).any()


@pytest.mark.parametrize("limit", list(Limit))
def test_what_stays_below_a_limit_fails(limit: Limit) -> None:
    lower = {
        Limit.TOKENS: Envelope(2047, 16, 8192, 128),
        Limit.SEQUENCES: Envelope(2048, 15, 8192, 128),
        Limit.CONTEXT: Envelope(2048, 16, 8191, 128),
        Limit.SLOT: Envelope(2048, 15, 8192, 128),
        Limit.PAGE: Envelope(2048, 16, 8064, 128),
    }[limit]
    below = envelopes.gates(driven(DEFAULT, lower.steps(50, 0)))
    assert limit in {gate.output for gate in below if not gate.passed}
    assert all(gate.passed for gate in envelopes.gates(driven(DEFAULT, (), DEFAULT.steps(50, 0))))


class Right:
    """A right graph of every kind of layer with small pages, and its validation on a few decode steps."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.model: LoadedModel = load(checkpoint)
        self.config = BuildConfig(checkpoint, folder, "fp32", page_size=16, **SMALL_LIMITS)
        self.graph = folder / "model.onnx"
        lower(self.model, trace(self.model, self.config), self.graph)

    def failed(self, whole: bool) -> set[str]:
        plan = plan_validation(self.model, self.config, drift_steps=0, with_envelope=whole)
        report = validate(self.model, self.config, graph_candidate(OnnxGraph.read(self.graph)), plan)
        return {gate.scenario for gate in report.gates if not gate.passed}


BEYOND_SHORT_STEPS: dict[str, Callable[[Graph], None]] = {
    "slot modulo 5": limits.slot_modulo(5),
    "page modulo 64": limits.page_modulo(64),
    "context capped": limits.capped_context(200),
    "tokens from the 129th on": limits.lost_tokens(128),
    "sequences from the 5th on": limits.forgetful_sequences(5),
}
"""Faults that no short scenario sees."""


@pytest.mark.parametrize("whole", [True, False], ids=["the whole model", "layers alone"])
@pytest.mark.parametrize("name", BEYOND_SHORT_STEPS)
def test_a_fault_near_a_limit_is_caught(checkpoint: Path, tmp_path: Path, name: str, whole: bool) -> None:
    right = Right(checkpoint, tmp_path)
    broken(right.graph, BEYOND_SHORT_STEPS[name])
    failed = right.failed(whole)
    assert gates.ALONE_AT_LIMITS in failed
    assert (envelopes.SCENARIO in failed) == whole
    assert failed <= {gates.ALONE_AT_LIMITS, envelopes.SCENARIO, SAME_PROGRAM}


@pytest.mark.parametrize("whole", [True, False], ids=["the whole model", "layers alone"])
def test_a_right_graph_reaches_its_limits(checkpoint: Path, tmp_path: Path, whole: bool) -> None:
    assert Right(checkpoint, tmp_path).failed(whole) == set()


UNUSUAL_STEPS: dict[str, tuple[Callable[[Graph], None], str]] = {
    "rows of logits in another order": (limits.sorted_rows, "head"),
    "the last token of the vocabulary": (limits.capped_tokens, "embeddings"),
    "a chunk of two tokens": (limits.forgetful_chunks(2), "layers.0"),
    "a chunk of three tokens": (limits.forgetful_chunks(3), "layers.0"),
}
"""Faults that act in steps which few prompts have, alike in all layers, and the part that shows them."""


@pytest.mark.parametrize("name", UNUSUAL_STEPS)
def test_a_fault_in_an_unusual_step_is_caught(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    right = Right(write_checkpoint(folder, hybrid_override_pattern="MM", vocab_size=20_000), tmp_path)
    inject, part = UNUSUAL_STEPS[name]
    broken(right.graph, inject)
    report = validate_parts(right.model, right.config, OnnxGraph.read(right.graph))
    assert part in {gate.output.split()[0] for gate in report.gates if not gate.passed}


@pytest.mark.parametrize(
    "limits",
    [
        {"max_tokens": 16, "max_context": 1 << 20},
        {"max_tokens": 2**31 - 1},
        {"max_tokens": 1 << 20, "max_sequences": 1 << 20},
        {"max_tokens": 2**31 - 1, "max_sequences": 1 << 20, "max_context": 1 << 20},
    ],
    ids=["context", "tokens", "sequences", "all"],
)
def test_a_profile_too_large_for_the_memory_is_refused_with_one_that_fits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    model = load(checkpoint)
    monkeypatch.setattr(estimates, "memory_bytes", lambda: 1_000_000_000)
    refused = "validating .* sequences of .* tokens, in steps of .* tokens, needs about"
    with pytest.raises(UsageError, match=refused) as caught:
        estimates.check_envelope(model, BuildConfig(checkpoint, Path("out"), "fp32", **limits))
    choices = caught.value.hint.split(" can be validated")[0].split(" or ")
    for choice in choices:
        words = choice.split()
        fitting = {
            name[2:].replace("-", "_"): int(size) for name, size in zip(words[::2], words[1::2], strict=True)
        }
        estimates.check_envelope(model, BuildConfig(checkpoint, Path("out"), "fp32", **limits | fitting))
        assert all(size < limits[name] for name, size in fitting.items() if name in limits)
        if len(fitting) == 1:
            ((name, size),) = fitting.items()
            unit = 128 if name == "max_context" else 1
            beyond = BuildConfig(checkpoint, Path("out"), "fp32", **limits | {name: size + unit})
            with pytest.raises(UsageError, match=refused):
                estimates.check_envelope(model, beyond)
