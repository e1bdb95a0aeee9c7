"""Train examples/tiny: a small Nemotron-H checkpoint with every layer kind, in the published layout.

The text is Python's documentation, read from the interpreter that runs this script (PSF-2.0). Training is
transformers' NemotronHForCausalLM in FP32; weights are saved in BF16 under the names that NVIDIA publishes.
Suffixes: B sequences, T tokens, V vocabulary, K chosen experts, R routers, E experts.
"""

import ast
import json
import math
import platform
import pydoc_data.topics
import random
import re
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

UNK, BOS, EOS = 0, 1, 2  # the family's ids; <unk> also pads
WINDOW, BATCH = 512, 2  # a window is one sequence of a batch
PEAK_RATE, WARMUP_STEPS = 4e-3, 100
SMALL_TENSOR_RATE = 12e-3  # at the matrices' rate, 250 steps left half of a dt_bias at its BF16 value
BALANCING_RATE = 1e-3  # of arXiv 2408.15664
TOPIC_REPEATS = 3  # of the language reference in an epoch; held-out perplexity after 250 steps 49 -> 38
SHINGLE = 12  # words; no two paragraphs share a run this long
HELD_OUT = ("booleans", "context-managers", "execmodel", "lists", "raise", "typesmapping", "while", "yield")
SKIPPED = {"dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
PROMPT = 'The "while" statement'
# fmt: off
CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": BOS, "chunk_size": 128, "conv_kernel": 4, "dtype": "bfloat16", "eos_token_id": EOS,
    "expand": 2, "head_dim": 64, "hidden_dropout": 0.0, "hidden_size": 128,
    "hybrid_override_pattern": "ME*-MEM*-E", "initializer_range": 0.05, "intermediate_size": 384,
    "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 4,
    "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 8192,
    "mlp_bias": False, "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "moe_intermediate_size": 128,
    "moe_latent_size": 64, "moe_shared_expert_intermediate_size": 256, "moe_shared_expert_overlap": False,
    "n_group": 1, "n_groups": 2, "n_routed_experts": 8, "n_shared_experts": 1, "norm_eps": 1e-05,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 10,
    "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": UNK, "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True, "residual_in_fp32": False, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False,
    "time_step_floor": 0.0001, "time_step_limit": [0.0, math.inf], "time_step_max": 0.1,
    "time_step_min": 0.001, "topk_group": 1, "transformers_version": transformers.__version__,
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True,
    "vocab_size": 1024,
}
# fmt: on
CARD = """\
# A tiny Nemotron-H

Every layer kind of the family (Mamba-2 `M`, attention `*`, latent MoE with a shared expert `E`, MLP `-`) in
one trained checkpoint of {parameters:,} parameters, pattern `{pattern}`, in BF16 under the names that NVIDIA
publishes. It exists to test an exporter: its weights, activations and expert loads are those of a trained
model, but its text makes little sense.

Made by `{command}` with Python {python}, {versions},
in {minutes:.0f} minutes of CPU time: {training}, by transformers'
`NemotronHForCausalLM` in FP32 with `time_step_limit` honored.

## Text

Trained on {characters:,} characters of this Python's documentation, which differs between versions: the
language reference (`pydoc_data.topics`) and the docstrings of those standard-library modules that state no
license of their own, all PSF-2.0. Not used for training: the topics {topics},
with which no training paragraph shares {shingle} consecutive words. They are `heldout.txt`, Copyright © 2001
onwards Python Software Foundation, under `LICENSE-PYTHON.txt`. Changes made: topics joined, typographic
quotes made ASCII, heading underlines and emphasis marks removed.

## Held-out text

{held_out}

## `{prompt}`, continued greedily and at temperature 0.8

```text
{greedy}
```

```text
{sampled}
```
"""


@dataclass(frozen=True)
class Corpus:
    """Training texts of two sources, and the held-out text."""

    topics: list[str]
    docstrings: list[str]
    held_out: str


