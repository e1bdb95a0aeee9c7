"""Compares a bundle with PyTorch on text: the error of the conversion, and the cost of quantization.

*Conversion* compares the graph with the same model in PyTorch, quantized alike. Its limit is three times the rounding
*baseline*: the error of PyTorch at the graph's precision. For a quantized model, *quantization* compares the quantized
reference with the unquantized model, and *total* compares the graph with the unquantized model.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.quantization.text import SEQUENCE_TOKENS, Sequences
from nemotrt.exporter.report.model import Gate, Metric, TextComparison, TextReport
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.step import StepInputs, pages_of
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.envelope import PoolSizes, SequenceChunk, packed_step
from nemotrt.exporter.validation.gates import BASELINE_FACTOR
from nemotrt.exporter.validation.metrics import Array, Values
from nemotrt.exporter.validation.plan import empty_pools
from nemotrt.exporter.validation.routing import RouterPolicy, num_mismatches, router_policies
from nemotrt.exporter.validation.runners.base import GraphRunner, Mode, Runner
from nemotrt.exporter.validation.runners.torch import TorchRunner
from nemotrt.plugins.contract import DType, LayerName

MEAN_KL, TOP1_DISAGREEMENT, PERPLEXITY_RATIO = 0.02, 0.03, 1.01
"""Limits of what quantization may cost: nats per token, fraction of top-1 disagreement, growth of perplexity."""

FP32_MEAN_KL = 1e-6
"""FP32 logits may be off by 1e-4 relative, some 1e-3 for logits that reach 10; KL is half the square of that."""

ATTRIBUTION_SEQUENCES = 4
"""Sequences of the text that measure what each layer costs: they run once more for each layer."""

NUM_SLOTS = 2
"""One sequence at a time, and scratch."""

CONVERSION, BASELINE, QUANTIZATION, TOTAL = "conversion", "baseline", "quantization", "total"
CONVERSION_METRICS = Metric.MEAN_KL, Metric.TOP1_DISAGREEMENT, Metric.PERPLEXITY_CHANGE


class TextPlan(NamedTuple):
    """What a comparison on text runs; the number of its sequences is the total of the progress bar."""

    steps: tuple[StepInputs, ...]
    """One fresh sequence each."""
    attribution: tuple[tuple[int, StepInputs], ...]
    """A layer that is quantized alone, and the sequence on which."""

    @property
    def num_sequences(self) -> int:
        """How often a sequence runs."""
        return len(self.steps) + len(self.attribution)


def plan_text(model: LoadedModel, base: LoadedModel | None, config: BuildConfig, text: Sequences) -> TextPlan:
    """What a comparison on this text runs."""
    steps = tuple(
        packed_step([SequenceChunk(sequence, 0, 1, range(1, 1 + pages_of(len(sequence), config.page_size)))])
        for sequence in text
    )
    layers = _quantized_layers(model) if base else []
    return TextPlan(steps, tuple(product(layers, steps[:ATTRIBUTION_SEQUENCES])))


def measure(
    model: LoadedModel,
    base: LoadedModel | None,
    config: BuildConfig,
    graph: OnnxGraph,
    plan: TextPlan,
    name: str,
    *,
    advance: Advance = ignore,
) -> TextReport:
    """How the graph compares on the text, and with a `base` (the unquantized model) what quantization costs."""
    num_pages, pools = 1 + pages_of(SEQUENCE_TOKENS, config.page_size), model.pools(config)
    reference = TorchRunner(model, pools, torch.float32)
    unquantized = TorchRunner(base, base.pools(config), torch.float32) if base else None
    runners: dict[str, Runner] = {
        "graph": GraphRunner(graph, num_slots=NUM_SLOTS, num_pages=num_pages, mode=Mode.UNBOUND),
        "reference": reference,
    }
    if config.dtype is not DType.FLOAT32:
        runners[BASELINE] = TorchRunner(model, pools, config.dtype.torch)
    if unquantized:
        runners["unquantized"] = unquantized
    zeros = empty_pools(pools, PoolSizes(NUM_SLOTS, num_pages))
    for runner in runners.values():
        runner.reset(zeros)
    policies = router_policies(model)
    differences: dict[str, list[Array]] = defaultdict(list)
    for inputs in plan.steps:
        for pair, (candidate, expected) in _logit_pairs(runners, policies, inputs).items():
            differences[pair].append(_differences(candidate, expected, inputs))
        advance(1)
    costs: dict[int, list[Array]] = defaultdict(list)
    if unquantized:
        for layer, inputs in plan.attribution:
            unquantized.reset(zeros)
            expected = unquantized.step(inputs)
            with unquantized.borrowed(reference, layer):
                unquantized.reset(zeros)
                costs[layer].append(_differences(unquantized.step(inputs), expected, inputs))
            advance(1)
    kinds = model.config.numbered_layers
    layers = [_comparison(f"layers.{layer}", cost, kinds[layer]) for layer, cost in costs.items()]
    return TextReport(
        text=name,
        num_tokens=sum(len(inputs.input_ids) for inputs in plan.steps),
        base=base.folder.resolve().name if base else "",
        comparisons=tuple(_comparison(pair, rows) for pair, rows in differences.items()),
        layers=tuple(sorted(layers, key=lambda cost: -cost.mean_kl)),
    )


def _logit_pairs(
    runners: dict[str, Runner], policies: Sequence[RouterPolicy], inputs: StepInputs
) -> dict[str, tuple[Values, Values]]:
    """For each comparison the two models' logits of one fresh sequence."""
    logits = {name: runner.step(inputs) for name, runner in runners.items()}
    routers = runners["reference"].router_logits()

    def aligned(name: str) -> tuple[Values, Values]:
        """A model and the reference with the same expert routing, so that a near tie is not an error."""
        forced = runners[name].router_logits()
        if num_mismatches(policies, [routers], [forced]):
            return logits[name], runners["reference"].step(inputs, forced)
        return logits[name], logits["reference"]

    pairs = {CONVERSION: aligned("graph")}
    if BASELINE in runners:
        pairs[BASELINE] = aligned(BASELINE)
    if "unquantized" in runners:
        pairs[QUANTIZATION] = logits["reference"], logits["unquantized"]
        pairs[TOTAL] = logits["graph"], logits["unquantized"]
    return pairs


