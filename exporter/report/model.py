"""What a validation found: what was compared, every gate, and what was not compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """One number against its limit, and PyTorch's own loss at that precision where that is what set the limit."""

    scenario: str
    output: str
    metric: str
    value: float
    limit: float
    floor: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value is a number within the limit: NaN fails."""
        return self.value <= self.limit


@dataclass(frozen=True)
class TextFigure:
    """How far one model is from another on text; each value has its standard error."""

    name: str
    """`conversion`: what was built, against the reference quantized alike; `floor`: PyTorch in its precision, so too.

    `quantization`: the reference as quantized, against what it was before; `total`: what was built, so too.
    """
    mean_kl: float
    """Nats a token."""
    mean_kl_error: float
    same_top: float
    """The share of tokens whose most likely successor is the same."""
    same_top_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float


@dataclass(frozen=True)
class LayerCost:
    """What quantizing one layer alone costs on text, in nats a token, and the standard error."""

    layer: int
    kind: str
    mean_kl: float
    mean_kl_error: float


@dataclass(frozen=True)
class TextReport:
    """What was built on a text, and what quantization costs; layers in order of their cost, the dearest first."""

    text: str
    num_tokens: int
    base: str
    """The checkpoint that was quantized; empty where none was."""
    figures: tuple[TextFigure, ...]
    layers: tuple[LayerCost, ...]


@dataclass(frozen=True)
class TextPlace:
    """A token after which the candidate's next-token distribution is far off: where, and what either side prefers."""

    row: int
    kl: float
    before: tuple[int, ...]
    """The last tokens of the sequence up to here."""
    reference: int
    candidate: int
    margin: float
    """By how much the reference prefers its own token, in logits."""


@dataclass(frozen=True)
class NextToken:
    """How the next-token distributions of one scenario differ; KL(reference ‖ candidate) in nats."""

    scenario: str
    kl: tuple[float, ...]
    """A row of logits each, in the order in which they were computed."""
    floor_kl: tuple[float, ...]
    mean: float
    mean_error: float
    """The standard error of the mean over rows."""
    p999: float
    """The 99.9th percentile."""
    same_top: float
    """The share of rows whose best token is the same."""
    same_top_error: float
    matched: int
    """Rows before the first whose best token differs by more than the floor's own error."""
    worst: tuple[TextPlace, ...]


@dataclass(frozen=True)
class LayerError:
    """One layer alone, on inputs that are the same to the bit: relative L2 of what it adds to its tokens."""

    place: str
    kind: str
    error: float
    floor: float | None


@dataclass(frozen=True)
class OpError:
    """One output of one op's node alone, on inputs that are the same to the bit."""

    node: str
    op: str
    output: str
    error: float | None
    """Relative L2; None where a value is not finite."""
    not_finite: int
    """Values that are NaN or infinite."""
    floor: float | None
    limit: float


@dataclass(frozen=True)
class Suspect:
    """One value inside a part of the graph, beside PyTorch's: where it is, and how far off."""

    place: str
    """`layers.7`."""
    kind: str
    node: str
    op: str
    tensor: str
    shape: tuple[str, ...]
    """As the graph declares it, free axes by their names."""
    error: float | None
    """Relative L2 over all steps; None where a value is not finite."""
    floor: float | None
    limit: float
    step: int
    """Where the largest difference is: a step of the mixed batch, and the place in the value."""
    index: tuple[int, ...]
    candidate: float | None
    """What stands there, None where that is not finite."""
    reference: float | None
    reads: tuple[str, ...]
    """The node's own inputs, each with what is known of it."""

    @property
    def departs(self) -> bool:
        """Whether it is beyond its limit."""
        return self.error is None or self.error > self.limit

    @property
    def strain(self) -> float:
        """The error as a share of its limit."""
        if self.error is None or (self.error and not self.limit):
            return float("inf")
        return self.error / self.limit if self.error else 0.0


@dataclass(frozen=True)
class Bisection:
    """Where the graph departs from PyTorch: each part alone, every value of it an output."""

    runs_as: str
    num_values: int
    """Compared, over all parts."""
    num_unmatched: int
    """Values of the graph that PyTorch has no counterpart of, as the steps inside a linear."""
    departing: tuple[Suspect, ...]
    """The first value of each part that departs, in the order in which tokens pass the parts."""
    nearest: Suspect | None
    """Of the values that do not depart, the nearest to its limit."""
    marking_changed: tuple[str, ...]
    """Parts whose results have other bits when inner values are outputs too."""


@dataclass(frozen=True)
class RouterAgreement:
    """One MoE layer's choices over all scenarios."""

    layer: int
    tokens: int
    rerouted: int
    """Tokens that got other experts."""
    median_margin: float
    """Between a token's last expert and the next, in the reference."""
    rerouted_margin: float
    """The largest among the rerouted; 0 where there are none."""
    score_error: float


@dataclass(frozen=True)
class StateDrift:
    """One recurrent state's relative L2 at each mark of a drift."""

    pool: str
    error: tuple[float, ...]
    floor: tuple[float, ...]
    """PyTorch's at the graph's precision; empty in FP32."""
    alone: tuple[float, ...]
    """The worst head's, against FP64 on the recurrence's own inputs; empty where the candidate does not show them."""
    alone_floor: tuple[float, ...]
    """The same of a recurrence whose state is held as the pool holds it; empty where that is FP32."""


@dataclass(frozen=True)
class Drift:
    """How far the recurrent states and the next token depart over decode steps with identical tokens."""

    steps: tuple[int, ...]
    """The marks: after how many steps it was looked."""
    sequences: int
    states: tuple[StateDrift, ...]
    kl: tuple[float, ...]
    """Nats, the mean over the rows of the last steps before each mark."""
    floor_kl: tuple[float, ...]


@dataclass(frozen=True)
class ValidationReport:
    """What was compared with what, every gate, and what was not compared."""

    candidate: str
    reference: str
    floor: str
    tokens: dict[str, int]
    gates: tuple[Gate, ...]
    rerouted: dict[str, int]
    """How often, in each scenario, a token got other experts than the reference gives it: those of near ties."""
    not_compared: tuple[str, ...]
    text: TextReport | None = None
    """What was built on a text, where there was one."""
    next_token: tuple[NextToken, ...] = ()
    layers: tuple[LayerError, ...] = ()
    ops: tuple[OpError, ...] = ()
    routers: tuple[RouterAgreement, ...] = ()
    drift: Drift | None = None
    bisect: Bisection | None = None
    """Where values depart, where that was looked for."""
    is_whole: bool = True
    """Whether whole steps of the model were compared: else each part was run alone, and the report says so."""

    @property
    def not_finite(self) -> tuple[Gate, ...]:
        """Gates that say that one side holds NaN or infinity: then nothing else can be judged."""
        return tuple(gate for gate in self.gates if "not finite" in gate.metric and not gate.passed)

    @property
    def verdict(self) -> str:
        """In words that make no more of it than was compared."""
        what = "" if self.is_whole else ", each layer alone"
        return ("passed" if self.passed else "failed") + what

    @property
    def passed(self) -> bool:
        """Whether there were gates, all of them hold, and no value departs: no comparison is never a pass."""
        departs = self.bisect is not None and bool(self.bisect.departing)
        return bool(self.gates) and all(gate.passed for gate in self.gates) and not departs
