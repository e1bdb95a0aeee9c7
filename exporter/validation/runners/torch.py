"""The reference that a scenario is driven through: the PyTorch model, whole, in one dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.base import Array
from nemotrt.exporter.validation.runners.router_hook import RouterTap
from nemotrt.model.fp8 import widen
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.step import Step
from nemotrt.plugins.contract import DType, PoolSpec
from nemotrt.plugins.e4m3 import FP8

SMALL_MODEL_BYTES = 64 << 20
"""Below this PyTorch runs on one thread: a second one waits longer than it works (three times the CPU time)."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_threads(state: Mapping[str, Tensor]) -> int:
    """Threads for a module of these weights."""
    is_small = sum(tensor.nbytes for tensor in state.values()) < SMALL_MODEL_BYTES
    return 1 if is_small else torch.get_num_threads()


def pool_dtype(spec: PoolSpec, dtype: torch.dtype) -> torch.dtype:
    """What a model of a dtype holds a pool in: FP32 keeps all in FP32 but what is quantized."""
    own: torch.dtype = getattr(torch, spec.dtype)
    is_wide = dtype == torch.float32 and own != FP8
    return torch.float32 if is_wide else own


STEP_FIELDS = ("query_start", "context_len", "slot", "page_table")


def torch_step(inputs: StepInputs) -> Step:
    """The step as the model takes it."""
    return Step(*(torch.from_numpy(getattr(inputs, name)) for name in STEP_FIELDS))


class TorchRunner:
    """The reference model in one dtype, on the CPU."""

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
        moe = [index for index, kind in model.config.numbered_layers.items() if kind == "moe"]
        self.choosing = self.tap.choosing(moe)
        self._num_threads = num_threads(state)
        self._pools: list[torch.Tensor] = []

    @contextmanager
    def borrowed(self, other: TorchRunner, layer: int) -> Iterator[None]:
        """With one layer, and its pools' dtypes, of another runner of the same layers; pools are to be reset."""
        layers, specs = self._network.backbone.layers, self._specs
        own = layers[str(layer)]
        other.tap.begin()
        layers[str(layer)] = other._network.backbone.layers[str(layer)]
        self._specs = tuple(
            theirs if mine.layer == layer else mine for mine, theirs in zip(specs, other._specs, strict=True)
        )
        try:
            yield
        finally:
            layers[str(layer)], self._specs = own, specs

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        self._pools = [
            torch.from_numpy(pools[spec.name].copy()).to(pool_dtype(spec, self._dtype))
            for spec in self._specs
        ]

    @torch.no_grad()
    def step(self, inputs: StepInputs, leader: RouterLogits = ()) -> Array:
        """The logits [R, V] of one step, with the experts that `leader` leads to."""
        self.tap.begin(leader)
        ids, rows = torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.logits_row)
        with threads(self._num_threads):
            logits, self._pools = self._network(ids, torch_step(inputs), rows, self._pools)
        return logits.double().numpy()  # type: ignore[no-any-return]

    def pools(self) -> dict[str, Array]:
        """Every pool's values."""
        return {spec.name: pool.double().numpy() for spec, pool in zip(self._specs, self._pools, strict=True)}

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens: the model's own, before another's choices took their place."""
        return tuple(self.tap.seen)
