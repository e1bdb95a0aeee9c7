"""The gates: every number that a validation compares with a limit.

FP32 must be within 1e-4. A lower precision must be within three times its *rounding baseline*: the error of PyTorch at
that precision against PyTorch in FP32, on the same tokens.

Legend: R rows of logits, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import NotFiniteError, ValidationError
from nemotrt.exporter.report.model import Gate, Metric, ValidationReport
from nemotrt.exporter.validation import metrics, routing
from nemotrt.exporter.validation.metrics import Array
from nemotrt.exporter.validation.observation import Observation
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.model.checkpoint import parameters
from nemotrt.plugins.contract import NEXT, DType
from nemotrt.plugins.spec import DOMAIN, ops

if TYPE_CHECKING:
    import onnx_ir as ir

FP32_RELATIVE_L2 = 1e-4
BASELINE_FACTOR = 3.0
"""The worst of ten prompt batches was 2.45 times the median of the rounding baseline, so three."""

COSINE, NORM_RATIO = 0.99, 0.25
"""Two further gates, with TensorRT Edge-LLM's thresholds."""

ALONE = "each layer alone"
"""The scenario in which every part runs alone, on inputs that are bitwise equal."""

ALONE_AT_LIMITS = "envelope, layers alone"
"""The scenario in which the first layer of each form runs alone at the limits of the profile."""

DTYPES = "dtypes"
"""The scenario of the dtypes that a graph declares."""

Pair = tuple[Array, Array]
"""The candidate's values, and the reference's."""

ExpectedDtypes = dict[str, dict[str, str]]
"""`weights` and `pools`: name → dtype."""


@dataclass(frozen=True)
class OutputErrors:
    """How far one output is from the reference; no distance is measured if a value is not finite."""

    not_finite: int
    """The candidate's NaN and infinite values."""
    reference_not_finite: int = 0
    out_of_bounds: int = 0
    """Values of a pool that changed although the reference did not write them."""
    relative_l2: float = 0.0
    norm_ratio: float = 0.0
    angle: float = 0.0
    """1 − cosine."""


@dataclass(frozen=True)
class ScenarioErrors:
    """How far a runner is from the reference in one scenario: every number that a gate or a limit needs."""

    outputs: dict[str, OutputErrors]
    """The errors of the logits and of every pool, by name."""
    kl: tuple[float, ...]
    """Nats, one per row of logits; empty if logits are not finite."""
    mismatch_margin: float
    """The largest logit margin by which the reference prefers its own top-1 token over the runner's."""
    max_logit_error: float
    router_scores: tuple[float, ...]
    """The largest error of a router's score, per MoE layer; empty if the runner does not output router logits."""


def measure(candidate: Observation, reference: Observation) -> ScenarioErrors:
    """The candidate's errors; pools count only where the steps write, so that nothing else dilutes an error."""
    logits = metrics.in_fp64(candidate.logits_RV, reference.logits_RV)
    outputs = {"logits": _errors(logits)}
    for name, expected in reference.pools.items():
        pair = metrics.in_fp64(candidate.pools[name], expected)
        # A reference can be another bundle, which may write out of bounds too.
        stray = max(side.out_of_bounds.get(name, 0) for side in (candidate, reference))
        outputs[name] = _errors(pair, stray)
    scores = _router_errors(candidate.routers, reference.routers)
    if outputs["logits"].not_finite or outputs["logits"].reference_not_finite:
        return ScenarioErrors(outputs, (), 0.0, 0.0, scores)
    return ScenarioErrors(
        outputs=outputs,
        kl=tuple(metrics.kl_divergence(*logits).tolist()),
        mismatch_margin=float(metrics.mismatch_margins(*logits).max(initial=0.0)),
        max_logit_error=float(np.abs(logits[0] - logits[1]).max()),
        router_scores=scores,
    )


