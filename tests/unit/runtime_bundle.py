"""A small bundle as a build leaves it: graph, tokenizer and manifest."""

from __future__ import annotations

import json
from pathlib import Path

from runtime_graph import PAGE, VOCAB, write_graph
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Role, Verdict

BOS, EOS = "<s>", "</s>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEXT = ["the cat sat on the mat, naïve café", "日本語のテキスト", "🙂🙃 emoji 👩‍💻"]


def write_tokenizer(folder: Path, *, eos: object = 1) -> None:
    """Byte-level BPE with two special tokens, 0 and 1, and all files that go with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True) for token in (BOS, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": EOS}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


ROLES = {
    "model.onnx": Role.GRAPH,
    "model.onnx.data": Role.WEIGHTS,
    "tokenizer.json": Role.TOKENIZER,
    "tokenizer_config.json": Role.TOKENIZER,
    "generation_config.json": Role.GENERATION_CONFIG,
}


def write_bundle(
    folder: Path, *, max_context: int = 64, max_tokens: int = 16, max_sequences: int = 3, eos: object = 1
) -> Path:
    """A whole bundle of random weights at `folder`."""
    graph = write_graph(folder)
    write_tokenizer(folder, eos=eos)
    manifest = manifests.Manifest(
        schema_version=manifests.SCHEMA_VERSION,
        bundle_id="",
        files=manifests.describe_files(folder, ROLES),
        model=manifests.ModelSummary(("NemotronHForCausalLM",), {"mamba": 2}, "fp32", VOCAB, (1,)),
        source=manifests.Source("random", "", {"model.safetensors": 1}),
        graph=OnnxGraph.read(graph).summary,
        profiles=(manifests.Profile("onnx", "model.onnx", max_tokens, max_sequences, max_context, PAGE),),
        environment=manifests.BuildEnvironment("Linux", "x86_64", {"python": "3.11"}),
        plugins=(),
        partial=False,
        not_exported=("mtp.layers.0.enorm.weight",),
        validation=manifests.ValidationSummary(Verdict.NOT_RUN, 0, 0, "", ()),
        license="not stated",
    )
    manifests.write(folder, manifest)
    return folder
