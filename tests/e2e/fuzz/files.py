"""Good small checkpoints as the bytes of their files, and the same with random edits."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bad_checkpoints
import fp8_checkpoints
from bad_checkpoints import CONFIG, MLP_ONLY, SINGLE
from bad_checkpoints.damage import INDEX, sharded, tokenizer
from hypothesis import strategies as st

from fuzz.json_edits import NUMBERS, TEXTS, VALUES, Draw, damaged, edited
from fuzz.templates import TEMPLATES
from fuzz.tokenizer_parts import PARTS

Files = Mapping[str, bytes]
"""Name → content of the files of a checkpoint."""

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "extra_special_tokens": {"image_token": "<s>"},
}

QUANTIZED = "quantized"
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


@functools.cache
def good(pattern: str, *, with_tokenizer: bool = False, shards: bool = False) -> Files:
    """A checkpoint that a build accepts, with layers of this pattern, or one in FP8."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        if pattern == QUANTIZED:
            fp8_checkpoints.small(folder)
        else:
            damage = tokenizer(lambda _: None) if with_tokenizer else lambda _: None
            damage = sharded(lambda *_: None) if shards else damage
            size = {"vocab_size": 1024} if with_tokenizer else {}
            bad_checkpoints.write(
                bad_checkpoints.Case("", damage, model={"hybrid_override_pattern": pattern} | size), folder
            )
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if with_tokenizer:
        files["special_tokens_map.json"] = json.dumps(SPECIAL_TOKENS).encode()
    return files


@st.composite
def configs(draw: Draw) -> Files:
    """A checkpoint with an edited config.json."""
    files = good(draw(st.sampled_from([*"M*E-", CONFIG["hybrid_override_pattern"], QUANTIZED])))
    optional = {
        "time_step_limit": [0.0, 1.0],
        "bos_token_id": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_bias": False,
    }
    config = json.loads(files["config.json"]) | draw(st.sampled_from([{}, optional]))
    return files | {"config.json": draw(edited(config))}


@st.composite
def tokenizers(draw: Draw) -> Files:
    """A checkpoint with other parts in tokenizer.json, or with one or two edited files of the tokenizer."""
    files = good("-", with_tokenizer=True)
    if draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=3, unique=True))
        changed = json.loads(files["tokenizer.json"]) | {
            name: draw(st.sampled_from(PARTS[name])) for name in names
        }
        return files | {"tokenizer.json": json.dumps(changed).encode()}
    names = draw(st.lists(st.sampled_from(SIDE_FILES), min_size=1, max_size=2, unique=True))
    return files | {name: draw(edited(json.loads(files[name]))) for name in names}


@st.composite
def templates(draw: Draw) -> Files:
    """A checkpoint with a random chat template, in a file or in tokenizer_config.json."""
    files = good("-", with_tokenizer=True)
    template = draw(TEMPLATES)
    if draw(st.booleans()):
        return files | {"chat_template.jinja": template.encode("utf-8", "surrogatepass")}
    named = [{"name": "default", "template": template}, {"name": "other", "template": "x"}]
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = draw(st.sampled_from([template, named]))
    return files | {"tokenizer_config.json": json.dumps(config).encode()}


@st.composite
def headers(draw: Draw) -> Files:
    """A checkpoint with an edited safetensors header, header length or index, or with more or fewer bytes of data."""
    shards = draw(st.booleans())
    files = dict(good("-", shards=shards))
    if shards and draw(st.booleans()):
        return files | {INDEX: draw(edited(json.loads(files[INDEX])))}
    name = "shard-1.safetensors" if shards else SINGLE
    length = int.from_bytes(files[name][:8], "little")
    text, data = files[name][8 : 8 + length], files[name][8 + length :]
    part = draw(st.sampled_from(["header", "header", "tensor", "tensor", "length", "data", "metadata"]))
    if part == "header":
        text = draw(edited(json.loads(text)))
    elif part == "tensor":
        text = draw(_edited_tensor(json.loads(text)))
    elif part == "metadata":
        metadata = {"__metadata__": draw(VALUES)}
        text = json.dumps(metadata | json.loads(text), indent=draw(st.integers(0, 2))).encode()
    elif part == "data":
        data = draw(damaged(data))
    length = len(text)
    if part == "length":
        lengths = [0, 1, length - 1, length + 1, len(data) + length, 10**8 + 1, 2**63, 2**64 - 1]
        length = draw(st.sampled_from(lengths))
    return files | {name: length.to_bytes(8, "little") + text + data}


@st.composite
def _edited_tensor(draw: Draw, header: dict[str, Any]) -> bytes:
    """A header in which one tensor has another dtype, shape or name, or other offsets."""
    name = draw(st.sampled_from(sorted(header)))
    entry = header[name]
    dtypes = st.sampled_from(["F64", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", ""])
    sizes = st.lists(NUMBERS, max_size=4)
    field, values = draw(
        st.sampled_from([("dtype", dtypes), ("shape", sizes), ("data_offsets", sizes), ("name", TEXTS)])
    )
    if field == "name":
        header[draw(values)] = header.pop(name)
    else:
        entry[field] = draw(values)
    return json.dumps(header).encode()


@st.composite
def tables(draw: Draw) -> Files:
    """A config.json and a table of tensors, of which one is edited."""
    config = CONFIG | draw(st.sampled_from([MLP_ONLY, {"hybrid_override_pattern": "E"}, {}]))
    table = {
        "backbone.embeddings.weight": ["F32", [96, 32]],
        "lm_head.weight": ["F32", [96, 32]],
        "backbone.norm_f.weight": ["F32", [32]],
        "backbone.layers.0.norm.weight": ["F32", [32]],
        "backbone.layers.0.mixer.up_proj.weight": ["F32", [48, 32]],
        "backbone.layers.0.mixer.down_proj.weight": ["F32", [32, 48]],
        "backbone.layers.0.mixer.experts.0.up_proj.weight": ["F32", [24, 16]],
    }
    if draw(st.booleans()):
        return {"config.json": draw(edited(config)), "table.json": json.dumps(table).encode()}
    return {"config.json": json.dumps(config).encode(), "table.json": draw(edited(table))}
