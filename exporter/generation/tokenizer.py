"""Text to tokens and back, and messages to a prompt, from the tokenizer files of a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.chat_template import Conversation, render
from nemotrt.exporter.runtime.strict_json import MAX_BYTES, read_object

if TYPE_CHECKING:
    import tokenizers

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
CHAT_TEMPLATE = "chat_template.jinja"


class Tokenizer:
    """The tokenizer of a bundle or a checkpoint folder; `fast` is the tokenizers library's object."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's files; raises BundleError if tokenizer.json is missing or broken."""
        from tokenizers import Tokenizer as FastTokenizer

        path = folder / TOKENIZER
        if not path.exists():
            raise BundleError(
                f"{folder} has no {TOKENIZER}, which is needed for text",
                hint=f"build again with the model's {TOKENIZER} in the checkpoint, or run token ids in a Session",
            )
        text = _read_text(path)
        with _faults_named(f"{path} is not a tokenizer"):
            self.fast: tokenizers.Tokenizer = FastTokenizer.from_str(text)
        # Settings of the training run that wrote the file: transformers disables both at each call, too.
        self.fast.no_truncation()
        self.fast.no_padding()
        self._folder = folder
        self._config = _optional(folder / TOKENIZER_CONFIG)
        self.named_tokens = dict(_named_tokens(self._config, _optional(folder / SPECIAL_TOKENS)))
        """The special tokens that have a name, such as bos_token."""
        self.end_tokens = stored_end_tokens(folder) | self._own_end_token()
        """The end-of-text tokens by the file that names them."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return self.fast.get_vocab_size(with_added_tokens=True)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry for a token, None if it has none."""
        return self.fast.id_to_token(token_id)

    def outside(self, vocab_size: int) -> list[str]:
        """The tokens whose ids the model does not have, as `the id 1500 of <x>`."""
        vocabulary = self.fast.get_vocab(with_added_tokens=True)
        return [f"the id {token} of {text}" for text, token in vocabulary.items() if token >= vocab_size]

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a plain prompt, with the special tokens that the tokenizer adds, such as a first token.

        Raises BundleError if the tokenizer fails on this text.
        """
        return self._encode(text, add_special_tokens=True)

    def chat(self, conversations: Sequence[Conversation]) -> list[tuple[int, ...]]:
        """The tokens of each conversation for the model to answer; a message is {role, content}.

        Raises UsageError if there is no template or it refuses the messages, BundleError if it is broken.
        """
        # The template writes the special tokens itself.
        texts = self.render(conversations)
        return [self._encode(text, add_special_tokens=False) for text in texts]

    def render(self, conversations: Sequence[Conversation]) -> list[str]:
        """Each conversation as the template formats it; raises the same errors as `chat`."""
        if not self.has_template:
            raise UsageError("there is no chat template", hint="leave out --chat")
        return render(self._template(), conversations, self.named_tokens)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template; raises BundleError if it is not text."""
        return bool(self._template())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, special ones left out."""
        with _faults_named(f"{self._folder / TOKENIZER} cannot decode tokens"):
            return str(self.fast.decode(list(tokens), skip_special_tokens=True))

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every end-of-text token that a file of the folder names: a text ends at any of them."""
        return frozenset().union(*self.end_tokens.values())

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        with _faults_named(f"{self._folder / TOKENIZER} cannot encode this text"):
            return tuple(self.fast.encode(text, add_special_tokens=add_special_tokens).ids)

    def _own_end_token(self) -> dict[str, frozenset[int]]:
        """The named `eos_token`; an empty set if the vocabulary does not have it."""
        if not (token := self.named_tokens.get("eos_token")):
            return {}
        eos = self.fast.token_to_id(token)
        return {TOKENIZER_CONFIG: frozenset(() if eos is None else (eos,))}

    def _template(self) -> str:
        """The chat template's text, empty if there is none; of several named templates, `default`."""
        path = self._folder / CHAT_TEMPLATE
        if path.is_file():
            return _read_text(path)
        template = self._config.get("chat_template") or ""
        if isinstance(template, list):
            named = {
                entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
            }
            template = named.get("default", "")
        if not isinstance(template, str):
            raise BundleError(f"{self._folder / TOKENIZER_CONFIG}: chat_template is not text")
        return template


class TextStream:
    """The text of one sequence as its tokens arrive: every character once, when all its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._num_characters = 0

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._tokens.append(token)
        with _faults_named("the tokenizer cannot decode tokens"):
            text = self._stream.step(self._tokenizer.fast, token) or ""
        self._num_characters += len(text)
        return text

    def end(self) -> str:
        """The rest of the text: replacement characters for a character that was never completed."""
        return self._tokenizer.decode(self._tokens)[self._num_characters :]


@contextmanager
def _faults_named(what: str) -> Iterator[None]:
    """Raise BundleError, which begins with `what`, for every error and panic of the tokenizers library."""
    try:
        yield
    except BaseException as error:
        # It raises no type of its own, and a panic is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{what}: {error}") from error


def stored_end_tokens(folder: Path) -> dict[str, frozenset[int]]:
    """The end-of-text tokens in the model's configuration files, by file; raises BundleError if they are not ids."""
    end_tokens = {}
    for name in (GENERATION_CONFIG, CONFIG):
        value = _optional(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise BundleError(f"{folder / name}: eos_token_id is {value}, not token ids")
        end_tokens[name] = frozenset(ids)
    return end_tokens


def _read_text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise BundleError(f"{path} has {size} bytes, over {MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} cannot be read as UTF-8: {error.reason}") from error


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _named_tokens(config: Mapping[str, Any], special_tokens: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The name and text of each named special token, as transformers reads them; a later one replaces an earlier one.

    special_tokens_map.json has no effect if tokenizer_config.json lists the added tokens itself.
    """
    for file in (config, {} if "added_tokens_decoder" in config else special_tokens):
        named = {name: token for name, token in file.items() if name.endswith("_token")}
        for group in ("model_specific_special_tokens", "extra_special_tokens"):
            named |= entries if isinstance(entries := file.get(group), dict) else {}
        for name, token in named.items():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield name, text
