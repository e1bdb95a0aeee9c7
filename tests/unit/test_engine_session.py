"""An engine session does on a stand-in for TensorRT what a session does in ONNX Runtime, and refuses what it cannot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import ENGINE, LIBRARY, VERSION, FakeCuda, FakeEngine, add_engine, engine_of, fake_module
from runtime_bundle import write_bundle
from runtime_graph import VOCAB, int32, one_sequence, open_session

from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.generation.generate import GenerateConfig, generate
from nemotrt.exporter.runtime import cuda as cuda_module
from nemotrt.exporter.runtime import engine_session
from nemotrt.exporter.runtime.engine_session import EngineSession
from nemotrt.exporter.runtime.step import StepInputs

CONFIG = BuildConfig(
    Path("checkpoint"), Path("bundle"), max_tokens=16, max_sequences=3, max_context=64, page_size=4
)
"""What `write_bundle` says of its bundle."""
SLOTS, PAGES = 4, 30


def engine_bundle(folder: Path) -> Path:
    """A bundle that says that it has an engine; the engine is a stand-in's."""
    bundle = write_bundle(folder)
    add_engine(bundle, CONFIG)
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_bundle(tmp_path_factory.mktemp("bundles") / "engine")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_module.ctypes, "CDLL", lambda name: fake)
    return fake


@pytest.fixture
def engine(bundle: Path, cuda: FakeCuda) -> FakeEngine:
    return engine_of(bundle, CONFIG, cuda)


@pytest.fixture
def trt(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_module(VERSION, engine)
    monkeypatch.setattr(engine_session, "load_module", lambda backend: module)
    return module


@pytest.fixture
def session(bundle: Path, trt: Any) -> EngineSession:
    return EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def decode_step(*slots: int, context: int = 6) -> StepInputs:
    """A token of each of these slots, and a row of logits for each."""
    count = len(slots)
    table = np.asarray([[3 * slot + i for i in range(1, 4)] for slot in slots], dtype=np.int32)
    return StepInputs(
        np.arange(5, 5 + count, dtype=np.int64),
        np.arange(count + 1, dtype=np.int32),
        np.full(count, context, dtype=np.int32),
        int32(*slots),
        table,
        np.arange(count, dtype=np.int32),
    )


STEPS = {
    "a prompt": one_sequence([3, 1, 4, 1, 5], pages=(4, 5, 6)),
    "a mixture": StepInputs(
        np.arange(9, dtype=np.int64),
        int32(0, 6, 6, 7),
        int32(0, 0, 5),
        int32(3, 0, 1),
        np.asarray([[10, 11], [0, 0], [4, 5]], dtype=np.int32),
        int32(5, 6),
    ),
    "a piece of a prompt, of which no logits are wanted": replace(
        one_sequence([2, 7, 1], slot=2), logits_row=int32()
    ),
    "two decode": decode_step(1, 3),
    "two decode again": decode_step(3, 1, context=7),
    "two decode from a graph": decode_step(1, 3, context=8),
    "an empty one among them": StepInputs(
        np.asarray([9], dtype=np.int64),
        int32(0, 0, 1),
        int32(0, 9),
        int32(0, 3),
        np.asarray([[0, 0, 0], [10, 11, 12]], dtype=np.int32),
        int32(0),
    ),
    "three decode": decode_step(1, 2, 3, context=3),
    "a prompt again": one_sequence(range(16), slot=2, pages=(7, 8, 9, 13)),
    "three decode again": decode_step(1, 2, 3, context=4),
}


def test_every_kind_of_step_is_what_onnx_runtime_makes_of_it(
    session: EngineSession, bundle: Path, cuda: FakeCuda
) -> None:
    reference = open_session(bundle / "model.onnx", num_slots=SLOTS, num_pages=PAGES)
    generator = np.random.default_rng(0)
    for name in reference.pool_names:
        values = generator.integers(-4, 5, reference.pool(name).shape) / 4
        reference.set_pool(name, values)
        session.set_pool(name, values)
    for name, step in STEPS.items():
        np.testing.assert_allclose(session.step(step), reference.step(step), atol=2e-5, err_msg=name)
        for pool in reference.pool_names:
            np.testing.assert_allclose(
                session.pool(pool)[1:], reference.pool(pool)[1:], atol=2e-5, err_msg=f"{name}, {pool}"
            )
    assert session.pool_names == reference.pool_names
    assert (session.page_size, session.vocab_size) == (reference.page_size, VOCAB)
    # The second step of a batch size, here 2 and 3, is captured and launched, and every later one launched.
    assert cuda.launched == 4
    assert len(cuda.graphs) == 2


def test_without_capture_nothing_is_captured(bundle: Path, trt: Any, cuda: FakeCuda) -> None:
    session = EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES, capture=False)
    for _ in range(3):
        session.step(decode_step(1, 3))
    assert not cuda.graphs


def test_steps_come_from_any_thread(session: EngineSession) -> None:
    with ThreadPoolExecutor(1) as pool:
        for step in (STEPS["a prompt"], decode_step(1, 3), decode_step(1, 3)):
            assert pool.submit(session.step, step).result().shape[1] == VOCAB
        for name in session.pool_names:
            pool.submit(session.set_pool, name, pool.submit(session.pool, name).result()).result()


