"""Reads and writes reference files: a reference's run of one model, for machines that do not have the checkpoint.

It is a safetensors file. Its metadata has `header`, the JSON of `Header`, and `sha256`, a hash of that and of all
tensors:

    input/<scenario>/<step>/<field>    a step's inputs
    logits/<scenario>                  FP32, the rows of all steps
    router/<layer>/<scenario>          FP32, the router logits of all steps' tokens; <layer> counts MoE layers
    bias/<layer>                       FP32, the router's correction bias
    place/<pool>/<scenario>            which rows were written: slots [N, 1], or pages and positions [N, 2]
    pool/<pool>/<scenario>             FP32, the values of those rows

The initial contents of pools are derived from the seed again, and compared by their hash. Of the rounding baseline the
file has the numbers that limits derive from, not the values.
"""

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
from nemotrt.exporter.runtime.files import check_place, replacing
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.runtime.strict_json import check_schema, decode, encode, parse_object
from nemotrt.exporter.validation.comparison import ReferenceRun
from nemotrt.exporter.validation.envelope import PoolSizes
from nemotrt.exporter.validation.gates import ExpectedDtypes, ScenarioErrors
from nemotrt.exporter.validation.observation import Noise, Observation
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.routing import RouterPolicy
from nemotrt.plugins.contract import STEP_INPUTS, DType

SCHEMA_VERSION = 3
HEADER, DIGEST = "header", "sha256"
"""Keys of the safetensors metadata."""
OLD_HEADER = "golden"
"""The header's key in schema 1."""

AGAIN = "make it again with nemo-export validate BUNDLE --checkpoint DIR --save-golden FILE"
ABSENT = (
    NotCompared(Omitted.PARTS, "a reference file holds whole steps only"),
    NotCompared(Omitted.DRIFT, "a reference file holds no long decode"),
)


@dataclass(frozen=True)
class Identity:
    """The model that a reference file was made from; all but the checkpoint's name must match the bundle's."""

    checkpoint: str
    config_sha256: str
    tokenizer_sha256: str
    """A hash of the tokenizer's files; empty if there is none."""
    precision: str
    state_dtype: str
    """The dtype of the recurrent state; empty if there is none."""
    kv_dtype: str
    page_size: int
    layers: tuple[int, ...]
    """The chosen layers; empty for all."""


@dataclass(frozen=True)
class Header:
    """The contents of a reference file apart from its tensors."""

    schema_version: int
    identity: Identity
    reference: str
    baseline: str
    workload: Workload
    num_steps: dict[str, int]
    """The number of steps of each scenario, in order."""
    routers: tuple[dict[str, int], ...]
    """For each MoE layer the fields of its RouterPolicy, without the bias."""
    baselines: dict[str, ScenarioErrors]
    dtypes: ExpectedDtypes
    not_compared: tuple[NotCompared, ...]
    tools: dict[str, str]
    """The versions of the tools that wrote the file."""
    noise_sha256: str


Noises = dict[PoolSizes, Noise]

COPIED = ("workload", "baseline", "baselines", "dtypes")
"""The fields that a header has in common with a ReferenceRun."""

DIFFERENCES = {
    "config_sha256": "another model: config.json differs",
    "tokenizer_sha256": "another tokenizer",
    "precision": "precision {theirs}, the bundle has {ours}",
    "state_dtype": "a recurrent state in {theirs}, the bundle has {ours}",
    "kv_dtype": "a KV cache in {theirs}, the bundle has {ours}",
    "page_size": "pages of {theirs} tokens, the bundle has {ours}",
    "layers": "layers {theirs}, the bundle has {ours}",
}
"""The message for each field of an identity that differs, most important first."""


def identity_of(manifest: Manifest) -> Identity:
    """The identity of a bundle's model."""
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


def check_path(path: Path, bundle: Path) -> None:
    """Raise UsageError if no reference file can be written here, or if it would replace something else."""
    check_place(path, bundle)
    if not os.path.lexists(path):
        return
    try:
        _open(path)
    except BundleError as error:
        raise UsageError(
            f"{path} exists and is not a reference file: it is not replaced", hint="choose another name"
        ) from error


def save(path: Path, run: ReferenceRun, identity: Identity) -> None:
    """Write the file, whole or not at all; raises NotFiniteError if the reference or its baseline is not finite."""
    for name, observation in run.observations.items():
        values = {"logits": observation.logits_RV, **observation.pools}
        broken = [output for output, array in values.items() if not np.isfinite(array).all()]
        if name in run.baselines:
            errors = run.baselines[name].outputs.items()
            broken += [output for output, e in errors if e.not_finite or e.reference_not_finite]
        if broken:
            raise NotFiniteError(
                f"{name}, {broken[0]}: the reference is not finite; no reference file was written"
            )
    header = Header(
        schema_version=SCHEMA_VERSION,
        identity=identity,
        reference=run.reference,
        num_steps={name: len(steps) for name, steps in run.scenarios.items()},
        routers=tuple(
            {name: value for name, value in vars(policy).items() if name != "correction_bias"}
            for policy in run.policies
        ),
        not_compared=run.not_compared,
        tools=environment.tool_versions(),
        noise_sha256=_noise_digest(run.noise),
        **{name: getattr(run, name) for name in COPIED},
    )
    tensors = dict(_tensors(run))
    text = encode(header)
    metadata = {HEADER: text, DIGEST: _digest(text, tensors)}
    entries = [_entry(name, values) for name, values in tensors.items()]
    with replacing(path) as partial:
        write_file(partial, entries, metadata)


