"""Checkpoints that are damaged in one way each, and what a build says of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import CONFIG, random_tensors
from safetensors.torch import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
MLP_ONLY = {"hybrid_override_pattern": "-"}
"""One layer of one kind: what is only found in the weights' values is found after a short trace."""


@dataclass(frozen=True)
class Case:
    """How a good checkpoint is damaged, and what the one line of the error must hold."""

    says: str
    damage: Callable[[Path], None] = lambda folder: None
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its config.json that are not as in CONFIG; the tensors fit CONFIG with `model` instead."""
    model: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    code: int = 3


def without(ending: str) -> Callable[[Path], None]:
    """Leave out the first tensor whose name ends so."""

    def damage(folder: Path) -> None:
        tensors = stored(folder)
        del tensors[named(tensors, ending)]
        save_file(tensors, folder / SINGLE)

    return damage


def replaced(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change the first tensor whose name ends so."""

    def damage(folder: Path) -> None:
        tensors = stored(folder)
        name = named(tensors, ending)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / SINGLE)

    return damage


def added(name: str) -> Callable[[Path], None]:
    """Add a tensor."""

    def damage(folder: Path) -> None:
        save_file(stored(folder) | {name: torch.zeros(3)}, folder / SINGLE)

    return damage


def added_head(folder: Path) -> None:
    """Add a head that is not the embeddings that the configuration ties it to."""
    tensors = stored(folder)
    head = tensors["backbone.embeddings.weight"] + 1
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE)


def one_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with its last value replaced."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that the checkpoint was written with."""
    return random_tensors(json.loads((folder / "config.json").read_text()))


def named(tensors: dict[str, torch.Tensor], ending: str) -> str:
    """The first name with that ending."""
    return next(name for name in tensors if name.endswith(ending))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of the file and leave its data as it is."""

    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        changed = change(entries)
        text = changed if isinstance(changed, bytes) else json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def last(entries: dict[str, Any]) -> dict[str, Any]:
    """The entry whose data lie last."""
    tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
    return max(tensors, key=lambda entry: entry["data_offsets"][1])


def shift(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """Move the last tensor's place."""

    def change(entries: dict[str, Any]) -> None:
        offsets = last(entries)["data_offsets"]
        offsets[0] += begin
        offsets[1] += end

    return change


