"""Loading matches every parameter to its tensors, and reports every problem at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, random_tensors, write_checkpoint
from runtime_bundle import write_tokenizer
from safetensors.torch import save_file

from nemotrt.exporter.checkpoint.safetensors_reader import SINGLE, StoredTensor, open_checkpoint
from nemotrt.exporter.checkpoint.side_files import code_files, read_config
from nemotrt.exporter.checkpoint.tensor_matching import match
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.pipelines.check import check, read_headers
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.stages.load import load
from nemotrt.model.checkpoint import HEAD, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType


def table(config: dict[str, Any], dtype: DType = DType.FLOAT32) -> dict[str, StoredTensor]:
    """The stored tensors of a whole checkpoint, as headers describe them."""
    return {
        name: StoredTensor(name, dtype, tuple(tensor.shape), Path("x"), 0, tensor.nbytes)
        for name, tensor in random_tensors(config).items()
    }


def stored(name: str, dtype: DType, *shape: int) -> StoredTensor:
    return StoredTensor(name, dtype, shape, Path("x"), 0, 1)


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_dict(CONFIG)


def test_every_parameter_has_its_tensors(checkpoint: Path) -> None:
    model = load(checkpoint)
    assert set(model.weights) == set(tensor_sources(model.config))
    used = [tensor.name for source in model.weights.values() for tensor in source.tensors]
    assert sorted(used) == sorted(open_checkpoint(checkpoint))
    assert model.side_files == ("config.json",)


def test_tied_embeddings_are_used_twice(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    assert model.weights["lm_head.weight"].tensors == model.weights["backbone.embeddings.weight"].tensors


def write_tied(folder: Path, head: torch.Tensor | None, *, has_table: bool = True) -> Path:
    """A checkpoint with tied embeddings that stores `head` too, or with None the table under the head's name."""
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    table = tensors["backbone.embeddings.weight"]
    if not has_table:
        del tensors["backbone.embeddings.weight"]
    write_checkpoint(folder, tie_word_embeddings=True)
    save_file(tensors | {HEAD: table.clone() if head is None else head}, folder / SINGLE)
    return folder


@pytest.mark.parametrize("has_table", [True, False])
def test_tied_embeddings_that_are_stored_as_the_head(tmp_path: Path, has_table: bool) -> None:
    """Some tools store both, with the same bytes; others store the one tensor under the head's name."""
    folder = write_tied(tmp_path / "tied", None, has_table=has_table)
    model = load(folder)
    assert model.weights[HEAD].tensors == model.weights["backbone.embeddings.weight"].tensors
    assert model.not_exported == ()
    assert check(read_headers(folder)).is_buildable


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (torch.ones(96, 32), f"{HEAD} differs from backbone.embeddings.weight, but config.json has tie_word"),
        (torch.ones(96, 32).half(), f"backbone.embeddings.weight and {HEAD} are two names of one tensor"),
        (torch.ones(90, 32), f"backbone.embeddings.weight and {HEAD} are two names of one tensor"),
    ],
    ids=["values", "dtype", "shape"],
)
def test_tied_embeddings_with_another_head(tmp_path: Path, head: torch.Tensor, message: str) -> None:
    folder = write_tied(tmp_path / "tied", head)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    assert [str(problem) for problem in check(read_headers(folder)).problems if HEAD in str(problem)]


def test_every_problem_is_found(config: ModelConfig) -> None:
    tensors = table(CONFIG)
    del tensors["lm_head.weight"], tensors["backbone.layers.0.mixer.A_log"]
    tensors["backbone.layers.0.mixer.D"] = stored("backbone.layers.0.mixer.D", DType.FLOAT32, 5)
    tensors["backbone.layers.0.mixer.dt_bias"] = stored("backbone.layers.0.mixer.dt_bias", DType.INT64, 4)
    tensors["backbone.layers.9.norm.weight"] = stored("backbone.layers.9.norm.weight", DType.FLOAT32, 32)
    messages = [str(problem) for problem in match(config, tensors).problems]
    assert messages == [
        "backbone.layers.0.mixer.A_log is missing",
        "backbone.layers.0.mixer.D has shape [5], but the configuration requires [4]",
        "backbone.layers.0.mixer.dt_bias is stored as int64, which is not a supported dtype of weights",
        "lm_head.weight is missing",
        "backbone.layers.9.norm.weight is in the checkpoint, but not in the model that config.json describes",
    ]


