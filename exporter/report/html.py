"""The validation report as one HTML file without external resources: verdict, plots, tables."""

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemotrt.exporter.generation.tokenizer import TOKENIZER, Tokenizer
from nemotrt.exporter.report import plots
from nemotrt.exporter.report.model import Drift, Metric, ValidationReport
from nemotrt.exporter.report.precision_map import PlacePrecision, precision_map
from nemotrt.exporter.report.units import digits, size
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAX_PERCENT = 999


def bundle_page(
    report: ValidationReport,
    graph: OnnxGraph,
    folder: Path,
    manifest: Manifest,
    *,
    name: str,
    seconds: Mapping[str, float] | None = None,
) -> str:
    """`report_html` with the bundle's graph and tokenizer."""
    places = precision_map(graph.model)
    tokenizer = Tokenizer(folder) if (folder / TOKENIZER).is_file() else None
    return report_html(
        report, name=name, manifest=manifest, places=places, tokenizer=tokenizer, seconds=seconds
    )


def report_html(
    report: ValidationReport,
    *,
    name: str,
    manifest: Manifest | None = None,
    places: Sequence[PlacePrecision] = (),
    tokenizer: Tokenizer | None = None,
    seconds: Mapping[str, float] | None = None,
) -> str:
    """The page; without a tokenizer, tokens are shown as ids. `seconds` is the duration of each stage."""
    from jinja2 import Environment, StrictUndefined

    def decoded(tokens: Sequence[int]) -> str:
        return tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))

    source = files("nemotrt.exporter.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": digits,
        "size": size,
        "thousands": "{:,}".format,
        "power": lambda exponent: f"10{str(exponent).translate(SUPERSCRIPT)}",
        "percent": lambda fraction: min(100 * fraction, MAX_PERCENT),
        "decoded": decoded,
    }
    pools = manifest.graph.pools if manifest else ()
    fraction = operator.attrgetter("limit_fraction")
    return environment.from_string(source).render(
        name=name,
        report=report,
        manifest=manifest,
        seconds=seconds or {},
        failed=sorted(report.failed, key=fraction, reverse=True),
        closest=max((gate for gate in report.gates if gate.limit), key=fraction, default=None),
        decode=next((tokens for tokens in report.next_token if tokens.scenario == "decode"), None),
        layers=plots.layer_plot(report.layers) if report.layers else None,
        next_token=[(tokens, plots.kl_plot(tokens)) for tokens in report.next_token],
        drift=_drift(report.drift) if report.drift else None,
        costs=plots.cost_plot(report.text.layers) if report.text and report.text.layers else None,
        precision=_precision(places) if places else None,
        state_bytes=sum(pool.row_bytes for pool in pools if not pool.is_paged),
        cache_bytes=sum(pool.row_bytes // pool.page_size for pool in pools if pool.is_paged),
    )


def _drift(drift: Drift) -> dict[str, Any]:
    """The plot, and a row for each curve: its last error, and the step at which it uses most of its limit."""
    rows = []
    for curve in drift.curves:
        if curve.limits:
            fraction, step = max(zip(curve.limit_fractions, drift.steps, strict=True))
            baseline = curve.baseline[-1] if curve.baseline else None
            rows.append((curve, curve.values[-1], baseline, fraction, step))
    states = [fraction for curve, *_, fraction, _ in rows if curve.metric is Metric.RELATIVE_L2]
    return {"plot": plots.drift_plot(drift), "rows": rows, "steps": drift.steps[-1], "worst": max(states)}


def _precision(places: Sequence[PlacePrecision]) -> dict[str, Any]:
    """The places and their items (linear layers, ops, norms and pools), and a summary for each kind of layer."""
    kinds: dict[str, dict[str, Any]] = {}
    for place in places:
        new = {"places": 0, "stored": Counter(), "dtypes": defaultdict(Counter)}
        kind = kinds.setdefault(place.kind, new)
        kind["places"] += 1
        kind["stored"].update(place.bytes_by_dtype)
        for item, dtype in place.dtypes.items():
            kind["dtypes"][item][dtype] += 1
    rows = dict.fromkeys(item for place in places for item in place.dtypes)
    used = {dtype for place in places for dtype in place.dtypes.values()}
    return {"places": places, "rows": list(rows), "used": used, "kinds": kinds}
