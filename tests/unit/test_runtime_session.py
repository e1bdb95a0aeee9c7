"""A session runs a graph on pools that it owns, and refuses a step that breaks the graph's contract."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from runtime_graph import DTYPES, VOCAB, int32, one_sequence, open_session, write_graph

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime.ort import Interruptible
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return {dtype: write_graph(folder / dtype, dtype=dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def session(graphs: dict[str, Path]) -> Session:
    return open_session(graphs["float32"])


def fill(session: Session, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for name in session.pool_names:
        session.set_pool(name, generator.integers(-4, 5, session.pool(name).shape) / 4)


def mixed_step() -> StepInputs:
    """A fresh prompt, an empty sequence, a token of an old sequence, and two tokens of padding."""
    return StepInputs(
        np.arange(9, dtype=np.int64),
        int32(0, 6, 6, 7),
        int32(0, 0, 5),
        int32(3, 0, 1),
        np.asarray([[4, 5], [0, 0], [7, 2]], dtype=np.int32),
        int32(5, 6),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_and_unbound_pools_agree_to_the_bit(graphs: dict[str, Path], dtype: str) -> None:
    bound = open_session(graphs[dtype])
    unbound = open_session(graphs[dtype], bound=False)
    steps = [mixed_step(), one_sequence([1, 2, 3], context=6, slot=3, pages=(4, 5, 6)), mixed_step()]
    for one in (bound, unbound):
        fill(one, seed=1)
    before = {name: bound.pool(name) for name in bound.pool_names}
    for step in steps:
        np.testing.assert_array_equal(bound.step(step), unbound.step(step))
        for name in bound.pool_names:
            np.testing.assert_array_equal(bound.pool(name), unbound.pool(name))
    assert all((bound.pool(name) != before[name]).any() for name in bound.pool_names)


def test_rows_that_no_sequence_owns_keep_their_bits(graphs: dict[str, Path]) -> None:
    session = open_session(graphs["float32"])
    fill(session, seed=2)
    before = {name: session.pool(name) for name in session.pool_names}
    session.step(mixed_step())
    for name, pool in session.pools.items():
        owned = {0, 2, 4, 5, 7} if pool.is_paged else {0, 1, 3}
        changed = (session.pool(name) != before[name]).reshape(len(before[name]), -1).any(1)
        assert set(np.flatnonzero(changed)) <= owned
        assert changed.any()


def test_a_fresh_sequence_ignores_what_its_slot_held(graphs: dict[str, Path]) -> None:
    clean, used = open_session(graphs["float32"]), open_session(graphs["float32"])
    fill(used, seed=3)
    for session in (clean, used):
        session.step(one_sequence([5, 6, 7]))
    tokens, step = [9, 8, 7, 6, 5], one_sequence([4], context=5)
    np.testing.assert_array_equal(clean.step(one_sequence(tokens)), used.step(one_sequence(tokens)))
    np.testing.assert_array_equal(clean.step(step), used.step(step))


def test_pieces_of_a_prompt_give_what_the_whole_gives(graphs: dict[str, Path]) -> None:
    session = open_session(graphs["float32"])
    tokens = list(range(11))
    whole = session.step(one_sequence(tokens))
    for start, end in ((0, 1), (1, 6), (6, 11)):
        pieces = session.step(one_sequence(tokens[start:end], context=start))
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-5)


def test_a_step_may_want_no_logits(session: Session) -> None:
    assert session.step(replace(one_sequence([1, 2]), logits_row=int32())).shape == (0, VOCAB)


def test_a_graph_without_some_inputs_takes_the_same_step(tmp_path: Path) -> None:
    for pattern, page_size in (("M", 0), ("*", 4), ("E", 0)):
        session = open_session(write_graph(tmp_path / str(ord(pattern)), pattern=pattern))
        assert session.page_size == page_size
        assert session.step(one_sequence([1, 2])).shape == (1, VOCAB)


def test_the_session_says_how_it_runs(graphs: dict[str, Path]) -> None:
    said = [open_session(graphs[dtype]).runs_as for dtype in DTYPES]
    assert said == ["FP32", "FP16, emulated in FP32", "BF16, emulated in FP32"]


def changed(**arrays: np.ndarray) -> StepInputs:
    return replace(mixed_step(), **arrays)


BAD_STEPS = {
    "token": (changed(input_ids=np.full(9, VOCAB)), "input_ids holds 300, outside the vocabulary"),
    "negative token": (changed(input_ids=np.full(9, -1)), "input_ids holds -1"),
    "dtype": (changed(input_ids=np.zeros(9, np.int32)), "input_ids is int32 of rank 1, .* int64"),
    "rank": (changed(slot=int32(1, 2, 3)[None]), "slot is int32 of rank 2"),
    "no token": (changed(input_ids=np.zeros(0, np.int64)), "at least one token"),
    "rows": (changed(slot=int32(1, 2)), "slot has 2 rows; 3 sequences"),
    "start": (changed(query_start=int32(1, 6, 6, 7)), "must start at 0"),
    "falls": (changed(query_start=int32(0, 6, 5, 7)), "never fall"),
    "ends late": (changed(query_start=int32(0, 6, 6, 10)), "end within the 9 tokens"),
    "context": (changed(context_len=int32(0, 0, -1)), "context_len holds -1"),
    "slot out of range": (changed(slot=int32(4, 0, 1)), "slot holds 4, outside"),
    "negative slot": (changed(slot=int32(-1, 0, 1)), "slot holds -1"),
    "scratch slot": (changed(slot=int32(3, 0, 0)), "slot 0 is scratch"),
    "shared slot": (changed(slot=int32(3, 0, 3)), "slot gives 3 to two"),
    "shared with an empty one": (changed(slot=int32(3, 3, 1)), "slot gives 3 to two"),
    "page out of range": (changed(page_table=np.full((3, 2), 30, np.int32)), "page_table holds 30"),
    "scratch page": (changed(page_table=np.zeros((3, 2), np.int32)), "page 0 is scratch"),
    "shared page": (
        changed(page_table=np.asarray([[4, 5], [0, 0], [7, 4]], np.int32)),
        "page_table gives 4 to two",
    ),
    "few pages": (changed(page_table=int32(4, 0, 7)[:, None]), "takes 2 pages of 4 tokens"),
    "row": (changed(logits_row=int32(9)), "logits_row holds 9, outside this step's tokens"),
}


@pytest.mark.parametrize(("step", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_a_step_that_breaks_the_contract_is_refused_and_changes_nothing(
    session: Session, step: StepInputs, message: str
) -> None:
    before = {name: session.pool(name) for name in session.pool_names}
    with pytest.raises(UsageError, match=message):
        session.step(step)
    for name, values in before.items():
        np.testing.assert_array_equal(session.pool(name), values)


def test_pools_are_filled_whole_or_not_at_all(session: Session) -> None:
    with pytest.raises(UsageError, match=r"kv_cache\.1 has shape \[30, 2, 2, 4, 8\], not \[1\]"):
        session.set_pool("kv_cache.1", np.zeros(1))
    with pytest.raises(UsageError, match="no pool kv_cache"):
        session.pool("kv_cache")


def test_a_copy_of_a_pool_is_the_callers(session: Session) -> None:
    session.pool("conv_state.0")[...] = 7
    assert not (session.pool("conv_state.0") == 7).all()


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_room_for_scratch_alone_is_refused(graphs: dict[str, Path], sizes: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="no room for a sequence"):
        open_session(graphs["float32"], num_slots=sizes[0], num_pages=sizes[1])


def test_an_unknown_provider_is_refused(graphs: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="has no AbacusExecutionProvider"):
        Session(graphs["float32"], num_slots=2, num_pages=2, providers=("AbacusExecutionProvider",))


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]


def forget_pool(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def rename_axis(model: onnx.ModelProto) -> None:
    model.graph.input[6].type.tensor_type.shape.dim[0].dim_param = "rows"


DAMAGE = {
    "no logits": (rename_output, "no output logits"),
    "half a pool": (forget_pool, r"input conv_state\.0 is unknown"),
    "axis": (rename_axis, r"pool conv_state\.0 has shape \['rows', 48, 3\]"),
    "no weights": (lambda model: model.graph.initializer.pop(), "ONNX Runtime refuses|cannot run"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_graph_of_another_kind_is_refused(
    graphs: dict[str, Path], tmp_path: Path, damage: Callable[[onnx.ModelProto], object], message: str
) -> None:
    model = onnx.load(graphs["float32"])
    damage(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=message):
        open_session(tmp_path / "model.onnx")


def test_what_is_no_graph_is_refused(graphs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        open_session(tmp_path / "nowhere.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        open_session(broken)
    # Its data is not beside it.
    (tmp_path / "model.onnx").write_bytes(graphs["float32"].read_bytes())
    with pytest.raises(BundleError, match=r"cannot run|refuses"):
        open_session(tmp_path / "model.onnx")


def test_ctrl_c_ends_a_call_that_would_not_end() -> None:
    stopped, ended = threading.Event(), threading.Event()

    def call() -> None:
        stopped.wait(20)
        ended.set()

    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        Interruptible().run(call, stop=stopped.set)
    assert time.perf_counter() - started < 5
    assert ended.is_set()


def test_what_a_call_raises_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        Interruptible().run(lambda: 1 // 0, stop=lambda: None)