def test_a_build_names_the_first_problem_and_counts_the_others(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "damaged")
    tensors = random_tensors(CONFIG)
    save_file({name: value for name, value in tensors.items() if "A_log" not in name}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"0\.mixer\.A_log is missing \(nemo-export check lists 1 more"):
        load(folder)


def test_multi_token_prediction_is_recognised_and_left_out(config: ModelConfig) -> None:
    mtp = stored("mtp.layers.0.enorm.weight", DType.FLOAT32, 32)
    matched = match(config, table(CONFIG) | {mtp.name: mtp})
    assert matched.problems == ()
    assert matched.not_exported == (mtp.name,)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_one_by_one_or_stacked(config: ModelConfig, stacked: bool) -> None:
    tensors = table(CONFIG)
    if stacked:
        for layer in (1, 5):
            for name, shape in (("up_proj", (4, 24, 16)), ("down_proj", (4, 16, 24))):
                prefix = f"backbone.layers.{layer}.mixer.experts."
                for expert in range(4):
                    del tensors[f"{prefix}{expert}.{name}.weight"]
                tensors[f"{prefix}{name}"] = stored(f"{prefix}{name}", DType.FLOAT32, *shape)
    matched = match(config, tensors)
    assert matched.problems == ()
    assert len(matched.weights["backbone.layers.1.mixer.experts.up"].tensors) == (1 if stacked else 4)


def quantized(config: dict[str, Any]) -> dict[str, StoredTensor]:
    """The table with its projections in FP8, each with the scales that ModelOpt writes."""
    tensors = table(config, DType.BFLOAT16)
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            tensors[name] = stored(name, DType.FLOAT8_E4M3, *tensors[name].shape)
            for scale in ("weight_scale", "input_scale"):
                scale_name = name.removesuffix("weight") + scale
                tensors[scale_name] = stored(scale_name, DType.FLOAT32)
    return tensors


def test_fp8_that_nothing_describes_is_one_clear_problem(config: ModelConfig) -> None:
    problems = match(config, quantized(CONFIG)).problems
    assert [str(problem) for problem in problems] == [
        "backbone.layers.0.mixer.in_proj.weight is FP8, but neither config.json nor hf_quant_config.json"
        " describes a quantization"
    ]


def test_packed_four_bit_weights_are_one_clear_problem(config: ModelConfig) -> None:
    tensors = table(CONFIG, DType.BFLOAT16)
    name = "backbone.layers.3.mixer.up_proj.weight"
    tensors[name] = stored(name, DType.UINT8, 48, 16)
    problems = match(config, tensors).problems
    assert [str(problem) for problem in problems] == [
        f"the checkpoint is quantized as packed 4-bit values ({name})"
    ]
    tensors[f"{name}_scale_2"] = stored(f"{name}_scale_2", DType.FLOAT32)
    assert "quantized as NVFP4" in str(match(config, tensors).problems[0])


def test_scales_without_quantized_weights_are_extra_tensors(config: ModelConfig) -> None:
    scale = stored("backbone.layers.0.mixer.in_proj.weight_scale", DType.FLOAT32)
    problems = match(config, table(CONFIG) | {scale.name: scale}).problems
    assert [str(problem).split()[0] for problem in problems] == [scale.name]


def test_a_quantization_that_nothing_has(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "fp8", quantization_config={"quant_algo": "FP8"})
    with pytest.raises(CheckpointError, match="describes a quantization, but no stored tensor is quantized"):
        load(folder)


def test_an_end_token_outside_the_vocabulary(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "eos", eos_token_id=[2, 96])
    with pytest.raises(CheckpointError, match="eos_token_id 96 is outside the vocabulary of 96"):
        read_config(folder)


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "text", vocab_size=512)
    write_tokenizer(folder, eos=1)
    return folder


