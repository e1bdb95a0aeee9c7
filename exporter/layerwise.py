"""Each part of the graph alone, on the reference's own inputs: an error stays on the layer that made it.

One part is in memory at a time, in PyTorch (FP32, and at the graph's precision for the floor) and in ONNX Runtime,
with the activations of the steps: a model that fits no machine as a whole is still compared layer by layer.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotrt.exporter import gates as judged
from nemotrt.exporter import metrics
from nemotrt.exporter.artifacts import Gate, LayerError, LoadedModel
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.exporter.gates import Array, Pair
from nemotrt.exporter.graph_cuts import Cut, cuts
from nemotrt.exporter.routing import RouterLogits
from nemotrt.exporter.runtime.graph_file import read_proto
from nemotrt.exporter.runtime.part_session import PartSession
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.torch_parts import TorchPart
from nemotrt.model.pools import PoolSpec

Noise = dict[str, NDArray[np.float32]]


@dataclass
class _Shown:
    """What a part gave over the steps, its tokens only, by a runner and the reference beside it."""

    pairs: dict[str, tuple[list[Array], list[Array]]] = field(default_factory=dict)

    def add(self, name: str, ours: Array, reference: Array) -> None:
        mine, other = self.pairs.setdefault(name, ([], []))
        mine.append(ours)
        other.append(reference)

    def joined(self) -> dict[str, Pair]:
        return {name: (np.concatenate(a), np.concatenate(b)) for name, (a, b) in self.pairs.items()}


def compare_layers(
    model: LoadedModel,
    config: BuildConfig,
    graph: Path,
    steps: tuple[StepInputs, ...],
    noise: Noise,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Gate], tuple[LayerError, ...]]:
    """The gates of every part alone over the steps, and each layer's error; `advance` hears of parts."""
    pools = model.pools(config)
    kinds = {f"layers.{index}": kind for index, kind in model.config.numbered_layers.items()}
    dtype = getattr(torch, COMPUTE_DTYPES[config.precision])
    found: list[Gate] = []
    errors = []
    flows: list[Tensor] = [torch.from_numpy(inputs.input_ids) for inputs in steps]
    for cut in cuts(read_proto(graph)):
        own = [pool for pool in pools if f"layers.{pool.layer}" == cut.place]
        part = _Part(model, cut, graph, own, dtype)
        part.reset({pool.name: noise[pool.name] for pool in own})
        # What flows is rounded, so that all three start from the same bits.
        flows = [
            part.step(flow if flow.dtype == torch.int64 else flow.to(dtype), inputs)
            for flow, inputs in zip(flows, steps, strict=True)
        ]
        shown, floor = part.shown.joined(), part.floor.joined() or None
        found += judged.layer_gates(cut.place, shown, floor)
        if cut.mixed:
            base = metrics.relative_l2(*floor["adds"]) if floor else None
            error = metrics.relative_l2(*shown["adds"])
            errors.append(LayerError(cut.place, kinds[cut.place], error, base))
        advance(1)
    return found, tuple(errors)


class _Part:
    """One part, three times: the reference in FP32, the graph's in ONNX Runtime, and PyTorch's at its precision."""

    def __init__(
        self, model: LoadedModel, cut: Cut, graph: Path, pools: list[PoolSpec], dtype: torch.dtype
    ) -> None:
        self._cut, self._specs = cut, pools
        self._reference = TorchPart(model, cut.place, pools, torch.float32)
        self._floor = TorchPart(model, cut.place, pools, dtype) if dtype != torch.float32 else None
        routers = [cut.router_logits] if cut.router_logits else []
        self._session = PartSession(cut.showing(routers), graph)
        self.shown, self.floor = _Shown(), _Shown()

    def reset(self, noise: Noise) -> None:
        """Fill every pool of each."""
        self._noise = noise
        self._state = dict(noise)
        self._reference.reset(noise)
        if self._floor:
            self._floor.reset(noise)

    def step(self, flow: Tensor, inputs: StepInputs) -> Tensor:
        """What flows on from the reference, on the experts that the graph chose."""
        count = int(inputs.query_start[-1])
        fields = {name: getattr(inputs, name) for name in StepInputs.names()}
        flowing = {} if flow.dtype == torch.int64 else {self._cut.flow_in: flow.float().numpy()}
        shown = self._session.run(fields | flowing | self._state)
        self._state = {name: shown[f"next.{name}"] for name in self._state}
        result = self._reference.step(flow, inputs, self._leader(shown, count))
        self._add(self.shown, self._named(shown), self._of(self._reference, result), count)
        if self._floor:
            floor_result = self._floor.step(flow, inputs)
            own = _first(self._floor.router_logits(), count)
            # On the floor's choice of experts; a layer that has experts has no pools to spoil.
            led = self._reference.step(flow, inputs, own) if own else result
            self._add(self.floor, self._of(self._floor, floor_result), self._of(self._reference, led), count)
        return result

    def _leader(self, shown: dict[str, NDArray[np.float32]], count: int) -> RouterLogits:
        name = self._cut.router_logits
        return _first((shown[name],), count) if name else ()

    def _named(self, shown: dict[str, NDArray[np.float32]]) -> dict[str, Array]:
        """What the graph's part gave, by what it is."""
        named = {"": shown[self._cut.flow_out].astype(np.float64)}
        if self._cut.mixed:
            named["adds"] = shown[self._cut.mixed].astype(np.float64)
        return named | {name: values.astype(np.float64) for name, values in self._state.items()}

    def _of(self, part: TorchPart, result: Tensor) -> dict[str, Array]:
        named = {"": result.double().numpy()}
        if part.mixed is not None:
            named["adds"] = part.mixed
        return named | part.pools()

    def _add(self, into: _Shown, ours: dict[str, Array], reference: dict[str, Array], count: int) -> None:
        if set(ours) != set(reference):
            raise AssertionError(f"{self._cut.place} gave {sorted(ours)}, the reference {sorted(reference)}")
        for name, values in reference.items():
            mine = ours[name]
            if name in self._noise:
                written = judged.written_of(name, values[1:], self._noise[name][1:])
                into.add(name, mine[1:][written], values[1:][written])
            else:
                rows = count if self._cut.place != "head" else len(values)
                into.add(name, mine[:rows], values[:rows])


def _first(router_logits: RouterLogits, count: int) -> RouterLogits:
    return tuple(logits_TE[:count] for logits_TE in router_logits)
