"""What a person and a script may count on in every command: --json, --quiet, --debug, completion, the log, speed."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import bad_checkpoints
import pytest
from click.testing import CliRunner, Result

from nemotrt.exporter.cli import program
from nemotrt.exporter.errors import UsageError
from nemotrt.model.checkpoint import tensor_sources
from nemotrt.model.config import ModelConfig

PROGRAM = Path(sys.executable).with_name("nemo-export")
COMMANDS = tuple(program.commands)

JSON = {
    "build": ("build", "{checkpoint}", "--runtime", "onnx", "--no-validate", "--output", "{here}/out"),
    "check": ("check", "{checkpoint}"),
    "check-table": ("check", "--config", "{here}/config.json", "--tensors", "{here}/tensors.json"),
    "inspect-bundle": ("inspect", "{bundle}"),
    "inspect-checkpoint": ("inspect", "{checkpoint}", "--layer", "0"),
    "inspect-graph": ("inspect", "{bundle}/model.onnx"),
    "quantize": ("quantize", "{checkpoint}", "--output", "{here}/fp8"),
    "validate": ("validate", "{bundle}", "--checkpoint", "{checkpoint}"),
    "verify": ("verify", "{bundle}"),
}
GENERATE = ("generate", "{bundle}", "--prompt", "for", "--max-new-tokens", "3")


def run(bundle: Path, here: Path, *arguments: str) -> Result:
    """The command, with the bundle, its checkpoint and a folder of the test's own filled in."""
    places = {"bundle": bundle, "checkpoint": bundle.parent / "checkpoint", "here": here}
    return CliRunner().invoke(program, [argument.format(**places) for argument in arguments])


def write_table(folder: Path, raw: dict[str, object]) -> None:
    """A configuration, and the table of its BF16 tensors with expert 0 for all."""
    (folder / "config.json").write_text(json.dumps(raw))
    sources = tensor_sources(ModelConfig.from_dict(raw)).values()
    named = [(aliases[0], source.shape) for source in sources for aliases in source.names]
    kept = [(name, shape) for name, shape in named if ".experts." not in name or ".experts.0." in name]
    table = {name: ["BF16", list(shape)] for name, shape in kept}
    (folder / "tensors.json").write_text(json.dumps(table))


@pytest.mark.parametrize("name", JSON)
def test_json_is_all_that_stands_on_stdout(bundle: Path, tmp_path: Path, name: str) -> None:
    write_table(tmp_path, bad_checkpoints.CONFIG)
    result = run(bundle, tmp_path, *JSON[name], "--json")
    assert result.exit_code == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict)


def test_generate_prints_a_line_of_json_for_each_token(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, tmp_path, *GENERATE, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 3
    assert lines[-1]["finish"]


def test_every_command_has_json() -> None:
    assert {name.partition("-")[0] for name in JSON} | {GENERATE[0]} == set(COMMANDS)


@pytest.mark.parametrize("name", JSON)
def test_quiet_says_nothing(bundle: Path, tmp_path: Path, name: str) -> None:
    write_table(tmp_path, bad_checkpoints.CONFIG)
    result = run(bundle, tmp_path, *JSON[name], "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""


def test_a_traceback_is_shown_with_debug_only(bundle: Path, tmp_path: Path) -> None:
    wrong = ("build", "{checkpoint}", "--output", "{bundle}")
    assert isinstance(run(bundle, tmp_path, *wrong).exception, SystemExit)
    assert isinstance(run(bundle, tmp_path, *wrong, "--debug").exception, UsageError)
    done = subprocess.run(
        [PROGRAM, "--debug", "verify", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("Traceback")
    assert f"{tmp_path} is not a bundle" in done.stderr.splitlines()[-1]


def test_what_was_mistyped_is_one_line_with_debug_too(bundle: Path, tmp_path: Path) -> None:
    result = run(bundle, tmp_path, "verify", "nowhere", "--debug")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0].endswith("nowhere does not exist")
    assert result.stderr.startswith("error: ")


def test_the_bundle_s_log_has_what_was_said_and_no_times(bundle: Path) -> None:
    lines = (bundle / "logs" / "build.log").read_text().splitlines()
    assert [line.split()[0] for line in lines if line[:1].isalpha()] == ["load", "zeros", "trace", "lower"]
    assert lines[-1].strip() == "not validated: the manifest says so"
    assert not any(line.endswith(" s") for line in lines)


def complete(*words: str, shell: str = "bash_complete") -> str:
    """What the program answers a shell that asks it to complete the last word."""
    asked = {"_NEMO_EXPORT_COMPLETE": shell, "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    command = subprocess.run([PROGRAM], env=os.environ | asked, capture_output=True, text=True, check=False)
    return command.stdout


def test_a_shell_completes_commands_options_choices_and_paths() -> None:
    assert "plain,build" in complete("nemo-export", "b").splitlines()
    assert "plain,--precision" in complete("nemo-export", "build", "--pre").splitlines()
    assert complete("nemo-export", "build", "--precision", "fp").split()[:2] == ["plain,fp32", "plain,fp16"]
    assert complete("nemo-export", "verify", "").split(",")[0] == "dir"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_line_prints_a_shell_s_completion(shell: str) -> None:
    assert "_NEMO_EXPORT_COMPLETE" in complete("", shell=f"{shell}_source")


HELP = """
import sys
before = set(sys.modules)
from nemotrt.exporter.cli import program
for arguments in {arguments}:
    try:
        program(arguments)
    except SystemExit as end:
        assert not end.code
found = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
sys.stderr.write(" ".join(sorted(found)))
"""


def test_help_imports_click_and_nothing_else_that_is_installed() -> None:
    """Its time is its imports': 0.1 s of 0.3 s; a package more (rich, NumPy) would be most of what is left."""
    arguments = [["--help"], *([name, "--help"] for name in COMMANDS)]
    code = HELP.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["click", "nemotrt"]


SUPER = bad_checkpoints.CONFIG | {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "hybrid_override_pattern": "MEMEMEM*E" + 2 * "MEMEMEM*E" + 4 * "MEMEMEMEM*E" + "MEMEMEM*E" + "MEMEMEME",
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 2688,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "routed_scaling_factor": 5.0,
    "torch_dtype": "bfloat16",
}
"""Nemotron 3 Super's sizes."""


def test_a_model_of_120_billion_parameters_is_checked_in_ten_seconds(tmp_path: Path) -> None:
    write_table(tmp_path, SUPER)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [PROGRAM, "check", "--config", "config.json", "--tensors", "tensors.json", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["is_buildable"]
    assert math.isclose(found["num_parameters"], 120.669e9, rel_tol=1e-3)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 10  # of the processor: what else runs here does not count
