"""What a bundle says of itself (`manifest.json`), and whether its folder is exactly that.

The manifest tells a damaged, incomplete or edited bundle from a whole one. It is no signature: who can write
the folder can write a manifest that fits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime import uncached
from nemotrt.exporter.runtime.strict_json import decode, encode, read_object

SCHEMA_VERSION = 1
NAME = "manifest.json"

ROLES = (
    "graph",
    "weights",
    "config",
    "quantization",
    "tokenizer",
    "generation_config",
    "chat_template",
    "report",
    "log",
    "licence",
    "engine",
    "plugins",
    "timing_cache",
)
"""What a file of a bundle is for; `tokenizer` is every file that the tokenizer reads."""

VERDICTS = ("passed", "failed", "not run")


@dataclass(frozen=True)
class BundleFile:
    """One file: its path below the bundle with forward slashes, its bytes, and one of ROLES."""

    path: str
    size: int
    sha256: str
    role: str


@dataclass(frozen=True)
class ModelSummary:
    """What was exported."""

    architectures: tuple[str, ...]
    layers: dict[str, int]
    """A layer's kind → how many there are."""
    precision: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    chosen_layers: tuple[int, ...] = ()
    """Which layers of the checkpoint were exported; empty for all."""


@dataclass(frozen=True)
class SourceFile:
    """One file of the checkpoint; `sha256` is empty where it was not computed."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the weights come from: the checkpoint folder's own name, its config.json's hash, its files."""

    name: str
    config_sha256: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Edge:
    """An input or output of the graph; an axis is a size or the contract's name of it."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class PoolPair:
    """An input that holds state, the output that replaces it, and what one row (a slot or a page) is."""

    input: str
    output: str
    axis: str
    dtype: str
    row_shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphSummary:
    """The graph's edges, and which of them are the same pool before and after a step."""

    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    pools: tuple[PoolPair, ...]


@dataclass(frozen=True)
class Profile:
    """What one step may hold, and the runtime (`onnx`, `tensorrt-rtx`, `tensorrt`) and file that it holds for."""

    runtime: str
    path: str
    max_tokens: int
    max_sequences: int
    max_context: int
    page_size: int
    max_rows: int = 0
    """Rows of logits that a step may ask for; 0 for one of each token."""
    runtime_version: str = ""
    """Of the TensorRT that built the engine and must run it; empty where any version will do."""
    sms: tuple[int, ...] = ()
    """GPU generations that the engine is for."""


@dataclass(frozen=True)
class BuildEnvironment:
    """What the bundle was built with: tools by name and version, operating system and architecture."""

    os: str
    arch: str
    tools: dict[str, str]


@dataclass(frozen=True)
class Plugin:
    """A library of ops that an engine in the bundle needs, and the library's own hash of what it was made from."""

    name: str
    version: str
    namespace: str
    path: str
    build: str


@dataclass(frozen=True)
class Verdict:
    """What the report concluded: one of VERDICTS, how many gates there were, and what was not compared."""

    verdict: str
    num_gates: int
    num_failed: int
    runs_as: str
    not_compared: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that a bundle says of itself; `bundle_id` is a hash of all the rest."""

    schema_version: int
    bundle_id: str
    files: tuple[BundleFile, ...]
    model: ModelSummary
    source: Source
    graph: GraphSummary
    profiles: tuple[Profile, ...]
    environment: BuildEnvironment
    plugins: tuple[Plugin, ...]
    partial: bool
    """Whether only some layers were exported."""
    not_exported: tuple[str, ...]
    """Tensors of the checkpoint that are recognised and left out."""
    validation: Verdict
    licence: str
    """The weights' licence as the checkpoint states it, or `not stated`."""

    def of_role(self, role: str) -> tuple[str, ...]:
        """Paths of the files with that role."""
        return tuple(file.path for file in self.files if file.role == role)


@dataclass(frozen=True)
class Findings:
    """How a folder differs from its manifest, each entry a path below the bundle."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    irregular: dict[str, str]
    """What is no plain file → what it is instead: a link, an empty folder."""

    @property
    def is_whole(self) -> bool:
        """Whether the folder is exactly what the manifest says."""
        return not (self.added or self.removed or self.changed or self.irregular)

    def lines(self) -> tuple[str, ...]:
        """Each difference in words."""
        return (
            *(f"{path} is {what}" for path, what in self.irregular.items()),
            *(f"{path} is missing" for path in self.removed),
            *(f"{path} is not in the manifest" for path in self.added),
            *(f"{path} was changed" for path in self.changed),
        )


def describe_files(bundle: Path, roles: Mapping[str, str]) -> tuple[BundleFile, ...]:
    """Every file of the folder but the manifest, hashed, in order of path; `roles` has each path's role.

    Raises BundleError when a file has no role, a role no file, or something in the folder is no plain file.
    """
    found, irregular = _walk(bundle)
    if irregular:
        path, what = next(iter(irregular.items()))
        raise BundleError(f"{bundle}: {path} is {what}")
    strays = sorted(set(found) ^ set(roles))
    if strays:
        what = "has no role" if strays[0] in found else "is missing"
        raise BundleError(f"{bundle}: {strays[0]} {what}")
    unknown = sorted(set(roles.values()) - set(ROLES))
    if unknown:
        raise BundleError(f"{unknown[0]} is no role of a file", hint="known: " + ", ".join(ROLES))
    return tuple(describe_file(bundle, path, roles[path]) for path in found)


def describe_file(bundle: Path, path: str, role: str) -> BundleFile:
    """One file of the folder, hashed."""
    return BundleFile(path, (bundle / path).stat().st_size, file_hash(bundle / path), role)


def write(bundle: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with the id of its contents; gives the manifest with that id."""
    sealed = dataclasses.replace(manifest, bundle_id=content_id(manifest))
    (bundle / NAME).write_text(encode(sealed), encoding="utf-8")
    return sealed


