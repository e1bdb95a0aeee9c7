"""The data of a validation report: what was compared, every gate, and what was not compared."""

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from operator import attrgetter


class Metric(StrEnum):
    """What a gate measures; the value is its label in tables."""

    RELATIVE_L2 = "relative L2"
    NORM_RATIO = "norm ratio"
    NORM_RATIO_ABSOLUTE = "norm ratio, absolute"
    COSINE = "1 − cosine"
    MEAN_KL = "mean KL"
    MAX_KL = "max KL"
    TOP1_MARGIN = "top-1 mismatch margin"
    TOP1_DISAGREEMENT = "top-1 disagreement"
    PERPLEXITY_RATIO = "perplexity ratio"
    PERPLEXITY_CHANGE = "perplexity change"
    ROUTER_SCORE = "router score error"
    RECURRENCE = "recurrence alone"
    NOT_FINITE = "not finite"
    REFERENCE_NOT_FINITE = "reference not finite"
    BASELINE_NOT_FINITE = "baseline not finite"
    OUT_OF_BOUNDS = "out-of-bounds writes"
    MODES_DIFFER = "execution modes differ"
    DTYPE = "unexpected dtype"
    NOT_REACHED = "below the promised limit"
    PROGRAM = "program differs"
    WEIGHT = "differs from checkpoint"
    NOT_STORED = "not in checkpoint"


NOT_FINITE = (Metric.NOT_FINITE, Metric.REFERENCE_NOT_FINITE, Metric.BASELINE_NOT_FINITE)
"""Metrics that count NaN and infinite values."""


@dataclass(frozen=True)
class Gate:
    """One number against its limit, and the rounding baseline if the limit derives from one."""

    scenario: str
    output: str
    metric: Metric
    value: float
    limit: float
    baseline: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the limit; NaN fails."""
        return self.value <= self.limit

    @property
    def limit_fraction(self) -> float:
        """The fraction of the limit that is used; infinite for NaN, and for any error where none is allowed."""
        return _fraction(self.value, self.limit)


def _fraction(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    if limit == 0:
        return math.inf if value else 0.0
    return value / limit


class Omitted(StrEnum):
    """What a validation can leave out."""

    ENGINE = "TensorRT engine"
    PYTORCH = "PyTorch"
    CHECKPOINT = "the checkpoint"
    FIELD = "a field of config.json"
    MODEL = "the whole model"
    TENSORS = "not exported"
    PARTS = "each layer and each op alone"
    RECURRENCES = "each recurrence alone"
    DRIFT = "state drift"
    ROUTERS = "routers"
    KV_RANGE = "range of keys and values"
    TEXT = "text"
    QUANTIZATION_COST = "what quantization costs"


@dataclass(frozen=True)
class NotCompared:
    """Something that was not compared, and why."""

    what: Omitted
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


@dataclass(frozen=True)
class TextComparison:
    """How far one model is from another on text; each mean comes with its standard error."""

    name: str
    """`conversion`: the graph against the reference, quantized alike; `baseline`: PyTorch at the graph's precision.

    `quantization`: the quantized reference against the unquantized model; `total`: the graph against that model;
    `layers.7`: the unquantized model with this layer alone quantized, against itself.
    """
    mean_kl: float
    """Nats per token."""
    mean_kl_error: float
    top1_agreement: float
    """The fraction of tokens for which both models prefer the same next token."""
    top1_agreement_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    kind: str = ""
    """The kind of the layer, if the comparison is of one."""


@dataclass(frozen=True)
class TextReport:
    """How the bundle compares on a text, and what quantization costs there."""

    text: str
    num_tokens: int
    base: str
    """The checkpoint that was quantized; empty if none was."""
    comparisons: tuple[TextComparison, ...]
    layers: tuple[TextComparison, ...]
    """One per quantized layer, highest mean KL first."""


@dataclass(frozen=True)
class WorstToken:
    """A position at which the next-token distributions differ most, and the token that each side prefers."""

    row: int
    kl: float
    before: tuple[int, ...]
    """The last tokens of the sequence, this position's included."""
    reference: int
    candidate: int
    margin: float
    """The reference's logit for its own token minus its logit for the candidate's."""


@dataclass(frozen=True)
class NextToken:
    """How the next-token distributions of one scenario differ; KL(reference ‖ candidate) in nats."""

    scenario: str
    kl: tuple[float, ...]
    """One per row of logits, in the order of computation."""
    baseline_kl: tuple[float, ...]
    mean: float
    mean_error: float
    """The standard error of the mean over rows."""
    p999: float
    """The 99.9th percentile."""
    top1_agreement: float
    """The fraction of rows in which both sides prefer the same token."""
    top1_agreement_error: float
    matched: int
    """Rows before the first top-1 mismatch that exceeds the baseline's own error."""
    worst: tuple[WorstToken, ...]


@dataclass(frozen=True)
class PartError:
    """The relative L2 error of a layer or an op that ran alone, on inputs that are bitwise equal."""

    name: str
    """The layer (`layers.7`) or the op's node (`layers.7.mixer.scan`)."""
    kind: str
    """The kind of the layer, or the op's type."""
    output: str
    """The op's output; empty for a layer, whose contribution to the residual stream is compared."""
    error: float | None
    """None if a value is not finite."""
    not_finite: int
    """The number of NaN and infinite values."""
    baseline: float | None
    limit: float