def test_the_tokenizer_goes_along(with_tokenizer: Path) -> None:
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert load(with_tokenizer).side_files == names


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is x, not token ids"),
        (
            "generation_config.json",
            '{"eos_token_id": [1, 512]}',
            "eos_token_id 512 is outside the vocabulary",
        ),
        ("chat_template.jinja", "{% if %}", "the chat template is broken: Expected an expression"),
    ],
)
def test_a_broken_side_file(with_tokenizer: Path, name: str, text: str, message: str) -> None:
    (with_tokenizer / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(with_tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model(with_tokenizer: Path) -> None:
    config = json.loads((with_tokenizer / "config.json").read_text())
    save_file(random_tensors(config | {"vocab_size": 100}), with_tokenizer / SINGLE)
    (with_tokenizer / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has \d+ tokens, config.json 100"):
        load(with_tokenizer)


def test_a_token_beyond_the_vocabulary(with_tokenizer: Path) -> None:
    fields = json.loads((with_tokenizer / "tokenizer.json").read_text())
    fields["model"]["vocab"]["far"] = 1500
    (with_tokenizer / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: the id 1500 of far is outside the vocabulary"
    ):
        load(with_tokenizer)
    (problem,) = check(read_headers(with_tokenizer)).problems
    assert "the id 1500 of far is outside the vocabulary of 512 tokens" in str(problem)


def test_a_template_may_refuse_the_simplest_conversation(with_tokenizer: Path) -> None:
    (with_tokenizer / "chat_template.jinja").write_text("{{ raise_exception('a base model does not chat') }}")
    assert not check(read_headers(with_tokenizer)).problems


def test_end_tokens_that_files_disagree_about_are_listed(with_tokenizer: Path) -> None:
    """`check` and the build say so, and the manifest has all of them; a serving system stops at each."""
    (note,) = (note for note in check(read_headers(with_tokenizer)).notes if "end-of-text" in note)
    assert "(generation_config.json: 1; config.json: 2; tokenizer_config.json: 1)" in note
    out = with_tokenizer.parent / "bundle"
    build(BuildConfig(with_tokenizer, out, runtime="onnx", layers="3", validate=False))
    assert note in (out / "logs/build.log").read_text()
    assert manifest.read(out).model.eos_token_ids == (1, 2)


def test_end_tokens_without_a_tokenizer(checkpoint: Path, with_tokenizer: Path) -> None:
    assert load(checkpoint).end_tokens == {"config.json": {2}}
    (with_tokenizer / "tokenizer.json").unlink()
    assert load(with_tokenizer).end_tokens == {"generation_config.json": {1}, "config.json": {2}}


def test_an_end_token_that_the_vocabulary_does_not_have(with_tokenizer: Path) -> None:
    (with_tokenizer / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    notes = check(read_headers(with_tokenizer)).notes
    assert any("tokenizer_config.json: a token that tokenizer.json does not have" in note for note in notes)


def test_end_tokens_that_files_agree_about_are_no_news(with_tokenizer: Path) -> None:
    write_tokenizer(with_tokenizer, eos=2)
    (with_tokenizer / "tokenizer_config.json").write_text("{}")
    assert not any("end-of-text" in note for note in check(read_headers(with_tokenizer)).notes)


def test_a_side_file_that_leads_out_of_the_checkpoint(with_tokenizer: Path) -> None:
    secret = with_tokenizer.parent / "secret"
    secret.write_text("{}")
    (with_tokenizer / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match="LICENSE is a link to"):
        load(with_tokenizer)


def test_no_tensor_is_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "small")
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in random_tensors(CONFIG).items()}
    save_file(tensors, folder / SINGLE)
    assert load(folder).weights


def test_code_that_transformers_would_run_is_found_with_its_imports(with_tokenizer: Path) -> None:
    config = json.loads((with_tokenizer / "config.json").read_text())
    classes = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "other/repository--modeling_y.Y"}
    classes["AutoImageProcessor"] = f"{'too_long' * 99}.X"
    (with_tokenizer / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (with_tokenizer / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name, code in {
        "configuration_x.py": "from .shapes import Shape\nimport torch\n",
        "shapes.py": "if True:\n    from .configuration_x import XConfig\n",
        "tokenization_x.py": "",
        "modeling_y.py": "",
        "unrelated.py": "",
    }.items():
        (with_tokenizer / name).write_text(code)
    assert code_files(with_tokenizer) == ("configuration_x.py", "shapes.py", "tokenization_x.py")
    (with_tokenizer / "shapes.py").unlink()
    (with_tokenizer / "shapes.py").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        code_files(with_tokenizer)
