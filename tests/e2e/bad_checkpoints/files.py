"""Checkpoints whose files are damaged or missing, and models in other formats."""

from __future__ import annotations

import json
import os

from bad_checkpoints.damage import (
    INDEX,
    SINGLE,
    Case,
    added,
    header,
    held_twice,
    index,
    last,
    linked_index,
    linked_outside,
    mapped,
    of_another_format,
    only_pickles,
    repeated,
    set_last,
    sharded,
    shift,
    text,
    truncated,
)

BIG = 100_000_001

FORMATS = {
    "lora-adapter": Case(
        r"is a LoRA adapter, not a whole model \(adapter_config\.json\)",
        of_another_format("adapter_config.json", "adapter_model.safetensors"),
    ),
    "lora-adapter-with-a-config": Case(
        r"is a LoRA adapter, not a whole model",
        of_another_format("adapter_config.json", "adapter_model.bin", keep="config.json"),
    ),
    "gguf": Case(r"is a model in GGUF, the format of llama\.cpp \(m\.gguf\)", of_another_format("m.gguf")),
    "nemo-archive": Case(r"is a checkpoint of NeMo \(m\.nemo\)", of_another_format("m.nemo")),
    "nemo-folder": Case(
        r"is a checkpoint of NeMo \(context/model\.yaml\)",
        of_another_format("context/model.yaml", "weights/.metadata", "weights/__0_0.distcp"),
    ),
    "megatron": Case(
        "is a checkpoint of Megatron", of_another_format("latest_checkpointed_iteration.txt", "iter_1/x")
    ),
    "megatron-iteration": Case(
        "is a checkpoint of Megatron", of_another_format("common.pt", ".metadata", "__0_0.distcp")
    ),
    "megatron-ranks": Case(
        "is a checkpoint of Megatron", of_another_format("mp_rank_00/model_optim_rng.pt", keep="config.json")
    ),
    "deepspeed": Case(
        "is a checkpoint of DeepSpeed", of_another_format("zero_to_fp32.py", "latest", keep="config.json")
    ),
    "dcp": Case(
        r"is a distributed checkpoint of PyTorch \(DCP\)", of_another_format(".metadata", "__0_0.distcp")
    ),
    "dcp-of-the-trainer": Case(
        r"is a distributed checkpoint of PyTorch \(DCP\)",
        of_another_format("pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin", keep="config.json"),
    ),
    "pickle-without-a-config": Case("has only pickled weights", of_another_format("pytorch_model.bin")),
}

FILES = {
    "truncated-file": Case(
        r"is truncated: it has \d+ bytes, its header promises \d+", truncated(SINGLE, lambda size: size - 1)
    ),
    "truncated-header": Case("is truncated: 100 bytes", truncated(SINGLE, lambda size: 100)),
    "empty-file": Case("is truncated: 0 bytes", truncated(SINGLE, lambda size: 0)),
    "trailing-bytes": Case(
        "has 3 bytes that belong to no tensor",
        lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"abc") and None,
    ),
    "not-safetensors": Case("is truncated: 19 bytes", text(SINGLE, "<!DOCTYPE html><p>\n")),
    "git-lfs-pointer": Case(
        "is a Git LFS pointer, not the weights",
        text(SINGLE, "version https://git-lfs.github.com/spec/v1\noid"),
    ),
    "empty-pickle": Case(r"only pickled weights, .* \(pytorch_model\.bin\)", only_pickles(b"")),
    "pickle-with-code": Case(r"only pickled weights", only_pickles(b"cos\nsystem\n(S'touch was-here'\ntR.")),
    "no-weights": Case(f"has neither {SINGLE} nor {INDEX}", lambda folder: (folder / SINGLE).unlink()),
    "header-duplicate-key": Case(
        "duplicate key lm_head.weight",
        header(lambda entries: json.dumps(entries)[:-1].encode() + b', "lm_head.weight": {}}'),
    ),
    "header-overlap": Case("overlaps another tensor", header(shift(-4, -4))),
    "header-hole": Case("leaves a gap before it", header(shift(4, 4))),
    "header-offsets-reversed": Case(r"but its bytes are 8 to 4", header(set_last("data_offsets", [8, 4]))),
    "header-out-of-range": Case(
        "is truncated: .* its header promises",
        header(
            lambda entries: last(entries).update(
                dtype="U8",
                shape=[BIG],
                data_offsets=[last(entries)["data_offsets"][0], last(entries)["data_offsets"][0] + BIG],
            )
        ),
    ),
    "header-giant": Case(
        f"has a header of {BIG} bytes",
        lambda folder: (
            (folder / SINGLE).write_bytes(BIG.to_bytes(8, "little")),
            os.truncate(folder / SINGLE, BIG + 8),
        )[1],
    ),
    "header-not-json": Case("the header of .* is not valid JSON", header(lambda _: b"{not json}")),
    "header-unknown-dtype": Case("has unknown dtype F4", header(set_last("dtype", "F4"))),
    "header-negative-shape": Case(
        "has a shape or offset that is not a non-negative integer", header(set_last("shape", [-1, -1]))
    ),
    "truncated-shard": Case(
        "shard-2.safetensors is truncated",
        sharded(lambda folder, _: truncated("shard-2.safetensors", lambda size: size - 8)(folder)),
    ),
    "index-missing-shard": Case(
        "shard-2.safetensors is missing", sharded(lambda folder, _: (folder / "shard-2.safetensors").unlink())
    ),
    "index-and-shard-missing": Case(
        r"has no model\.safetensors\.index\.json, and model-00001-of-00002\.safetensors is missing",
        lambda folder: (folder / SINGLE).rename(folder / "model-00002-of-00002.safetensors"),
    ),
    "index-outside": Case(
        r"lists \.\./x\.safetensors, which is not a file of", sharded(mapped("../x.safetensors"))
    ),
    "index-with-a-long-name": Case("xxx cannot be read: File name too long", sharded(mapped("x" * 300))),
    "index-absolute": Case("lists /etc/passwd, which is not a file of", sharded(mapped("/etc/passwd"))),
    "index-through-link": Case(
        "shard-2.safetensors is a link to .* outside the checkpoint", sharded(linked_outside)
    ),
    "index-wrong-shard": Case(
        r"lm_head\.weight is in shard-2.safetensors, but .* lists it in shard-1",
        sharded(mapped("shard-1.safetensors")),
    ),
    "index-of-nothing": Case(
        r"lists unknown.weight in shard-1\.safetensors, which does not contain it",
        sharded(lambda folder, found: index(folder, found | {"unknown.weight": "shard-1.safetensors"})),
    ),
    "index-duplicate-key": Case("duplicate key lm_head.weight", sharded(repeated)),
    "index-is-a-link-outside": Case(
        "index.json is a link to .* outside the checkpoint", sharded(linked_index)
    ),
    "two-shards-with-one-tensor": Case(
        r"lm_head\.weight is in two shards: shard-1\.safetensors and shard-2", sharded(held_twice)
    ),
    "index-not-json": Case("is not valid JSON", sharded(lambda folder, _: text(INDEX, "{")(folder))),
    "index-and-single": Case(f"has both {SINGLE} and {INDEX}", sharded(lambda folder, _: added("x")(folder))),
}
