"""A golden: what a reference showed of a model, in one file that judges a bundle where there is no checkpoint.

A safetensors file. Its header's `golden` is the JSON of `Header`, and `sha256` a hash of that and of all tensors:

    input/<scenario>/<step>/<field>    a step's inputs
    logits/<scenario>                  FP32, the rows of all steps
    router/<layer>/<scenario>          FP32, the router logits of all steps' tokens; <layer> counts MoE layers
    bias/<layer>                       FP32, the correction bias by which experts are chosen
    place/<pool>/<scenario>            which rows were written: slots [N], or pages and positions [N, 2]
    pool/<pool>/<scenario>             FP32, the values of those rows

What pools held at first is made again of the seed, and compared with its hash. Of the baseline the file has the numbers
that limits derive from, not the values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter import environment
from nemotrt.exporter.checkpoint.safetensors_reader import read_header_and_metadata, read_pieces
from nemotrt.exporter.checkpoint.safetensors_writer import Entry, write_file
from nemotrt.exporter.errors import BundleError, CheckpointError, NotFiniteError, UsageError
from nemotrt.exporter.report.model import NotCompared, Omitted
from nemotrt.exporter.runtime.files import replacing
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.runtime.strict_json import decode, encode, parse_object
from nemotrt.exporter.validation.comparison import Extent, Recording, noise_of
from nemotrt.exporter.validation.gates import Array, Measured, Noise, Observation, written_of
from nemotrt.exporter.validation.graph_dtypes import ExpectedDtypes
from nemotrt.exporter.validation.routing import Choosing, RouterLogits
from nemotrt.exporter.validation.scenarios import Scenario
from nemotrt.plugins.contract import STEP_INPUTS, DType

SCHEMA_VERSION = 2
HEADER, DIGEST = "golden", "sha256"
"""Keys of the safetensors header's text."""

AGAIN = "make it again with nemo-export validate BUNDLE --checkpoint DIR --save-golden FILE"
ABSENT = (
    NotCompared(Omitted.PARTS, "a reference file holds whole steps only"),
    NotCompared(Omitted.DRIFT, "a reference file holds no long decode"),
)
"""What a golden does not hold, in words."""


@dataclass(frozen=True)
class Identity:
    """What a golden is of: a bundle is judged by it only if all but the checkpoint's name is the same."""

    checkpoint: str
    config_sha256: str
    tokenizer_sha256: str
    """Over the tokenizer's files; empty where there is none."""
    precision: str
    state_dtype: str
    """Of the recurrent state; empty where there is none."""
    kv_dtype: str
    page_size: int
    layers: tuple[int, ...]
    """Those that were chosen; empty for all."""


@dataclass(frozen=True)
class Router:
    """How a MoE layer chooses experts, but for its bias."""

    layer: int
    top_k: int
    num_groups: int
    topk_group: int


@dataclass(frozen=True)
class Header:
    """All of a golden but its tensors."""

    schema_version: int
    identity: Identity
    reference: str
    baseline: str
    extent: Extent
    num_steps: dict[str, int]
    """Of each scenario, in order."""
    routers: tuple[Router, ...]
    baselines: dict[str, Measured]
    dtypes: ExpectedDtypes
    not_compared: tuple[NotCompared, ...]
    tools: dict[str, str]
    """By name and version: what made it."""
    noise_sha256: str


DIFFERS = {
    "config_sha256": "another model: their config.json differ",
    "tokenizer_sha256": "another tokenizer",
    "precision": "precision {theirs}, the bundle has {ours}",
    "state_dtype": "a recurrent state in {theirs}, the bundle has {ours}",
    "kv_dtype": "a KV cache in {theirs}, the bundle has {ours}",
    "page_size": "pages of {theirs} tokens, the bundle has {ours}",
    "layers": "layers {theirs}, the bundle has {ours}",
}
"""A field of an identity → what is said where it differs, in order."""


def identity_of(manifest: Manifest) -> Identity:
    """What the bundle is of."""
    digest = hashlib.sha256()
    tokenizer = [file for file in manifest.files if file.role == "tokenizer"]
    for file in sorted(tokenizer, key=lambda file: file.path):
        digest.update(f"{file.path} {file.sha256}\n".encode())
    dtypes = {pool.kind: pool.dtype for pool in manifest.graph.pools}
    return Identity(
        checkpoint=manifest.source.name,
        config_sha256=manifest.source.config_sha256,
        tokenizer_sha256=digest.hexdigest() if tokenizer else "",
        precision=manifest.model.precision,
        state_dtype=dtypes.get("ssm_state", ""),
        kv_dtype=dtypes.get("kv_cache", ""),
        page_size=manifest.profiles[0].page_size,
        layers=manifest.model.chosen_layers,
    )


