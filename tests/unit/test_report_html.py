"""The HTML report: what it holds, how large it is, and what a browser makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import Browser

from nemotrt.exporter.artifacts import (
    Gate,
    LayerError,
    NextToken,
    RouterAgreement,
    TextPlace,
    ValidationReport,
)
from nemotrt.exporter.junit import junit
from nemotrt.exporter.report_html import report_html

KINDS = ("mamba", "moe", "attention", "mlp")


def made_up(num_layers: int = 10, num_rows: int = 160) -> ValidationReport:
    """A report of the size of a real one, one of its gates failed."""
    generator = np.random.default_rng(0)
    names = [f"layers.{i} adds" for i in range(num_layers)]
    gates = [
        Gate(scenario, name, metric, float(generator.uniform(0, 1)), 1.0, 1 / 3)
        for scenario in ("prefill", "decode", "mixed batch", "each layer alone")
        for name in ("logits", *names)
        for metric in ("relative L2", "norm ratio", "not finite")
    ]
    gates.append(Gate("decode", "logits", "mean KL", 2.5, 1.0, 0.3))
    kl = tuple(float(f"{value:.4g}") for value in generator.lognormal(-9, 2, num_rows))
    worst = (TextPlace(3, max(kl), (1, 2, 3), 5, 6, 0.25),)
    token = NextToken("decode", kl, kl[::-1], 1e-4, 1e-5, 1e-2, 0.99, 0.01, 100, worst)
    layers = tuple(
        LayerError(f"layers.{i}", KINDS[i % 4], 10 ** -generator.uniform(2, 4), 1e-3)
        for i in range(num_layers)
    )
    routers = tuple(RouterAgreement(i, 300, i % 3, 0.1, 1e-4, 1e-3) for i in range(1, num_layers, 4))
    return ValidationReport(
        candidate="ONNX Runtime, bf16 as an FP32 twin",
        reference="PyTorch, FP32",
        floor="PyTorch, bfloat16",
        tokens={"prompt": 96, "decode": 64, "seed": 0},
        gates=tuple(gates),
        rerouted={"decode": 2},
        not_compared=("TensorRT engine: not executed",),
        next_token=(token, replace(token, scenario="prefill")),
        layers=layers,
        routers=routers,
    )


def test_the_verdict_stands_first_and_what_failed_is_named() -> None:
    page = report_html(made_up(), name="a<b.bundle")
    body = page[page.index("<body>") :]
    assert body.index("Failed") < body.index("What failed") < body.index("mean KL")
    assert "a&lt;b.bundle" in page
    assert "a<b" not in page
    assert "TensorRT engine: not executed" in page


def test_a_page_of_88_layers_stays_small() -> None:
    report = made_up(88, 400)
    page = report_html(replace(report, next_token=report.next_token * 3), name="large")
    assert len(page.encode()) <= 1_500_000
    assert not re.search(r"(src|href)=|url\(|@import", page)


def test_a_report_of_nothing_is_shown_as_failed() -> None:
    page = report_html(ValidationReport("a", "b", "", made_up().tokens, (), {}, ()), name="empty")
    assert "Passed" not in page


def test_junit_has_a_case_for_each_gate() -> None:
    report = made_up()
    root = ElementTree.fromstring(junit(report, "tiny"))
    assert len(root.findall(".//testcase")) == len(report.gates) == int(root.attrib["tests"])
    assert [case.attrib["name"] for case in root.iter("testcase") if len(case)] == ["logits: mean KL"]
    assert root.attrib["failures"] == "1"
    empty = ElementTree.fromstring(junit(replace(report, gates=()), "tiny"))
    assert empty.attrib["failures"] == "1"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(tmp_path: Path, width: int, dark: bool) -> None:
    path = tmp_path / "report.html"
    path.write_text(report_html(made_up(88, 400), name="large.bundle"), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.show(path, width=width, dark=dark)
        assert browser.errors() == []
        assert browser.requests() == [path.as_uri()]
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('#layers rect').length") == 88
        assert browser.run("document.querySelector('#layers').getBoundingClientRect().width") > 0.7 * min(
            width, 900
        )
        assert browser.run("document.querySelectorAll('svg.kl polyline.curve').length") == 2
        background = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        cells = "[...document.querySelectorAll('#routers tbody tr')].map(row => +row.cells[2].innerText)"
        browser.run("document.querySelectorAll('#routers th button')[2].click()")
        assert browser.run(cells) == sorted(browser.run(cells))
        browser.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert browser.errors() == []
