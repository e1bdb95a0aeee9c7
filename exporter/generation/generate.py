"""Text from a bundle: prompts in, pieces of text out as they come, all prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.sampling import Sampler, SamplingConfig
from nemotrt.exporter.generation.scheduler import Limits, PlannedStep, Request, Scheduler
from nemotrt.exporter.generation.tokenizer import Tokenizer
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.engine_file import engine_profile
from nemotrt.exporter.runtime.engine_session import EngineSession
from nemotrt.exporter.runtime.manifest import Manifest, Profile
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs, pages_of

RUNTIME = "onnx"
"""The runtime of the profile that runs anywhere."""

GOING_ON, EOS, LENGTH, CONTEXT = "", "eos", "length", "context"
"""Why a text ends: its last token says so, the tokens asked for are there, or the context is full."""


@dataclass(frozen=True)
class GenerateConfig:
    """What is asked of every prompt; raises UsageError on what cannot be meant."""

    max_new_tokens: int = 128
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    chat: bool = False
    """Whether a prompt is a user's message to the chat template, and not plain text."""
    threads: int = 0
    """Threads of ONNX Runtime; 0 takes all cores."""
    engine: bool = False
    """Whether the bundle's TensorRT engine runs, on a GPU, instead of its graph in ONNX Runtime."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens} is below 1")
        if self.engine and self.threads:
            raise UsageError("--threads is ONNX Runtime's, and --engine does not use it")


class Steps(Protocol):
    """What runs steps: a session of either runtime."""

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The logits [R, V] of one step."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token of a request, and why it is the last, empty while it is not."""

    request: int
    token: int
    finish: str


@dataclass(frozen=True)
class TextEvent:
    """One new token of a prompt with the text that it completes; `finish` as in TokenEvent."""

    prompt: int
    token: int
    text: str
    finish: str


def generate(bundle: Path, prompts: Sequence[str], config: GenerateConfig) -> Iterator[TextEvent]:
    """Text for every prompt, token by token as steps end; events of one prompt come in order.

    Raises BundleError on a bundle that is not whole or not fit for text, UsageError on prompts that are not.
    """
    manifest = manifests.verify(bundle, deep=False)
    tokenizer = Tokenizer(bundle)
    profile = engine_profile(bundle, manifest) if config.engine else _graph_profile(bundle, manifest)
    requests = _requests(tokenizer, prompts, config, profile.max_context)
    at_once = min(profile.max_sequences, len(requests))
    num_slots = 1 + at_once
    num_pages = 1 + max(1, _num_pages(requests, at_once, profile.page_size))
    session = (
        EngineSession(bundle, num_slots=num_slots, num_pages=num_pages)
        if config.engine
        else Session(bundle / profile.path, num_slots=num_slots, num_pages=num_pages, threads=config.threads)
    )
    limits = Limits(
        max_tokens=profile.max_tokens,
        max_sequences=profile.max_sequences,
        max_context=profile.max_context,
        page_size=session.page_size,
        num_slots=session.num_slots,
        num_pages=session.num_pages,
    )
    streams = [tokenizer.stream() for _ in prompts]
    for event in generate_tokens(session, limits, requests, config.sampling, tokenizer.eos_ids):
        stream = streams[event.request]
        text = stream.push(event.token) + (stream.end() if event.finish else "")
        finish = event.finish
        if finish == LENGTH and requests[event.request].max_new_tokens < config.max_new_tokens:
            finish = CONTEXT
        yield TextEvent(event.request, event.token, text, finish)


def _graph_profile(bundle: Path, manifest: Manifest) -> Profile:
    found = next((profile for profile in manifest.profiles if profile.runtime == RUNTIME), None)
    if found is None:
        raise BundleError(f"{bundle} has no graph for ONNX Runtime")
    return found


def generate_tokens(
    session: Steps,
    limits: Limits,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    eos_ids: frozenset[int],
) -> Iterator[TokenEvent]:
    """New tokens of every request as steps end, the token that ends a text included.

    Raises UsageError on a request that could never run, BundleError when logits are not finite.
    """
    scheduler = Scheduler(limits)
    for request in requests:
        scheduler.submit(request)
    samplers = {request.number: Sampler(sampling, request.number) for request in requests}
    left = {request.number: request.max_new_tokens for request in requests}
    while not scheduler.is_done:
        step = scheduler.next_step()
        events = []
        for number, token in _chosen(session, step, samplers).items():
            left[number] -= 1
            finish = EOS if token in eos_ids else GOING_ON if left[number] else LENGTH
            events.append(TokenEvent(number, token, finish))
        scheduler.complete(
            step,
            {event.request: event.token for event in events},
            ended=[event.request for event in events if event.finish],
        )
        yield from events


def _chosen(session: Steps, step: PlannedStep, samplers: dict[int, Sampler]) -> dict[int, int]:
    """A request that wants logits → its next token."""
    logits_RV = session.step(step.inputs)
    tokens = {}
    for number, logits_V in zip(step.wanting, logits_RV, strict=True):
        if not np.isfinite(logits_V).all():
            raise BundleError(
                f"the logits of prompt {number + 1} are not finite",
                hint="the model overflows its precision: build it with --precision bf16 or fp32",
            )
        tokens[number] = samplers[number].choose(logits_V)
    return tokens


def _requests(
    tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig, max_context: int
) -> list[Request]:
    """A request for each prompt, asking for no more than the context holds."""
    if not prompts:
        raise UsageError("there is no prompt")
    requests = []
    for number, prompt in enumerate(prompts):
        message = [{"role": "user", "content": prompt}]
        tokens = tokenizer.chat(message) if config.chat else tokenizer.encode(prompt)
        if not tokens:
            raise UsageError(f"prompt {number + 1} is empty", hint="give some text to go on from")
        room = max_context - len(tokens)
        if room < 1:
            raise UsageError(
                f"prompt {number + 1} has {len(tokens)} tokens, the context holds {max_context}",
                hint="shorten it, or build with a larger --max-context",
            )
        requests.append(Request(number, tokens, min(config.max_new_tokens, room)))
    return requests


def _num_pages(requests: Sequence[Request], at_once: int, page_size: int) -> int:
    """Pages for the largest requests that may run at once."""
    needed = [pages_of(len(request.prompt) + request.max_new_tokens, page_size) for request in requests]
    return sum(sorted(needed)[-at_once:])
