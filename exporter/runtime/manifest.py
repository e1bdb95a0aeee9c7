"""The manifest of a bundle (`manifest.json`), and the check that the bundle's folder matches it.

The manifest detects damaged, incomplete and edited bundles. It is not a signature: whoever can write to the folder can
also write a matching manifest.
"""

import dataclasses
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime.files import sha256
from nemotrt.exporter.runtime.strict_json import check_schema, decode, encode, read_object
from nemotrt.plugins.contract import PoolSpec

SCHEMA_VERSION = 4
NAME = "manifest.json"

LINK = "a link"
COPY_FILES = (
    "copy the files that the links lead to: cp -rL BUNDLE COPY (hf download --local-dir makes no links)"
)
"""What to do about a bundle of links, as a download through the Hugging Face cache makes it."""


class Role(StrEnum):
    """The purpose of a file in a bundle; every file that the tokenizer reads is `tokenizer`."""

    GRAPH = "graph"
    WEIGHTS = "weights"
    CONFIG = "config"
    QUANTIZATION = "quantization"
    TOKENIZER = "tokenizer"
    GENERATION_CONFIG = "generation_config"
    CHAT_TEMPLATE = "chat_template"
    REPORT = "report"
    LOG = "log"
    LICENSE = "license"
    ENGINE = "engine"
    PLUGINS = "plugins"
    TIMING_CACHE = "timing_cache"


class Verdict(StrEnum):
    """The result of a bundle's validation."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle; `path` is relative to the bundle, with forward slashes."""

    path: str
    size: int
    sha256: str
    role: Role


@dataclass(frozen=True)
class ModelSummary:
    """The exported model."""

    architectures: tuple[str, ...]
    layers: dict[str, int]
    """The number of layers of each kind."""
    precision: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    chosen_layers: tuple[int, ...] = ()
    """Indexes of the exported layers in the checkpoint; empty if all were exported."""
    ignored_fields: tuple[str, ...] = ()
    """Unknown fields of config.json that the build was asked to ignore."""
    zero_weights: str = ""
    """Weights that are zero where trained weights are not, and that the build was asked to accept."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that the weights come from: its folder's name, and its files' names and sizes in bytes."""

    name: str
    config_sha256: str
    files: dict[str, int]


@dataclass(frozen=True)
class GraphValue:
    """An input or output of the graph; an axis is a size, or its name in the contract."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class GraphSummary:
    """The graph's inputs, outputs and pools; an output `next.NAME` replaces the pool NAME."""

    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]
    pools: tuple[PoolSpec, ...]


@dataclass(frozen=True)
class Profile:
    """The largest step that the graph (runtime `onnx`) or engine (`tensorrt-rtx`, `tensorrt`) at `path` takes."""

    runtime: str
    path: str
    max_tokens: int
    max_sequences: int
    max_context: int
    page_size: int
    max_rows: int = 0
    """Rows of logits that a step may request; 0 means one for each token."""
    runtime_version: str = ""
    """The TensorRT version that built the engine and must run it; empty if any version will do."""
    sms: tuple[int, ...] = ()
    """The GPU generations that the engine was built for."""


@dataclass(frozen=True)
class BuildEnvironment:
    """The machine that built the bundle, and the version of each tool it used."""

    os: str
    arch: str
    tools: dict[str, str]


@dataclass(frozen=True)
class Plugin:
    """A plugin library that the bundle's engine needs; `build` is the library's hash of its own sources."""

    name: str
    version: str
    namespace: str
    path: str
    build: str


@dataclass(frozen=True)
class ValidationSummary:
    """The outcome of the validation; the report has the details."""

    verdict: Verdict
    num_gates: int
    num_failed: int
    runs_as: str
    not_compared: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The description of a bundle; `bundle_id` is a hash of all other fields."""

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
    """Whether only some of the layers were exported."""
    not_exported: tuple[str, ...]
    """Tensors of the checkpoint that were recognized and left out."""
    validation: ValidationSummary
    license: str
    """The weights' license as the checkpoint states it, or `not stated`."""

    def of_role(self, role: Role | str) -> tuple[str, ...]:
        """Paths of the files with that role."""
        return tuple(file.path for file in self.files if file.role == role)


@dataclass(frozen=True)
class Findings:
    """The differences between a folder and its manifest, as paths relative to the bundle."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    irregular: dict[str, str]
    """A path that is not a regular file, and what it is: a link, an empty folder."""

    def lines(self) -> tuple[str, ...]:
        """One line for each difference."""
        return (
            *(f"{path} is {kind}" for path, kind in self.irregular.items()),
            *(f"{path} is missing" for path in self.removed),
            *(f"{path} is not in the manifest" for path in self.added),
            *(f"{path} was changed" for path in self.changed),
        )


def describe_files(bundle: Path, roles: Mapping[str, Role]) -> tuple[BundleFile, ...]:
    """Every file of the folder except the manifest, with its hash, in order of path; `roles` maps paths to roles.

    Raises BundleError if a file has no role, a role has no file, or the folder holds anything but regular files.
    """
    sizes, irregular = _walk(bundle)
    for path, kind in irregular.items():
        raise BundleError(f"{bundle}: {path} is {kind}")
    for path in sorted(sizes.keys() ^ roles.keys()):
        raise BundleError(f"{bundle}: {path} {'has no role' if path in sizes else 'is missing'}")
    return tuple(describe_file(bundle, path, roles[path]) for path in sizes)


def describe_file(bundle: Path, path: str, role: Role) -> BundleFile:
    """One file of the folder, with its hash."""
    return BundleFile(path, (bundle / path).stat().st_size, sha256(bundle / path), role)


def write(bundle: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with the id of its contents, and return the manifest with that id."""
    sealed = dataclasses.replace(manifest, bundle_id=content_id(manifest))
    (bundle / NAME).write_text(encode(sealed), encoding="utf-8")
    return sealed