def plain_text(text: str) -> str:
    """The text in ASCII quotes, without reStructuredText's underlines and emphasis."""
    text = text.expandtabs().translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    text = re.sub(r"^ *([*=\-~^])\1{2,} *$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![\w*])(\*\*?)([A-Za-z][\w '-]*)\1(?![\w*])", r"\2", text)
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def module_docstrings(library: Path) -> Iterator[str]:
    """The docstrings of each standard-library module that states no copyright or license."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if not re.search(r"copyright|licen[sc]e", source, re.IGNORECASE):
            nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
            yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of SHINGLE words."""
    words = text.split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def unseen(texts: Iterable[str], seen: set[tuple[str, ...]]) -> Iterator[str]:
    """The texts without paragraphs that share a run with `seen`, which grows; short ones join the next paragraph."""
    for text in texts:
        kept: list[str] = []
        pending: list[str] = []
        for paragraph in plain_text(text).split("\n\n"):
            pending.append(paragraph)
            if runs := shingles(paragraph):
                kept += [] if runs & seen else pending
                seen |= runs
                pending = []
        if kept:
            yield "\n\n".join(kept) + "\n"


def collect_corpus() -> Corpus:
    """The language reference and the library's docstrings, each paragraph once, and the held-out text."""
    topics: dict[str, str] = pydoc_data.topics.topics
    held_out = "\n\n\n".join(plain_text(topics[name]) for name in HELD_OUT) + "\n"
    seen = shingles(held_out)
    kept = list(unseen((text for name, text in topics.items() if name not in HELD_OUT), seen))
    return Corpus(kept, list(unseen(module_docstrings(Path(sysconfig.get_path("stdlib"))), seen)), held_out)


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE that puts <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = [("<s>", BOS)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=bos)
    return tokenizer


def token_stream(tokenizer: Tokenizer, corpus: Corpus, seed: int) -> Tensor:
    """The training tokens in a shuffled order of documents, each between <s> and </s>."""
    documents = corpus.topics * TOPIC_REPEATS + corpus.docstrings
    random.Random(seed).shuffle(documents)
    return torch.tensor([token for text in tokenizer.encode_batch(documents) for token in (*text.ids, EOS)])


