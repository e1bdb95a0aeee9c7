"""The command `verify`: detect every change of a bundle since it was built."""

from pathlib import Path

import click

from nemotrt.exporter.commands.arguments import BUNDLE, JSON, command, print_json
from nemotrt.exporter.commands.console import Console
from nemotrt.exporter.commands.terminal import printable
from nemotrt.exporter.errors import BundleError


@command("verify tiny.bundle")
@BUNDLE
@click.option("--fast", is_flag=True, help="Compare names and sizes only, without hashes.")
@JSON
@click.pass_obj
def verify(console: Console, bundle: Path, fast: bool, as_json: bool) -> None:
    """Compare the files of BUNDLE, their sizes and their hashes with the manifest."""
    from nemotrt.exporter.runtime import manifest as manifests

    manifest = manifests.read(bundle)
    total = sum(file.size for file in manifest.files)
    with console.stage("verify", f"{len(manifest.files)} files, {total:,} bytes"):
        findings = manifests.examine(bundle, manifest, deep=not fast)
    lines = findings.lines()
    if as_json:
        fields = {"whole": not lines, "hashed": not fast, "bundle_id": manifest.bundle_id}
        print_json(fields | vars(findings))
    else:
        text = "\n".join(lines) if lines else f"{bundle} is whole: {manifest.bundle_id}"
        click.echo(printable(text))
    if lines:
        raise BundleError(
            f"{bundle} differs from its manifest: {len(lines)} difference{'s' * (len(lines) > 1)}",
            hint="copy or build the bundle again",
        )
