"""Goldens that are not of the bundle, or not what was written; places where none is written; bundles of two models."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.validation.references import reference_file

Damage = Callable[[Path, Path], None]
"""Takes the path of a reference file and the bundle that it belongs to, and damages the file."""


def of(**changes: Any) -> Damage:
    """A reference file with another identity."""

    def damage(path: Path, bundle: Path) -> None:
        manifest = manifests.read(bundle)
        identity = dataclasses.replace(reference_file.identity_of(manifest), **changes)
        reference_file.save(path, reference_file.read(path, bundle, manifest), identity)

    return damage


def of_schema(version: bytes) -> Damage:
    """A file of another schema, written with two digits to keep its size."""

    def damage(path: Path, _: Path) -> None:
        content = path.read_bytes()
        changed = content.replace(rb"\"schema_version\": 3,", rb"\"schema_version\":" + version + b",")
        assert changed != content
        path.write_bytes(changed)

    return damage


def changed_byte(path: Path, _: Path) -> None:
    """One bit of a value."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def another_file(name: str) -> Damage:
    """A file of the bundle in place of the reference file."""

    def damage(path: Path, bundle: Path) -> None:
        path.write_bytes((bundle / name).read_bytes())

    return damage


def a_checkpoint(path: Path, bundle: Path) -> None:
    """The checkpoint's weights in place of the reference file."""
    path.write_bytes((bundle.parent / "checkpoint" / "model.safetensors").read_bytes())


ALL: dict[str, tuple[Damage, str, int]] = {
    "reference-of-another-model": (of(config_sha256="0" * 64), "is for another model: config.json differs", 2),
    "reference-of-another-tokenizer": (of(tokenizer_sha256="0" * 64), "is for another tokenizer", 2),
    "reference-of-another-precision": (of(precision="bf16"), "is for precision bf16, the bundle has", 2),
    "reference-of-another-state": (of(state_dtype="float16"), "is for a recurrent state in float16, the bundle has", 2),
    "reference-of-another-kv-cache": (of(kv_dtype="float8_e4m3fn"), "is for a KV cache in float8_e4m3fn, the", 2),
    "reference-of-other-pages": (of(page_size=64), "is for pages of 64 tokens, the bundle has 128", 2),
    "reference-of-other-layers": (of(layers=(0, 1)), "is for layers 0, 1, the bundle has all layers", 2),
    "reference-older-schema": (of_schema(b" 1"), "was written by an older nemo-export", 7),
    "reference-newer-schema": (of_schema(b"99"), "has schema 99, this nemo-export reads", 7),
    "reference-truncated": (lambda path, _: os.truncate(path, 9999), "is truncated", 7),
    "reference-cut-short": (
        lambda path, _: os.truncate(path, path.stat().st_size - 4), "is truncated", 7,
    ),
    "reference-empty": (lambda path, _: os.truncate(path, 0), "is truncated", 7),
    "reference-changed-byte": (changed_byte, "was changed after it was written", 7),
    "reference-is-a-checkpoint": (a_checkpoint, "is not a reference file", 7),
    "reference-is-a-manifest": (another_file("manifest.json"), "is truncated", 7),
}  # fmt: skip


def elsewhere(**changes: Any) -> Callable[[manifests.Manifest], manifests.Manifest]:
    """A bundle that was built of something else, or otherwise."""
    return lambda manifest: dataclasses.replace(manifest, **{
        name: dataclasses.replace(getattr(manifest, name), **fields) for name, fields in changes.items()
    })  # fmt: skip


def other_pages(manifest: manifests.Manifest) -> manifests.Manifest:
    """A bundle that was built with other pages."""
    profiles = tuple(dataclasses.replace(profile, page_size=64) for profile in manifest.profiles)
    return dataclasses.replace(manifest, profiles=profiles)


AGAINST: dict[str, tuple[Callable[[manifests.Manifest], manifests.Manifest], str]] = {
    "against-another-model": (
        elsewhere(source={"config_sha256": "0" * 64}),
        "is a bundle of another model: its config.json differs",
    ),
    "against-other-pages": (other_pages, "has pages of 64 tokens, bundle of 128"),
}

PLACES: dict[str, tuple[str, str]] = {
    "reference-in-the-bundle": ("bundle/model.golden", "is inside the bundle"),
    "reference-in-no-folder": ("nowhere/model.golden", "nowhere is not a folder"),
    "reference-into-a-pipe": ("pipe", "pipe is not a regular file"),
    "reference-over-weights": (
        "checkpoint/model.safetensors",
        "exists and is not a reference file: it is not replaced",
    ),
    "reference-over-a-text": (
        "checkpoint/config.json",
        "exists and is not a reference file: it is not replaced",
    ),
}
"""Where --save-path is not followed."""