def set_last(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set one field of the last tensor's entry."""
    return lambda entries: last(entries).__setitem__(key, value)


def truncated(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    """Cut a file short."""
    return lambda folder: os.truncate(folder / name, keep((folder / name).stat().st_size))


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def sharded(then: Callable[[Path, dict[str, str]], None]) -> Callable[[Path], None]:
    """Two shards and their index in the file's place, and then the damage."""

    def damage(folder: Path) -> None:
        tensors = stored(folder)
        names = sorted(tensors)
        half = len(names) // 2
        (folder / SINGLE).unlink()
        for number, part in enumerate((names[:half], names[half:]), 1):
            save_file({name: tensors[name] for name in part}, folder / f"shard-{number}.safetensors")
        weight_map = {name: f"shard-{1 + (i >= half)}.safetensors" for i, name in enumerate(names)}
        index(folder, weight_map)
        then(folder, weight_map)

    return damage


def index(folder: Path, weight_map: dict[str, str]) -> None:
    """Write the index."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def mapped(shard: str) -> Callable[[Path, dict[str, str]], None]:
    """List one tensor in another file."""
    return lambda folder, weight_map: index(folder, weight_map | {"lm_head.weight": shard})


def held_twice(folder: Path, weight_map: dict[str, str]) -> None:
    """A tensor of the second shard in the first one too."""
    tensors = stored(folder)
    first = {name: tensors[name] for name, shard in weight_map.items() if shard == "shard-1.safetensors"}
    save_file(first | {"lm_head.weight": tensors["lm_head.weight"]}, folder / "shard-1.safetensors")
    index(folder, weight_map | {"lm_head.weight": "shard-1.safetensors"})


def repeated(folder: Path, weight_map: dict[str, str]) -> None:
    """One name twice in the index."""
    entries = json.dumps(weight_map)
    (folder / INDEX).write_text(
        f'{{"weight_map": {entries[:-1]}, "lm_head.weight": "shard-1.safetensors"}}}}'
    )


def linked_index(folder: Path, _: dict[str, str]) -> None:
    """Move the index out of the folder and link to it."""
    (folder / INDEX).rename(folder.parent / "elsewhere.json")
    (folder / INDEX).symlink_to(folder.parent / "elsewhere.json")


def linked_outside(folder: Path, _: dict[str, str]) -> None:
    """Move a shard out of the folder and link to it."""
    outside = folder.parent / "elsewhere.safetensors"
    (folder / "shard-2.safetensors").rename(outside)
    (folder / "shard-2.safetensors").symlink_to(outside)


def only_pickles(content: bytes) -> Callable[[Path], None]:
    """A pickle in the safetensors file's place."""

    def damage(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def of_another_format(*names: str, keep: str = "") -> Callable[[Path], None]:
    """Files of another format in place of everything but `keep`."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name != keep:
                path.unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")

    return damage


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    """The tensors under other names."""

    def damage(folder: Path) -> None:
        save_file({rename(name): tensor for name, tensor in stored(folder).items()}, folder / SINGLE)

    return damage


def tokenizer(then: Callable[[Path], None]) -> Callable[[Path], None]:
    """A good tokenizer, and then the damage."""

    def damage(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(EXAMPLE / name, folder)
        then(folder)

    return damage


def linked_license(folder: Path) -> None:
    """A license file that leads out of the checkpoint."""
    (folder.parent / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(folder.parent / "secret")


BIG = 100_000_001

TENSORS = {
    "missing-in-proj": Case(r"in_proj\.weight is missing", without("in_proj.weight")),
    "missing-a-log": Case(r"A_log is missing", without("A_log")),
    "missing-lm-head": Case(r"lm_head\.weight is missing", without("lm_head.weight")),
    "missing-conv-bias": Case(r"conv1d\.bias is missing", without("conv1d.bias")),
    "missing-expert": Case(r"experts\.2\.up_proj\.weight is missing", without("experts.2.up_proj.weight")),
    "extra-tensor": Case(
        "unknown.weight is in the checkpoint, but not in the model", added("unknown.weight")
    ),
    "wrong-shape": Case(
        r"out_proj\.weight has shape \[32, 31\], but the configuration requires \[32, 32\]",
        replaced("out_proj.weight", lambda tensor: tensor[:, :31]),
    ),
    "int8-weight": Case(
        r"up_proj\.weight is stored as int8", replaced("up_proj.weight", lambda tensor: tensor.to(torch.int8))
    ),
    "fp8-weights": Case(
        r"up_proj\.weight is FP8, but neither config\.json nor hf_quant_config\.json describes",
        replaced("up_proj.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)),
    ),
    "fp8-only-said": Case(
        "the configuration describes a quantization, but no stored tensor is quantized",
        config={"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    ),
    "nan": Case(
        r"up_proj\.weight holds NaN", replaced("up_proj.weight", one_value(torch.nan)), model=MLP_ONLY
    ),
    "infinity": Case(
        r"up_proj\.weight holds an infinity", replaced("up_proj.weight", one_value(torch.inf)), model=MLP_ONLY
    ),
    "nan-in-a-linked-weight": Case(
        r"up_proj\.weight holds NaN",
        replaced("up_proj.weight", one_value(torch.nan)),
        model=MLP_ONLY,
        options=("--weights", "link"),
    ),
    "fp16-overflow": Case(
        r"up_proj\.weight holds 100000, too large for FP16",
        replaced("up_proj.weight", one_value(1e5)),
        model=MLP_ONLY,
        options=("--precision", "fp16"),
    ),
    "a-log-overflow": Case(
        r"A_log holds 200, too large for FP32",
        replaced("A_log", one_value(200)),
        model={"hybrid_override_pattern": "M"},
    ),
}

WRAPPED = {
    "names-of-torch-compile": Case(
        r"\d+ of \d+ tensor names contain _orig_mod\., which torch\.compile adds",
        renamed(lambda name: f"_orig_mod.{name}"),
    ),
    "names-of-torch-compile-in-layers": Case(
        r"contain _orig_mod\., which torch\.compile adds \(backbone\.layers\.0\._orig_mod\.",
        renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
        options=("--layers", "0:1"),
    ),
    "names-of-fsdp": Case(
        r"_fsdp_wrapped_module\., which FSDP adds", renamed(lambda name: f"_fsdp_wrapped_module.{name}")
    ),
    "names-of-ddp": Case(
        r"module\., which DistributedDataParallel or DeepSpeed adds", renamed(lambda name: f"module.{name}")
    ),
    "names-of-peft": Case(
        r"base_model\.model\., which PEFT adds", renamed(lambda name: f"base_model.model.{name}")
    ),
    "names-of-lora": Case(
        r"lora_A\., which an unmerged LoRA adapter adds",
        lambda folder: added("base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight")(folder),
    ),
    "names-of-a-multimodal-model": Case(
        r"language_model\., which a multimodal model adds", renamed(lambda name: f"language_model.{name}")
    ),
}

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

CONFIGS = {
    "config-missing": Case("has no config.json", lambda folder: (folder / "config.json").unlink()),
    "config-not-json": Case("config.json is not valid JSON", text("config.json", "{'model_type': 1}")),
    "config-not-text": Case("config.json is not valid JSON", text("config.json", b"\xff\xfe\x00")),
    "config-not-an-object": Case("config.json is not a JSON object", text("config.json", "[]")),
    "config-duplicate-key": Case(
        "duplicate key vocab_size", text("config.json", '{"vocab_size": 1, "vocab_size": 2}')
    ),
    "config-misspelt": Case(
        "hiden_size is not a field of this model family; did you mean hidden_size", config={"hiden_size": 32}
    ),
    "config-fp32-residual": Case(
        "residual_in_fp32 is true, but the residual of this build is BF16",
        config={"residual_in_fp32": True},
        options=("--precision", "bf16"),
    ),
    "config-field-not-ignorable": Case(
        "--ignore-field hidden_size has no effect", options=("--ignore-field", "hidden_size"), code=2
    ),
    "config-unknown": Case("hyper_connections is not a field", config={"hyper_connections": 4}),
    "config-other-model": Case('model_type is "llama"', config={"model_type": "llama"}),
    "config-llama-nemotron": Case(
        'model_type is "nemotron-nas": it is Llama-Nemotron',
        config={"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "block_configs": []},
    ),
    "config-puzzle": Case(
        "it is Nemotron Puzzle, whose layers differ in size",
        config={"architectures": ["NemotronHPuzzleForCausalLM"], "block_configs": []},
    ),
    "config-multimodal": Case(
        'model_type is "NemotronH_Nano_VL_V2": it is a multimodal model',
        config={"model_type": "NemotronH_Nano_VL_V2", "llm_config": CONFIG, "downsample_ratio": 0.5},
    ),
    "config-of-fsdp": Case(
        r'architectures is \["FSDPNemotronHForCausalLM"\]: FSDP has left its own name',
        config={"architectures": ["FSDPNemotronHForCausalLM"]},
    ),
    "config-of-peft": Case(
        r'architectures is \["PeftModelForCausalLM"\]: PEFT has left its own name',
        config={"architectures": ["PeftModelForCausalLM"]},
    ),
    "config-of-torch-compile": Case(
        r'architectures is \["OptimizedModule"\]: torch.compile has left its own name',
        config={"architectures": ["OptimizedModule"]},
    ),
    "config-field-missing": Case("ssm_state_size is missing", config={"ssm_state_size": None}),
    "config-contradictory": Case(
        "num_hidden_layers is 7, but hybrid_override_pattern has 6", config={"num_hidden_layers": 7}
    ),
    "config-two-names": Case("two names of one field must have the same value", config={"mamba_n_groups": 4}),
    "config-unknown-layer": Case('holds "X"', config={"hybrid_override_pattern": "MXM"}),
    "config-no-layers": Case("the model has no layer", config={"hybrid_override_pattern": ""}),
    "config-silu-experts": Case('mlp_hidden_act is "silu"', config={"mlp_hidden_act": "silu"}),
    "config-experts-by-groups": Case(
        "n_routed_experts 4 is not a multiple of n_group 3", config={"n_group": 3, "topk_group": 1}
    ),
    "config-too-many-experts-chosen": Case(
        "num_experts_per_tok 9 is more than n_routed_experts 4", config={"num_experts_per_tok": 9}
    ),
    "config-heads-by-kv-heads": Case(
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3", config={"num_key_value_heads": 3}
    ),
    "config-window": Case("sliding_window is 4096", config={"sliding_window": 4096}),
    "config-text-for-number": Case('hidden_size is "32"', config={"hidden_size": "32"}),
    "config-not-finite": Case("norm_eps is Infinity", config={"norm_eps": float("inf")}),
    "config-other-weights": Case(
        r"embeddings\.weight has shape \[96, 32\].* lists \d+ more problems", config={"hidden_size": 64}
    ),
    "tied-head-differs": Case(
        "lm_head.weight differs from backbone.embeddings.weight",
        added_head,
        config={"tie_word_embeddings": True},
    ),
    "config-end-token": Case("eos_token_id 96 is outside the vocabulary", config={"eos_token_id": 96}),
    "tokenizer-broken": Case(
        "tokenizer.json is not a tokenizer",
        tokenizer(text("tokenizer.json", '{"version": "1.0"}')),
        model={"vocab_size": 1024},
    ),
    "tokenizer-not-json": Case(
        "tokenizer.json is not valid JSON", tokenizer(text("tokenizer.json", "{")), model={"vocab_size": 1024}
    ),
    "tokenizer-of-another-model": Case(
        r"tokenizer.json has \d+ tokens, config.json 96", tokenizer(lambda _: None)
    ),
    "generation-config-broken": Case(
        "eos_token_id is end, not token ids",
        tokenizer(text("generation_config.json", '{"eos_token_id": "end"}')),
        model={"vocab_size": 1024},
    ),
    "license-through-link": Case("LICENSE is a link to .* outside the checkpoint", linked_license),
}

ALL = TENSORS | WRAPPED | FORMATS | FILES | CONFIGS

GOOD = Case("", model=MLP_ONLY)
GOOD_WITH_TOKENIZER = Case("", tokenizer(lambda _: None), model=MLP_ONLY | {"vocab_size": 1024})


def write(case: Case, folder: Path) -> None:
    """The damaged checkpoint at `folder`."""
    model = CONFIG | case.model
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    save_file(random_tensors(model), folder / SINGLE)
    if case.config:
        changed = {key: value for key, value in (model | case.config).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(changed))
    case.damage(folder)
