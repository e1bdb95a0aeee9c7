"""Text from a bundle: prompts in, text out as it is generated, with all prompts batched together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.sampling import Sampler, SamplingConfig
from nemotrt.exporter.generation.scheduler import Request, Scheduler
from nemotrt.exporter.generation.tokenizer import TextStream, Tokenizer
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.engine_session import EngineSession, engine_profile
from nemotrt.exporter.runtime.manifest import Manifest, Profile
from nemotrt.exporter.runtime.session import AnySession, Session
from nemotrt.exporter.runtime.step import pages_of


class Finish(StrEnum):
    """Why a text ended: with an end-of-text token, or at the number of tokens requested, or at a full context."""

    NOT_YET = ""
    EOS = "eos"
    LENGTH = "length"
    CONTEXT = "context"


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate; raises UsageError on options that contradict each other."""

    max_new_tokens: int = 128
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    chat: bool = False
    """Whether a prompt is a user's message for the chat template instead of plain text."""
    threads: int = 0
    """Threads of ONNX Runtime; 0 uses all cores."""
    engine: bool = False
    """Whether to run the TensorRT engine on a GPU instead of the graph in ONNX Runtime."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens} is below 1")
        if self.engine and self.threads:
            raise UsageError("--threads is ONNX Runtime's, and --engine does not use it")


@dataclass(frozen=True)
class TextEvent:
    """One new token of a prompt, and the text that it completes; `finish` is empty until the last token."""

    prompt: int
    token: int
    text: str
    finish: Finish


def generate(bundle: Path | str, prompts: Sequence[str], config: GenerateConfig) -> Iterator[TextEvent]:
    """Generate text for every prompt, one event for each token; the events of one prompt come in order.

    Raises BundleError if the bundle is damaged or cannot generate text, UsageError if a prompt is empty or too long.
    """
    bundle = Path(bundle)
    manifest = manifests.verify(bundle, deep=False)
    tokenizer = Tokenizer(bundle)
    profile = engine_profile(bundle, manifest) if config.engine else _graph_profile(bundle, manifest)
    requests = _requests(tokenizer, prompts, config, profile.max_context)
    _check_tokens(tokenizer, requests, manifest.model.vocab_size)
    batch = min(profile.max_sequences, len(requests))
    needed = [pages_of(len(r.prompt) + r.max_new_tokens, profile.page_size) for r in requests]
    # The largest requests may run at the same time.
    num_slots, num_pages = 1 + batch, 1 + max(1, sum(sorted(needed)[-batch:]))
    session = (
        EngineSession(bundle, num_slots=num_slots, num_pages=num_pages)
        if config.engine
        else Session(bundle / profile.path, num_slots=num_slots, num_pages=num_pages, threads=config.threads)
    )
    streams = [TextStream(tokenizer) for _ in prompts]
    for prompt, token, finish in generate_tokens(
        session, profile, requests, config.sampling, tokenizer.eos_ids
    ):
        text = streams[prompt].push(token) + (streams[prompt].end() if finish else "")
        if finish == Finish.LENGTH and requests[prompt].max_new_tokens < config.max_new_tokens:
            finish = Finish.CONTEXT
        yield TextEvent(prompt, token, text, finish)


def _graph_profile(bundle: Path, manifest: Manifest) -> Profile:
    for profile in manifest.profiles:
        if profile.runtime == "onnx":
            return profile
    raise BundleError(f"{bundle} has no graph for ONNX Runtime")


def generate_tokens(
    session: AnySession,
    profile: Profile,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    eos_ids: frozenset[int],
) -> Iterator[tuple[int, int, Finish]]:
    """Each new token with its request's number and whether it is the last; end-of-text tokens are included.

    Raises UsageError on a request that could never run, BundleError when logits are not finite.
    """
    profile = replace(profile, page_size=session.page_size)
    scheduler = Scheduler(profile, num_slots=session.num_slots, num_pages=session.num_pages)
    for request in requests:
        scheduler.submit(request)
    samplers = {request.number: Sampler(sampling, request.number) for request in requests}
    remaining = {request.number: request.max_new_tokens for request in requests}
    while not scheduler.is_done:
        inputs, numbers = scheduler.next_step()
        events = []
        for number, logits_V in zip(numbers, session.step(inputs), strict=True):
            if not np.isfinite(logits_V).all():
                raise BundleError(
                    f"the logits of prompt {number + 1} are not finite",
                    hint="nemo-export validate --bisect names where; FP16 may overflow where --precision bf16 does not",
                )
            token = samplers[number].choose(logits_V)
            remaining[number] -= 1
            finish = (
                Finish.EOS if token in eos_ids else Finish.NOT_YET if remaining[number] else Finish.LENGTH
            )
            events.append((number, token, finish))
        scheduler.complete(
            {number: token for number, token, _ in events},
            ended=[number for number, _, finish in events if finish],
        )
        yield from events


def _requests(
    tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig, max_context: int
) -> list[Request]:
    """A request for each prompt, with no more new tokens than the context has room for."""
    if not prompts:
        raise UsageError("there is no prompt")
    if isinstance(prompts, str):
        raise UsageError("the prompts are one string, not a list", hint=f"pass [{prompts[:40]!r}]")
    for number, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"prompt {number + 1} is not UTF-8 text: {error.reason}") from error
    if config.chat:
        encoded = tokenizer.chat([[{"role": "user", "content": prompt}] for prompt in prompts])
    else:
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
    requests = []
    for number, tokens in enumerate(encoded):
        if not tokens:
            raise UsageError(f"prompt {number + 1} is empty", hint="give some text to continue")
        room = max_context - len(tokens)
        if room < 1:
            raise UsageError(
                f"prompt {number + 1} has {len(tokens)} tokens, the context holds {max_context}",
                hint="shorten it, or build with a larger --max-context",
            )
        requests.append(Request(number, tokens, min(config.max_new_tokens, room)))
    return requests


def _check_tokens(tokenizer: Tokenizer, requests: Sequence[Request], vocab_size: int) -> None:
    for request in requests:
        if outside := [token for token in request.prompt if token >= vocab_size]:
            raise UsageError(
                f"prompt {request.number + 1} has {tokenizer.token(outside[0])},"
                f" token {outside[0]}, outside the vocabulary of {vocab_size} tokens",
                hint="leave it out",
            )