def check_place(path: Path, bundle: Path) -> None:
    """Raise UsageError where no golden can be written, or something else stands."""
    if not path.parent.is_dir():
        raise UsageError(
            f"{path.parent} is not a folder", hint="make the folder that the golden is to lie in"
        )
    if path.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(
            f"{path} is inside the bundle",
            hint="a bundle holds what its manifest lists; choose another place",
        )
    if not os.path.lexists(path):
        return
    try:
        _open(path)
    except BundleError as error:
        raise UsageError(
            f"{path} exists and is no golden: it is not replaced", hint="choose another name"
        ) from error


def save(path: Path, recording: Recording, identity: Identity) -> None:
    """Write the file, whole or not at all; raises NotFiniteError if the reference or its baseline is not finite."""
    for name, seen in recording.seen.items():
        values = {"logits": seen.logits_RV, **seen.pools}
        lost = [output for output, found in values.items() if not np.isfinite(found).all()]
        lost += [output for output, found in _baseline_outputs(recording, name) if found]
        if lost:
            raise NotFiniteError(f"{name}, {lost[0]}: the reference is not finite; no golden is made of it")
    header = Header(
        SCHEMA_VERSION,
        identity,
        recording.reference,
        recording.baseline,
        recording.extent,
        {scenario.name: len(scenario.steps) for scenario in recording.plan},
        tuple(Router(c.layer, c.top_k, c.num_groups, c.topk_group) for c in recording.choosing),
        recording.baselines,
        recording.dtypes,
        recording.not_compared,
        environment.tool_versions(),
        _noise_digest(recording.noise),
    )
    tensors = dict(_tensors(recording))
    text = encode(header)
    metadata = {HEADER: text, DIGEST: _digest(text, tensors)}
    entries = [_entry(name, values) for name, values in tensors.items()]
    with replacing(path) as partial:
        write_file(partial, entries, metadata)


def _baseline_outputs(recording: Recording, name: str) -> Iterator[tuple[str, int]]:
    if name in recording.baselines:
        for output, distances in recording.baselines[name].outputs.items():
            yield output, distances.not_finite + distances.reference_not_finite


def _entry(name: str, values: NDArray[Any]) -> Entry:
    return Entry(name, DType(str(values.dtype)), values.shape, lambda: iter([values.tobytes()]))


def _digest(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _noise_digest(noise: Noise) -> str:
    digest = hashlib.sha256()
    for values in noise.values():
        digest.update(values.data)
    return digest.hexdigest()


def _tensors(recording: Recording) -> Iterator[tuple[str, NDArray[Any]]]:
    for layer, choosing in enumerate(recording.choosing):
        yield f"bias/{layer}", choosing.correction_bias
    for scenario in recording.plan:
        name, seen = scenario.name, recording.seen[scenario.name]
        for number, inputs in enumerate(scenario.steps):
            for field, array in inputs.as_dict().items():
                yield f"input/{name}/{number}/{field}", array
        yield f"logits/{name}", seen.logits_RV.astype(np.float32)
        for layer in range(len(recording.choosing)):
            yield f"router/{layer}/{name}", np.concatenate([step[layer] for step in seen.routers])
        for pool, values in seen.pools.items():
            places = _written_places(pool, values, recording.noise[pool])
            yield f"place/{pool}/{name}", places
            yield f"pool/{pool}/{name}", _by_place(pool, values)[tuple(places.T)].astype(np.float32)


def _by_place(pool: str, values: NDArray[Any]) -> NDArray[Any]:
    """A view whose first axes are what is written at once: a slot, or a page and a position in it."""
    return np.moveaxis(values, 3, 1) if pool.startswith("kv_cache.") else values


def _written_places(pool: str, values: Array, noise: NDArray[np.float32]) -> NDArray[np.int32]:
    """[N, 1] slots, or [N, 2] pages and positions; of scratch none."""
    written = _by_place(pool, written_of(pool, values[1:], noise[1:]))
    axes = 2 if pool.startswith("kv_cache.") else 1
    places = np.argwhere(written.reshape(*written.shape[:axes], -1).any(-1))
    places[:, 0] += 1
    return places.astype(np.int32)


def read(path: Path, bundle: Path, manifest: Manifest) -> Recording:
    """The golden as the reference of a bundle.

    Raises BundleError on a file that is no golden, of a newer schema, or damaged; UsageError where it is of another
    model, tokenizer, precision, state, page size or choice of layers than the bundle.
    """
    header, text, digest, tensors = _open(path)
    _check_identity(path, header.identity, bundle, identity_of(manifest))
    values = {name: _values(tensor) for name, tensor in tensors.items()}
    if _digest(text, values) != digest:
        raise BundleError(f"{path} was changed after it was written", hint=f"copy it again, or {AGAIN}")
    noise = noise_of(manifest.graph.pools, header.extent)
    if _noise_digest(noise) != header.noise_sha256:
        raise BundleError(f"{path}: its seed gives other pools here than where it was made", hint=AGAIN)
    return _recording(path, header, values, noise)


def _open(path: Path) -> tuple[Header, str, str, dict[str, Any]]:
    """The header, its text, the hash, and where the tensors lie."""
    try:
        tensors, metadata = read_header_and_metadata(path)
    except CheckpointError as error:
        raise BundleError(str(error), hint=f"copy it again, or {AGAIN}") from error
    text, digest = metadata.get(HEADER), metadata.get(DIGEST)
    if not isinstance(text, str) or not isinstance(digest, str):
        raise BundleError(f"{path} is no golden", hint=AGAIN)
    fields = parse_object(text, f"{path}'s header")
    version = fields.get("schema_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: schema_version is not a number")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema {version}, this nemo-export reads up to {SCHEMA_VERSION}",
            hint="upgrade nemo-export",
        )
    return decode(Header, fields, path.name), text, digest, tensors


