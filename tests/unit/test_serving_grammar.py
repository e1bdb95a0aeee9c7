"""Structured output: whatever allowed tokens are chosen, the text satisfies the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_bundle import write_tokenizer
from runtime_graph import VOCAB
from tokenizers import AddedToken

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.tokenizer import Tokenizer
from nemotrt.exporter.serving.grammar import ANY_OBJECT, Grammar, Grammars
from nemotrt.exporter.serving.json_schema import has_finite_value

pytest.importorskip("llguidance", reason="structured output needs llguidance")

EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text's tokens are allowed one after the other, and an end-of-text token after them."""
    for token in tokenizer.fast.encode(text, add_special_tokens=False).ids:
        if not grammar.allowed()[token]:
            return False
        grammar.advance(token)
    return bool(grammar.allowed()[EOS])


@pytest.mark.parametrize("seed", range(5))
def test_random_allowed_tokens_satisfy_the_schema(tokenizer: Tokenizer, seed: int) -> None:
    vocab_size = VOCAB + 40  # a model's vocabulary is often padded
    grammar = Grammars(tokenizer, vocab_size).json_schema(PERSON)
    generator, tokens = np.random.default_rng(seed), []
    while not grammar.is_done and len(tokens) < 400:
        allowed = grammar.allowed()
        assert allowed.shape == (vocab_size,)
        assert not allowed[VOCAB:].any()
        if allowed[EOS]:
            break
        tokens.append(int(generator.choice(np.flatnonzero(allowed))))
        grammar.advance(tokens[-1])
    person = json.loads(tokenizer.decode(tokens))
    assert isinstance(person["name"], str)
    assert 0 <= person["age"] <= 150
    assert person.keys() <= {"name", "age", "tags"}


def test_the_end_is_allowed_when_the_text_is_complete(tokenizer: Tokenizer) -> None:
    grammar = Grammars(tokenizer, VOCAB).json_schema(ANY_OBJECT)
    assert not grammar.allowed()[EOS]
    assert accepts(grammar, tokenizer, '{"a": [1, null]}')
    assert grammar.is_done
    assert np.flatnonzero(grammar.allowed()).tolist() == [EOS]
    number = Grammars(tokenizer, VOCAB).json_schema({"type": "integer"})
    assert accepts(number, tokenizer, "12")
    assert not number.is_done  # another digit may follow


def test_a_tokenizer_may_be_larger_than_the_model(tokenizer: Tokenizer) -> None:
    grammar = Grammars(tokenizer, VOCAB - 20).json_schema(ANY_OBJECT)
    assert grammar.allowed().shape == (VOCAB - 20,)


REFUSED: dict[str, tuple[Any, str]] = {
    "no schema": (5, "must be an object"),
    "an unknown type": ({"type": "text"}, "Invalid type: text"),
    "an unsupported word": ({"not": {"type": "string"}}, "Unimplemented keys"),
    "a broken pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "a missing definition": ({"$ref": "#/$defs/x"}, "does not exist"),
    "a definition elsewhere": ({"$ref": "https://example.com/x"}, "does not fetch"),
    "no value": ({"enum": []}, "Unsatisfiable"),
    "a minimum above the maximum": ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    "an impossible pattern": ({"type": "string", "pattern": "^a$", "minLength": 2}, "Unsatisfiable"),
    "false": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "unsatisfiable"),
    "an endless object": (
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        "never end",
    ),
    "an endless array": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "never end"),
    "an endless choice": ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "never end"),
    "half of a surrogate pair": ({"const": "\ud800"}, "surrogate|escape"),
    "not a number": ({"const": float("nan")}, "not JSON compliant"),
    "too deep": (json.loads('{"items":' * 500 + "{}" + "}" * 500), "recursion limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_schema_is_refused_in_one_line(tokenizer: Tokenizer, case: str) -> None:
    schema, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason) as caught:
        Grammars(tokenizer, VOCAB).json_schema(schema)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "array", "prefixItems": [{}], "items": {"$ref": "#"}, "minItems": 1},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}}, "allOf": [{"$ref": "#/$defs/a"}]},
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    ],
)
def test_a_schema_that_may_end_has_a_finite_value(schema: dict[str, Any]) -> None:
    assert has_finite_value(schema)


@pytest.mark.parametrize("special", [None, False, True])
def test_the_schema_applies_after_the_reasoning(folder: Path, special: bool | None) -> None:
    """Whether the tags are no tokens, tokens, or special tokens."""
    tokenizer = Tokenizer(folder)
    for tag in ("<think>", "</think>") if special is not None else ():
        tokenizer.fast.add_tokens([AddedToken(tag, special=bool(special))])
    grammars = Grammars(tokenizer, VOCAB + 8)
    for text in ('the {cat}\n</think>\n{"age": 1, "name": ""}', '<think>é</think>{"name": "a", "age": 1}'):
        order = {**PERSON, "properties": dict(sorted(PERSON["properties"].items()))}  # type: ignore[attr-defined]
        schema = order if '"age": 1, "name"' in text else PERSON
        assert accepts(grammars.json_schema(schema, after_reasoning=True), tokenizer, text)
    assert not accepts(grammars.json_schema(PERSON, after_reasoning=True), tokenizer, "the cat")
    assert not accepts(grammars.json_schema(PERSON, after_reasoning=True), tokenizer, "a</think>the cat")


def test_without_an_end_of_text_token_there_is_no_structured_output(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos=[])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BundleError, match="names no end-of-text token"):
        Grammars(Tokenizer(tmp_path), VOCAB)


def test_a_token_that_was_not_allowed_is_refused(tokenizer: Tokenizer) -> None:
    grammar = Grammars(tokenizer, VOCAB).json_schema(ANY_OBJECT)
    with pytest.raises(UsageError, match="response_format"):
        grammar.advance(int(np.flatnonzero(~grammar.allowed())[-1]))
