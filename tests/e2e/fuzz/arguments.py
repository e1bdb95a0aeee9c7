"""Random arguments: any option that a command has, with values that fit and values that do not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click
from hypothesis import strategies as st

from fuzz.json_edits import Draw
from nemotrt.exporter.cli import program

PATHS = (
    "checkpoint", "bundle", "checkpoint/config.json", "checkpoint/tokenizer.json", "checkpoint/model.safetensors",
    "bundle/model.onnx", "bundle/manifest.json", "bundle/model.onnx.data", "empty", "empty.txt", "text.txt",
    "lines.jsonl", "pipe", "pipe.jsonl", "null", "zero", "loop", "dangling", "linked", "nowhere", "no/where", "", ".",
    "..", "out", "out/", "empty/out", "checkpoint/config.json/out", "x" * 300, "caf\u00e9", "a\nb", "\x1b[31m",
    "x\udcff", "-", "--", "~", "*",
)  # fmt: skip
"""Of them, `prepare` makes some."""

NUMBERS = (
    "0",
    "1",
    "2",
    "7",
    "-1",
    "128",
    "300",
    "2147483648",
    "9" * 40,
    "1e3",
    "nan",
    "inf",
    "-0",
    "",
    "x",
    "٣",
    "0x1",
)

WORDS = (
    "", "0", "0:2", "0:", ":", "1,0", "0,0", "-1", "9", "first-of-each", "0:99999999999", "a", "89", "89,120", "89,,x",
    "²", "75,999", "hidden_size", "residual_in_fp32", "*", "[", "\udcff", "caf\u00e9", "\ud7ff", "Hello", "x" * 5000,
    "backbone.layers.0.mixer.up_proj", "*.mixer*", "\n", "default",
)  # fmt: skip

EXCLUDED = {"debug", "help", "version"}
"""Options that do not end a command with an error's two lines."""

ALWAYS = {
    "build": ("--runtime", "onnx", "--no-validate"),
    "validate": ("--drift-steps", "2"),
    "generate": ("--max-new-tokens", "3"),
}
"""What keeps a command short that accepts its arguments; it comes last, and so it holds."""


def prepare(folder: Path, checkpoint: Path, bundle: Path) -> None:
    """What PATHS names, in the folder."""
    shutil.copytree(checkpoint, folder / "checkpoint")
    shutil.copytree(bundle, folder / "bundle")
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    (folder / "text.txt").write_text("The for statement. " * 9)
    (folder / "lines.jsonl").write_text('{"text": "The for statement."}\n[1]\n')
    for name in ("pipe", "pipe.jsonl"):
        os.mkfifo(folder / name)
    for name, target in {
        "null": "/dev/null",
        "zero": "/dev/zero",
        "loop": "loop",
        "dangling": "x",
        "linked": "bundle",
    }.items():
        (folder / name).symlink_to(target)


def _values(kind: click.ParamType) -> st.SearchStrategy[str]:
    if isinstance(kind, click.Choice):
        return st.sampled_from([*map(str, kind.choices), "", "x"])
    if isinstance(kind, click.Path):
        return st.sampled_from(PATHS)
    if kind.name in ("integer", "float", "integer range", "float range"):
        return st.sampled_from(NUMBERS)
    return st.sampled_from(WORDS)


@st.composite
def arguments(draw: Draw, name: str) -> tuple[str, ...]:
    """The command with random options."""
    options = [each for each in program.commands[name].params if each.name not in EXCLUDED]
    needed = [each for each in options if each.required]
    chosen = needed if draw(st.integers(0, 9)) else []
    chosen += draw(st.lists(st.sampled_from(options), max_size=3, unique=True))
    given = [text for option in chosen for text in _spelled(draw, option)]
    if draw(st.integers(0, 19)) == 7:
        given.insert(
            draw(st.integers(0, len(given))), draw(st.sampled_from([*PATHS, *WORDS, "--x", "-h", "--help"]))
        )
    return (name, *given, *ALWAYS.get(name, ()))


def _spelled(draw: Draw, option: click.Parameter) -> list[str]:
    if isinstance(option, click.Option) and option.is_flag:
        return [draw(st.sampled_from(option.opts))]
    value = draw(_values(option.type))
    if not isinstance(option, click.Option):
        likely = "bundle" if option.name == "bundle" else "checkpoint"
        return [draw(st.sampled_from([likely, likely, likely, value]))]
    if option.name in ("output", "prompt") and draw(st.booleans()):
        value = "out"
    spelling = draw(st.sampled_from(option.opts))
    return [f"{spelling}={value}"] if spelling.startswith("--") and draw(st.booleans()) else [spelling, value]
