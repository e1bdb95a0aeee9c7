"""A manifest says exactly what is in a bundle, and anything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runtime_bundle import ROLES, write_bundle

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.manifest import Role


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict], object], *, reseal: bool = True) -> None:
    """Change the manifest's JSON; resealed, its id fits again, as a careful forger would leave it."""
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    if reseal:
        manifest = manifests.decode(manifests.Manifest, fields, "manifest.json")
        manifests.write(bundle, manifest)


def test_a_whole_bundle_verifies(bundle: Path) -> None:
    manifest = manifests.verify(bundle, deep=True)
    assert {file.path for file in manifest.files} == set(ROLES)
    assert manifest.of_role("weights") == ("model.onnx.data",)
    assert not manifests.examine(bundle, manifest, deep=True).lines()


def test_reading_gives_what_was_written(bundle: Path) -> None:
    manifest = manifests.read(bundle)
    assert manifests.write(bundle, manifest) == manifest == manifests.read(bundle)
    assert [pool.name for pool in manifest.graph.pools][:2] == ["conv_state.0", "ssm_state.0"]
    assert manifest.graph.pools[2].row_shape == (2, 2, 4, 8)
    assert manifest.graph.outputs[0].axes == ("R", 300)


def test_the_id_covers_every_field_and_file(bundle: Path) -> None:
    manifest = manifests.read(bundle)
    ids = {manifests.content_id(dataclasses.replace(manifest, license=text)) for text in ("MIT", "other")}
    changed = dataclasses.replace(manifest.files[0], sha256="0" * 64)
    other = dataclasses.replace(manifest, files=(changed, *manifest.files[1:]))
    assert len(ids | {manifest.bundle_id, manifests.content_id(other)}) == 4


def flip_byte(bundle: Path) -> None:
    path = bundle / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_a_changed_byte_is_found_by_its_hash_only(bundle: Path) -> None:
    flip_byte(bundle)
    manifests.verify(bundle, deep=False)
    with pytest.raises(BundleError, match=r"model\.onnx\.data was changed"):
        manifests.verify(bundle, deep=True)


def replace_by_link(bundle: Path) -> None:
    target = bundle.parent / "elsewhere.json"
    (bundle / "tokenizer.json").rename(target)
    (bundle / "tokenizer.json").symlink_to(target)


def link_folder(bundle: Path) -> None:
    (bundle / "sub").symlink_to(bundle.parent)