def batches(stream: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless [BATCH, WINDOW] batches: each epoch cuts at another offset and shuffles."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        windows = stream[int(torch.randint(WINDOW, (), generator=rng)) :].unfold(0, WINDOW, WINDOW)
        order = torch.randperm(len(windows) // BATCH * BATCH, generator=rng)
        yield from windows[order].view(-1, BATCH, WINDOW)


def honor_time_step_limit(model: NemotronHForCausalLM) -> None:
    """Undoes transformers 5.23's clamp of dt to at least time_step_min, which only its prefill applies."""
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = tuple(model.config.time_step_limit)


class ExpertLoad:
    """Counts the tokens that each router gives to each expert."""

    def __init__(self, model: NemotronHForCausalLM) -> None:
        self.routers = [layer.mixer.gate for layer in model.model.layers if layer.block_type == "moe"]
        self.load_RE = torch.zeros(len(self.routers), model.config.n_routed_experts)
        for row, router in enumerate(self.routers):
            router.register_forward_hook(partial(self._count, row))

    def _count(self, row: int, _router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        chosen_TK = output[2]
        self.load_RE[row] += torch.bincount(chosen_TK.flatten(), minlength=self.load_RE.shape[1])

    def balance(self) -> None:
        """Moves the correction biases, which no gradient reaches, towards even load; forgets the counts."""
        for router, load_E in zip(self.routers, self.load_RE, strict=True):
            router.e_score_correction_bias += BALANCING_RATE * torch.sign(load_E.mean() - load_E)
        self.load_RE.zero_()


def schedule(step: int, num_steps: int) -> float:
    """The factor of the peak rate: linear warm-up, then a cosine to zero."""
    decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS))
    return min(decay, (step + 1) / WARMUP_STEPS)


def train(model: NemotronHForCausalLM, stream: Tensor, num_steps: int, seed: int) -> None:
    """Trains the model in place."""
    is_small = {name: p.dim() == 1 or "conv1d" in name for name, p in model.named_parameters()}
    small = [p for name, p in model.named_parameters() if is_small[name]]  # norms, conv, A_log, D, dt_bias
    matrices = [p for name, p in model.named_parameters() if not is_small[name]]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": small, "weight_decay": 0.0, "lr": SMALL_TENSOR_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, num_steps=num_steps))
    load = ExpertLoad(model)
    model.train()
    start, mean_loss = time.monotonic(), math.log(CONFIG["vocab_size"])
    for step, ids_BT in zip(range(1, num_steps + 1), batches(stream, seed), strict=False):
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        load.balance()
        mean_loss += 0.05 * (loss.item() - mean_loss)
        if step % 100 == 0 or step == num_steps:
            seconds = time.monotonic() - start
            click.echo(f"step {step}/{num_steps}  loss {mean_loss:.3f}  {seconds:.0f} s", err=True)


def published(model: NemotronHForCausalLM) -> dict[str, Tensor]:
    """Copies of the tensors under their published names: one per expert, in BF16 except for correction biases."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        stem, value = re.sub(r"^model\.", "backbone.", name), tensor.to(dtype, copy=True)
        if stacked := re.fullmatch(r"(.*\.experts)\.(\w+_proj)", stem):
            tensors |= {f"{stacked[1]}.{e}.{stacked[2]}.weight": part.clone() for e, part in enumerate(value)}
        else:
            tensors[stem] = value
    return tensors


def check_all_trained(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Refuses a checkpoint if any saved tensor is not finite or kept more than half of its initial values."""
    for name, tensor in after.items():
        moved = (tensor != before[name]).float().mean().item()
        if moved < 0.5 or not tensor.isfinite().all():
            raise click.ClickException(f"{name}: {moved:.0%} of its values moved; use more --steps")


@torch.no_grad()
def held_out_section(model: NemotronHForCausalLM, tokenizer: Tokenizer, stream: Tensor, text: str) -> str:
    """The card's table of scores and expert loads; refused unless perplexity is below half of the unigrams'."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    counts_V = torch.bincount(stream, minlength=CONFIG["vocab_size"]).double() + 1
    unigram_nats = -(counts_V / counts_V.sum()).log()[ids].sum().item()
    load, nats = ExpertLoad(model), 0.0
    for start in range(0, len(ids), WINDOW - 1):
        row_T = torch.tensor([BOS, *ids[start : start + WINDOW - 1]])
        logits_TV = model(input_ids=row_T[None], use_cache=False).logits[0, :-1]
        nats += nn.functional.cross_entropy(logits_TV, row_T[1:], reduction="sum").item()
    if nats > unigram_nats - len(ids) * math.log(2):
        raise click.ClickException("held-out perplexity is not half that of unigrams; use more --steps")
    if not load.load_RE.all():
        raise click.ClickException("an expert gets no token of the held-out text; use more --steps")
    lines = [
        f"{len(ids):,} tokens, {len(text.encode()):,} bytes, in rows of `<s>` followed by {WINDOW - 1} tokens;",
        "the model as saved in BF16, reloaded and run in FP32.\n",
        "| | perplexity per token | bits per byte |\n|---|---|---|",
    ]
    for name, cost in {"this model": nats, "unigrams of the training text, add-one": unigram_nats}.items():
        bits = cost / math.log(2) / len(text.encode())
        lines.append(f"| {name} | {math.exp(cost / len(ids)):.2f} | {bits:.3f} |")
    lines.append(f"\nEach expert's share of a router's choices (even: {1 / load.load_RE.shape[1]:.3f}):\n")
    for load_E in load.load_RE:
        lines.append("- " + " ".join(f"{share:.3f}" for share in (load_E / load_E.sum()).tolist()))
    return "\n".join(lines)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], tokenizer: Tokenizer, held_out: str) -> None:
    """Writes all files except the card."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors 0.8 lets only the owner read it
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": UNK}
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    tokens = {"clean_up_tokenization_spaces": False, "model_max_length": CONFIG["max_position_embeddings"]}
    contents: dict[str, dict[str, Any]] = {
        "config.json": CONFIG,
        "generation_config.json": generation | {"transformers_version": transformers.__version__},
        "tokenizer_config.json": specials | tokens | {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8")
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", folder / "LICENSE-PYTHON.txt")


def reload(folder: Path, tensors: dict[str, Tensor]) -> NemotronHForCausalLM:
    """The checkpoint as transformers loads it, in FP32; refused if a tensor differs from the saved one."""
    loaded: Any = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model: NemotronHForCausalLM = loaded[0]
    again = published(model)
    wrong = [name for name in tensors if name not in again or not torch.equal(again[name], tensors[name])]
    if wrong or any(loaded[1].values()):
        raise click.ClickException(f"transformers loads other tensors; fix published(): {wrong} {loaded[1]}")
    honor_time_step_limit(model)
    return model


def continuation(model: Any, tokenizer: Tokenizer, **choice: Any) -> str:
    """PROMPT and the model's next 64 tokens."""
    ids_BT = torch.tensor([tokenizer.encode(PROMPT).ids])
    generated_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=64, **choice)
    return str(tokenizer.decode(generated_BT[0].tolist()))


def make(folder: Path, seed: int, steps: int, command: str) -> None:
    """Fills an empty folder with a trained, reloaded and scored checkpoint."""
    torch.set_num_threads(1)  # two spin at every barrier when cores are shared: 0.41 -> 4.5 s of CPU a step
    torch.manual_seed(seed)
    corpus = collect_corpus()
    tokenizer = train_tokenizer(corpus.topics + corpus.docstrings)
    stream = token_stream(tokenizer, corpus, seed)
    model = NemotronHForCausalLM(NemotronHConfig(**CONFIG | {"dtype": "float32"}))
    honor_time_step_limit(model)
    initial = published(model)
    train(model, stream, steps, seed)
    minutes = time.process_time() / 60
    tensors = published(model)
    check_all_trained(initial, tensors)
    write_checkpoint(folder, tensors, tokenizer, corpus.held_out)
    model = reload(folder, tensors)
    torch.manual_seed(seed)
    card = CARD.format(
        greedy=continuation(model, tokenizer, do_sample=False),
        sampled=continuation(model, tokenizer, do_sample=True, temperature=0.8, top_k=0),
        held_out=held_out_section(model, tokenizer, stream, corpus.held_out),
        parameters=sum(p.numel() for p in model.parameters()),
        characters=sum(map(len, corpus.topics + corpus.docstrings)),
        pattern=CONFIG["hybrid_override_pattern"],
        python=platform.python_version(),
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers")),
        training=f"{steps} steps of {BATCH} sequences of {WINDOW} tokens, {len(stream):,} tokens per epoch",
        command=command,
        minutes=minutes,
        topics=", ".join(HELD_OUT),
        shingle=SHINGLE,
        prompt=PROMPT,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    click.echo(card, err=True)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=1600, show_default=True, help="1600 take eleven minutes on one core.")
def main(output: Path, seed: int, steps: int) -> None:
    """Train a small Nemotron-H checkpoint with every layer kind and save it in the published layout."""
    if output.exists():
        raise click.ClickException(f"{output} exists; move it away first")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = f"python scripts/make_tiny_checkpoint.py --output {output} --seed {seed} --steps {steps}"
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as unfinished:
        folder = Path(unfinished) / output.name
        folder.mkdir()
        make(folder, seed, steps, command)
        folder.rename(output)


if __name__ == "__main__":
    main()
