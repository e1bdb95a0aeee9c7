"""A session runs a graph step by step in ONNX Runtime, and owns the pools that the graph updates.

Legend: T tokens in this step, B sequences in this step, S state slots, K pages in the pool, M pages of one
sequence, R rows that want logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Session:
    """A graph in ONNX Runtime, and its pools, which start at zero.

    If `bound`, a pool's input and output share one buffer, so that a step writes only the rows it changes: with 544 MB
    of pools a step of one token took 0.5 ms, and 272 ms unbound. Unbound, every step allocates new pools; a comparison
    with the bound form shows any effect of the sharing.
    """

    def __init__(
        self,
        graph: OnnxGraph | Path,
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
        graph = OnnxGraph.read(graph) if isinstance(graph, Path) else graph
        self.runs_as = graph.runs_as(providers)
        self._session = open_graph(
            graph,
            threads=threads,
            providers=providers,
            thread=self._thread,
            extra_outputs=extra_outputs,
        )
        self.extra_values: dict[str, NDArray[Any]] = {}
        self._extra_outputs = tuple(extra_outputs)
        self.vocab_size = read_vocab_size(self._session)
        self.pools = read_pools(self._session, extra_outputs)
        self.num_slots, self.num_pages = num_slots, num_pages
        self._inputs = [value.name for value in self._session.get_inputs() if value.name not in self.pools]
        self._values = {name: self._new_pool(pool) for name, pool in self.pools.items()}
        self._binding = self._bind() if bound else None

    @property
    def pool_names(self) -> tuple[str, ...]:
        """The names of the pools, in the graph's order."""
        return tuple(self.pools)

    @property
    def page_size(self) -> int:
        """Tokens per page; 0 for a graph without a KV cache."""
        return max((pool.page_size for pool in self.pools.values()), default=0)

    def step(self, inputs: StepInputs) -> NDArray[np.float32]:
        """The logits [R, V] of one step; the pools are updated.

        Raises UsageError with the input that breaks the contract; the pools are then unchanged. Ctrl-C stops between
        two operators and leaves the pools undefined: the session must not be used again.
        """
        check_step(
            inputs,
            vocab_size=self.vocab_size,
            num_slots=self.num_slots,
            num_pages=self.num_pages,
            page_size=self.page_size,
        )
        feeds = {name: np.ascontiguousarray(getattr(inputs, name)) for name in self._inputs}
        if self._binding is None:
            return self._step_unbound(feeds)
        return self._step_bound(self._binding, feeds, len(inputs.logits_row))

    def pool(self, name: str) -> NDArray[Any]:
        """A copy of a pool's values; row 0 is scratch."""
        return np.array(self._value(name).numpy())

    def set_pool(self, name: str, values: NDArray[Any]) -> None:
        """Set a pool's values, converted to its dtype; raises UsageError if the shape differs."""
        target = self._value(name).numpy()
        if values.shape != target.shape:
            raise UsageError(f"{name} has shape {list(target.shape)}, not {list(values.shape)}")
        target[...] = values

    def _value(self, name: str) -> ort.OrtValue:
        if name not in self._values:
            raise UsageError(f"the graph has no pool {name}", hint="its pools: " + ", ".join(self._values))
        return self._values[name]

    def _new_pool(self, pool: PoolSpec) -> ort.OrtValue:
        shape = list(pool.shape(self.num_slots, self.num_pages))
        value = onnxruntime.load().OrtValue.ortvalue_from_shape_and_type(shape, pool.dtype.numpy.type)
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
        state = onnxruntime.errors()
        options = onnxruntime.load().RunOptions()

        def terminate() -> None:
            options.terminate = True

        try:
            return self._thread.run(lambda: call(options), stop=terminate)
        except (state.Fail, state.InvalidArgument, state.RuntimeException) as error:
            raise BundleError(f"ONNX Runtime failed in a step: {first_line(error)}") from error