def scenario_gates(
    scenario: str,
    candidate: Observation,
    reference: Observation,
    baseline: ScenarioErrors | None,
) -> list[Gate]:
    """Every gate of one scenario: finiteness, logits, next token, routers, and every pool without its scratch row.

    `baseline` is PyTorch's at the candidate's precision, None in FP32. Raises ValidationError if the candidate lacks an
    output of the reference.
    """
    missing = sorted(set(reference.pools) - set(candidate.pools))
    if missing or candidate.logits_RV.shape != reference.logits_RV.shape:
        raise ValidationError(
            f"{scenario}: {missing[0] if missing else 'logits'} was not produced by the graph"
        )
    errors = measure(candidate, reference)
    gates: list[Gate] = []
    for name, output in errors.outputs.items():
        if name in reference.pools:
            gates.append(Gate(scenario, name, Metric.OUT_OF_BOUNDS, float(output.out_of_bounds), 0.0))
        gates += _output_gates(scenario, name, output, baseline.outputs[name] if baseline else None)
    gates += _router_gates(scenario, errors, baseline)
    if errors.kl and baseline is None:
        limit = FP32_RELATIVE_L2 * float(np.abs(reference.logits_RV).max())
        gates.append(Gate(scenario, "logits", Metric.TOP1_MARGIN, errors.mismatch_margin, limit))
    elif errors.kl and baseline and baseline.kl:
        gates += _next_token_gates(scenario, errors, baseline)
    return gates


def layer_gates(
    scenario: str,
    place: str,
    values: dict[str, Pair],
    baseline: dict[str, Pair],
    out_of_bounds: Mapping[str, int],
) -> list[Gate]:
    """The gates of one part that ran alone; `values` are its outputs by name, `baseline` PyTorch's (empty in FP32).

    `out_of_bounds` counts, for each pool, the values that changed although the reference did not write them.
    """
    gates: list[Gate] = []
    for name, pair in values.items():
        base = _errors(baseline[name]) if baseline else None
        gates += _output_gates(scenario, f"{place} {name}".strip(), _errors(pair), base, _num_tokens(pair))
    for name, count in out_of_bounds.items():
        gates.append(Gate(scenario, f"{place} {name}", Metric.OUT_OF_BOUNDS, float(count), 0.0))
    return gates


def router_gate(scenario: str, place: str, error: float, baseline: float | None) -> Gate:
    """The gate on the largest error of a router's score; `baseline` is PyTorch's, None in FP32."""
    return Gate(scenario, place, Metric.ROUTER_SCORE, error, _score_limit(baseline), baseline)


def _score_limit(baseline: float | None) -> float:
    return FP32_RELATIVE_L2 if baseline is None else BASELINE_FACTOR * baseline


def same_bits(scenario: str, first: Observation, second: Observation) -> Gate:
    """How many outputs differ bitwise between two modes, such as pools updated in place and pools copied."""
    differing = [
        name
        for name in first.pools
        if not np.array_equal(first.pools[name], second.pools[name], equal_nan=True)
        or first.out_of_bounds.get(name) != second.out_of_bounds.get(name)
    ]
    if not np.array_equal(first.logits_RV, second.logits_RV, equal_nan=True):
        differing.append("logits")
    output = differing[0] if differing else "all"
    return Gate(scenario, output, Metric.MODES_DIFFER, float(len(differing)), 0.0)


def score_limits(baseline: ScenarioErrors | None, num_layers: int) -> list[float]:
    """The largest allowed error of a router's score, for each MoE layer."""
    return [*map(_score_limit, baseline.router_scores if baseline else [None] * num_layers)]


def _errors(pair: Pair, out_of_bounds: int = 0) -> OutputErrors:
    broken, reference_broken = (int(np.count_nonzero(~np.isfinite(side))) for side in pair)
    if broken or reference_broken:
        return OutputErrors(broken, reference_broken, out_of_bounds)
    distances = metrics.relative_l2(*pair), metrics.norm_ratio_error(*pair), 1 - metrics.cosine(*pair)
    return OutputErrors(0, 0, out_of_bounds, *distances)


