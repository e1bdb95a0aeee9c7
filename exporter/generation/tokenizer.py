"""Text to tokens and back, and messages to a prompt, from the tokenizer files of a checkpoint."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime.strict_json import read_object

if TYPE_CHECKING:
    import tokenizers

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
CHAT_TEMPLATE = "chat_template.jinja"

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no character, or none yet."""


class Tokenizer:
    """The tokenizer of one bundle or checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's files; raises BundleError when tokenizer.json is missing or broken."""
        from tokenizers import Tokenizer as FastTokenizer

        path = folder / TOKENIZER
        if not path.exists():
            raise BundleError(
                f"{folder} has no {TOKENIZER}, and text needs one",
                hint=f"build again with the model's {TOKENIZER} in the checkpoint, or run token ids in a Session",
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        try:
            self._tokenizer: tokenizers.Tokenizer = FastTokenizer.from_str(text)
        except Exception as error:  # tokenizers raises no other type, whatever is wrong
            raise BundleError(f"{path} is no tokenizer: {error}") from error
        self._folder = folder
        self._config = _optional(folder / TOKENIZER_CONFIG)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self.eos_ids = self._eos_ids()

    @property
    def vocab_size(self) -> int:
        """Tokens that it can give, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return bool(self._template())

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a plain prompt, with what the tokenizer puts around text, such as a first token."""
        return tuple(self._tokenizer.encode(text).ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The tokens of a conversation that the model is to answer; messages are {role, content}.

        Raises UsageError when there is no template or it refuses the messages, BundleError when it is broken.
        """
        # The template writes its own special tokens.
        return tuple(self._tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the template writes it; raises as `chat` does."""
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        template = self._template()
        if not template:
            raise UsageError("there is no chat template", hint="leave out --chat")
        try:
            compiled = _environment().from_string(template)
            named = self._named_tokens()
            return str(compiled.render(messages=list(messages), add_generation_prompt=True, **named))
        except _RefusedError as error:
            raise UsageError(f"the chat template refuses the messages: {error}") from error
        except SecurityError as error:
            raise BundleError(f"the chat template does what a template may not: {error}") from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise BundleError(f"the chat template is broken: {error}") from error

    def stream(self) -> TextStream:
        """A new stream of text, to be given one sequence's tokens."""
        return TextStream(self)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def is_special(self, token: int) -> bool:
        """Whether the token marks something, and is no text."""
        return token in self._special

    def _eos_ids(self) -> frozenset[int]:
        """What ends a text, by the generation config, else by config.json, else by the tokenizer's config."""
        for name in (GENERATION_CONFIG, CONFIG):
            found = _optional(self._folder / name).get("eos_token_id")
            if found is None:
                continue
            ids = found if isinstance(found, list) else [found]
            if not all(type(token) is int for token in ids):
                raise BundleError(f"{self._folder / name}: eos_token_id is {found}, not token ids")
            return frozenset(ids)
        token = self._named_tokens().get("eos_token")
        eos = self._tokenizer.token_to_id(token) if token else None
        return frozenset(() if eos is None else (eos,))

    def _named_tokens(self) -> dict[str, str]:
        """The tokens that templates know by name: bos_token, eos_token."""
        named = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = self._config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[name] = token
        return named

    def _template(self) -> str:
        """The chat template's text, empty where there is none; a list of named ones gives `default`."""
        path = self._folder / CHAT_TEMPLATE
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = self._config.get("chat_template") or ""
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default", "")
        if not isinstance(found, str):
            raise BundleError(f"{self._folder / TOKENIZER_CONFIG}: chat_template is no text")
        return found


class TextStream:
    """Text as its tokens arrive: every character once, and none before all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_old = 0
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that this token completes, maybe none."""
        if self._tokenizer.is_special(token):
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        ready = len(text.rstrip(INCOMPLETE))
        new = text[self._sent : ready]
        self._sent = max(self._sent, ready)
        if ready == len(text):
            # Some tokenizers write a first token otherwise, so whole characters stay before the next ones.
            self._tokens = self._tokens[self._num_old :]
            self._num_old = len(self._tokens)
            self._sent = len(self._tokenizer.decode(self._tokens))
        return new

    def end(self) -> str:
        """What is left when no token follows: an incomplete character, as a replacement character."""
        text = self._tokenizer.decode(self._tokens)[self._sent :]
        self._tokens, self._num_old, self._sent = [], 0, 0
        return text


class _RefusedError(Exception):
    """A template called raise_exception."""


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, in a sandbox: a template is a stranger's code."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise _RefusedError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
