"""Parts of a tokenizer.json that the example's does not have, good ones and bad ones."""

from __future__ import annotations

from typing import Any

VOCABULARY = {"a": 0, "for": 1, "H": 2, "<unk>": 3}


def _split(**pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _template(token: str, ids: list[int]) -> dict[str, Any]:
    """A template that puts the token before a text, and describes the token `x`."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, text]
    described = {"x": {"id": "x", "ids": ids, "tokens": ["x"]}}
    return {"type": "TemplateProcessing", "single": single, "pair": [text], "special_tokens": described}


PARTS: dict[str, list[dict[str, Any]]] = {
    "normalizer": [
        {"type": "NFC"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "Prepend", "prepend": ""},
        {"type": "Sequence", "normalizers": []},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
    ],
    "pre_tokenizer": [
        _split(String=""),
        _split(String="o"),
        _split(Regex=""),
        _split(Regex="(?<=a)("),
        {"type": "FixedLength", "length": 0},
        {"type": "FixedLength", "length": 1},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}],
        },
        {"type": "CharDelimiterSplit", "delimiter": " "},
    ],
    "post_processor": [
        _template("x", [5]),
        _template("x", [99999]),
        _template("x", []),
        _template("y", [5]),
        {"type": "BertProcessing", "sep": ["x", 2**31], "cls": ["y", 5]},
        {"type": "Sequence", "processors": []},
    ],
    "decoder": [
        {"type": "Strip", "content": " ", "start": 9, "stop": 9},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    ],
    "model": [
        {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<unk>"},
        {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "?"},
        {"type": "WordPiece", "vocab": VOCABULARY, "unk_token": "?", "continuing_subword_prefix": "#"},
        {"type": "Unigram", "vocab": [["a", -1.0], ["for", -2.0]], "unk_id": None},
        {"type": "Unigram", "vocab": [["a", -1.0], ["for", -2.0]], "unk_id": 9},
        {"type": "BPE", "vocab": VOCABULARY, "merges": [], "unk_token": "?"},
        {"type": "BPE", "vocab": VOCABULARY, "merges": [["f", "or"]]},
    ],
    "truncation": [{"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}],
    "padding": [
        {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ],
}
"""Entry of a tokenizer.json → values."""
