"""The command `generate`: generate text with a bundle, without PyTorch."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemotrt.exporter.commands.arguments import BUNDLE, ENGINE, command

if TYPE_CHECKING:
    from nemotrt.exporter.generation.generate import TextEvent

log = logging.getLogger(__name__)


@command("generate tiny.bundle --prompt 'The for statement' --max-new-tokens 40")
@BUNDLE
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="Text to continue. Repeat the option to run several prompts together.",
)
@click.option("--chat", is_flag=True, help="Format each prompt as a user message with the chat template.")
@click.option("--max-new-tokens", default=128, help="Maximum number of tokens to generate for each prompt.")
@click.option("--temperature", default=0.0, help="Sampling temperature; 0 selects the most likely token.")
@click.option(
    "--top-p",
    metavar="P",
    default=1.0,
    help="Nucleus sampling: keep the smallest set of tokens whose probability reaches P.",
)
@click.option("--top-k", default=0, help="Sample from the k most likely tokens; 0 disables the limit.")
@click.option("--seed", default=0, help="Random seed for sampling.")
@click.option(
    "--threads", default=0, help="Threads of ONNX Runtime, at most the number of cores; 0 uses all."
)
@ENGINE
@click.option(
    "--json", "as_json", is_flag=True, help="Print a line of JSON for each token as it is generated."
)
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    chat: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text from each prompt with BUNDLE and stream it to stdout."""
    from nemotrt.exporter.checkpoint.layer_selection import partial_model
    from nemotrt.exporter.generation import generate as generation
    from nemotrt.exporter.generation.sampling import SamplingConfig
    from nemotrt.exporter.runtime import manifest as manifests

    sampling = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    config = generation.GenerateConfig(sampling=sampling, chat=chat, **options)
    if layers := manifests.read(bundle).model.chosen_layers:
        log.warning("this is %s; its text is meaningless", partial_model(layers))
    events = generation.generate(bundle, prompts, config)
    if as_json:
        for event in events:
            click.echo(json.dumps(dataclasses.asdict(event)))
    elif len(prompts) == 1:
        _print_stream(events, "" if chat else prompts[0])
    else:
        _print_each(events, ("",) * len(prompts) if chat else prompts)


def _print_stream(events: Iterator[TextEvent], prompt: str) -> None:
    """Print the prompt, and its text as it is generated."""
    has_begun = False
    try:
        for event in events:
            click.echo(event.text if has_begun else prompt + event.text, nl=False)
            has_begun = True
    finally:
        if has_begun:
            click.echo()


def _print_each(events: Iterator[TextEvent], prompts: tuple[str, ...]) -> None:
    """Print each prompt's text once it is complete."""
    texts = [""] * len(prompts)
    for event in events:
        texts[event.prompt] += event.text
        if event.finish:
            click.echo(f"[{event.prompt + 1}] {prompts[event.prompt]}{texts[event.prompt]}\n")
