"""Our runners as Polygraphy's: its Comparator, its comparison functions and its RunResults work on them.

One inference is one step: a feed dict holds the step's inputs and every pool, the outputs are `logits` and a
`next.<pool>` for each, its scratch row zero: what that holds means nothing. Pools cross the edge in FP32, whatever a
runner holds them in: NumPy has no BF16 of its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import IterationResult

from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Manifest
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import FP32_RELATIVE_L2, Noise
from nemotrt.exporter.validation.runners.base import EngineRunner, GraphRunner, Runner
from nemotrt.exporter.validation.scenarios import NUM_SLOTS
from nemotrt.plugins.contract import LOGITS, NEXT, STEP_INPUTS, PoolSpec

FeedDict = dict[str, NDArray[Any]]


class StepRunner(BaseRunner):  # type: ignore[misc]
    """A runner of ours; it is opened when Polygraphy activates it, and closed when it is done."""

    def __init__(self, name: str, pools: Iterable[PoolSpec], open_runner: Callable[[], Runner]) -> None:
        super().__init__(name=name)
        self._pools = {pool.name: pool.row_shape for pool in pools}
        self._open = open_runner
        self._runner: Runner | None = None

    def activate_impl(self) -> None:
        """Open the runner."""
        self._runner = self._open()

    def deactivate_impl(self) -> None:
        """Let it go."""
        self._runner = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The contract's inputs and pools; None is an axis of any length."""
        metadata = TensorMetadata()
        for name, (dtype, axes) in STEP_INPUTS.items():
            metadata.add(name, dtype.numpy, (None,) * len(axes))
        for name, row_shape in self._pools.items():
            metadata.add(name, np.float32, (None, *row_shape))
        return metadata

    def infer_impl(self, feed_dict: FeedDict) -> OrderedDict[str, NDArray[np.float32]]:
        """The logits and the next pools of one step."""
        assert self._runner is not None, "Polygraphy activates a runner first"
        self._runner.reset({name: feed_dict[name] for name in self._pools})
        inputs = StepInputs(**{name: feed_dict[name] for name in STEP_INPUTS})
        started = time.perf_counter()
        logits = self._runner.step(inputs)
        self.inference_time = time.perf_counter() - started
        outputs = OrderedDict([(LOGITS, logits.astype(np.float32))])
        for name, values in self._runner.pools().items():
            outputs[NEXT + name] = values.astype(np.float32)
            outputs[NEXT + name][0] = 0
        return outputs


def graph_runner(
    bundle: Path, manifest: Manifest, *, num_pages: int, name: str = "ONNX Runtime"
) -> StepRunner:
    """A bundle's graph in ONNX Runtime, with NUM_SLOTS slots."""
    graph = OnnxGraph.read(bundle / manifest.of_role("graph")[0])
    return StepRunner(
        name,
        manifest.graph.pools,
        lambda: GraphRunner(graph, num_slots=NUM_SLOTS, num_pages=num_pages),
    )


def engine_runner(bundle: Path, manifest: Manifest, *, num_pages: int, name: str = "TensorRT") -> StepRunner:
    """A bundle's engine on this machine's GPU, with NUM_SLOTS slots."""
    return StepRunner(
        name,
        manifest.graph.pools,
        lambda: EngineRunner(bundle, num_slots=NUM_SLOTS, num_pages=num_pages),
    )


def feed_dicts(leader: Runner, steps: Iterable[StepInputs], noise: Noise) -> Iterator[FeedDict]:
    """A feed dict for each step, with the state that the leader carries to it."""
    leader.reset(noise)
    for inputs in steps:
        state = {name: values.astype(np.float32) for name, values in leader.pools().items()}
        yield inputs.as_dict() | state
        leader.step(inputs)


class RelativeL2:
    """A comparison function: relative L2 of each output within a limit, finite, and no output missing on either side.

    Polygraphy's own functions pass over an output that one side lacks; `simple` passes what is within either of two
    tolerances, and cosine does not see a scale.
    """

    def __init__(self, limit: float = FP32_RELATIVE_L2) -> None:
        self._limit = limit

    def __call__(self, first: IterationResult, second: IterationResult) -> OrderedDict[str, bool]:
        """Whether each output of the first is near the second's; raises ValidationError where one has it alone."""
        assert_same_outputs(first, second)
        return OrderedDict((name, self._is_near(first[name], second[name])) for name in first)

    def _is_near(self, ours: NDArray[Any], reference: NDArray[Any]) -> bool:
        sides = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        are_finite = all(np.isfinite(side).all() for side in sides)
        return are_finite and metrics.relative_l2(*sides) <= self._limit


def assert_same_outputs(first: IterationResult, second: IterationResult) -> None:
    """Raise ValidationError that names the first output that only one side has."""
    strays = sorted(set(first) ^ set(second))
    if strays:
        lacking = second if strays[0] in first else first
        raise ValidationError(f"{lacking.runner_name} has no output {strays[0]}: nothing was compared")
