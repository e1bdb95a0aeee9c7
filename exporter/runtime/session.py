"""A session runs a graph step by step, in ONNX Runtime here, and owns the pools that the graph updates.

Legend: T tokens in this step, B sequences in this step, S state slots, K pages in the pool, M pages of one
sequence, R rows that need logits, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import ort as onnxruntime
from nemotrt.exporter.runtime.graph_file import (
    CPU,
    OnnxGraph,
    first_line,
    open_graph,
    read_pools,
    read_vocab_size,
)
from nemotrt.exporter.runtime.step import StepInputs, check_step
from nemotrt.plugins.contract import LOGITS, NEXT, PoolSpec

if TYPE_CHECKING:
    import onnxruntime as ort


class AnySession(ABC):
    """Pools, and a runtime that executes steps on them; the pools start at zero."""

    runs_as: str
    vocab_size: int
    num_slots: int
    num_pages: int
    pools: dict[str, PoolSpec]
    """The pools in the graph's order."""

    @property
    def pool_names(self) -> tuple[str, ...]:
        """The names of the pools, in the graph's order."""
        return tuple(self.pools)

    @property
    def page_size(self) -> int:
        """Tokens per page; 0 for a graph without a KV cache."""
        return max((pool.page_size for pool in self.pools.values()), default=0)

    @abstractmethod
    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The logits [R, V] of one step; the pools are updated."""

    def pool(self, name: str) -> NDArray[Any]:
        """A copy of a pool's values; row 0 is scratch."""
        self._pool_shape(name)
        return self._read_pool(name)

    def set_pool(self, name: str, values: NDArray[Any]) -> None:
        """Set a pool's values, converted to its dtype; raises UsageError if the shape differs."""
        shape = self._pool_shape(name)
        if values.shape != shape:
            raise UsageError(f"{name} has shape {list(shape)}, not {list(values.shape)}")
        self._write_pool(name, values)

    def _pool_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a pool; raises UsageError if the graph does not have it."""
        if name not in self.pools:
            raise UsageError(f"the graph has no pool {name}", hint="its pools: " + ", ".join(self.pools))
        return self.pools[name].shape(self.num_slots, self.num_pages)

    def _check(self, inputs: StepInputs) -> None:
        sizes = {"num_slots": self.num_slots, "num_pages": self.num_pages, "page_size": self.page_size}
        check_step(inputs, vocab_size=self.vocab_size, **sizes)

    @abstractmethod
    def _read_pool(self, name: str) -> NDArray[Any]: ...

    @abstractmethod
    def _write_pool(self, name: str, values: NDArray[Any]) -> None: ...


class Session(AnySession):
    """A graph in ONNX Runtime, and its pools, which start at zero.

    If `bound`, a pool's input and output share one buffer, so that a step writes only the rows it changes: with 544 MB
    of pools a step of one token took 0.5 ms, and 272 ms unbound. Unbound, every step allocates new pools; a comparison
    with the bound form shows any effect of the sharing.
    """

    def __init__(
        self,
        graph: OnnxGraph | Path | str,
        *,
        num_slots: int,
        num_pages: int,
        bound: bool = True,
        threads: int = 0,
        providers: Sequence[str] = (CPU,),
        extra_outputs: Sequence[str] = (),
    ) -> None:
        """Load the graph with `num_slots` slots and `num_pages` pages, scratch included.

        `threads` 0 takes all cores. `extra_outputs` names further values of the graph; those of the last step are in
        `self.extra_values`. Only an unbound session has any. Raises BundleError on a file that is not such a graph,
        UsageError on arguments that this machine cannot satisfy.
        """
        if num_slots < 2 or num_pages < 2:
            raise UsageError(
                f"a session of {num_slots} slots and {num_pages} pages has no room for a sequence",
                hint="slot 0 and page 0 are scratch: give at least 2 of each",
            )
        assert not (bound and extra_outputs), "a bound session binds the pools and the logits only"
        self._thread = onnxruntime.Interruptible()
        graph = graph if isinstance(graph, OnnxGraph) else OnnxGraph.read(Path(graph))
        self.runs_as = graph.runs_as(providers)
        self._session = open_graph(
            graph, threads=threads, providers=providers, thread=self._thread, extra_outputs=extra_outputs
        )
        self.extra_values: dict[str, NDArray[Any]] = {}
        self._extra_outputs = tuple(extra_outputs)
        self.vocab_size = read_vocab_size(self._session)
        self.pools = read_pools(self._session, extra_outputs)
        self.num_slots, self.num_pages = num_slots, num_pages
        self._inputs = [value.name for value in self._session.get_inputs() if value.name not in self.pools]
        self._values = {name: self._new_pool(name) for name in self.pools}
        self._binding = self._bind() if bound else None

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The logits [R, V] of one step; the pools are updated.

        Raises UsageError with the input that breaks the contract; the pools are then unchanged. Ctrl-C stops between
        two operators and leaves the pools undefined: the session must not be used again.
        """
        self._check(inputs)
        feeds = {name: np.ascontiguousarray(getattr(inputs, name)) for name in self._inputs}
        if self._binding:
            return self._step_bound(self._binding, feeds, len(inputs.logits_row))
        return self._step_unbound(feeds)

    def _read_pool(self, name: str) -> NDArray[Any]:
        return np.array(self._values[name].numpy())

    def _write_pool(self, name: str, values: NDArray[Any]) -> None:
        self._values[name].numpy()[...] = values

    def _new_pool(self, name: str) -> ort.OrtValue:
        shape, dtype = list(self._pool_shape(name)), self.pools[name].dtype.numpy.type
        value = onnxruntime.load().OrtValue.ortvalue_from_shape_and_type(shape, dtype)
        # A comparison of pools reads rows that no step has written: they must be the same in every run.
        value.numpy()[...] = 0
        return value

    def _bind(self) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(NEXT + name, value)
        return binding

    def _step_bound(
        self, binding: ort.IOBinding, feeds: dict[str, NDArray[Any]], num_rows: int
    ) -> NDArray[np.float32]:
        logits_RV = np.empty((num_rows, self.vocab_size), dtype=np.float32)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(LOGITS, "cpu", 0, np.float32, list(logits_RV.shape), logits_RV.ctypes.data)
        self._run(lambda options: self._session.run_with_iobinding(binding, options))
        return logits_RV

    def _step_unbound(self, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        ort = onnxruntime.load()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        names = [LOGITS, *self._extra_outputs, *(NEXT + name for name in self.pools)]
        results = self._run(
            lambda options: self._session.run_with_ort_values(names, values | self._values, options)
        )
        by_name = dict(zip(names, results, strict=True))
        self.extra_values = {name: np.array(by_name[name].numpy()) for name in self._extra_outputs}
        self._values = {name: by_name[NEXT + name] for name in self.pools}
        return np.array(by_name[LOGITS].numpy())

    def _run(self, call: Callable[[ort.RunOptions], Any]) -> Any:
        """The result of `call`; Ctrl-C ends it between two operators."""
        options = onnxruntime.load().RunOptions()
        stop = partial(setattr, options, "terminate", True)
        try:
            return self._thread.run(lambda: call(options), stop=stop)
        except onnxruntime.failures() as error:
            onnxruntime.raise_if_memory_ran_out(error)
            raise BundleError(f"ONNX Runtime failed in a step: {first_line(error)}") from error
