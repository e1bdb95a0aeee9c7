"""Compares a bundle with PyTorch on text: the error of the conversion, and the cost of quantization.

*Conversion* compares the graph with the same model in PyTorch, quantized alike. Its limit is three times the rounding
*baseline*: the error of PyTorch at the graph's precision. For a quantized model, *quantization* compares the quantized
reference with the unquantized model, and *total* compares the graph with the unquantized model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.quantization.text import SEQUENCE_TOKENS, Sequences
from nemotrt.exporter.report.model import Gate, Metric, TextComparison, TextReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import BASELINE_FACTOR
from nemotrt.exporter.validation.routing import num_mismatches
from nemotrt.exporter.validation.runners.base import Array, GraphRunner
from nemotrt.exporter.validation.runners.torch import TorchRunner

MEAN_KL, OTHER_TOP, PERPLEXITY_RATIO = 0.02, 0.03, 1.01
"""Limits of what quantization may cost: nats a token, the share of tokens whose best differs, growth of perplexity."""

FP32_MEAN_KL = 1e-6
"""FP32's logits may be off by 1e-4 of themselves: some 1e-3 of logits that reach 10, and KL is half its square."""

ATTRIBUTION_SEQUENCES = 4
"""Of the text, for what each layer costs: it runs once more for each layer."""

CONVERSION, BASELINE, QUANTIZATION, TOTAL = "conversion", "baseline", "quantization", "total"


@dataclass(frozen=True)
class _Runners:
    """The graph, the same model in FP32 and at the graph's precision, and the model before it was quantized."""

    built: GraphRunner
    reference: TorchRunner
    baseline: TorchRunner | None
    before: TorchRunner | None


def measure(
    model: LoadedModel,
    base: LoadedModel | None,
    config: BuildConfig,
    graph: OnnxGraph,
    text: Sequences,
    name: str,
    *,
    advance: Advance = ignore,
) -> TextReport:
    """The figures of the graph, and with a `base`, from which the model was quantized, what that and each layer cost.

    `advance` hears of the sequences that were run, `num_runs` in all.
    """
    dtype, pools = config.dtype, model.pools(config)
    pages = 1 + pages_of(SEQUENCE_TOKENS, config.page_size)
    runners = _Runners(
        built=GraphRunner(graph, num_slots=2, num_pages=pages, bound=False),
        reference=TorchRunner(model, pools, torch.float32),
        baseline=TorchRunner(model, pools, getattr(torch, dtype)) if dtype != "float32" else None,
        before=TorchRunner(base, base.pools(config), torch.float32) if base else None,
    )
    zeros = _zeros(model, config, pages)
    for runner in (runners.built, runners.reference, runners.baseline, runners.before):
        if runner:
            runner.reset(zeros)
    tallies: dict[str, _Tally] = {}
    steps = [_step(sequence, config.page_size) for sequence in text]
    for inputs in steps:
        for name_, (candidate, reference) in _figures(runners, inputs).items():
            tallies.setdefault(name_, _Tally()).add(candidate, reference, inputs)
        advance(1)
    costs: list[TextComparison] = []
    if runners.before:
        costs = _costs(model, runners.before, runners.reference, steps, zeros, advance)
    return TextReport(
        text=name,
        num_tokens=sum(map(len, text)),
        base=base.folder.resolve().name if base else "",
        comparisons=tuple(tally.comparison(name) for name, tally in tallies.items()),
        layers=tuple(sorted(costs, key=lambda cost: -cost.mean_kl)),
    )


def _figures(runners: _Runners, inputs: StepInputs) -> dict[str, tuple[Array, Array]]:
    """Logits of one sequence, which is fresh, for each figure: the candidate's, and what they are compared with."""
    seen, expected = runners.built.step(inputs), runners.reference.step(inputs)
    own = runners.reference.router_logits()

    def beside(runner: GraphRunner | TorchRunner) -> Array:
        """The reference on the runner's choice of experts: near ties are no loss."""
        leader = runner.router_logits()
        if not num_mismatches(runners.reference.choosing, [own], [leader]):
            return expected
        return runners.reference.step(inputs, leader)

    found = {CONVERSION: (seen, beside(runners.built))}
    if runners.baseline:
        lowered = runners.baseline.step(inputs)
        found[BASELINE] = (lowered, beside(runners.baseline))
    if runners.before:
        before = runners.before.step(inputs)
        found |= {QUANTIZATION: (expected, before), TOTAL: (seen, before)}
    return found