@dataclass(frozen=True)
class DivergentValue:
    """One value inside the graph compared with PyTorch's: where it is, and its error."""

    place: str
    """`layers.7`."""
    kind: str
    node: str
    op: str
    tensor: str
    shape: tuple[str, ...]
    """As the graph declares it; dynamic axes by name."""
    error: float | None
    """Relative L2 over all steps; None if a value is not finite."""
    baseline: float | None
    limit: float
    step: int
    """The step of the mixed batch that has the largest difference."""
    index: tuple[int, ...]
    """Where in the value the largest difference is."""
    candidate: float | None
    """The graph's element there; None if it is not finite."""
    reference: float | None
    reads: tuple[str, ...]
    """The node's inputs, and for each how it compares."""

    @property
    def diverges(self) -> bool:
        """Whether the error exceeds the limit."""
        return self.error is None or self.error > self.limit

    @property
    def limit_fraction(self) -> float:
        """The fraction of the limit that the error uses."""
        return _fraction(math.inf if self.error is None else self.error, self.limit)


@dataclass(frozen=True)
class Bisection:
    """Where the graph diverges from PyTorch: each part ran alone with every inner value as an output."""

    runs_as: str
    num_values: int
    """Values compared, over all parts."""
    num_unmatched: int
    """Values of the graph that have no counterpart in PyTorch, such as the steps inside a linear layer."""
    diverging: tuple[DivergentValue, ...]
    """The first diverging value of each part, in the order of the layers."""
    nearest: DivergentValue | None
    """The value nearest to its limit among those that do not diverge."""
    marking_changed: tuple[str, ...]
    """Parts whose results change bitwise when inner values become outputs."""


@dataclass(frozen=True)
class EnvelopeLimit:
    """A limit that the bundle promises, and how far the validation went."""

    name: str
    promised: int
    whole: int
    """In steps of the whole model."""
    alone: int
    """In the first layer of each kind and numeric form, alone; 0 if no layer ran alone."""

    @property
    def driven(self) -> int:
        """The further of the two."""
        return max(self.whole, self.alone)


@dataclass(frozen=True)
class RouterAgreement:
    """How often one MoE layer routes tokens as the reference does, over all scenarios."""

    layer: int
    tokens: int
    routing_mismatches: int
    """Tokens routed to other experts."""
    median_margin: float
    """Between a token's last chosen expert and the next one, in the reference."""
    mismatch_margin: float
    """The largest margin of a mismatched token; 0 without mismatches."""
    score_error: float


@dataclass(frozen=True)
class DriftCurve:
    """One error at each mark of a long decode, with its limits."""

    output: str
    """The pool, or `logits`."""
    metric: Metric
    """The state's relative L2; its error in the recurrence alone (worst head, against FP64); or the logits' mean KL."""
    values: tuple[float, ...]
    baseline: tuple[float, ...]
    """The same error of PyTorch at the graph's precision; empty if the limit does not derive from it."""
    limits: tuple[float, ...]
    """Empty if there is no limit: the KL in FP32."""

    @property
    def limit_fractions(self) -> tuple[float, ...]:
        """The fraction of its limit that each value uses."""
        return tuple(_fraction(*pair) for pair in zip(self.values, self.limits, strict=True))


@dataclass(frozen=True)
class Drift:
    """How the error of recurrent states and of the next token develops over decode steps on identical tokens."""

    steps: tuple[int, ...]
    """The marks: numbers of decoded tokens after which the state is compared."""
    sequences: int
    curves: tuple[DriftCurve, ...]


@dataclass(frozen=True)
class ValidationReport:
    """What was compared with what, every gate, and what was not compared."""

    candidate: str
    reference: str
    baseline: str
    """What limits derive from; empty if they are absolute."""
    tokens: dict[str, int]
    gates: tuple[Gate, ...]
    routing_mismatches: dict[str, int]
    """By scenario: how often a token was routed to other experts than in the reference (near ties)."""
    not_compared: tuple[NotCompared, ...]
    text: TextReport | None = None
    next_token: tuple[NextToken, ...] = ()
    layers: tuple[PartError, ...] = ()
    ops: tuple[PartError, ...] = ()
    routers: tuple[RouterAgreement, ...] = ()
    drift: Drift | None = None
    bisect: Bisection | None = None
    envelope: tuple[EnvelopeLimit, ...] = ()
    is_whole: bool = True
    """Whether whole steps of the model were compared, and not each part alone."""

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that failed."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def not_finite(self) -> tuple[Gate, ...]:
        """Failed gates that count NaN and infinite values; then no other gate means anything."""
        return tuple(gate for gate in self.failed if gate.metric in NOT_FINITE)

    @property
    def worst_gates(self) -> list[tuple[Gate, int, int]]:
        """For each scenario and metric: the gate that uses most of its limit, and how many gates exist and failed."""
        group = attrgetter("scenario", "metric")
        groups = [list(gates) for _, gates in groupby(sorted(self.gates, key=group), key=group)]
        return [
            (max(gates, key=lambda gate: gate.limit_fraction), len(gates), sum(not g.passed for g in gates))
            for gates in groups
        ]

    @property
    def verdict(self) -> str:
        """`passed` or `failed`, restricted to what was compared."""
        scope = "" if self.is_whole else ", each layer alone"
        return ("passed" if self.passed else "failed") + scope

    @property
    def passed(self) -> bool:
        """Whether there are gates, all of them passed, and no value diverges."""
        diverges = self.bisect is not None and bool(self.bisect.diverging)
        return bool(self.gates) and not self.failed and not diverges