def _router_errors(candidate: Sequence[RouterLogits], reference: Sequence[RouterLogits]) -> tuple[float, ...]:
    if not any(candidate):
        return ()
    pairs = zip(routing.concatenated(candidate), routing.concatenated(reference), strict=True)
    return tuple(routing.score_error(*pair) for pair in pairs)


def _num_tokens(pair: Pair) -> float:
    """How many tokens share the square of a value's norm: fewer than it has, if some are larger; 1 for a pool.

    (Σ‖r‖²)² / Σ‖r‖⁴ over the rows r: errors that are independent then shrink in the norm by the root of this.
    """
    if pair[1].ndim == 1:
        return 1.0
    square_T = np.square(pair[1]).reshape(len(pair[1]), -1).sum(1)
    total = float(square_T.sum())
    return total**2 / float(np.square(square_T).sum()) if np.isfinite(total) and total > 0 else 1.0


def _output_gates(
    scenario: str, name: str, errors: OutputErrors, baseline: OutputErrors | None, num_tokens: float = 1.0
) -> Iterator[Gate]:
    """Finiteness, and then the distances; the errors of `num_tokens` tokens are independent."""
    yield Gate(scenario, name, Metric.NOT_FINITE, float(errors.not_finite), 0.0)
    if errors.reference_not_finite:
        yield Gate(scenario, name, Metric.REFERENCE_NOT_FINITE, float(errors.reference_not_finite), 0.0)
    elif baseline and baseline.not_finite:
        # Everything would pass a limit that derives from an infinite baseline.
        yield Gate(scenario, name, Metric.BASELINE_NOT_FINITE, float(baseline.not_finite), 0.0)
    elif not errors.not_finite:
        yield from _distance_gates(scenario, name, errors, baseline, num_tokens)


def _distance_gates(
    scenario: str, name: str, errors: OutputErrors, baseline: OutputErrors | None, num_tokens: float
) -> Iterator[Gate]:
    """Relative L2, and at a lower precision the norm ratio and the cosine too."""
    if baseline is None:
        yield Gate(scenario, name, Metric.RELATIVE_L2, errors.relative_l2, FP32_RELATIVE_L2)
        return
    l2_limit = BASELINE_FACTOR * baseline.relative_l2
    # A norm can be right by luck. Its error never exceeds the relative L2 of the same values; and errors that are
    # independent cancel in it as in a mean, while a wrong factor remains.
    norm_limit = BASELINE_FACTOR * max(baseline.norm_ratio, baseline.relative_l2 / num_tokens**0.5)
    # Edge-LLM's thresholds suit trained models. If PyTorch itself misses them at this precision (a router near a tie,
    # as with random weights), the limit derives from its error.
    angle_limit = max(1 - COSINE, BASELINE_FACTOR * baseline.angle)
    absolute_limit = max(NORM_RATIO, BASELINE_FACTOR * baseline.norm_ratio)
    for metric, error, limit, base in (
        (Metric.RELATIVE_L2, errors.relative_l2, l2_limit, baseline.relative_l2),
        (Metric.NORM_RATIO, errors.norm_ratio, norm_limit, baseline.norm_ratio),
        (Metric.COSINE, errors.angle, angle_limit, baseline.angle),
        (Metric.NORM_RATIO_ABSOLUTE, errors.norm_ratio, absolute_limit, baseline.norm_ratio),
    ):
        yield Gate(scenario, name, metric, error, limit, base)


def _router_gates(scenario: str, errors: ScenarioErrors, baseline: ScenarioErrors | None) -> Iterator[Gate]:
    """The largest error of each router's scores: only such an error excuses a routing mismatch."""
    scores = errors.router_scores
    bases: Sequence[float | None] = baseline.router_scores if baseline else [None] * len(scores)
    if scores:
        for layer, numbers in enumerate(zip(scores, bases, strict=True)):
            yield router_gate(scenario, f"router {layer}", *numbers)


