"""The report as HTML (its contents, its size, and how a browser renders it), as JSON and as JUnit XML."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import open_page

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.html import report_html
from nemotrt.exporter.report.junit import junit
from nemotrt.exporter.report.model import (
    Bisection,
    DivergentValue,
    Drift,
    DriftCurve,
    Gate,
    Metric,
    NextToken,
    NotCompared,
    Omitted,
    PartError,
    RouterAgreement,
    TextComparison,
    TextReport,
    ValidationReport,
    WorstToken,
)
from nemotrt.exporter.report.precision_map import PlacePrecision
from nemotrt.exporter.runtime import manifest
from nemotrt.plugins.contract import DType, PoolSpec

KINDS = ("mamba", "moe", "attention", "mlp")


def sample_report(num_layers: int = 10, num_rows: int = 160) -> ValidationReport:
    """A report as large as a real one, with one failed gate."""
    generator = np.random.default_rng(0)
    names = [f"layers.{i} adds" for i in range(num_layers)]
    gates = [
        Gate(scenario, name, metric, float(generator.uniform(0, 1)), 1.0, 1 / 3)
        for scenario in ("prefill", "decode", "mixed batch", "each layer alone")
        for name in ("logits", *names)
        for metric in (Metric.RELATIVE_L2, Metric.NORM_RATIO, Metric.NOT_FINITE)
    ]
    gates.append(Gate("decode", "logits", Metric.MEAN_KL, 2.5, 1.0, 0.3))
    kl = tuple(float(f"{value:.4g}") for value in generator.lognormal(-9, 2, num_rows))
    worst = (WorstToken(3, max(kl), (1, 2, 3), 5, 6, 0.25),)
    token = NextToken("decode", kl, kl[::-1], 1e-4, 1e-5, 1e-2, 0.99, 0.01, 100, worst)
    layers = tuple(
        PartError(f"layers.{i}", KINDS[i % 4], "", 10 ** -generator.uniform(2, 4), 0, 1e-3, 3e-3)
        for i in range(num_layers)
    )
    routers = tuple(RouterAgreement(i, 300, i % 3, 0.1, 1e-4, 1e-3) for i in range(1, num_layers, 4))
    ops = tuple(
        PartError(f"layers.{i}.mixer.scan", "NemoSelectiveScan", output, 1e-3, 0, 1e-3, 3e-3)
        for i in range(num_layers)
        for output in ("y", "next_ssm_state")
    )
    return ValidationReport(
        ops=ops,
        drift=drift(num_layers),
        text=text(num_layers),
        candidate="ONNX Runtime, BF16, emulated in FP32",
        reference="PyTorch, FP32",
        baseline="PyTorch, bfloat16",
        tokens={"prompt": 96, "decode": 64, "seed": 0},
        gates=tuple(gates),
        routing_mismatches={"decode": 2},
        not_compared=(NotCompared(Omitted.ENGINE, "not executed"),),
        next_token=(token, replace(token, scenario="prefill")),
        layers=layers,
        routers=routers,
    )


STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def drift(num_layers: int) -> Drift:
    generator = np.random.default_rng(1)

    def errors(size: float) -> tuple[float, ...]:
        return tuple(float(value) for value in size * generator.uniform(0.5, 2, len(STEPS)))

    limit = (1.2e-2,) * len(STEPS)
    curves = []
    for i in range(0, num_layers, 2):
        for kind in ("conv_state", "ssm_state"):
            curves.append(DriftCurve(f"{kind}.{i}", Metric.RELATIVE_L2, errors(4e-3), errors(4e-3), limit))
        curves.append(DriftCurve(f"ssm_state.{i}", Metric.RECURRENCE, errors(2e-7), (), (1e-4,) * len(STEPS)))
    curves.append(DriftCurve("logits", Metric.MEAN_KL, errors(1e-4), errors(1e-4), (3e-4,) * len(STEPS)))
    return Drift(STEPS, 2, tuple(curves))


def text(num_layers: int) -> TextReport:
    figures = tuple(
        TextComparison(name, 2.5e-3, 3e-5, 0.964, 0.002, 1.0011, 7e-4) for name in ("quantization", "total")
    )
    costs = [
        TextComparison(f"layers.{i}", 1e-3 / (1 + i), 1e-4 / (1 + i), 0.99, 0.01, 1.0, 1e-3, KINDS[i % 4])
        for i in range(num_layers)
    ]
    return TextReport("prose.txt", 10_930, "super", figures, tuple(costs))


def bundle(num_layers: int = 10) -> dict[str, Any]:
    """The arguments of `report_html` that describe a bundle with every other layer in FP8."""
    items = ("norm", "in_proj", "conv", "scan", "out_proj", "conv_state", "ssm_state")
    places = [
        PlacePrecision(
            f"layers.{i}", KINDS[i % 4], dict.fromkeys(items, "bf16" if i % 2 else "fp8"), {"bf16": 1_000_000}
        )
        for i in range(num_layers)
    ]
    pools = (
        PoolSpec("ssm_state.0", DType.FLOAT32, (4, 64, 128)),
        PoolSpec("kv_cache.2", DType.BFLOAT16, (2, 2, 128, 64)),
    )
    summary = manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        bundle_id="0" * 64,
        files=(manifest.BundleFile("model.onnx.data", 3_805_184, "0" * 64, manifest.Role.WEIGHTS),),
        model=manifest.ModelSummary((), {"mamba": num_layers}, "fp8", 1024, (2,)),
        source=manifest.Source("super", "", {}),
        graph=manifest.GraphSummary((), (), pools),
        profiles=(manifest.Profile("onnx", "model.onnx", 2048, 16, 8192, 128),),
        environment=manifest.BuildEnvironment("Linux", "x86_64", {"torch": "2.13"}),
        plugins=(),
        partial=False,
        not_exported=(),
        validation=manifest.ValidationSummary(manifest.Verdict.FAILED, 1, 1, "", ()),
        license="not stated",
    )
    return {"manifest": summary, "places": places}


def test_the_page_starts_with_the_verdict_and_the_failed_gates() -> None:
    page = report_html(sample_report(), name="a<b.bundle")
    body = page[page.index("<main>") :]
    assert body.index("Failed") < body.index("Failed gates") < body.index("<td>mean KL</td>")
    assert "a&lt;b.bundle" in page
    assert "a<b" not in page
    assert "TensorRT engine: not executed" in page


def test_a_page_of_88_layers_stays_small() -> None:
    report = sample_report(88, 400)
    page = report_html(replace(report, next_token=report.next_token * 3), name="large", **bundle(88))
    assert len(page.encode()) <= 1_500_000
    assert not re.search(r"(src|href)=[^\"]*(http|//)|url\(|@import", page)


def test_the_page_shows_the_measurements() -> None:
    page = report_html(sample_report(), name="tiny", **bundle(), seconds={"load": 0.12, "validate": 8.96})
    assert "131 kB of recurrent state, 512 B of KV cache per token" in page
    assert "load 0.1 s, validate 9.0 s" in page
    assert "1.00110" in page
    assert "10,930 tokens of prose.txt" in page
    bare = report_html(replace(sample_report(), drift=None, text=None, layers=(), routers=()), name="tiny")
    for heading in ("drift", "text", "by-layer", "experts", "bundle"):
        assert f'<h2 id="{heading}">' in page
        assert f'"{heading}"' not in bare


def test_a_report_is_read_back_from_its_json() -> None:
    nan = Gate("decode", "logits", Metric.MEAN_KL, float("nan"), 1.0)
    report = replace(sample_report(), gates=(*sample_report().gates, nan), bisect=diverging())
    fields = json.loads(
        json_file.text(report), parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
    )
    parsed = json_file.parse(fields, json_file.NAME)
    assert np.isnan(parsed.gates[-1].value)
    assert replace(parsed, gates=()) == replace(report, gates=())
    assert parsed.gates[:-1] == report.gates[:-1]
    assert not parsed.gates[-1].passed


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"schema_version": 99}, "was written by a newer nemo-export", "upgrade nemo-export"),
        ({"schema_version": 2}, "was written by an older nemo-export", "validate the bundle again"),
        ({"schema_version": None}, "is not a report: it has no schema_version", ""),
        ({"extra": 1}, "extra is not known", ""),
    ],
)
def test_a_report_of_another_schema_is_refused(change: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(BundleError, match=message) as refused:
        json_file.parse(json_file.as_json(sample_report()) | change, json_file.NAME)
    assert refused.value.hint == hint


def test_a_report_without_gates_is_shown_as_failed() -> None:
    page = report_html(ValidationReport("a", "b", "", sample_report().tokens, (), {}, ()), name="empty")
    assert "Failed" in page
    assert "Passed" not in page


def diverging() -> Bisection:
    """The result of a bisection that names one value."""
    value = DivergentValue(
        place="layers.3",
        kind="mlp",
        node="layers.3.mixer.up_proj",
        op="Gemm",
        tensor="layers.3.mixer.up_proj",
        shape=("T", "64"),
        error=None,
        baseline=1e-3,
        limit=3e-3,
        step=0,
        index=(1, 2),
        candidate=None,
        reference=0.5,
        reads=("weight: equal",),
    )
    return Bisection("ONNX Runtime", 120, 4, (value,), None, ())


def test_junit_has_a_case_for_each_gate() -> None:
    report = sample_report()
    root = ElementTree.fromstring(junit(report, "tiny"))
    assert len(root.findall(".//testcase")) == len(report.gates) == int(root.attrib["tests"])
    assert [case.attrib["name"] for case in root.iter("testcase") if len(case)] == ["logits: mean KL"]
    assert root.attrib["failures"] == "1"
    bisected = ElementTree.fromstring(junit(replace(report, bisect=diverging()), "tiny"))
    assert bisected.attrib["failures"] == "2"
    case = next(suite for suite in bisected if suite.attrib["name"] == "bisect")[0]
    assert case.attrib["name"] == "layers.3.mixer.up_proj: relative L2"
    assert "not finite exceeds the limit 0.003" in case[0].attrib["message"]
    empty = ElementTree.fromstring(junit(replace(report, gates=()), "tiny"))
    assert empty.attrib["failures"] == "1"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    page = report_html(replace(sample_report(88, 400), bisect=diverging()), name="large.bundle", **bundle(88))
    path.write_text(page, encoding="utf-8")
    with open_page(path, width=width, dark=dark) as (shown, errors, requests):
        assert errors == []
        assert requests == [path.as_uri()]
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        layers = shown.locator("#layers")
        assert layers.locator("rect").count() == 88
        assert layers.evaluate("svg => svg.getBoundingClientRect().width") > 0.7 * min(width, 900)
        assert shown.locator("svg.kl polyline.curve").count() == 2
        assert shown.locator("#drift-plot polyline").count() == 132
        assert shown.locator("#map i[class]").count() == 88 * 7
        assert shown.locator("#ops tbody tr").count() == 88 * 2
        assert shown.locator("#ops").is_hidden()
        assert shown.locator("#costs rect").count() == 88
        assert shown.locator(".divergent").count() == 1
        background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        for table, column in (
            ("#routers", "row => +row.cells[2].innerText"),
            ("#ranked", "row => +row.cells[2].dataset.v"),
        ):
            shown.evaluate(f"document.querySelectorAll('{table} th button')[2].click()")
            cells = shown.locator(f"{table} tbody tr").evaluate_all(f"rows => rows.map({column})")
            assert cells == sorted(cells)
        shown.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert errors == []
