"""Text goes to tokens and comes back whole, however it is cut into tokens; templates run in a sandbox."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_bundle import TEXT, write_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from nemotrt.exporter.errors import BundleError, ExportError, UsageError
from nemotrt.exporter.generation import chat_template
from nemotrt.exporter.generation.tokenizer import TextStream, Tokenizer
from nemotrt.exporter.generation.tokenizer_program import try_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in tokens), stream.end()]


@given(st.text() | st.sampled_from(TEXT))
def test_text_comes_back_piece_by_piece(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, list(tokenizer.encode(text)))
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.lists(st.integers(0, 299), max_size=40))
def test_any_tokens_give_the_text_of_all_of_them(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Random tokens are mostly bytes that are no UTF-8."""
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a\N{MUSICAL SYMBOL G CLEF}b")
    assert len(tokens) == 6
    assert streamed(tokenizer, list(tokens)) == ["a", "", "", "", "\N{MUSICAL SYMBOL G CLEF}", "b", ""]
    assert streamed(tokenizer, list(tokens[:3])) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a")
    assert streamed(tokenizer, [0, a, 1, a]) == ["", "a", "", "a", ""]
    assert tokenizer.decode([0, a, 1]) == "a"


def test_bytes_that_fall_back_wait_too(tmp_path: Path) -> None:
    """Sentencepiece's way: a token a byte, and a space that the first token loses."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁cat": 257}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(strip)
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    tokens = [256, 257, *"€🙂".encode(), 257]
    pieces = streamed(tokenizer, tokens)
    assert pieces[:2] == ["the", " cat"]
    assert "".join(pieces) == "the cat€🙂 cat"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_the_chat_template_writes_the_prompt(tokenizer: Tokenizer) -> None:
    assert tokenizer.render([MESSAGES]) == ["<s>[user] hi\n[assistant] "]
    (tokens,) = tokenizer.chat([MESSAGES])
    assert tokens[0] == 0
    assert tokenizer.decode(tokens) == "[user] hi\n[assistant] "


def write_template(folder: Path, template: object) -> Tokenizer:
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def test_a_template_file_comes_first_and_a_list_gives_its_default(folder: Path) -> None:
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    assert write_template(folder, named).render([MESSAGES]) == ["D"]
    (folder / "chat_template.jinja").write_text("F {{ messages[0].content }}")
    assert Tokenizer(folder).render([MESSAGES]) == ["F hi"]


def test_templates_have_what_transformers_gives_them(folder: Path) -> None:
    template = (
        "{% for message in messages %}\n"
        "    {% if loop.first %}{{ message | tojson }}{% endif %}\n"
        "{% break %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert write_template(folder, template).render([MESSAGES]) == ['{"role": "user", "content": "hi"}4']


REFUSED = {
    "raised": ("{{ raise_exception('roles must alternate') }}", UsageError, "roles must alternate"),
    "syntax": ("{% if %}", BundleError, "template is broken"),
    "undefined": ("{{ nothing.at.all }}", BundleError, "template is broken"),
    "type": ("{{ 1 + 'a' }}", BundleError, "template is broken"),
    "zero": ("{{ 1 / 0 }}", BundleError, "template is broken"),
    "escape": ("{{ ''.__class__.__mro__ }}", BundleError, "may not"),
    "mutation": ("{{ messages.append(1) }}", BundleError, "may not"),
    "range": ("{% for i in range(1000000000) %}{% endfor %}", BundleError, "template is broken"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", BundleError, "template is broken"),
    "nesting": ("{% if 1 %}" * 2000, BundleError, "template is broken"),
    "deep expression": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", BundleError, "template is broken"),
    "memory": ("{{ 'a' * 10**11 }}", BundleError, r"it needs more than \d GiB of memory"),
    "too long": ("{{ 'a' * 10**8 }}", BundleError, r"its text has more than \d+ characters"),
    "attribute": ("{{ messages | map(attribute='a.b') | list }}", BundleError, "template is broken"),
    "surrogate": (r"{{ '\ud800' }}", BundleError, "template is broken"),
    "open block": ("{% generation %}", BundleError, "template is broken"),
    "no text": (5, BundleError, "chat_template is not text"),
    "none": ("", UsageError, "no chat template"),
}


@pytest.mark.parametrize(("template", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_cannot_be_used_is_an_error(
    folder: Path, template: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_template(folder, template).render([MESSAGES])


@pytest.mark.parametrize("fault", ["{% if %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}"])
def test_a_broken_template_is_given_with_its_line(folder: Path, fault: str) -> None:
    with pytest.raises(BundleError, match=r"template is broken: .+ \(line 3\)$"):
        write_template(folder, f"{{# 1 #}}\nabc\n{fault}\n").render([MESSAGES])


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 7 ** (7 ** 9) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_stopped(
    folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    with pytest.raises(BundleError, match="template is broken: it computes for more than 1 s"):
        write_template(folder, template).render([MESSAGES])


def test_a_package_that_cannot_be_imported_is_not_the_templates_fault(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = tmp_path_factory.mktemp("shadow")
    (shadow / "jinja2.py").write_text("raise ImportError('a jinja2 that is none')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(shadow), os.environ.get("PYTHONPATH", ""))))
    with pytest.raises(
        ExportError, match="templates does not run: ImportError: a jinja2 that is none"
    ) as raised:
        Tokenizer(folder).render([MESSAGES])
    assert not isinstance(raised.value, BundleError)


def test_a_refusal_is_whole_whatever_the_encoding_of_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    with pytest.raises(UsageError, match="refuses the messages: é\N{MUSICAL SYMBOL G CLEF}"):
        write_template(folder, "{{ raise_exception('é\N{MUSICAL SYMBOL G CLEF}') }}").render([MESSAGES])


def test_conversations_are_rendered_apart(folder: Path) -> None:
    tokenizer = write_template(folder, "{{ messages[0].content }}")
    assert tokenizer.render([[{"role": "user", "content": text}] for text in ("a", "é\U0001f642")]) == [
        "a",
        "é\U0001f642",
    ]


def test_a_template_file_that_is_not_utf8_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes("für".encode("latin-1"))
    with pytest.raises(BundleError, match=r"chat_template\.jinja cannot be read as UTF-8"):
        Tokenizer(folder).render([MESSAGES])


def test_a_text_ends_at_every_end_token_that_a_file_names(folder: Path) -> None:
    assert Tokenizer(folder).eos_ids == {1}
    write_tokenizer(folder, eos=[1, 7])
    assert Tokenizer(folder).eos_ids == {1, 7}
    write_tokenizer(folder, eos=7)
    assert Tokenizer(folder).eos_ids == {1, 7}  # </s> is tokenizer_config.json's
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer(folder).end_tokens == {
        "generation_config.json": {7},
        "config.json": {9},
        "tokenizer_config.json": {1},
    }
    write_tokenizer(folder, eos=None)
    assert Tokenizer(folder).eos_ids == {1, 9}
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert Tokenizer(folder).eos_ids == {0, 9}
    for broken in ("</s>", [1, True], 1.5):
        write_tokenizer(folder, eos=broken)
        with pytest.raises(BundleError, match="not token ids"):
            Tokenizer(folder)


def test_a_tokenizer_alone_is_enough(folder: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_ids == frozenset()
    with pytest.raises(UsageError, match="there is no chat template"):
        tokenizer.chat([MESSAGES])
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_training_runs_truncation_and_padding_have_no_effect(folder: Path, side: str) -> None:
    """tokenizer.json keeps what the last training call had set, on either side."""
    text = "the cat sat on the mat"
    whole, chat = Tokenizer(folder).encode(text), Tokenizer(folder).chat([MESSAGES])
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_truncation(3, stride=1, direction=side)
    fast.enable_padding(direction=side, length=64, pad_id=0, pad_token="<s>")
    fast.save(str(folder / "tokenizer.json"))
    assert len(fast.encode(text).ids) == 64
    tokenizer = Tokenizer(folder)
    assert (tokenizer.encode(text), tokenizer.chat([MESSAGES])) == (whole, chat)


def test_a_package_that_cannot_be_imported_is_not_the_tokenizers_fault(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = tmp_path_factory.mktemp("shadow")
    (shadow / "tokenizers.py").write_text("raise ImportError('tokenizers that are none')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(shadow), os.environ.get("PYTHONPATH", ""))))
    with pytest.raises(
        ExportError, match="tokenizers does not run: ImportError: tokenizers that are"
    ) as raised:
        try_tokenizer(folder, "text")
    assert not isinstance(raised.value, BundleError)


def test_an_absent_or_broken_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    for text in ("{", "{}", '{"version": "1.0", "model": {"type": "Unheard"}}'):
        path.write_text(text)
        with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
            Tokenizer(folder)
    path.write_bytes(b"\xff")
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer(folder)
    path.unlink()
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        Tokenizer(folder)