def _next_token_gates(scenario: str, errors: ScenarioErrors, baseline: ScenarioErrors) -> Iterator[Gate]:
    """KL of the next-token distributions, and by how much the reference prefers a token that was not chosen."""
    for metric, error, base in (
        (Metric.MEAN_KL, float(np.mean(errors.kl)), float(np.mean(baseline.kl))),
        (Metric.MAX_KL, max(errors.kl), max(baseline.kl)),
    ):
        yield Gate(scenario, "logits", metric, error, BASELINE_FACTOR * base, base)
    # Without a mismatch in the baseline, two tokens may still be closer than the baseline's own error.
    limit = 2 * max(baseline.mismatch_margin, baseline.max_logit_error)
    margin = errors.mismatch_margin
    yield Gate(scenario, "logits", Metric.TOP1_MARGIN, margin, limit, baseline.mismatch_margin)


def expected_dtypes(model: LoadedModel, config: BuildConfig) -> ExpectedDtypes:
    """The dtypes of the weights and pools that a graph built with `config` must have."""
    weights = {name: str(dtype) for name, (_, dtype) in parameters(model.config, config.dtype).items()}
    pools = {prefix + pool.name: str(pool.dtype) for pool in model.pools(config) for prefix in ("", NEXT)}
    return {"weights": weights, "pools": pools}


def dtype_gates(model: ir.Model, expected: ExpectedDtypes) -> list[Gate]:
    """Gates on the number of weights, pools and FP32 inputs of ops that have another dtype or are cast to one.

    Only the graph's own nodes are read: the ops' conformance tests cover the values inside an op.
    """
    import onnx_ir as ir

    graph = model.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    casts = [node for node in graph if node.op_type == "Cast"]
    cast_names = {value.name for node in casts for value in (*node.inputs, *node.outputs) if value}
    groups = {
        "weights": (expected["weights"], graph.initializers),
        "pools": (expected["pools"], values),
        "ops' FP32 inputs": (dict.fromkeys(_fp32_inputs(graph), DType.FLOAT32.value), values),
    }
    return [_dtype_gate(group, *dtypes, cast_names) for group, dtypes in groups.items()]


def _dtype_gate(
    group: str, expected: Mapping[str, str], values: Mapping[str, ir.Value], cast_names: set[str | None]
) -> Gate:
    diverging = [
        name
        for name, dtype in expected.items()
        if name not in values or _dtype(values[name]) != DType(dtype).onnx or name in cast_names
    ]
    output = diverging[0] if diverging else group
    return Gate(DTYPES, output, Metric.DTYPE, float(len(diverging)), 0.0)


def _dtype(value: ir.Value) -> ir.DataType | None:
    """The dtype of a weight's bytes, whatever the graph declares, or the declared dtype of another value."""
    return value.const_value.dtype if value.const_value is not None else value.dtype


def _fp32_inputs(graph: ir.Graph) -> list[str]:
    """The inputs that ops take in FP32 whatever the model's dtype: decay, step size, router logits, scales."""
    positions = {
        spec.name: [i for i, tensor in enumerate(spec.inputs) if tensor.dtype == "float32"] for spec in ops()
    }
    nodes = (node for node in graph if node.domain == DOMAIN)
    return [str(value.name) for node in nodes for i in positions[node.op_type] if (value := node.inputs[i])]


SIDES = {
    Metric.REFERENCE_NOT_FINITE: (
        "of the reference ",
        "the reference's own weights lead to NaN or infinity: they are damaged, or overflow even in FP32",
    ),
    Metric.BASELINE_NOT_FINITE: (
        "of PyTorch at the bundle's precision ",
        "the model overflows at this precision: use --precision bf16 or fp32",
    ),
    Metric.NOT_FINITE: ("", "no distance was measured for this output; do not ship the bundle"),
}
"""What counts NaN and infinite values → whose they are, and what to do; the cause of the others comes first."""


def check_finite(report: ValidationReport) -> None:
    """Raise NotFiniteError if a value is NaN or infinite on either side: then no other gate means anything."""
    for metric, (whose, hint) in SIDES.items():
        for gate in report.not_finite:
            if gate.metric == metric:
                raise NotFiniteError(
                    f"{gate.scenario}, {gate.output}: {gate.value:.0f} values {whose}are not finite",
                    hint=hint,
                )
