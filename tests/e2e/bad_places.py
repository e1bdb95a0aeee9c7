"""Flags and outputs that cannot be meant, and outputs that look odd and can."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

BUILD = ("build", "checkpoint", "--output", "out")

FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "path-mistyped": (
        ("build", "chekpoint", "--output", "out"),
        "chekpoint does not exist; did you mean checkpoint",
    ),
    "path-mistyped-above": (
        ("build", "nowhere/at/all", "--output", "out"),
        "nowhere/at/all does not exist",
    ),
    "path-is-a-hub-name": (
        ("build", "nvidia/Nemotron-Nano", "--output", "out"),
        "nvidia/Nemotron-Nano does not exist; nemo-export downloads no models: name a local folder",
    ),
    "path-is-a-file": (("verify", "checkpoint/config.json"), "config.json is not a folder"),
    "path-is-gguf": (
        ("build", "other/m.gguf", "--output", "out"),
        "is a model in GGUF.*; use the checkpoint",
    ),
    "path-is-a-nemo-archive": (("check", "other/m.nemo"), "is a checkpoint of NeMo.*; convert it with"),
    "path-is-a-pickle": (
        ("quantize", "other/m.bin", "--output", "out"),
        "only pickled weights.*; convert them",
    ),
    "calibration-is-a-device": (
        (*BUILD, "--precision", "fp8", "--calibration", "/dev/zero"),
        "/dev/zero is not a regular file; copy its content to one",
    ),
    "evaluation-text-is-a-pipe": (
        ("validate", "checkpoint", "--eval", "other/pipe"),
        "other/pipe is not a regular file",
    ),
    "config-is-a-pipe": (("check", "--config", "other/pipe"), "other/pipe is not a regular file"),
    "reference-file-is-a-pipe": (
        ("validate", "checkpoint", "--golden", "other/pipe"),
        "other/pipe is not a regular file",
    ),
    "path-is-a-pipe": (("inspect", "other/pipe"), "other/pipe is not a regular file"),
    "path-is-neither": (("inspect", "."), "is not a checkpoint, an ONNX file or a bundle"),
    "option-unknown": ((*BUILD, "--presicion", "fp16"), "No such option.*--presicion"),
    "command-unknown": (("biuld", "checkpoint"), "No such command .*biuld"),
    "output-not-given": (("build", "checkpoint"), "Missing option '--output'"),
    "precision-unknown": ((*BUILD, "--precision", "fp12"), "'fp12' is not one of"),
    "max-tokens-zero": ((*BUILD, "--max-tokens", "0"), "--max-tokens is 0; it must be at least 1"),
    "max-tokens-too-large": (
        (*BUILD, "--max-tokens", "99999999999999999999"),
        "--max-tokens is 99999999999999999999; it must be at most 2147483647",
    ),
    "page-size-too-large": (
        (*BUILD, "--page-size", str(1 << 70)),
        r"--page-size is \d+; it must be at most 2147483647",
    ),
    "output-not-utf8": (("build", "checkpoint", "--output", "x\udcff"), r"x\\udcff is not UTF-8; rename it"),
    "max-tokens-text": ((*BUILD, "--max-tokens", "many"), "'many' is not a valid integer"),
    "more-sequences-than-tokens": (
        (*BUILD, "--max-tokens", "4", "--max-sequences", "8"),
        "--max-sequences 8 is more than --max-tokens 4",
    ),
    "page-size-odd": ((*BUILD, "--page-size", "100"), "--page-size 100 is not a power of two"),
    "quiet-and-verbose": ((*BUILD, "--quiet", "--verbose"), "--quiet and --verbose exclude each other"),
    **{
        f"reference-file-with-{name}": (
            ("validate", "checkpoint", "--golden", "checkpoint/config.json", f"--{name}", *value),
            f"--golden and --{name} exclude each other: the reference file is the reference",
        )
        for name, value in {
            "checkpoint": ("checkpoint",),
            "against": ("checkpoint",),
            "save-golden": ("model.golden",),
            "eval": ("checkpoint/config.json",),
            "seed": ("1",),
            "bisect": (),
        }.items()
    },
    "against-with-checkpoint": (
        ("validate", "checkpoint", "--against", "checkpoint", "--checkpoint", "checkpoint"),
        "--against and --checkpoint exclude each other: the other bundle is the reference",
    ),
    "provider-with-bisect": (
        ("validate", "checkpoint", "--provider", "cuda", "--bisect"),
        "--provider and --bisect exclude each other: --bisect runs the graph on the CPU",
    ),
    "engine-with-layers-alone": (
        ("validate", "checkpoint", "--engine", "--layers-alone"),
        "--engine and --layers-alone exclude each other: --layers-alone is for the graph in ONNX Runtime",
    ),
    "layers-alone-with-save-golden": (
        ("validate", "checkpoint", "--layers-alone", "--save-golden", "model.golden"),
        "--layers-alone and --save-golden exclude each other: --save-golden needs the whole model",
    ),
    "html-in-no-folder": (
        ("validate", "checkpoint", "--html", "nowhere/report.html"),
        "nowhere is not a folder",
    ),
    **{
        f"{name}-is-a-pipe": (
            ("validate", "checkpoint", f"--{name}", "other/pipe"),
            "other/pipe is not a regular",
        )
        for name in ("html", "junit")
    },
    "junit-in-the-bundle": (
        ("validate", "checkpoint", "--junit", "checkpoint/gates.xml"),
        "gates.xml is inside the bundle",
    ),
    "layer-outside": (("inspect", "checkpoint", "--layer", "7"), "--layer 7 is not a layer of this model"),
    "check-of-nothing": (("check",), "check needs either a checkpoint, or --config"),
    "check-of-a-table-alone": (
        ("check", "--tensors", "checkpoint/config.json"),
        "check needs either a checkpoint, or --config",
    ),
    "check-of-a-checkpoint-and-a-config": (
        ("check", "checkpoint", "--config", "checkpoint/config.json"),
        "check needs either a checkpoint, or --config",
    ),
    "deep-check-of-a-config": (
        ("check", "--config", "checkpoint/config.json", "--deep"),
        "--deep reads weights, and --config names none",
    ),
}


def nothing(folder: Path) -> None:
    """Leave the folder as it is."""


def a_file(folder: Path) -> None:
    """A file where the output is to stand."""
    (folder / "out").write_text("the user's")


def a_folder(folder: Path) -> None:
    """A folder of the user's there."""
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("the user's")


