"""Checkpoints that are damaged in one way each, and what a build says of them."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import CONFIG, random_tensors
from safetensors.torch import save_file

from bad_checkpoints.configs import CONFIGS
from bad_checkpoints.damage import EXAMPLE, MLP_ONLY, SINGLE, Case, replaced, stored, text, tokenizer
from bad_checkpoints.files import FILES, FORMATS
from bad_checkpoints.tensors import TENSORS, WRAPPED
from bad_checkpoints.zeros import ZEROS

__all__ = ["CONFIG", "EXAMPLE", "MLP_ONLY", "SINGLE", "Case", "replaced", "stored", "text", "tokenizer"]

ALL = TENSORS | WRAPPED | ZEROS | FORMATS | FILES | CONFIGS

GOOD = Case("", model=MLP_ONLY)
GOOD_WITH_TOKENIZER = Case("", tokenizer(lambda _: None), model=MLP_ONLY | {"vocab_size": 1024})


def write(case: Case, folder: Path) -> None:
    """The damaged checkpoint at `folder`."""
    model = CONFIG | case.model
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    save_file(random_tensors(model), folder / SINGLE)
    if case.config:
        changed = {key: value for key, value in (model | case.config).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(changed))
    case.damage(folder)