def content_id(manifest: Manifest) -> str:
    """SHA-256 over the manifest without its id, file hashes included: equal ids mean equal bundles."""
    text = encode(dataclasses.replace(manifest, bundle_id=""), indent=None)
    return hashlib.sha256(text.encode()).hexdigest()


def read(bundle: Path) -> Manifest:
    """The manifest, its files not looked at.

    Raises BundleError on a folder without one, one of a newer schema, one edited after it was written, and on
    any field that is missing, unknown, or not of its type.
    """
    if not bundle.is_dir():
        raise BundleError(f"{bundle} is not a folder", hint="name the bundle that build has written")
    path = bundle / NAME
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{bundle} is not a bundle: {NAME} is no file of it",
            hint="nemo-export build makes a bundle of a checkpoint",
        )
    fields = read_object(path)
    version = fields.get("schema_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: schema_version is not a number")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{bundle} has schema {version}, this nemo-export reads up to {SCHEMA_VERSION}",
            hint="upgrade nemo-export",
        )
    manifest = decode(Manifest, fields, NAME)
    _check_names(manifest)
    if manifest.bundle_id != content_id(manifest):
        raise BundleError(f"{path} was changed after it was written", hint="copy or build the bundle again")
    return manifest


def _check_names(manifest: Manifest) -> None:
    """Refuse paths that are not plainly below the bundle, before any of them is opened."""
    seen = set()
    for file in manifest.files:
        parts = PurePosixPath(file.path).parts
        is_plain = parts and "/".join(parts) == file.path and not file.path.startswith("/")
        if not is_plain or ".." in parts or "\\" in file.path or "\0" in file.path:
            raise BundleError(f"{NAME} names {file.path!r}, which is not a path inside the bundle")
        if file.path == NAME or file.path in seen:
            raise BundleError(f"{NAME} lists {file.path} {'twice' if file.path in seen else 'itself'}")
        if file.role not in ROLES:
            raise BundleError(f"{NAME} gives {file.path} the unknown role {file.role}")
        seen.add(file.path)
    if manifest.validation.verdict not in VERDICTS:
        raise BundleError(f"{NAME} has the unknown verdict {manifest.validation.verdict}")


def examine(bundle: Path, manifest: Manifest, *, deep: bool) -> Findings:
    """How the folder differs from its manifest: its exact file set and sizes, and with `deep` every hash."""
    found, irregular = _walk(bundle)
    listed = {file.path: file for file in manifest.files}
    present = [file for path, file in listed.items() if path in found]
    changed = [
        file.path
        for file in present
        if found[file.path] != file.size or (deep and file_hash(bundle / file.path) != file.sha256)
    ]
    return Findings(
        added=tuple(sorted(set(found) - set(listed))),
        removed=tuple(sorted(set(listed) - set(found) - set(irregular))),
        changed=tuple(sorted(changed)),
        irregular=irregular,
    )


def verify(bundle: Path, *, deep: bool) -> Manifest:
    """The manifest of a bundle that is exactly what it says; every opening runs this, at least not `deep`.

    Raises BundleError that names the first difference and counts the others.
    """
    manifest = read(bundle)
    lines = examine(bundle, manifest, deep=deep).lines()
    if lines:
        more = f", and {len(lines) - 1} more differences" if len(lines) > 1 else ""
        raise BundleError(f"{bundle}: {lines[0]}{more}", hint="copy or build the bundle again")
    return manifest


def _walk(bundle: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes of the plain files below the folder but the manifest, in order, and what else is there."""
    files: dict[str, int] = {}
    irregular: dict[str, str] = {}
    for path, entry in _entries(bundle, ""):
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            files[path] = status.st_size
        elif stat.S_ISLNK(status.st_mode):
            irregular[path] = "a link"
        else:
            irregular[path] = "an empty folder" if stat.S_ISDIR(status.st_mode) else "no plain file"
    files.pop(NAME, None)
    return files, irregular


def _entries(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All below a folder but folders that hold something, in order of name; links are not followed."""
    for entry in _listing(folder):
        path = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and _listing(Path(entry.path)):
            yield from _entries(Path(entry.path), f"{path}/")
        else:
            yield path, entry


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror}") from error


def file_hash(path: Path) -> str:
    """A file's SHA-256; raises BundleError where it cannot be read."""
    try:
        return uncached.sha256(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
