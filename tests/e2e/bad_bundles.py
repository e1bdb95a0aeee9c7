"""Bundles that are not what their build wrote, and prompts that they cannot answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA, MANIFEST = "model.onnx.data", "manifest.json"


def changed_byte(bundle: Path) -> None:
    """One bit of the weights."""
    data = bytearray((bundle / DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / DATA).write_bytes(data)


def manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the manifest."""

    def damage(bundle: Path) -> None:
        fields = json.loads((bundle / MANIFEST).read_text())
        change(fields)
        (bundle / MANIFEST).write_text(json.dumps(fields))

    return damage


def all_linked(bundle: Path) -> None:
    """Every file moved out, and linked to, as in a Hugging Face cache."""
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        blob = bundle.parent / "blobs" / path.relative_to(bundle).as_posix().replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)


def linked(bundle: Path) -> None:
    """The weights moved out, and linked to."""
    (bundle / DATA).rename(bundle.parent / "weights")
    (bundle / DATA).symlink_to(bundle.parent / "weights")


ALL: dict[str, tuple[Callable[[Path], None], str]] = {
    "bundle-changed-byte": (changed_byte, "model.onnx.data was changed"),
    "bundle-truncated": (lambda bundle: os.truncate(bundle / DATA, 99), "model.onnx.data was changed"),
    "bundle-missing-file": (lambda bundle: (bundle / DATA).unlink(), "model.onnx.data is missing"),
    "bundle-extra-file": (
        lambda bundle: (bundle / "notes.txt").touch(),
        "notes.txt is not in the manifest",
    ),
    "bundle-extra-hidden-file": (
        lambda bundle: (bundle / "logs" / ".x").touch(),
        r"logs/\.x is not in the manifest",
    ),
    "bundle-extra-folder": (lambda bundle: (bundle / "empty").mkdir(), "empty is an empty folder"),
    "bundle-link": (linked, "model.onnx.data is a link"),
    "bundle-of-links": (all_linked, "manifest.json is a link, and a bundle has no links"),
    "bundle-without-manifest": (lambda bundle: (bundle / MANIFEST).unlink(), "is not a bundle"),
    "bundle-manifest-broken": (lambda bundle: os.truncate(bundle / MANIFEST, 99), "is not valid JSON"),
    "bundle-newer-schema": (
        manifest(lambda fields: fields.update(schema_version=99)),
        "has schema 99, this nemo-export reads",
    ),
    "bundle-unknown-field": (manifest(lambda fields: fields.update(extra=1)), "extra is not known"),
    "bundle-edited-manifest": (
        manifest(lambda fields: fields.update(license="apache-2.0")),
        "manifest.json was changed after it was written",
    ),
    "bundle-path-outside": (
        manifest(lambda fields: fields["files"][0].update(path="../x")),
        "names '../x', which is not a path inside the bundle",
    ),
    "bundle-file-twice": (
        manifest(lambda fields: fields["files"].append(fields["files"][0])),
        "lists .* twice",
    ),
}

SEEN_BY_HASHES_ONLY = ("bundle-changed-byte",)
"""Opening a bundle compares names and sizes; its hashes are compared by verify."""

PROMPTS: dict[str, tuple[tuple[str, ...], str]] = {
    "prompt-none": ((), "Missing option '--prompt'"),
    "prompt-too-long": (("--prompt", "for " * 200), r"prompt 1 has \d+ tokens, the context holds 64"),
    "prompt-not-utf8": (("--prompt", "caf\udce9"), "prompt 1 is not UTF-8 text"),
    "chat-not-utf8": (("--chat", "--prompt", "for", "--prompt", "caf\udce9"), "prompt 2 is not UTF-8 text"),
    "tokens-none": (("--prompt", "for", "--max-new-tokens", "0"), "--max-new-tokens 0 is below 1"),
    "threads-too-many": (
        ("--prompt", "for", "--threads", "1000000"),
        "1000000 threads are not between 0 and",
    ),
    "threads-negative": (("--prompt", "for", "--threads", "-1"), "-1 threads are not between 0 and"),
    "temperature-negative": (
        ("--prompt", "for", "--temperature", "-1"),
        r"--temperature -1\.0 is not a finite number of at least 0",
    ),
    "sampling-without-effect": (("--prompt", "for", "--top-k", "5"), "have no effect at temperature 0"),
}

EVALS: dict[str, tuple[str, bytes, str]] = {
    "eval-empty": ("empty.txt", b"", r"empty.txt has \d+ tokens; at least 256 are needed"),
    "eval-only-spaces": (
        "spaces.jsonl",
        b"\n\n  \n",
        r"spaces.jsonl has \d+ tokens; at least 256 are needed",
    ),
    "eval-too-short": ("short.txt", b"for for for", r"short.txt has \d+ tokens; at least 256 are needed"),
    "eval-no-utf8": ("latin.txt", "für ".encode("latin-1") * 300, "latin.txt is not UTF-8 text"),
    "eval-broken-line": ("x.jsonl", b'{"text": "for"}\n{"text": ', "x.jsonl, line 2, is not valid JSON"),
    "eval-line-without-text": ("x.jsonl", b'{"prompt": "for"}\n', "x.jsonl, line 1, has no text"),
    "eval-json-array": ("x.json", b'[{"text": "for"}]', "x.json, line 1, is not a JSON object"),
    "eval-json-lines-in-capitals": ("x.JSONL", b'{"prompt": "for"}\n', "x.JSONL, line 1, has no text"),
    "eval-text-is-no-string": ("x.jsonl", b'{"text": 7}\n', "x.jsonl, line 1, has no text"),
}
"""A text that cannot be used: its name, its bytes, and the error message."""
