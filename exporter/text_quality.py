"""What quantisation costs on text: the reference as quantised, and the graph, against the model as it was before.

Three figures are kept apart. *Conversion*, the graph against the reference as quantised, is what a validation's gates
judge on any tokens; *quantisation* and *total* need a trained model and real text, and are measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nemotrt.exporter import metrics
from nemotrt.exporter.artifacts import Gate, LayerCost, LoadedModel, TextFigure, TextReport
from nemotrt.exporter.calibration_text import SEQUENCE, Sequences
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.runners import Array, GraphRunner
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.torch_runner import TorchRunner

MEAN_KL, OTHER_TOP, PERPLEXITY_RATIO = 0.02, 0.03, 1.01
"""Limits on the text: nats a token, the share of tokens whose best differs, and how much perplexity may grow."""

ATTRIBUTION_SEQUENCES = 4
"""Of the text, for what each layer costs: it runs once more for each layer."""


def measure(
    model: LoadedModel,
    base: LoadedModel,
    config: BuildConfig,
    graph: Path,
    text: Sequences,
    name: str,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> TextReport:
    """The figures of the quantised model and of its graph against `base`, and what each layer's quantisation costs.

    `advance` hears of the sequences that were run, `num_runs` in all.
    """
    before = TorchRunner(base, base.pools(config), torch.float32)
    quantised = TorchRunner(model, model.pools(config), torch.float32)
    pages = 1 + pages_of(SEQUENCE, config.page_size)
    built = GraphRunner(graph, num_slots=2, num_pages=pages)
    steps = [_step(sequence, config.page_size) for sequence in text]
    zeros = _zeros(model, config, pages)
    quantisation, total = _Tally(), _Tally()
    for runner in (before, quantised, built):
        runner.reset(zeros)
    for inputs in steps:
        reference = before.step(inputs)
        quantisation.add(quantised.step(inputs), reference, inputs)
        total.add(built.step(inputs), reference, inputs)
        advance(3)
    costs = []
    for layer in _quantised_layers(model):
        tally = _Tally()
        for inputs in steps[:ATTRIBUTION_SEQUENCES]:
            before.reset(zeros)
            reference = before.step(inputs)
            with before.borrowed(quantised, layer):
                before.reset(zeros)
                tally.add(before.step(inputs), reference, inputs)
            advance(2)
        figure = tally.figure("")
        kind = model.config.numbered_layers[layer]
        costs.append(LayerCost(layer, kind, figure.mean_kl, figure.mean_kl_error))
    return TextReport(
        text=name,
        num_tokens=sum(map(len, text)),
        base=base.folder.name,
        figures=(quantisation.figure("quantisation"), total.figure("total")),
        layers=tuple(sorted(costs, key=lambda cost: -cost.mean_kl)),
    )


def num_runs(model: LoadedModel, text: Sequences) -> int:
    """Sequences that `measure` runs."""
    return 3 * len(text) + 2 * len(_quantised_layers(model)) * min(len(text), ATTRIBUTION_SEQUENCES)


def gates(report: TextReport) -> tuple[Gate, ...]:
    """Each figure against its limit."""
    return tuple(
        Gate(f"text {report.text}", figure.name, metric, value, limit)
        for figure in report.figures
        for metric, value, limit in (
            ("mean KL", figure.mean_kl, MEAN_KL),
            ("other best token", 1 - figure.same_top, OTHER_TOP),
            ("perplexity ratio", figure.perplexity_ratio, PERPLEXITY_RATIO),
        )
    )


def _quantised_layers(model: LoadedModel) -> list[int]:
    recipe = model.config.recipe
    own = {int(name.split(".")[2]) for name in recipe.modules}
    kinds = model.config.numbered_layers
    return [i for i, kind in kinds.items() if i in own or (recipe.kv_cache and kind == "attention")]


def _zeros(model: LoadedModel, config: BuildConfig, pages: int) -> dict[str, NDArray[np.float32]]:
    return {
        pool.name: np.zeros((pages if pool.is_paged else 2, *pool.row_shape), dtype=np.float32)
        for pool in model.pools(config)
    }


def _step(sequence: NDArray[np.int64], page_size: int) -> StepInputs:
    """A fresh sequence at once, every token's logits wanted."""
    count = len(sequence)
    return StepInputs(
        input_ids=sequence,
        query_start=np.asarray([0, count], dtype=np.int32),
        context_len=np.zeros(1, dtype=np.int32),
        slot=np.ones(1, dtype=np.int32),
        page_table=np.arange(1, pages_of(count, page_size) + 1, dtype=np.int32)[None],
        logits_row=np.arange(count, dtype=np.int32),
    )


class _Tally:
    """Values a token, as sequences are added; the last token of a sequence has none that follows."""

    def __init__(self) -> None:
        self._kl: list[Array] = []
        self._is_same: list[NDArray[np.bool_]] = []
        self._surprise: list[Array] = []

    def add(self, candidate: Array, reference: Array, inputs: StepInputs) -> None:
        candidate, reference, following = candidate[:-1], reference[:-1], inputs.input_ids[1:]
        self._kl.append(metrics.kl_divergence(candidate, reference))
        self._is_same.append(candidate.argmax(-1) == reference.argmax(-1))
        self._surprise.append(metrics.surprise(candidate, following) - metrics.surprise(reference, following))

    def figure(self, name: str) -> TextFigure:
        kl, kl_error = metrics.mean_and_error(np.concatenate(self._kl))
        same, same_error = metrics.mean_and_error(np.concatenate(self._is_same).astype(np.float64))
        growth, growth_error = metrics.mean_and_error(np.concatenate(self._surprise))
        ratio = float(np.exp(growth))
        return TextFigure(name, kl, kl_error, same, same_error, ratio, ratio * growth_error)