def _values(tensor: Any) -> NDArray[Any]:
    whole = next(read_pieces(tensor, tensor.length), bytearray())
    return np.frombuffer(whole, tensor.dtype).reshape(tensor.shape)


def _check_identity(path: Path, theirs: Identity, bundle: Path, ours: Identity) -> None:
    for field, what in DIFFERS.items():
        one, other = getattr(theirs, field), getattr(ours, field)
        if one != other:
            said = what.format(theirs=_said(one), ours=_said(other))
            raise UsageError(
                f"{path} is no golden of {bundle}: it is of {said}",
                hint=f"it was made of {theirs.checkpoint}; {AGAIN}",
            )


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "all layers"
    return str(value) or "none"


def _recording(path: Path, header: Header, values: dict[str, NDArray[Any]], noise: Noise) -> Recording:
    try:
        plan = tuple(_scenario(name, count, values) for name, count in header.num_steps.items())
        seen = {scenario.name: _observation(scenario, header, values, noise) for scenario in plan}
        choosing = tuple(
            Choosing(r.layer, values[f"bias/{layer}"], r.top_k, r.num_groups, r.topk_group)
            for layer, r in enumerate(header.routers)
        )
    except KeyError as error:
        raise BundleError(f"{path} has no tensor {error.args[0]}", hint=AGAIN) from error
    tools = ", ".join(
        f"{name} {header.tools[name]}" for name in ("nemo-export", "torch") if name in header.tools
    )
    return Recording(
        reference=f"{header.reference}, as {path.name} has it ({tools})",
        baseline=header.baseline,
        extent=header.extent,
        plan=plan,
        noise=noise,
        seen=seen,
        choosing=choosing,
        baselines=header.baselines,
        dtypes=header.dtypes,
        not_compared=(*header.not_compared, *ABSENT),
    )


def _scenario(name: str, num_steps: int, values: dict[str, NDArray[Any]]) -> Scenario:
    return Scenario(
        name,
        tuple(
            StepInputs(**{field: values[f"input/{name}/{number}/{field}"] for field in STEP_INPUTS})
            for number in range(num_steps)
        ),
    )


def _observation(
    scenario: Scenario, header: Header, values: dict[str, NDArray[Any]], noise: Noise
) -> Observation:
    name = scenario.name
    ends = np.cumsum([inputs.query_start[-1] for inputs in scenario.steps])[:-1]
    layers = [np.split(values[f"router/{layer}/{name}"], ends) for layer in range(len(header.routers))]
    routers: tuple[RouterLogits, ...] = tuple(
        tuple(layer[number] for layer in layers) for number in range(len(scenario.steps))
    )
    pools = {}
    for pool, held in noise.items():
        pools[pool] = held.astype(np.float64)
        places = values[f"place/{pool}/{name}"]
        _by_place(pool, pools[pool])[tuple(places.T)] = values[f"pool/{pool}/{name}"]
    return Observation(values[f"logits/{name}"].astype(np.float64), pools, routers)
