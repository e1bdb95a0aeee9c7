"""A chat template renders as transformers renders it: the same variables, named tokens, filters and blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotrt.exporter.generation.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
MESSAGES = [
    {"role": "system", "content": "Answer “briefly”"},
    {"role": "user", "content": "<b>naïve</b>"},
]
ADDED = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "special": True}

TEMPLATES: dict[str, str] = {
    "tools": "{% if tools is not none %}tools{% endif %}{% if documents is none %}no documents{% endif %}",
    "tools-defined": "{{ tools is defined }} {{ documents is defined }} {{ xyz is defined }}",
    "named-tokens": "{{ bos_token }}|{{ eos_token }}|{{ cls_token }}|{{ sep_token }}|{{ mask_token }}|{{ turn_token }}"
    "|{{ image_token }}|{{ pad_token is defined }}|{{ additional_special_tokens is defined }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(ensure_ascii=true) }}{{ messages | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':')) }}{{ messages[0] | tojson(true) }}",
    "generation": "{% set x = 1 %}{% for message in messages %}\n    {%- generation %}\n{% set x = 2 %}"
    "{{ message.content }}{{ x }}{{ loop.index }}\n    {% endgeneration -%}\n{{ x }}{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}<answer>{% endgeneration %}{% endif %}",
    "blocks": "{% for message in messages %}{% if loop.last %}{% break %}{% endif %}{{ message | tojson }}\n"
    "{% endfor %}\n{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}{{ strftime_now('%Y') }}",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "extra": {"cls_token": "<s>", "extra_special_tokens": {"turn_token": "</s>"}},
    "direct": {"turn_token": "</s>", "image_token": ADDED, "eos_token": ADDED, "pad_token": None},
    "listed": {"extra_special_tokens": ["</s>"], "added_tokens_decoder": {"2": {"content": "</s>"}}},
}
"""What tokenizer_config.json says in addition to the example's."""

SPECIAL_TOKENS = {"sep_token": "</s>", "bos_token": {"content": "</s>", "lstrip": False}}
"""A special_tokens_map.json, which an older transformers wrote."""


@pytest.mark.parametrize("special_tokens", [None, SPECIAL_TOKENS], ids=["", "special_tokens_map"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_template_renders_as_in_transformers(
    tmp_path: Path, config: str, special_tokens: dict[str, Any] | None
) -> None:
    shutil.copyfile(EXAMPLE / "tokenizer.json", tmp_path / "tokenizer.json")
    fields = json.loads((EXAMPLE / "tokenizer_config.json").read_text()) | CONFIGS[config]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    if special_tokens:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    expected = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for name, template in TEMPLATES.items():
        (tmp_path / "chat_template.jinja").write_text(template)
        theirs = expected.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert Tokenizer(tmp_path).render([MESSAGES]) == [theirs], name