def _entry(name: str, values: NDArray[Any]) -> Entry:
    return Entry(name, DType(str(values.dtype)), values.shape, lambda: iter([values.tobytes()]))


def _digest(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _tensors(run: ReferenceRun) -> Iterator[tuple[str, NDArray[Any]]]:
    for layer, policy in enumerate(run.policies):
        yield f"bias/{layer}", policy.correction_bias
    for name, steps in run.scenarios.items():
        observation = run.observations[name]
        for number, inputs in enumerate(steps):
            for field, values in inputs.as_dict().items():
                yield f"input/{name}/{number}/{field}", values
        yield f"logits/{name}", observation.logits_RV
        for layer in range(len(run.policies)):
            yield f"router/{layer}/{name}", np.concatenate([step[layer] for step in observation.routers])
        for pool, values in observation.pools.items():
            yield f"pool/{pool}/{name}", values


def read(path: Path, bundle: Path, manifest: Manifest) -> ReferenceRun:
    """The reference run that a file holds, for this bundle.

    Raises BundleError on a file that is damaged, has another schema, or is not a reference file; UsageError if its
    model, tokenizer, precision, state, page size or choice of layers differs from the bundle's.
    """
    header, text, digest, tensors = _open(path)
    _check_identity(path, header.identity, bundle, identity_of(manifest))
    values = {name: _values(tensor) for name, tensor in tensors.items()}
    if _digest(text, values) != digest:
        raise BundleError(f"{path} was changed after it was written", hint=f"copy it again, or {AGAIN}")
    noise = header.workload.noises(manifest.graph.pools)
    if _noise_digest(noise) != header.noise_sha256:
        raise BundleError(
            f"{path}: its seed gives other pools here than on the machine that wrote it", hint=AGAIN
        )
    return _reference_run(path, header, values, noise)


def _open(path: Path) -> tuple[Header, str, str, dict[str, Any]]:
    """The header, its text, the hash, and the tensors' entries."""
    try:
        tensors, metadata = read_header_and_metadata(path)
    except CheckpointError as error:
        raise BundleError(str(error), hint=f"copy it again, or {AGAIN}") from error
    text, digest = metadata.get(HEADER, metadata.get(OLD_HEADER)), metadata.get(DIGEST)
    if not isinstance(text, str) or not isinstance(digest, str):
        raise BundleError(f"{path} is not a reference file", hint=AGAIN)
    fields = parse_object(text, f"{path}'s header")
    check_schema(fields, SCHEMA_VERSION, str(path), hint=AGAIN)
    return decode(Header, fields, path.name), text, digest, tensors


def _noise_digest(noises: Noises) -> str:
    return _digest(
        "", {f"{sizes}/{name}": values for sizes, noise in noises.items() for name, values in noise.items()}
    )


def _values(tensor: Any) -> NDArray[Any]:
    content = next(read_pieces(tensor, tensor.length), bytearray())
    return np.frombuffer(content, tensor.dtype).reshape(tensor.shape)


def _check_identity(path: Path, theirs: Identity, bundle: Path, ours: Identity) -> None:
    for field, message in DIFFERENCES.items():
        their_value, our_value = getattr(theirs, field), getattr(ours, field)
        if their_value != our_value:
            difference = message.format(theirs=_text(their_value), ours=_text(our_value))
            raise UsageError(
                f"{path} does not match {bundle}: it is for {difference}",
                hint=f"it was made from {theirs.checkpoint}; {AGAIN}",
            )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "all layers"
    return str(value) or "none"


def _reference_run(
    path: Path, header: Header, values: dict[str, NDArray[Any]], noise: Noises
) -> ReferenceRun:
    try:
        scenarios = {
            name: tuple(
                StepInputs(**{field: values[f"input/{name}/{number}/{field}"] for field in STEP_INPUTS})
                for number in range(num_steps)
            )
            for name, num_steps in header.num_steps.items()
        }
        observations = {
            name: _observation(
                name, steps, len(header.routers), values, noise[header.workload.sizes_of(name)]
            )
            for name, steps in scenarios.items()
        }
        policies = tuple(
            RouterPolicy(correction_bias=values[f"bias/{layer}"], **fields)
            for layer, fields in enumerate(header.routers)
        )
    except KeyError as error:
        raise BundleError(f"{path} has no tensor {error.args[0]}", hint=AGAIN) from error
    tools = ", ".join(
        f"{name} {header.tools[name]}" for name in ("nemo-export", "torch") if name in header.tools
    )
    return ReferenceRun(
        reference=f"{header.reference}, from {path.name} ({tools})",
        scenarios=scenarios,
        noise=noise,
        observations=observations,
        policies=policies,
        not_compared=(*header.not_compared, *ABSENT),
        **{name: getattr(header, name) for name in COPIED},
    )


def _observation(
    scenario: str,
    steps: tuple[StepInputs, ...],
    num_routers: int,
    values: Mapping[str, NDArray[Any]],
    noise: Noise,
) -> Observation:
    ends = np.cumsum([inputs.query_start[-1] for inputs in steps])[:-1]
    layers = [np.split(values[f"router/{layer}/{scenario}"], ends) for layer in range(num_routers)]
    routers = tuple(tuple(layer[number] for layer in layers) for number in range(len(steps)))
    pools = {pool: values[f"pool/{pool}/{scenario}"] for pool in noise}
    return Observation(values[f"logits/{scenario}"], pools, routers=routers)
