"""Structured output: which tokens may follow, so that an answer matches a JSON schema. It uses llguidance.

Legend: V vocabulary of the model, whose last tokens may be in no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.tokenizer import Tokenizer
from nemotrt.exporter.serving.json_schema import has_finite_value
from nemotrt.exporter.serving.reasoning import CLOSE, OPEN

if TYPE_CHECKING:
    from llguidance import LLMatcher

ANY_OBJECT = {"type": "object"}
"""The schema of OpenAI's `response_format` `{"type": "json_object"}`."""


class Grammars:
    """Makes the grammars of one bundle's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's; raises BundleError if llguidance does not take the tokenizer."""
        from llguidance import LLTokenizer

        self._vocab_size = vocab_size
        num_tokens = max(vocab_size, tokenizer.vocab_size)
        if not tokenizer.eos_ids:
            raise BundleError("the bundle names no end-of-text token, which structured output needs")
        try:
            self._tokenizer = LLTokenizer(tokenizer.fast.to_str(), num_tokens, sorted(tokenizer.eos_ids))
        except ValueError as error:
            raise BundleError(f"the tokenizer cannot be used for structured output: {error}") from error
        self._tags = {tag: self._is_special(tokenizer, tag) for tag in (OPEN, CLOSE)}

    def json_schema(self, schema: Mapping[str, Any], *, after_reasoning: bool = False) -> Grammar:
        """The grammar of the values that satisfy a JSON schema.

        With `after_reasoning`, any text up to `</think>` comes first. Raises UsageError if it is no schema, uses
        something that is not supported, or no text satisfies it.
        """
        from llguidance import LLMatcher

        try:
            text = json.dumps(schema, allow_nan=False)
            grammar = LLMatcher.grammar_from_json_schema(text)
        except (ValueError, RecursionError) as error:
            raise _unusable(str(error)) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _unusable(matcher.get_error())
        if not has_finite_value(schema):
            raise _unusable("no text satisfies it: its required values never end")
        if after_reasoning:
            grammar = LLMatcher.grammar_from_lark(self._lark(text))
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        return Grammar(matcher, self._vocab_size)

    def _lark(self, schema: str) -> str:
        """The grammar of reasoning and a JSON value in llguidance's dialect of Lark."""
        first = f"{OPEN}?" if self._tags[OPEN] else ""
        reasoning = f"TEXT {CLOSE}" if self._tags[CLOSE] else "reasoning"
        return (
            f"start: {first} {reasoning} SPACE? json\n"
            f'reasoning[suffix="{CLOSE}"]: TEXT\n'
            "TEXT: /(?s:.*)/\nSPACE: /[ \\n]+/\n"
            f"json: %json {schema}\n"
        )

    def _is_special(self, tokenizer: Tokenizer, tag: str) -> bool:
        """Whether the tag is a token that is not matched as text."""
        token = tokenizer.fast.token_to_id(tag)
        return token is not None and self._tokenizer.is_special_token(token)


class Grammar:
    """The tokens that may come next in one answer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """Which of the V tokens may come next; the end-of-text tokens may as soon as the text is complete.

        Raises UsageError if the schema is too complex to go on with.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise _unusable(self._matcher.get_error())
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def advance(self, token: int) -> None:
        """Record the token that was chosen, one of those allowed; raises UsageError if it is not."""
        if not self._matcher.consume_token(token):
            raise _unusable(self._matcher.get_error())

    @property
    def is_done(self) -> bool:
        """Whether the text is complete and nothing but an end-of-text token may follow."""
        return self._matcher.is_stopped()


def _unusable(reason: str) -> UsageError:
    # An internal error of llguidance ends with its whole state.
    line = " ".join(reason.partition("\n<state>")[0].split())
    return UsageError(f"the schema of response_format cannot be used: {line[:200]}")
