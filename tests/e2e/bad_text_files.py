"""Tokenizers and chat templates that cannot work with their model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_checkpoints import MLP_ONLY, Case, text, tokenizer

FITTING = MLP_ONLY | {"vocab_size": 1024}


def token(token_id: int) -> Callable[[Path], None]:
    """Give the vocabulary's last token another id."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = fields["model"]["vocab"]
        last = max(vocabulary, key=lambda text: int(vocabulary[text]))
        vocabulary[last] = token_id
        (folder / "tokenizer.json").write_text(json.dumps(fields))

    return damage


def template(content: str | bytes) -> Callable[[Path], None]:
    """A chat template next to a good tokenizer."""
    return tokenizer(text("chat_template.jinja", content))


def entries(**changes: Any) -> Callable[[Path], None]:
    """Replace entries of a good tokenizer.json."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(fields | changes))

    return tokenizer(damage)


def fitting(says: str, damage: Callable[[Path], None] = lambda folder: None, **config: Any) -> Case:
    """A case whose model has as many tokens as the example's tokenizer."""
    return Case(says, damage, config, model=FITTING)


ALL = {
    "token-beyond-the-vocabulary": fitting(
        "tokenizer.json: the id 1500 of .* is outside the vocabulary of 1024 tokens", tokenizer(token(1500))
    ),
    "end-token-beyond-the-vocabulary": fitting(
        "generation_config.json: eos_token_id 1024 is outside the vocabulary",
        tokenizer(text("generation_config.json", '{"eos_token_id": [2, 1024]}')),
    ),
    "start-token-beyond-the-vocabulary": fitting(
        "config.json: bos_token_id 1024 is outside the vocabulary", bos_token_id=1024
    ),
    "tokenizer-that-panics-when-read": fitting(
        "tokenizer.json is not a tokenizer: Precompiled: Error",
        entries(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ),
    "tokenizer-that-panics-on-text": fitting(
        "tokenizer.json cannot encode this text: chunk size must be non-zero",
        entries(pre_tokenizer={"type": "FixedLength", "length": 0}),
    ),
    "tokenizer-without-its-unknown-token": fitting(
        "tokenizer.json cannot encode this text: WordLevel error: Missing .UNK. token",
        entries(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
    ),
    "tokenizer-is-a-folder": fitting(
        "tokenizer.json is not a regular file", lambda folder: (folder / "tokenizer.json").mkdir()
    ),
    "template-is-a-pipe": fitting(
        "chat_template.jinja is not a regular file",
        tokenizer(lambda folder: os.mkfifo(folder / "chat_template.jinja")),
    ),
    "template-with-a-syntax-error": fitting("the chat template is broken: ", template("{% if %}")),
    "template-of-no-utf8": fitting(
        "chat_template.jinja cannot be read as UTF-8", template("für".encode("latin-1"))
    ),
    "template-of-an-unknown-variable": fitting(
        "the chat template is broken: 'nothing' is undefined", template("{{ nothing.at.all }}")
    ),
    "template-that-recurses": fitting(
        "the chat template is broken: maximum recursion depth",
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    ),
    "template-that-nests-too-deep": fitting("the chat template is broken: ", template("{% if 1 %}" * 2000)),
    "template-of-too-much-memory": fitting(
        "the chat template is broken: it needs more than 2 GiB of memory", template("{{ 'a' * 10**11 }}")
    ),
    "template-with-half-a-character": fitting("the chat template is broken: ", template(r"{{ '\ud800' }}")),
    "template-that-leaves-the-sandbox": fitting(
        "the chat template uses something that a template may not",
        template("{{ ''.__class__.__mro__ }}"),
    ),
    "template-that-is-no-text": fitting(
        "tokenizer_config.json: chat_template is not text",
        tokenizer(text("tokenizer_config.json", '{"chat_template": 5}')),
    ),
}