def test_an_input_that_decides_a_shape_is_refused(bundle: Path, trt: Any, engine: FakeEngine) -> None:
    engine.on_host = {"context_len"}
    with pytest.raises(BundleError, match="takes context_len from host memory"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def test_shapes_that_tensorrt_cannot_infer_are_an_error_in_words(
    session: EngineSession, engine: FakeEngine
) -> None:
    engine.failing_shapes = True
    with pytest.raises(BundleError, match="the engine refuses the step"):
        session.step(STEPS["a prompt"])


def test_generation_is_onnx_runtime_s(bundle: Path, trt: Any) -> None:
    def texts(engine: bool) -> list[tuple[int, int, str]]:
        config = GenerateConfig(max_new_tokens=6, engine=engine)
        events = generate(bundle, ["the cat sat on", "naïve", "the mat", "a"], config)
        return sorted((event.prompt, event.token, event.finish) for event in events)

    assert texts(engine=True) == texts(engine=False)


def test_threads_are_not_the_engine_s() -> None:
    with pytest.raises(UsageError, match="--threads is ONNX Runtime's"):
        GenerateConfig(engine=True, threads=2)


def test_pools_start_at_zero(session: EngineSession) -> None:
    assert all(not session.pool(name).any() for name in session.pool_names)


def test_contexts_share_their_scratch(session: EngineSession, engine: FakeEngine) -> None:
    for slots in ((1,), (1, 3), (1, 2, 3)):
        session.step(decode_step(*slots))
    assert len(engine.contexts) == 3 + 3
    assert len({context.scratch for context in engine.contexts}) == 1


def test_it_says_on_what_it_runs(session: EngineSession) -> None:
    assert session.runs_as == "TensorRT-RTX 1.7.1 on Fake RTX (SM 89)"


def test_a_step_over_the_engine_is_named(session: EngineSession) -> None:
    with pytest.raises(UsageError, match="a step of 17 tokens, 1 sequences, 5 pages each and 1 rows"):
        session.step(one_sequence(range(17), pages=(1, 2, 3, 4, 5)))


def test_a_broken_step_leaves_the_pools(session: EngineSession) -> None:
    session.step(STEPS["a prompt"])
    before = {name: session.pool(name) for name in session.pool_names}
    with pytest.raises(UsageError, match="slot 0 is scratch"):
        session.step(one_sequence([1], slot=0))
    assert all((session.pool(name) == before[name]).all() for name in before)


@pytest.mark.parametrize(("slots", "pages", "name"), [(9, 30, "conv_state.0"), (4, 1, "kv_cache.1")])
def test_pools_that_the_engine_does_not_take_are_named(
    bundle: Path, trt: Any, slots: int, pages: int, name: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} would have {slots if slots > 4 else pages} rows"):
        EngineSession(bundle, num_slots=slots, num_pages=pages)


def test_a_gpu_that_is_too_small_is_named(bundle: Path, trt: Any, cuda: FakeCuda) -> None:
    cuda.failing = "cuMemAlloc_v2"
    with pytest.raises(UsageError, match=r"Fake RTX has no room for 4 slots, 30 pages.*out of memory"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def test_a_failing_kernel_is_an_error(session: EngineSession, cuda: FakeCuda) -> None:
    cuda.failing = "cuStreamSynchronize"
    with pytest.raises(BundleError, match="a step failed on the GPU: cuStreamSynchronize"):
        session.step(STEPS["a prompt"])


def test_another_gpu_is_refused(bundle: Path, trt: Any, cuda: FakeCuda) -> None:
    cuda.sm = (9, 0)
    with pytest.raises(BundleError, match="has an engine for SM 89, 120, Fake RTX is SM 90"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def test_no_driver_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(cuda_module.ctypes, "CDLL", no_library)
    with pytest.raises(
        UsageError, match=r"engine needs a GPU: no NVIDIA driver is installed \(no libcuda.so.1\)"
    ):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def test_another_tensorrt_is_refused(bundle: Path, trt: Any) -> None:
    trt.__version__ = "1.8.0"
    with pytest.raises(BundleError, match=r"was built by TensorRT-RTX 1\.7\.1, installed is 1\.8\.0"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def test_a_bundle_without_an_engine_is_refused(tmp_path: Path, cuda: FakeCuda) -> None:
    with pytest.raises(BundleError, match="has no TensorRT engine"):
        EngineSession(write_bundle(tmp_path / "plain"), num_slots=SLOTS, num_pages=PAGES)


@pytest.mark.parametrize("name", [ENGINE, LIBRARY])
def test_changed_code_is_never_loaded(tmp_path: Path, trt: Any, name: str) -> None:
    bundle = engine_bundle(tmp_path / "bundle")
    (bundle / name).write_bytes(b"stand-IN")
    with pytest.raises(BundleError, match=f"{name} was changed after it was built"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)
    assert not trt.loaded


def test_a_library_that_is_not_loaded_is_named(
    bundle: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_session, "load_module", lambda backend: fake_module(VERSION, engine, loads=False)
    )
    with pytest.raises(BundleError, match=f"TensorRT-RTX does not load .*{LIBRARY}: it gave no reason"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)


def test_an_engine_that_is_not_loaded_says_why(
    bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_session, "load_module", lambda backend: fake_module(VERSION, None))
    with pytest.raises(BundleError, match=f"does not load .*{ENGINE}: Serialization assertion failed"):
        EngineSession(bundle, num_slots=SLOTS, num_pages=PAGES)