def a_web_page(folder: Path) -> None:
    """A folder with a manifest.json that is not ours."""
    a_folder(folder)
    (folder / "out" / "manifest.json").write_text('{"name": "page"}')


def an_older_bundle(folder: Path) -> None:
    """A bundle of a schema that is no longer read."""
    a_folder(folder)
    (folder / "out" / "manifest.json").write_text('{"schema_version": 1}')


def a_link(folder: Path) -> None:
    """A link to a folder of the user's."""
    a_folder(folder)
    (folder / "out").rename(folder / "mine")
    (folder / "out").symlink_to(folder / "mine")


def a_dangling_link(folder: Path) -> None:
    """A link to nothing."""
    (folder / "out").symlink_to(folder / "nowhere")


def the_checkpoint_inside(folder: Path) -> None:
    """The checkpoint below the output."""
    (folder / "out").mkdir()
    (folder / "checkpoint").rename(folder / "out" / "checkpoint")
    (folder / "checkpoint").symlink_to(folder / "out" / "checkpoint")


def workspace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A path of the workspace, or the workspace itself, which no build made."""

    def prepare(folder: Path) -> None:
        path = folder / ".out.building" / name
        path.parent.mkdir(exist_ok=True)
        make(path)

    return prepare


def linked_workspace(folder: Path) -> None:
    """A link to a folder of the user's, with the names of a workspace."""
    (folder / "mine").mkdir()
    the_users(folder / "mine" / "bundle")
    (folder / ".out.building").symlink_to(folder / "mine")


def the_users(path: Path) -> None:
    """A folder with a file."""
    path.mkdir()
    (path / "notes.txt").write_text("the user's")


def a_linked_bundle(folder: Path) -> None:
    """A workspace in which the bundle is a link to a folder of the user's."""
    the_users(folder / "mine")
    (folder / ".out.building").mkdir()
    (folder / ".out.building" / "lock").touch()
    (folder / ".out.building" / "bundle").symlink_to(folder / "mine")


PLACES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "output-is-a-file": (a_file, "out", "out exists"),
    "output-is-a-folder": (a_folder, "out", "out exists"),
    "output-is-a-dangling-link": (a_dangling_link, "out", "out exists"),
    "output-is-the-checkpoint": (nothing, "checkpoint", "checkpoint exists"),
    "output-is-here": (nothing, ".", " exists"),
    "output-in-no-folder": (nothing, "nowhere/out", "nowhere is not a folder"),
    "output-in-a-file": (nothing, "checkpoint/config.json/out", "config.json is not a folder"),
    "output-with-a-long-name": (nothing, "o" * 250, "File name too long"),
    "workspace-is-a-link": (linked_workspace, "out", r"\.out\.building is not a folder"),
    "workspace-is-a-file": (
        lambda folder: (folder / ".out.building").write_text("the user's"),
        "out",
        r"\.out\.building is not a folder",
    ),
    "workspace-of-the-users": (
        workspace("bundle", the_users),
        "out",
        r"\.out\.building holds bundle, which no build wrote",
    ),
    "workspace-with-a-linked-bundle": (a_linked_bundle, "out", r"\.out\.building/bundle is not a folder"),
    "workspace-with-a-pipe": (workspace("lock", os.mkfifo), "out", "lock is not a regular file"),
    "workspace-with-a-linked-lock": (
        workspace("lock", lambda path: path.symlink_to("/dev/null")),
        "out",
        "lock is not a regular file",
    ),
    "workspace-with-a-folder-for-a-journal": (
        workspace("journal.json", Path.mkdir),
        "out",
        "journal.json is not a regular file",
    ),
    "force-on-a-file": (a_file, "out", "is not a bundle: --force replaces nothing else"),
    "force-on-a-folder": (a_folder, "out", "out is not a bundle: it has no file manifest.json"),
    "force-on-another-manifest": (a_web_page, "out", "schema_version is not a number"),
    "force-on-an-older-bundle": (an_older_bundle, "out", "was written by an older nemo-export"),
    "force-on-a-link": (a_link, "out", "is not a bundle: --force replaces nothing else"),
    "force-on-the-checkpoint": (nothing, "checkpoint", "checkpoint is not a bundle: it has no file"),
    "force-on-what-holds-the-checkpoint": (
        the_checkpoint_inside,
        "out",
        "out is not a bundle: it has no file manifest.json",
    ),
}

SPELLINGS = {
    "trailing-slash": "out/",
    "relative": "./checkpoint/../out",
    "spaces": "my first bundle",
    "accents": "modèle·试验",
    "like-an-option": "./--force",
    "inside-the-checkpoint": "checkpoint/bundle",
}
"""Outputs that are as good as any."""
