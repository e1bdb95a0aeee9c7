"""A validation's report as one HTML file that loads nothing: verdict first, then plots and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer
from nemotrt.exporter.report import plots
from nemotrt.exporter.report.gate_summary import summary
from nemotrt.exporter.report.model import Drift, Metric, ValidationReport
from nemotrt.exporter.report.precision_map import PlacePrecision, precision_map
from nemotrt.exporter.report.units import digits, size
from nemotrt.exporter.runtime.graph_file import read_proto
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.plugins.contract import PoolSpec

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Bundle:
    """What a page says of the bundle beside its report; tokens are shown as ids where there is no tokenizer."""

    manifest: Manifest
    places: Sequence[PlacePrecision]
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> Bundle:
        """Read from a bundle's folder; raises BundleError on a graph that is none."""
        graphs = manifest.of_role("graph")
        places = precision_map(read_proto(folder / graphs[0])) if graphs else []
        return cls(manifest, places, Tokenizer(folder) if (folder / TOKENIZER).is_file() else None)


def report_html(
    report: ValidationReport,
    *,
    name: str,
    bundle: Bundle | None = None,
    seconds: Mapping[str, float] | None = None,
) -> str:
    """The page; `seconds` are what each stage took."""
    from jinja2 import Environment, StrictUndefined

    source = files("nemotrt.exporter.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": digits,
        "size": size,
        "power": lambda exponent: f"10{str(exponent).translate(SUPERSCRIPT)}",
        "text": _text(bundle.tokenizer if bundle else None),
    }
    return environment.from_string(source).render(
        name=name,
        report=report,
        bundle=bundle,
        seconds=seconds or {},
        failed=sorted(
            (gate for gate in report.gates if not gate.passed),
            key=lambda gate: gate.limit_fraction,
            reverse=True,
        ),
        tiles=_tiles(report),
        rows=summary(report.gates),
        layers=plots.layer_plot(report.layers) if report.layers else None,
        kinds=list(dict.fromkeys(layer.kind for layer in report.layers)),
        positions=[(found, plots.kl_plot(found)) for found in report.next_token],
        drift=_drift(report.drift) if report.drift else None,
        costs=plots.cost_plot(report.text.layers) if report.text and report.text.layers else None,
        precision=_precision(bundle.places) if bundle and bundle.places else None,
        state=_state(bundle.manifest.graph.pools) if bundle else None,
    )


def _text(tokenizer: Tokenizer | None) -> Callable[[Sequence[int]], str]:
    return lambda tokens: tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))


@dataclass(frozen=True)
class Tile:
    """One figure at the top of the page."""

    title: str
    figure: str
    detail: str
    is_bad: bool = False


def _tiles(report: ValidationReport) -> list[Tile]:
    """What a reader wants to know first, as far as it was measured."""
    held = sum(gate.passed for gate in report.gates)
    tiles = [Tile("Gates that hold", f"{held}", f"of {len(report.gates)}", held < len(report.gates))]
    limited = [gate for gate in report.gates if gate.limit > 0]
    if limited:
        worst = max(limited, key=lambda gate: gate.limit_fraction)
        used = min(100 * worst.limit_fraction, 999.0)
        where = f"{worst.metric} of {worst.output}, {worst.scenario}"
        tiles.append(Tile("Nearest to its limit", f"{used:.0f} %", where, not worst.passed))
    decoded = next((found for found in report.next_token if found.scenario == "decode"), None)
    if decoded:
        detail = f"± {digits(decoded.mean_error)} nats a token, decoding"
        tiles.append(Tile("Mean KL", digits(decoded.mean), detail))
        same = f"± {100 * decoded.top1_agreement_error:.1f}, of {len(decoded.kl)} tokens"
        tiles.append(Tile("Same best token", f"{100 * decoded.top1_agreement:.4g} %", same))
    if report.drift:
        shares = [
            max(curve.limit_fractions) for curve in report.drift.curves if curve.metric is Metric.RELATIVE_L2
        ]
        detail = f"of its limit at worst, {report.drift.steps[-1]:,} steps"
        tiles.append(Tile("State drift", f"{100 * max(shares):.0f} %", detail, max(shares) > 1))
    if report.routers:
        mismatches = sum(router.routing_mismatches for router in report.routers)
        tokens = sum(router.tokens for router in report.routers)
        tiles.append(Tile("Routing mismatches", f"{mismatches}", f"of {tokens:,}, near ties"))
    return tiles


def _drift(drift: Drift) -> dict[str, Any]:
    """A row for each curve that has limits: its last error, and where it uses most of its limit."""
    rows = []
    for curve in drift.curves:
        if curve.limits:
            fractions = curve.limit_fractions
            mark = max(range(len(fractions)), key=fractions.__getitem__)
            rows.append(
                {
                    "output": curve.output,
                    "metric": curve.metric,
                    "error": curve.values[-1],
                    "baseline": curve.baseline[-1] if curve.baseline else None,
                    "worst": 100 * fractions[mark],
                    "step": drift.steps[mark],
                }
            )
    return {"plot": plots.drift_plot(drift), "rows": rows, "steps": drift.steps[-1]}


@dataclass
class KindPrecision:
    """All layers of one kind, or the embeddings or the head."""

    kind: str
    places: int = 0
    bytes: int = 0
    bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, dict[str, int]] = field(default_factory=dict)
    """What a layer has → a dtype → how many layers have it in that."""

    def add(self, place: PlacePrecision) -> None:
        """Count one more."""
        self.places += 1
        for dtype, num_bytes in place.bytes_by_dtype.items():
            self.bytes += num_bytes
            self.bytes_by_dtype[dtype] = self.bytes_by_dtype.get(dtype, 0) + num_bytes
        for what, dtype in place.dtypes.items():
            counts = self.dtypes.setdefault(what, {})
            counts[dtype] = counts.get(dtype, 0) + 1


def _precision(places: Sequence[PlacePrecision]) -> dict[str, Any]:
    kinds: dict[str, KindPrecision] = {}
    for place in places:
        kinds.setdefault(place.kind, KindPrecision(place.kind)).add(place)
    used = sorted({dtype for place in places for dtype in place.dtypes.values()}, key="fp8bf16fp16fp32".find)
    return {"plot": plots.precision_plot(places), "kinds": list(kinds.values()), "dtypes": used}


def _state(pools: Sequence[PoolSpec]) -> dict[str, int]:
    """Bytes of one sequence's recurrent state, and of one token in the KV cache."""
    found = {"sequence": 0, "token": 0}
    for pool in pools:
        if pool.is_paged:
            found["token"] += pool.row_bytes // pool.page_size
        else:
            found["sequence"] += pool.row_bytes
    return found
