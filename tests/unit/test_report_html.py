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
from sample_reports import bundle, diverging, sample_report

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.report import json_file
from nemotrt.exporter.report.html import report_html
from nemotrt.exporter.report.junit import junit
from nemotrt.exporter.report.model import Gate, Metric, ValidationReport


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
        ({"schema_version": 99}, "has schema 99, this nemo-export reads 4", "upgrade nemo-export"),
        ({"schema_version": 2}, "was written by an older nemo-export", "validate the bundle again"),
        ({"schema_version": None}, "schema_version is not a number", ""),
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
