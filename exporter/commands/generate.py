"""generate: text from a bundle, on its own, with no PyTorch."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemotrt.exporter.commands.arguments import BUNDLE, command

if TYPE_CHECKING:
    from nemotrt.exporter.generation.generate import TextEvent


log = logging.getLogger(__name__)


@command("generate tiny.bundle --prompt 'The for statement' --max-new-tokens 40")
@BUNDLE
@click.option(
    "--prompt", "prompts", multiple=True, required=True, help="May be given again: all run together."
)
@click.option("--chat", is_flag=True, help="Take a prompt as a user's message to the chat template.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Tokens after each prompt.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest of this probability.")
@click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest; 0 from all.")
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
@click.option("--threads", default=0, show_default=True, help="Of ONNX Runtime; 0 takes all cores.")
@click.option("--engine", is_flag=True, help="Run the bundle's TensorRT engine, on this machine's GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each token, as it comes.")
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    threads: int,
    engine: bool,
    as_json: bool,
) -> None:
    """Go on from each prompt with BUNDLE in ONNX Runtime, and print the text as it comes."""
    from nemotrt.exporter.checkpoint.layer_selection import partial_model
    from nemotrt.exporter.generation import generate as generation
    from nemotrt.exporter.generation.sampling import SamplingConfig
    from nemotrt.exporter.runtime import manifest as manifests

    config = generation.GenerateConfig(
        max_new_tokens=max_new_tokens,
        sampling=SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        chat=chat,
        threads=threads,
        engine=engine,
    )
    if chosen := manifests.read(bundle).model.chosen_layers:
        log.warning("this is %s; its text means nothing", partial_model(chosen))
    events = generation.generate(bundle, prompts, config)
    if as_json:
        for event in events:
            click.echo(json.dumps(dataclasses.asdict(event), ensure_ascii=False))
    elif len(prompts) == 1:
        _print_stream(events, "" if chat else prompts[0])
    else:
        _print_each(events, ("",) * len(prompts) if chat else prompts)


def _print_stream(events: Iterator[TextEvent], prompt: str) -> None:
    """One prompt's text as it comes, the prompt itself first."""
    try:
        for event in events:
            click.echo(prompt + event.text, nl=False)
            prompt = ""
    finally:
        if not prompt:
            click.echo()


def _print_each(events: Iterator[TextEvent], prompts: tuple[str, ...]) -> None:
    """Each prompt's text once it has ended: the texts come interleaved."""
    texts = [""] * len(prompts)
    for event in events:
        texts[event.prompt] += event.text
        if event.finish:
            click.echo(f"[{event.prompt + 1}] {prompts[event.prompt]}{texts[event.prompt]}\n")
