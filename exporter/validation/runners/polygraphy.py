"""Our runners as Polygraphy runners, for its Comparator, its comparison functions and its RunResults.

One inference is one step. The feed dict holds the step's inputs and every pool; the outputs are `logits` and a
`next.<pool>` for each pool, with zeros in the scratch row. Pools are FP32 on both sides, because NumPy has no BF16.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import IterationResult

from nemotrt.exporter.errors import ValidationError
from nemotrt.exporter.runtime import manifest as manifests
from nemotrt.exporter.runtime.graph_file import OnnxGraph
from nemotrt.exporter.runtime.manifest import Role
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation import metrics
from nemotrt.exporter.validation.gates import FP32_RELATIVE_L2
from nemotrt.exporter.validation.observation import Noise
from nemotrt.exporter.validation.plan import NUM_SLOTS
from nemotrt.exporter.validation.runners.base import EngineRunner, GraphRunner, Runner
from nemotrt.plugins.contract import LOGITS, NEXT, STEP_INPUTS, PoolSpec

FeedDict = dict[str, NDArray[Any]]


class StepRunner(BaseRunner):  # type: ignore[misc]
    """One of our runners; Polygraphy opens it by activating it, and closes it by deactivating it."""

    def __init__(self, name: str, pools: Iterable[PoolSpec], open_runner: Callable[[], Runner]) -> None:
        super().__init__(name=name)
        self._pools = {pool.name: pool.row_shape for pool in pools}
        self._open = open_runner
        self._runner: Runner | None = None

    def activate_impl(self) -> None:
        """Open the runner."""
        self._runner = self._open()

    def deactivate_impl(self) -> None:
        """Close the runner."""
        self._runner = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The step inputs and the pools; None marks an axis of any length."""
        metadata = TensorMetadata()
        for name, (dtype, axes) in STEP_INPUTS.items():
            metadata.add(name, dtype.numpy, (None,) * len(axes))
        for name, row_shape in self._pools.items():
            metadata.add(name, np.float32, (None, *row_shape))
        return metadata

    def infer_impl(self, feed_dict: FeedDict) -> OrderedDict[str, NDArray[np.float32]]:
        """The logits and the pools after one step."""
        assert self._runner is not None, "Polygraphy activates a runner before it infers"
        self._runner.reset({name: feed_dict[name] for name in self._pools})
        inputs = StepInputs(**{name: feed_dict[name] for name in STEP_INPUTS})
        started = time.perf_counter()
        logits = self._runner.step(inputs)
        self.inference_time = time.perf_counter() - started
        outputs = OrderedDict([(LOGITS, logits.astype(np.float32))])
        for name in self._pools:
            outputs[NEXT + name] = self._runner.pool(name).copy()
            outputs[NEXT + name][0] = 0
        return outputs


def graph_runner(bundle: Path, *, num_pages: int, name: str = "ONNX Runtime") -> StepRunner:
    """A bundle's graph in ONNX Runtime, with NUM_SLOTS slots."""
    graph = OnnxGraph.read(bundle / manifests.read(bundle).of_role(Role.GRAPH)[0])
    open_runner = partial(GraphRunner, graph, num_slots=NUM_SLOTS, num_pages=num_pages)
    return StepRunner(name, graph.summary.pools, open_runner)


def engine_runner(bundle: Path, *, num_pages: int, name: str = "TensorRT") -> StepRunner:
    """A bundle's engine on this machine's GPU, with NUM_SLOTS slots."""
    pools = manifests.read(bundle).graph.pools
    return StepRunner(name, pools, lambda: EngineRunner(bundle, num_slots=NUM_SLOTS, num_pages=num_pages))


def feed_dicts(reference: Runner, steps: Iterable[StepInputs], noise: Noise) -> Iterator[FeedDict]:
    """The feed dict of each step; its pools hold the state of the reference at that step."""
    reference.reset(noise)
    for inputs in steps:
        state = {name: reference.pool(name).copy() for name in noise}
        yield inputs.as_dict() | state
        reference.step(inputs)


class RelativeL2:
    """A comparison function that limits the relative L2 of every output.

    It fails on values that are not finite and on outputs that only one side has. Polygraphy's own functions skip such
    an output; `simple` passes a value that is within either of its two tolerances, and cosine ignores a wrong scale.
    """

    def __init__(self, limit: float = FP32_RELATIVE_L2) -> None:
        self._limit = limit

    def __call__(self, first: IterationResult, second: IterationResult) -> OrderedDict[str, bool]:
        """Whether each output is within the limit; raises ValidationError on an output that only one side has."""
        if unmatched := sorted(set(first) ^ set(second)):
            lacking = second if unmatched[0] in first else first
            raise ValidationError(f"{lacking.runner_name} has no output {unmatched[0]}: nothing was compared")
        return OrderedDict((name, self._is_near(first[name], second[name])) for name in first)

    def _is_near(self, ours: NDArray[Any], reference: NDArray[Any]) -> bool:
        pair = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
        are_finite = all(np.isfinite(values).all() for values in pair)
        return are_finite and metrics.relative_l2(*pair) <= self._limit
