"""Validation reports for tests, as large as real ones, and the bundle that they describe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

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
        candidate="ONNX Runtime (BF16, emulated in FP32)",
        reference="PyTorch (FP32)",
        baseline="PyTorch (BF16)",
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