DAMAGE = {
    "missing": (lambda bundle: (bundle / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "extra": (lambda bundle: (bundle / "a b.txt").write_text(""), r"a b\.txt is not in the manifest"),
    "extra, hidden": (
        lambda bundle: [(bundle / ".git").mkdir(), (bundle / ".git/x").write_text("")],
        r"\.git/x is not in the manifest",
    ),
    "longer": (
        lambda bundle: os.truncate(bundle / "tokenizer.json", 100_000),
        r"tokenizer\.json was changed",
    ),
    "empty": (lambda bundle: (bundle / "model.onnx").write_bytes(b""), r"model\.onnx was changed"),
    "linked": (replace_by_link, r"tokenizer\.json is a link"),
    "linked folder": (link_folder, r"sub is a link"),
    "empty folder": (lambda bundle: (bundle / "sub").mkdir(), r"sub is an empty folder"),
    "pipe": (lambda bundle: os.mkfifo(bundle / "pipe"), r"pipe is not a regular file"),
    "folder for a file": (
        lambda bundle: [(bundle / "model.onnx").unlink(), (bundle / "model.onnx").mkdir()],
        r"model\.onnx is an empty folder",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("deep", [False, True])
def test_a_folder_that_is_not_its_manifest_is_refused(
    bundle: Path, damage: Callable[[Path], object], message: str, deep: bool
) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        manifests.verify(bundle, deep=deep)


def test_all_differences_are_found_and_told_apart(bundle: Path) -> None:
    (bundle / "extra").write_text("")
    (bundle / "model.onnx").unlink()
    (bundle / "folder").mkdir()
    flip_byte(bundle)
    found = manifests.examine(bundle, manifests.read(bundle), deep=True)
    expected = manifests.Findings(
        ("extra",), ("model.onnx",), ("model.onnx.data",), {"folder": "an empty folder"}
    )
    assert found == expected
    assert len(found.lines()) == 4
    with pytest.raises(BundleError, match="and 3 more differences"):
        manifests.verify(bundle, deep=True)


def first_file(name: str, value: object) -> Callable[[dict], None]:
    return lambda fields: fields["files"][0].update({name: value})


FORGERIES = {
    "newer schema": (
        lambda fields: fields.update(schema_version=manifests.SCHEMA_VERSION + 1),
        f"has schema {manifests.SCHEMA_VERSION + 1}, .* reads {manifests.SCHEMA_VERSION}",
    ),
    "older schema": (lambda fields: fields.update(schema_version=2), "was written by an older nemo-export"),
    "no schema": (lambda fields: fields.pop("schema_version"), "schema_version is not a number"),
    "schema true": (lambda fields: fields.update(schema_version=True), "schema_version is not a number"),
    "unknown field": (lambda fields: fields.update(colour="red"), "colour is not known"),
    "missing field": (lambda fields: fields.pop("license"), "license is missing"),
    "missing inside": (lambda fields: fields["model"].pop("precision"), r"model\.precision is missing"),
    "wrong type": (first_file("size", "12"), r"files\[0\]\.size is \"12\", not int"),
    "true for a number": (first_file("size", True), r"files\[0\]\.size is true, not int"),
    "not a list": (lambda fields: fields.update(files={}), "files is not a list"),
    "not an object": (lambda fields: fields.update(model=[]), "model is not an object"),
    "edited": (lambda fields: fields.update(license="MIT"), "was changed after it was written"),
    "edited id": (lambda fields: fields.update(bundle_id="0"), "was changed after it was written"),
}


@pytest.mark.parametrize(("change", "message"), FORGERIES.values(), ids=FORGERIES)
def test_a_manifest_that_is_not_ours_is_refused(
    bundle: Path, change: Callable[[dict], object], message: str
) -> None:
    edit(bundle, change, reseal=False)
    with pytest.raises(BundleError, match=message):
        manifests.verify(bundle, deep=False)


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "sub/../../outside",
        "/etc/passwd",
        "a//b",
        "./model.onnx",
        "",
        ".",
        "a\\b",
        "manifest.json",
    ],
)
def test_paths_out_of_the_bundle_are_refused(bundle: Path, path: str) -> None:
    edit(bundle, first_file("path", path))
    with pytest.raises(BundleError, match=r"not a path inside the bundle|lists manifest\.json itself"):
        manifests.verify(bundle, deep=False)


def test_a_path_listed_twice_and_unknown_words_are_refused(bundle: Path) -> None:
    edit(bundle, lambda fields: fields["files"].append(fields["files"][0]))
    with pytest.raises(BundleError, match="twice"):
        manifests.read(bundle)
    edit(bundle, lambda fields: fields["files"].pop())
    edit(bundle, first_file("role", "virus"), reseal=False)
    with pytest.raises(BundleError, match=r'files\[0\]\.role is "virus", not one of graph, weights'):
        manifests.read(bundle)
    edit(bundle, first_file("role", "graph"))
    edit(bundle, lambda fields: fields["validation"].update(verdict="probably"), reseal=False)
    with pytest.raises(
        BundleError, match=r'validation\.verdict is "probably", not one of passed, failed, not run'
    ):
        manifests.read(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"files": [], "files": []}', "duplicate key files"),
        ("[" * 100_000, "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_a_broken_manifest_is_refused(bundle: Path, text: str, message: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BundleError, match=message):
        manifests.read(bundle)


def test_what_is_no_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        manifests.verify(tmp_path / "nowhere", deep=False)
    (bundle / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match="is not a bundle"):
        manifests.verify(bundle, deep=False)


def test_a_bundle_of_links_says_how_to_copy_it(bundle: Path, tmp_path: Path) -> None:
    """A download through the Hugging Face cache makes one."""
    (tmp_path / "links").mkdir()
    for path in bundle.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    with pytest.raises(BundleError, match=r"manifest\.json is a link, and a bundle has no links") as refused:
        manifests.verify(tmp_path / "links", deep=False)
    assert "cp -rL" in refused.value.hint
    (tmp_path / "links" / "manifest.json").unlink()
    (tmp_path / "links" / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes())
    with pytest.raises(
        BundleError, match=r"generation_config\.json is a link, and \d more differences"
    ) as refused:
        manifests.verify(tmp_path / "links", deep=False)
    assert "cp -rL" in refused.value.hint


def test_describing_files_wants_a_role_for_each_and_plain_files(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json has no role"):
        manifests.describe_files(
            bundle, {path: role for path, role in ROLES.items() if path != "tokenizer.json"}
        )
    with pytest.raises(BundleError, match=r"report\.json is missing"):
        manifests.describe_files(bundle, ROLES | {"report.json": Role.REPORT})
    (bundle / "link").symlink_to("model.onnx")
    with pytest.raises(BundleError, match="link is a link"):
        manifests.describe_files(bundle, ROLES | {"link": Role.GRAPH})
