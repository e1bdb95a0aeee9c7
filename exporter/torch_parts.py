"""The PyTorch model part by part, with no more of it in memory than the part that runs.

Legend: T tokens, D hidden size, R rows that want logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nemotrt.exporter import environment, weights
from nemotrt.exporter.artifacts import LoadedModel
from nemotrt.exporter.router_tap import RouterTap
from nemotrt.exporter.routing import RouterLogits
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.model.block import Block
from nemotrt.model.fp8 import FP8
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.pools import PoolSpec
from nemotrt.model.step import Step

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
    """What a model of a dtype holds a pool in: FP32 keeps all in FP32 but what is quantised."""
    own: torch.dtype = getattr(torch, spec.dtype)
    is_wide = dtype == torch.float32 and own != FP8
    return torch.float32 if is_wide else own


STEP_FIELDS = ("query_start", "context_len", "slot", "page_table")


def torch_step(inputs: StepInputs) -> Step:
    """The step as the model takes it."""
    return Step(*(torch.from_numpy(getattr(inputs, name)) for name in STEP_FIELDS))


def part_of(model: LoadedModel, place: str, dtype: torch.dtype) -> nn.Module:
    """The model's module at `embeddings`, `layers.7` or `head`, with the checkpoint's weights in `dtype`."""
    with torch.device("meta"):
        network = NemotronH(model.config, dtype=dtype)
    module = network.head() if place == "head" else network.backbone.get_submodule(place)
    state = {}
    for name, parameter in module.state_dict().items():
        own = name if name.startswith("lm_head.") else f"backbone.{name}"
        whole = own if place == "head" else f"backbone.{place}.{name}"
        state[name] = weights.read(model.weights[whole], tuple(parameter.shape), parameter.dtype)
    module.load_state_dict(state, assign=True)
    return module


class TorchPart:
    """One part in one dtype, on pools of its own; row 0 of a pool is scratch."""

    def __init__(self, model: LoadedModel, place: str, pools: Sequence[PoolSpec], dtype: torch.dtype) -> None:
        environment.hide_unusable_amx()
        self._module, self._dtype = part_of(model, place, dtype), dtype
        self._num_threads = num_threads(self._module.state_dict())
        self._specs = tuple(pools)
        self._pools: list[Tensor] = []
        self._tap = RouterTap(self._module)
        self.mixed: NDArray[np.float64] | None = None
        """What the layer added to its tokens in the last step [T, D]; none of a part that is no layer."""
        if isinstance(self._module, Block):
            self._module.mixer.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, results: tuple[Tensor, ...]) -> None:
        self.mixed = results[0].double().numpy()

    def reset(self, pools: dict[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        self._pools = [
            torch.from_numpy(pools[spec.name].copy()).to(pool_dtype(spec, self._dtype))
            for spec in self._specs
        ]

    @torch.no_grad()
    def step(self, flow: Tensor, inputs: StepInputs, leader: RouterLogits = ()) -> Tensor:
        """What flows on, of what flowed in; the experts are those that `leader` leads to."""
        self._tap.begin(leader)
        with threads(self._num_threads):
            return self._run(flow, inputs)

    def _run(self, flow: Tensor, inputs: StepInputs) -> Tensor:
        if isinstance(self._module, Block):
            flow = flow.to(self._dtype)
            result, *self._pools = self._module(flow, torch_step(inputs), *self._pools)
            return result  # type: ignore[no-any-return]
        if isinstance(self._module, nn.Embedding):
            return self._module(torch.from_numpy(inputs.input_ids))  # type: ignore[no-any-return]
        rows = torch.from_numpy(inputs.logits_row)
        return self._module(flow.to(self._dtype), rows)  # type: ignore[no-any-return]

    def pools(self) -> dict[str, NDArray[np.float64]]:
        """Every pool's values."""
        return {spec.name: pool.double().numpy() for spec, pool in zip(self._specs, self._pools, strict=True)}

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens, before another's choices took their place."""
        return tuple(self._tap.seen)
