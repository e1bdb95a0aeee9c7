"""Text from a bundle is the same alone and in company, and ends where it should."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from runtime_bundle import write_bundle
from runtime_graph import DTYPES, VOCAB, one_sequence, open_session, profile_of, write_graph

from nemotrt.exporter.cli import program
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.generate import GenerateConfig, TextEvent, generate, generate_tokens
from nemotrt.exporter.generation.sampling import SamplingConfig
from nemotrt.exporter.generation.scheduler import Request
from nemotrt.exporter.generation.tokenizer import Tokenizer
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.session import Session

GREEDY = SamplingConfig()
PROMPTS = ["the cat", "日本", "mat, naïve café sat on the 🙂", "x", "on the mat on the mat"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module", params=DTYPES)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return open_session(write_graph(tmp_path_factory.mktemp(request.param), dtype=request.param))


def workload(count: int) -> list[Request]:
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 30, count)
    return [
        Request(i, tuple(generator.integers(0, VOCAB, length).tolist()), int(generator.integers(3, 12)))
        for i, length in enumerate(lengths)
    ]


def tokens_of(
    session: Session | SimpleNamespace,
    requests: Sequence[Request],
    sampling: SamplingConfig = GREEDY,
    eos: frozenset[int] = frozenset(),
    *,
    max_tokens: int = 16,
) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {request.number: [] for request in requests}
    profile = profile_of(session, max_tokens=max_tokens)
    for number, token, _ in generate_tokens(session, profile, requests, sampling, eos):
        tokens[number].append(token)
    return tokens


def test_requests_in_company_get_the_tokens_they_get_alone(session: Session) -> None:
    requests = workload(7)
    alone = {request.number: tokens_of(session, [request])[request.number] for request in requests}
    assert tokens_of(session, requests) == alone
    assert [len(alone[request.number]) for request in requests] == [r.max_new_tokens for r in requests]
    # Another order and smaller steps: other slots, other pieces, other neighbours.
    assert tokens_of(session, requests[::-1], max_tokens=5) == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == len(requests)


def test_scarce_pages_make_requests_wait_and_change_nothing(session: Session) -> None:
    requests = workload(5)
    expected = tokens_of(session, requests)
    needed = max(len(request.prompt) + request.max_new_tokens for request in requests) // 4 + 1
    scarce = SimpleNamespace(
        step=session.step, num_slots=session.num_slots, num_pages=1 + needed, page_size=session.page_size
    )
    assert tokens_of(scarce, requests) == expected


def test_greedy_is_the_largest_logit_step_by_step(session: Session) -> None:
    prompt = [3, 1, 4, 1, 5]
    logits_RV = session.step(one_sequence(prompt))
    expected = []
    for context in range(5, 9):
        expected.append(int(logits_RV[0].argmax()))
        logits_RV = session.step(one_sequence(expected[-1:], context=context))
    assert tokens_of(session, [Request(0, tuple(prompt), 4)])[0] == expected


def test_sampled_tokens_do_not_depend_on_company(session: Session) -> None:
    requests, sampling = workload(5), SamplingConfig(temperature=0.8, top_p=0.9, seed=7)
    alone = {r.number: tokens_of(session, [r], sampling)[r.number] for r in requests}
    assert tokens_of(session, requests, sampling) == alone
    assert tokens_of(session, requests, replace(sampling, seed=8)) != alone


def test_a_request_ends_with_the_token_that_says_so(session: Session) -> None:
    requests = workload(3)
    free = tokens_of(session, requests)
    eos = free[0][1]
    cut = {
        number: tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        for number, tokens in free.items()
    }
    assert tokens_of(session, requests, eos=frozenset({eos})) == cut
    assert len(cut[0]) <= 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_end_the_run(
    session: Session, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "step", lambda *_: np.full((1, VOCAB), value, np.float32))
    with pytest.raises(BundleError, match="logits of prompt 1 are not finite"):
        tokens_of(session, [Request(0, (1, 2), 3)])


def texts(events: list[TextEvent], count: int) -> list[str]:
    return ["".join(event.text for event in events if event.prompt == i) for i in range(count)]


def test_a_bundle_gives_streamed_text_for_every_prompt(bundle: Path) -> None:
    events = list(generate(bundle, PROMPTS, GenerateConfig(max_new_tokens=9)))
    tokenizer = Tokenizer(bundle)
    for i, text in enumerate(texts(events, len(PROMPTS))):
        own = [event for event in events if event.prompt == i]
        assert text == tokenizer.decode([event.token for event in own])
        assert [event.finish for event in own[:-1]] == [""] * (len(own) - 1)
        assert own[-1].finish == ("eos" if own[-1].token == 1 else "length")
    alone = [texts(list(generate(bundle, [one], GenerateConfig(max_new_tokens=9))), 1) for one in PROMPTS]
    assert [text for (text,) in alone] == texts(events, len(PROMPTS))


def test_the_end_of_the_context_is_told_from_the_length_asked_for(bundle: Path) -> None:
    (*_, last) = generate(bundle, ["the cat"], GenerateConfig(max_new_tokens=1000))
    assert last.finish in ("context", "eos")
    (event,) = generate(bundle, ["the cat"], GenerateConfig(max_new_tokens=1))
    assert event.finish in ("length", "eos")


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    manifest = manifests.read(bundle)
    manifests.write(bundle, replace(manifest, model=replace(manifest.model, vocab_size=40)))
    (token,) = Tokenizer(bundle).encode("a")
    with pytest.raises(
        UsageError, match=f"prompt 1 has a, token {token}, outside the vocabulary of 40 tokens"
    ):
        list(generate(bundle, ["a"], GenerateConfig()))


def test_chat_goes_through_the_template(bundle: Path) -> None:
    tokenizer = Tokenizer(bundle)
    written = tokenizer.render([[{"role": "user", "content": "cat"}]])
    config = GenerateConfig(max_new_tokens=4)
    assert list(generate(bundle, ["cat"], replace(config, chat=True))) == list(
        generate(bundle, written, config)
    )


def test_a_refused_conversation_prints_no_text(bundle: Path) -> None:
    result = CliRunner().invoke(program, ["generate", str(bundle), "--chat", "--prompt", "x" * 99])
    assert result.exit_code == UsageError.exit_code
    assert (result.stdout, "prompt 1 has" in result.stderr) == ("", True)


def test_prompts_that_do_not_fit_are_refused(bundle: Path) -> None:
    config = GenerateConfig(max_new_tokens=4)
    for prompts, message in (
        ([], "no prompt"),
        ([""], "prompt 1 is empty"),
        (["x", "x" * 99], "prompt 2 has"),
    ):
        with pytest.raises(UsageError, match=message):
            next(generate(bundle, prompts, config))
    with pytest.raises(UsageError, match="max-new-tokens 0"):
        GenerateConfig(max_new_tokens=0)


def test_a_damaged_bundle_does_not_run(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    manifest = manifests.read(bundle)
    (bundle / "note.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"note\.txt is not in the manifest"):
        next(generate(bundle, ["x"], GenerateConfig()))
    (bundle / "note.txt").unlink()
    manifests.write(bundle, replace(manifest, profiles=()))
    with pytest.raises(BundleError, match="no graph for ONNX Runtime"):
        next(generate(bundle, ["x"], GenerateConfig()))


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "triton", "tensorrt", "tensorrt_rtx"):
    sys.modules[name] = None  # importing it raises ImportError
import pkgutil
from importlib import import_module
from pathlib import Path
import nemotrt.exporter.runtime as runtime
for module in pkgutil.iter_modules(runtime.__path__):
    import_module(f"{runtime.__name__}.{module.name}")
heavy = {"onnx", "onnx_ir", "onnxruntime", "tokenizers", "jinja2"} & set(sys.modules)
assert not heavy, f"loaded by importing alone: {heavy}"
from nemotrt.exporter.generation.generate import GenerateConfig, generate
events = list(generate(Path(sys.argv[1]), ["the cat"], GenerateConfig(max_new_tokens=3, chat=True)))
assert events
"""


def test_a_bundle_runs_where_there_is_no_torch(bundle: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(bundle)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
