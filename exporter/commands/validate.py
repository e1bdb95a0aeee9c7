"""The command `validate`: compare a bundle with PyTorch, a reference file or another bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotrt.exporter.commands.arguments import BUNDLE, ENGINE, FILE, FOLDER, JSON, EvaluationText, command
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.config import DRIFT_STEPS
from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.runtime import files

if TYPE_CHECKING:
    from nemotrt.exporter.report.model import ValidationReport

OUTPUT_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@command("validate tiny.bundle --checkpoint examples/tiny")
@BUNDLE
@click.option(
    "--checkpoint",
    type=FOLDER,
    help="Checkpoint that the bundle was built from; its weights are compared too, bit for bit. Without it, PyTorch"
    " runs with the bundle's weights.",
)
@click.option(
    "--golden",
    type=FILE,
    help="Reference file from --save-golden to compare with, instead of running PyTorch.",
)
@click.option("--against", type=FOLDER, help="Another bundle to compare with, instead of running PyTorch.")
@click.option(
    "--save-golden",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write PyTorch's results to a reference file, for --golden on another machine.",
)
@ENGINE
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    show_default="cpu",
    help="Execution provider of ONNX Runtime; cuda needs onnxruntime-gpu and is untested.",
)
@click.option(
    "--eval",
    "text",
    type=EvaluationText(),
    metavar="FILE|default",
    help="Also compare on this text (.txt, .jsonl) and measure the quality loss of FP8; `default` is built in.",
)
@click.option(
    "--base",
    type=FOLDER,
    help="With --eval: the model before quantization. Default: the checkpoint, if the build quantized it.",
)
@click.option(
    "--layers-alone",
    is_flag=True,
    help="Compare each layer alone, with one layer in memory at a time; whole steps are not compared.",
)
@click.option("--bisect", is_flag=True, help="Find the layer, the op and the tensor that diverge first.")
@click.option("--html", type=OUTPUT_FILE, help="Write the report as a self-contained HTML page.")
@click.option("--junit", type=OUTPUT_FILE, help="Write the gates as JUnit XML for a CI system.")
@click.option(
    "--drift-steps",
    type=click.IntRange(0),
    show_default=str(DRIFT_STEPS),
    help="Decode steps for measuring the drift of the recurrent state; 0 skips it.",
)
@click.option("--seed", type=click.IntRange(0), show_default="0", help="Random seed for the prompt's tokens.")
@JSON
@click.pass_obj
def validate(
    console: Console, /, html: Path | None, junit: Path | None, as_json: bool, **options: Any
) -> None:
    """Compare BUNDLE with PyTorch, a reference file or another bundle.

    Exits with 6 if a gate fails, and with 8 if a value is not finite.
    """
    from nemotrt.exporter.pipelines.validate import revalidate
    from nemotrt.exporter.validation.request import ValidationRequest

    request = ValidationRequest(**options)
    for page in filter(None, (html, junit)):
        files.check_place(page, request.bundle)
    report = revalidate(request, console)
    if html:
        _write_page(html, request.bundle, report, console.seconds)
    if junit:
        from nemotrt.exporter.report.junit import junit as as_junit

        junit.write_text(as_junit(report, request.bundle.name), encoding="utf-8")
    if as_json:
        from nemotrt.exporter.report import json_file

        click.echo(json_file.text(report), nl=False)
    else:
        from nemotrt.exporter.commands import tables

        tables.show(tables.report(report))
    _raise_on_failure(report, can_bisect=not (request.bisect or request.golden or request.against))


def _write_page(page: Path, bundle: Path, report: ValidationReport, seconds: dict[str, float]) -> None:
    from nemotrt.exporter.report.html import bundle_page
    from nemotrt.exporter.runtime import manifest as manifests
    from nemotrt.exporter.runtime.graph_file import OnnxGraph

    manifest = manifests.read(bundle)
    graph = OnnxGraph.read(bundle / manifest.of_role("graph")[0])
    text = bundle_page(report, graph, bundle, manifest, name=bundle.resolve().name, seconds=seconds)
    page.write_text(text, encoding="utf-8")


def _raise_on_failure(report: ValidationReport, *, can_bisect: bool) -> None:
    from nemotrt.exporter.validation.gates import check_finite

    check_finite(report)
    diverging = report.bisect.diverging if report.bisect else ()
    if diverging:
        first = diverging[0]
        raise ValidationError(
            f"{first.node} diverges from PyTorch in {first.tensor}: relative L2"
            f" {'not finite' if first.error is None else f'{first.error:.3g}'}, limit {first.limit:.3g}",
            hint="do not ship the bundle",
        )
    if not report.passed:
        raise ValidationError(
            f"{len(report.failed)} of {len(report.gates)} gates failed"
            if report.gates
            else "nothing was compared",
            hint="do not ship the bundle"
            + ("; --bisect names the layer, the op and the tensor" * can_bisect),
        )
