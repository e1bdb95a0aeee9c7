"""Zero rows of matrices: which are found, which are refused, and what a user who accepts them is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fp8_checkpoints
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from click.testing import CliRunner
from runtime_bundle import write_tokenizer
from safetensors.torch import load_file, save_file

from nemotrt.exporter.artifacts import ZeroWeights
from nemotrt.exporter.checkpoint import zero_weights
from nemotrt.exporter.checkpoint.safetensors_reader import SINGLE
from nemotrt.exporter.cli import program
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import CheckpointError
from nemotrt.exporter.pipelines.build import build
from nemotrt.exporter.pipelines.check import check, read_headers
from nemotrt.exporter.pipelines.quantize import quantize_checkpoint
from nemotrt.exporter.runtime import manifest
from nemotrt.exporter.stages.load import load

Q_PROJ = "backbone.layers.2.mixer.q_proj.weight"
EMBEDDINGS = "backbone.embeddings.weight"
NOTHING = ZeroWeights("", "", "")


def edited(folder: Path, **changes: Callable[[torch.Tensor], object]) -> Path:
    """Change the tensors whose names end so, in place."""
    tensors = load_file(folder / SINGLE)
    for ending, change in changes.items():
        for name in [name for name in tensors if name.endswith(ending)]:
            change(tensors[name])
    save_file(tensors, folder / SINGLE)
    return folder


def zero(start: int, stop: int) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor[start:stop].zero_()


def found(folder: Path) -> ZeroWeights:
    return zero_weights.find(load(folder).weights, folder)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A small checkpoint of the test's own, without a tokenizer."""
    return write_checkpoint(tmp_path / "checkpoint", torch_dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_good_checkpoint_has_none(tmp_path: Path, dtype: str) -> None:
    assert found(write_checkpoint(tmp_path / "checkpoint", torch_dtype=dtype)) == NOTHING


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((0, 32), "all 32 rows"),
        ((4, 8), "rows 4 to 7 of 32"),
        ((28, 32), "rows 28 to 31 of 32"),
        ((31, 32), "row 31 of 32"),
    ],
)
def test_a_run_of_an_eighth_is_refused_and_a_shorter_one_noted(
    own: Path, rows: tuple[int, int], words: str
) -> None:
    result = found(edited(own, **{Q_PROJ: zero(*rows)}))
    sentence = f"{Q_PROJ} is zero in {words} ({SINGLE})"
    assert result == (
        ZeroWeights(sentence, SINGLE, "") if rows[1] - rows[0] >= 4 else ZeroWeights("", "", sentence)
    )