def content_id(manifest: Manifest) -> str:
    """SHA-256 of the manifest without its id. File hashes are included, so equal ids mean equal bundles."""
    text = encode(dataclasses.replace(manifest, bundle_id=""), indent=None)
    return hashlib.sha256(text.encode()).hexdigest()


def read(bundle: Path) -> Manifest:
    """The manifest; the files that it lists are not opened.

    Raises BundleError if there is none, if it has another schema or was edited after it was written, or if a field is
    missing, unknown or of the wrong type.
    """
    if not bundle.is_dir():
        raise BundleError(f"{bundle} is not a folder", hint="name the bundle that build has written")
    path = bundle / NAME
    if path.is_symlink():
        raise BundleError(f"{path} is a link, and a bundle has no links", hint=COPY_FILES)
    if not path.is_file():
        raise BundleError(
            f"{bundle} is not a bundle: it has no file {NAME}",
            hint="nemo-export build makes a bundle of a checkpoint",
        )
    fields = read_object(path)
    check_schema(fields, SCHEMA_VERSION, str(path), hint="build it again")
    manifest = decode(Manifest, fields, NAME)
    _check_paths(manifest)
    if manifest.bundle_id != content_id(manifest):
        raise BundleError(f"{path} was changed after it was written", hint="copy or build the bundle again")
    return manifest


def _check_paths(manifest: Manifest) -> None:
    """Refuse paths outside the bundle before any of them is opened."""
    paths: set[str] = set()
    for file in manifest.files:
        parts = PurePosixPath(file.path).parts
        is_plain = parts and "/".join(parts) == file.path and not file.path.startswith("/")
        if not is_plain or ".." in parts or "\\" in file.path or "\0" in file.path:
            raise BundleError(f"{NAME} names {file.path!r}, which is not a path inside the bundle")
        if file.path == NAME or file.path in paths:
            raise BundleError(f"{NAME} lists {file.path} {'twice' if file.path in paths else 'itself'}")
        paths.add(file.path)


def examine(bundle: Path, manifest: Manifest, *, deep: bool) -> Findings:
    """The differences in the set of files and their sizes, and with `deep` in their hashes too."""
    sizes, irregular = _walk(bundle)
    listed = {file.path: file for file in manifest.files}
    changed = [
        path
        for path, file in listed.items()
        if path in sizes and (sizes[path] != file.size or (deep and sha256(bundle / path) != file.sha256))
    ]
    return Findings(
        added=tuple(sorted(sizes.keys() - listed.keys())),
        removed=tuple(sorted(listed.keys() - sizes.keys() - irregular.keys())),
        changed=tuple(sorted(changed)),
        irregular=irregular,
    )


def verify(bundle: Path, *, deep: bool) -> Manifest:
    """The manifest, if the bundle matches it; `deep` compares hashes too. Every command that opens a bundle calls this.

    Raises BundleError that names the first difference and counts the others.
    """
    manifest = read(bundle)
    findings = examine(bundle, manifest, deep=deep)
    if lines := findings.lines():
        more = f", and {len(lines) - 1} more differences" if len(lines) > 1 else ""
        hint = COPY_FILES if LINK in findings.irregular.values() else "copy or build the bundle again"
        raise BundleError(f"{bundle}: {lines[0]}{more}", hint=hint)
    for file in manifest.files:
        if not os.access(bundle / file.path, os.R_OK, effective_ids=True):
            raise BundleError(f"{bundle / file.path} cannot be read", hint="change its permissions")
    return manifest


def _walk(bundle: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes of the regular files except the manifest, and what every irregular path is; links are not followed."""
    sizes: dict[str, int] = {}
    irregular: dict[str, str] = {}
    try:
        for folder, subfolders, names in os.walk(bundle, onerror=_reraise):
            for path in (Path(folder, name) for name in (*subfolders, *names)):
                relative, status = path.relative_to(bundle).as_posix(), path.lstat()
                if stat.S_ISREG(status.st_mode):
                    sizes[relative] = status.st_size
                elif stat.S_ISLNK(status.st_mode):
                    irregular[relative] = LINK
                elif not stat.S_ISDIR(status.st_mode):
                    irregular[relative] = "not a regular file"
                elif not any(path.iterdir()):
                    irregular[relative] = "an empty folder"
    except OSError as error:
        raise BundleError(f"{error.filename} cannot be read: {error.strerror}") from error
    sizes.pop(NAME, None)
    return dict(sorted(sizes.items())), dict(sorted(irregular.items()))


def _reraise(error: OSError) -> None:
    raise error