def _costs(
    model: LoadedModel,
    before: TorchRunner,
    quantized: TorchRunner,
    steps: list[StepInputs],
    zeros: dict[str, NDArray[np.float32]],
    advance: Advance,
) -> list[TextComparison]:
    """What quantizing each layer alone costs."""
    costs = []
    for layer in _quantized_layers(model):
        tally = _Tally()
        for inputs in steps[:ATTRIBUTION_SEQUENCES]:
            before.reset(zeros)
            reference = before.step(inputs)
            with before.borrowed(quantized, layer):
                before.reset(zeros)
                tally.add(before.step(inputs), reference, inputs)
            advance(1)
        costs.append(tally.comparison(f"layers.{layer}", model.config.numbered_layers[layer]))
    return costs


def num_copies(base: LoadedModel | None) -> float:
    """Of the weights in FP32, that `measure` holds at most."""
    return 2.5 if base else 1.5


def num_runs(model: LoadedModel, base: LoadedModel | None, text: Sequences) -> int:
    """Sequences that `measure` tells of."""
    attributed = len(_quantized_layers(model)) * min(len(text), ATTRIBUTION_SEQUENCES) if base else 0
    return len(text) + attributed


def gates(report: TextReport) -> tuple[Gate, ...]:
    """Conversion against the baseline, or FP32's limits; what quantization costs against its own."""
    figures = {figure.name: figure for figure in report.comparisons}
    scenario = f"text {report.text}"
    found = [
        Gate(scenario, figure.name, metric, value, limit)
        for figure in report.comparisons
        if figure.name in (QUANTIZATION, TOTAL)
        for metric, value, limit in (
            (Metric.MEAN_KL, figure.mean_kl, MEAN_KL),
            (Metric.TOP1_DISAGREEMENT, 1 - figure.top1_agreement, OTHER_TOP),
            (Metric.PERPLEXITY_RATIO, figure.perplexity_ratio, PERPLEXITY_RATIO),
        )
    ]
    own, baseline = figures[CONVERSION], figures.get(BASELINE)
    return (*_conversion(scenario, own, baseline, report.num_tokens), *found)


def _conversion(
    scenario: str, own: TextComparison, baseline: TextComparison | None, num_tokens: int
) -> list[Gate]:
    growth, other = abs(own.perplexity_ratio - 1), 1 - own.top1_agreement
    # A baseline without a flip may as well have had one, and a ratio that came out right is luck within its error.
    one = 1 / num_tokens
    if baseline is None:
        spread = (2 * FP32_MEAN_KL) ** 0.5
        return [
            Gate(scenario, CONVERSION, Metric.MEAN_KL, own.mean_kl, FP32_MEAN_KL),
            Gate(scenario, CONVERSION, Metric.TOP1_DISAGREEMENT, other, (BASELINE_FACTOR + 0.5) * one),
            Gate(scenario, CONVERSION, Metric.PERPLEXITY_CHANGE, growth, spread),
        ]
    flips, drift = 1 - baseline.top1_agreement, abs(baseline.perplexity_ratio - 1)
    luck = max(drift, baseline.perplexity_ratio_error)
    return [
        Gate(
            scenario,
            CONVERSION,
            Metric.MEAN_KL,
            own.mean_kl,
            BASELINE_FACTOR * baseline.mean_kl,
            baseline.mean_kl,
        ),
        Gate(
            scenario,
            CONVERSION,
            Metric.TOP1_DISAGREEMENT,
            other,
            BASELINE_FACTOR * max(flips, one) + one / 2,
            flips,
        ),
        Gate(scenario, CONVERSION, Metric.PERPLEXITY_CHANGE, growth, BASELINE_FACTOR * luck, drift),
    ]


def _quantized_layers(model: LoadedModel) -> list[int]:
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

    def comparison(self, name: str, kind: str = "") -> TextComparison:
        kl, kl_error = metrics.mean_and_error(np.concatenate(self._kl))
        same, same_error = metrics.mean_and_error(np.concatenate(self._is_same).astype(np.float64))
        growth, growth_error = metrics.mean_and_error(np.concatenate(self._surprise))
        ratio = float(np.exp(growth))
        return TextComparison(name, kl, kl_error, same, same_error, ratio, ratio * growth_error, kind)