def num_copies(base: LoadedModel | None) -> float:
    """How many copies of the FP32 weights `measure` holds at most."""
    return 2.5 if base else 1.5


def gates(report: TextReport) -> tuple[Gate, ...]:
    """Conversion against the baseline, or FP32's limits; the cost of quantization against its own limits."""
    comparisons = {comparison.name: comparison for comparison in report.comparisons}
    conversion, baseline = comparisons[CONVERSION], comparisons.get(BASELINE)
    scenario = f"text {report.text}"
    gates = list(_conversion_gates(scenario, conversion, baseline, report.num_tokens))
    for name in (QUANTIZATION, TOTAL):
        if cost := comparisons.get(name):
            gates += [
                Gate(scenario, name, Metric.MEAN_KL, cost.mean_kl, MEAN_KL),
                Gate(scenario, name, Metric.TOP1_DISAGREEMENT, 1 - cost.top1_agreement, TOP1_DISAGREEMENT),
                Gate(scenario, name, Metric.PERPLEXITY_RATIO, cost.perplexity_ratio, PERPLEXITY_RATIO),
            ]
    return tuple(gates)


def _conversion_gates(
    scenario: str, conversion: TextComparison, baseline: TextComparison | None, num_tokens: int
) -> Iterator[Gate]:
    token = 1 / num_tokens
    limits = FP32_MEAN_KL, (BASELINE_FACTOR + 0.5) * token, (2 * FP32_MEAN_KL) ** 0.5
    base: Sequence[float | None] = (None, None, None)
    if baseline:
        base = kl, mismatches, change = _distances(baseline)
        # Chance can make a baseline's mismatches 0 or its perplexity ratio 1, so neither limit may become 0.
        limits = (
            BASELINE_FACTOR * kl,
            BASELINE_FACTOR * max(mismatches, token) + token / 2,
            BASELINE_FACTOR * max(change, baseline.perplexity_ratio_error),
        )
    for metric, *numbers in zip(CONVERSION_METRICS, _distances(conversion), limits, base, strict=True):
        yield Gate(scenario, CONVERSION, metric, *numbers)


def _distances(comparison: TextComparison) -> tuple[float, float, float]:
    """The distances, in the order of CONVERSION_METRICS."""
    change = abs(comparison.perplexity_ratio - 1)
    return comparison.mean_kl, 1 - comparison.top1_agreement, change


def _quantized_layers(model: LoadedModel) -> list[int]:
    recipe = model.config.recipe
    names = (LayerName.parse(name) for name in recipe.modules)
    quantized = {name.layer for name in names if name}
    kinds = model.config.numbered_layers
    return [i for i, kind in kinds.items() if i in quantized or (recipe.kv_cache and kind == "attention")]


def _differences(ours: Values, theirs: Values, inputs: StepInputs) -> Array:
    """KL, top-1 agreement and growth of the loss [3, T-1] of a sequence; its last token has no successor."""
    candidate, reference = metrics.in_fp64(ours[:-1], theirs[:-1])
    following = inputs.input_ids[1:]
    kl = metrics.kl_divergence(candidate, reference)
    agrees = candidate.argmax(-1) == reference.argmax(-1)
    losses = (metrics.negative_log_likelihood(logits, following) for logits in (candidate, reference))
    return np.stack([kl, agrees, np.subtract(*losses)])


def _comparison(name: str, differences: Sequence[Array], kind: str = "") -> TextComparison:
    (kl, kl_error), (agreement, agreement_error), (growth, growth_error) = map(
        metrics.mean_and_error, np.concatenate(differences, axis=1)
    )
    ratio = float(np.exp(growth))
    return TextComparison(name, kl, kl_error, agreement, agreement_error, ratio, ratio * growth_error, kind)