def test_a_run_of_many_bytes_is_refused_however_large_the_matrix(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(own, **{Q_PROJ: zero(3, 5)})
    assert found(own).noted
    monkeypatch.setattr(zero_weights, "REFUSED_BYTES", 2 * 32 * 2)
    assert found(own).refused


@pytest.mark.parametrize("piece", [1, 64, 200])
def test_pieces_do_not_change_what_is_found(own: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    edited(own, **{Q_PROJ: zero(3, 9), "in_proj.weight": zero(131, 132)})
    expected = found(own)
    monkeypatch.setattr(zero_weights, "PIECE_BYTES", piece)
    assert found(own) == expected
    assert expected.refused == f"{Q_PROJ} is zero in rows 3 to 8 of 32 ({SINGLE})"
    assert expected.noted.endswith("; 1 more tensor has zero rows: backbone.layers.4.mixer.in_proj.weight")


def test_the_longest_run_is_named(own: Path) -> None:
    edited(own, **{Q_PROJ: lambda tensor: (zero(1, 2)(tensor), zero(10, 20)(tensor))})
    assert f"{Q_PROJ} is zero in 11 of 32 rows, such as rows 10 to 19" in found(own).refused


def test_one_value_makes_a_row_and_a_negative_zero_does_not(own: Path) -> None:
    def last_value(tensor: torch.Tensor) -> None:
        tensor[4:12] = -0.0
        tensor[8:, -1] = 2.0**-133  # the smallest value of BF16

    assert found(edited(own, **{Q_PROJ: last_value})).refused == (
        f"{Q_PROJ} is zero in rows 4 to 7 of 32 ({SINGLE})"
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_the_sign_does_not_count_in_any_dtype(dtype: type[np.unsignedinteger]) -> None:
    sign = dtype(1 << (8 * np.dtype(dtype).itemsize - 1))
    bits = np.zeros((4, 40), dtype)
    bits[1] = sign
    bits[2, -1] = 1
    bits[3, 0] = sign - dtype(1)
    assert zero_weights._are_zero(bits).tolist() == [True, True, False, False]


def test_vectors_may_be_zero(own: Path) -> None:
    names = ("bias", "A_log", ".D", "dt_bias", "norm.weight", "norm_f.weight")
    edited(own, **dict.fromkeys(names, torch.Tensor.zero_))
    assert found(own) == NOTHING


def test_an_expert_is_a_matrix_whether_stacked_or_alone(tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.experts"
    folder = edited(write_checkpoint(tmp_path / "alone"), **{f"{name}.2.up_proj.weight": torch.Tensor.zero_})
    assert found(folder).refused == f"{name}.2.up_proj.weight is zero in all 24 rows ({SINGLE})"
    tensors = load_file(folder / SINGLE)
    parts = [tensors.pop(f"{name}.{expert}.up_proj.weight") for expert in range(4)]
    save_file(tensors | {f"{name}.up_proj": torch.stack(parts)}, folder / SINGLE)
    assert found(folder).refused == f"{name}.up_proj[2] is zero in all 24 rows ({SINGLE})"


def test_a_channel_of_a_convolution_is_a_row(own: Path) -> None:
    edited(own, **{"layers.0.mixer.conv1d.weight": zero(5, 6)})
    assert not found(own).refused
    assert "conv1d.weight is zero in row 5 of 96" in found(own).noted


@pytest.mark.parametrize("byte", [0x00, 0x80])
def test_fp8(tmp_path: Path, byte: int) -> None:
    name = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    fp8_checkpoints.small(tmp_path / "fp8")
    assert found(tmp_path / "fp8") == NOTHING
    edited(tmp_path / "fp8", **{name: lambda tensor: tensor.view(torch.uint8).fill_(byte)})
    assert found(tmp_path / "fp8").refused.startswith(f"{name} is zero in all 24 rows")


@pytest.fixture
def with_tokens(tmp_path: Path) -> tuple[Path, int]:
    """A checkpoint whose vocabulary is padded, and the number of its tokenizer's tokens."""
    folder = write_checkpoint(tmp_path / "checkpoint", vocab_size=512)
    write_tokenizer(folder)
    return folder, load_tokens(folder)


def load_tokens(folder: Path) -> int:
    from nemotrt.exporter.generation.tokenizer import Tokenizer

    return Tokenizer(folder).vocab_size


def test_padding_may_be_zero_and_the_row_of_a_token_may_not(with_tokens: tuple[Path, int]) -> None:
    folder, tokens = with_tokens
    assert tokens < 512
    edited(folder, **{EMBEDDINGS: zero(tokens, 512), "lm_head.weight": zero(tokens, 512)})
    assert found(folder) == NOTHING
    edited(folder, **{EMBEDDINGS: zero(tokens - 1, 512)})
    sentence = f"{EMBEDDINGS} is zero in row {tokens - 1} of 512, the row of token "
    assert found(folder).refused.startswith(sentence)
    (folder / "tokenizer.json").unlink()
    assert f"{EMBEDDINGS} is zero in rows {tokens - 1} to 511 of 512 (" in found(folder).refused


def test_the_row_of_the_padding_token_may_be_zero(with_tokens: tuple[Path, int]) -> None:
    folder, _ = with_tokens
    edited(folder, **{EMBEDDINGS: zero(0, 1)})
    assert found(folder).refused
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": config["bos_token"]}))
    assert found(folder) == NOTHING
    edited(folder, **{EMBEDDINGS: zero(0, 2)})
    assert found(folder).refused.startswith(f"{EMBEDDINGS} is zero in row 1 of 512, the row of token ")


def test_tied_embeddings_are_named_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    edited(folder, **{EMBEDDINGS: torch.Tensor.zero_})
    assert found(folder).refused == f"{EMBEDDINGS} is zero in all 96 rows ({SINGLE})"


def test_a_hole_is_found_without_reading_it(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_weights.files, "is_hole", lambda *_: True)
    monkeypatch.setattr(zero_weights.files, "read_into", None)
    assert "all 96 rows" in found(own).refused


def test_a_file_that_ends_early_is_an_error(own: Path) -> None:
    sources = load(own).weights
    (own / SINGLE).write_bytes((own / SINGLE).read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"ended while lm_head\.weight was read"):
        zero_weights.find(sources, own)


def test_the_hint_names_the_files() -> None:
    problem = ZeroWeights("x is zero", "a.safetensors", "").problem
    assert problem
    assert problem.hint == ("download a.safetensors again, or accept such weights with --allow-zero-weights")
    assert NOTHING.problem is None


def test_a_build_says_what_it_accepted(own: Path, tmp_path: Path) -> None:
    """In its log, in the manifest and in `inspect`; the log alone names rows that are not refused."""
    edited(own, **{Q_PROJ: zero(0, 16), "o_proj.weight": zero(0, 1)})
    config = BuildConfig(own, tmp_path / "bundle", runtime="onnx", validate=False, layers="2")
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is zero"):
        build(config)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    build(BuildConfig(**(vars(config) | {"allow_zero_weights": True})))
    sentence = f"{Q_PROJ} is zero in rows 0 to 15 of 32 ({SINGLE})"
    assert manifest.read(tmp_path / "bundle").model.zero_weights == sentence
    log = (tmp_path / "bundle" / "logs" / "build.log").read_text()
    assert f"{sentence}: accepted as requested" in log
    assert "o_proj.weight is zero in row 0 of 32" in log
    shown = CliRunner().invoke(program, ["inspect", str(tmp_path / "bundle")])
    assert f"{Q_PROJ} is zero in" in shown.stdout


def test_check_reads_values_only_with_deep(own: Path) -> None:
    edited(own, **{Q_PROJ: zero(0, 16), "o_proj.weight": zero(0, 1)})
    headers = read_headers(own)
    assert check(headers).is_buildable
    refused = check(headers, deep=True)
    assert [str(problem) for problem in refused.problems] == [found(own).refused]
    assert found(own).noted in refused.notes
    accepted = check(headers, deep=True, allow_zero_weights=True)
    assert accepted.is_buildable
    assert f"{found(own).refused}: accepted as requested" in accepted.notes
    useless = CliRunner().invoke(program, ["check", str(own), "--allow-zero-weights"])
    assert useless.exit_code == 2
    assert "--allow-zero-weights has no effect without --deep" in useless.stderr


def test_quantize_refuses_them_too(with_tokens: tuple[Path, int], tmp_path: Path) -> None:
    folder, _ = with_tokens
    edited(folder, **{Q_PROJ: zero(0, 16)})
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 200)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} is zero"):
        quantize_checkpoint(folder, tmp_path / "fp8", calibration=text)
    assert not (tmp_path / "fp8").exists()
    quantize_checkpoint(folder, tmp_path / "fp8", calibration=text, allow_zero_weights=True)
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert Q_PROJ in found(tmp_path / "fp8").refused
