"""Runs the whole PyTorch model, in one dtype, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.metrics import Values
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.router_hook import RouterTap
from nemotrt.model.fp8 import widen
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.step import Step
from nemotrt.plugins.contract import DType, PoolSpec

SMALL_MODEL_BYTES = 64 << 20
"""Models smaller than this run on one thread: a second one would wait more than work (three times the CPU time)."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit PyTorch to this number of threads while the context is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_threads(state: Mapping[str, Tensor]) -> int:
    """The number of threads for a module with these weights."""
    is_small = sum(tensor.nbytes for tensor in state.values()) < SMALL_MODEL_BYTES
    return 1 if is_small else torch.get_num_threads()


def pool_dtype(spec: PoolSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a pool in a model of this dtype: an FP32 model keeps every pool in FP32, except FP8 caches."""
    is_wide = dtype == torch.float32 and spec.dtype is not DType.FLOAT8_E4M3
    return torch.float32 if is_wide else spec.dtype.torch


def filled_pools(
    specs: Sequence[PoolSpec], values: Mapping[str, NDArray[np.float32]], dtype: torch.dtype
) -> list[Tensor]:
    """Pools with these values, each in the dtype that it has in a model of this dtype."""
    return [torch.from_numpy(values[spec.name].copy()).to(pool_dtype(spec, dtype)) for spec in specs]


def torch_step(inputs: StepInputs) -> Step:
    """The step in the model's own form."""
    return Step(*(torch.from_numpy(getattr(inputs, name)) for name in Step._fields))


class TorchRunner:
    """Runs the PyTorch model in one dtype."""

    def __init__(self, model: LoadedModel, pools: tuple[PoolSpec, ...], dtype: torch.dtype) -> None:
        self._specs = pools
        self._dtype = dtype
        with torch.device("meta"):
            self._network = NemotronH(model.config, dtype=dtype)
        state = {
            name: weights.read(model.weights[name], tuple(parameter.shape), DType.from_torch(parameter.dtype))
            for name, parameter in self._network.state_dict().items()
        }
        self._network.load_state_dict(state, assign=True)
        widen(self._network)
        self.tap = RouterTap(self._network)
        self._num_threads = num_threads(state)
        self._pools: list[torch.Tensor] = []

    @property
    def has_narrow_state(self) -> bool:
        """Whether a recurrent state is narrower than FP32, so that every step loses precision."""
        states = (spec for spec in self._specs if spec.kind == "ssm_state")
        return any(pool_dtype(spec, self._dtype) != torch.float32 for spec in states)

    @contextmanager
    def borrowed(self, other: TorchRunner, layer: int) -> Iterator[None]:
        """Use one layer of another runner, and its pools' dtypes, while the context is open; pools must be reset."""
        layers, specs = self._network.backbone.layers, self._specs
        original = layers[str(layer)]
        other.tap.begin()
        layers[str(layer)] = other._network.backbone.layers[str(layer)]
        self._specs = tuple(
            theirs if mine.layer == layer else mine for mine, theirs in zip(specs, other._specs, strict=True)
        )
        try:
            yield
        finally:
            layers[str(layer)], self._specs = original, specs

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        self._pools = filled_pools(self._specs, pools, self._dtype)

    @torch.no_grad()
    def step(self, inputs: StepInputs, forced: RouterLogits = ()) -> Values:
        """The logits [R, V] of one step; `forced` router logits, if any, choose the experts."""
        self.tap.begin(forced)
        ids, rows = torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.logits_row)
        with threads(self._num_threads):
            logits, self._pools = self._network(ids, torch_step(inputs), rows, self._pools)
        return logits.float().numpy()  # type: ignore[no-any-return]

    def pool(self, name: str) -> Values:
        """A pool's values."""
        position = [spec.name for spec in self._specs].index(name)
        return self._pools[position].float().numpy()

    def router_logits(self) -> RouterLogits:
        """The model's own router logits in the last step, before any were replaced."""
        return tuple(self.tap.logits)
