"""The PyTorch model part by part, with no more of it in memory than the part that runs.

Legend: T tokens, D hidden size, R rows that want logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._python_dispatch import TorchDispatchMode

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.validation.parts.subgraphs import Cut
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.router_hook import RouterTap
from nemotrt.exporter.validation.runners.torch import num_threads, pool_dtype, threads, torch_step
from nemotrt.model.block import Block
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.recipe import EXPERTS
from nemotrt.plugins import torch_op
from nemotrt.plugins.contract import STEP_INPUTS, DType, PoolSpec
from nemotrt.plugins.spec import OpSpec, ops

OPS = {torch_op.overload(spec): spec for spec in ops()}


class PartModules:
    """The model's modules, with the weights of the parts in use and no others.

    Parts of one place share the tensors that they hold in the same dtype. The FP32 reference's experts and embeddings
    stay as they are stored: what is read of them is widened, to the same values.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._empty: dict[torch.dtype, NemotronH] = {}
        self._place = ""
        self._held: dict[tuple[str, DType], Tensor] = {}

    def module(self, place: str, dtype: torch.dtype) -> nn.Module:
        """The one at `embeddings`, `layers.7` or `head`, with the checkpoint's weights in `dtype`."""
        if place != self._place:
            self._place = place
            self._held.clear()
        if dtype not in self._empty:
            self._empty[dtype] = NemotronH(self._model.config, dtype=dtype, device="meta")
        network = self._empty[dtype]
        module = network.head() if place == "head" else network.backbone.get_submodule(place)
        module = copy.deepcopy(module)
        state = {}
        for name, parameter in module.state_dict().items():
            own = name if name.startswith("lm_head.") else f"backbone.{name}"
            whole = own if place == "head" else f"backbone.{place}.{name}"
            state[name] = self._weight(whole, parameter)
        module.load_state_dict(state, assign=True)
        return module

    def _weight(self, name: str, parameter: Tensor) -> Tensor:
        source = self._model.weights[name]
        dtype = DType.from_torch(parameter.dtype)
        if dtype == DType.FLOAT32 and self._place != "head" and name.endswith(WIDENED_AS_THEY_ARE_READ):
            dtype = source.tensors[0].dtype
        if (name, dtype) not in self._held:
            self._held[name, dtype] = weights.read_or_map(source, tuple(parameter.shape), dtype)
        return self._held[name, dtype]


WIDENED_AS_THEY_ARE_READ = (f".{EXPERTS}.up", f".{EXPERTS}.down", ".embeddings.weight")
"""Experts one by one, in their op; embeddings row by row."""


@dataclass(frozen=True)
class OpCall:
    """One of our ops as a model called it: its tensors in SPEC order, and its attributes."""

    spec: OpSpec
    tensors: tuple[Tensor, ...]
    attributes: dict[str, Any]


class _OpCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every call of our ops while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[OpCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in OPS:
            self.calls.append(OpCall(OPS[func], args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


class TorchPart:
    """The part of the model that a cut is of, in one dtype, on pools of its own; row 0 of a pool is scratch."""

    def __init__(self, modules: PartModules, cut: Cut, pools: Sequence[PoolSpec], dtype: torch.dtype) -> None:
        self._cut, self._dtype = cut, dtype
        self._module = modules.module(cut.place, dtype)
        self._num_threads = num_threads(self._module.state_dict())
        self._specs = tuple(spec for spec in pools if f"layers.{spec.layer}" == cut.place)
        self._pools: list[Tensor] = []
        self._tap = RouterTap(self._module)
        self.values: dict[str, Tensor] = {}
        """What the last step gave, by the graph's names."""
        self.calls: list[OpCall] = []
        """The ops that the last step called."""
        if isinstance(self._module, Block):
            # A hook that held this part, which holds the module, would keep the weights until a look for garbage.
            self._module.mixer.register_forward_hook(partial(_keep, self.values, cut.mixed))

    def reset(self, pools: Mapping[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        self._pools = [
            torch.from_numpy(pools[spec.name].copy()).to(pool_dtype(spec, self._dtype))
            for spec in self._specs
        ]

    @torch.no_grad()
    def step(self, flow: Tensor, inputs: StepInputs, leader: RouterLogits = ()) -> Tensor:
        """What flows on, of what flowed in; the experts are those that `leader` leads to."""
        self._tap.begin(leader)
        self.values.clear()
        with threads(self._num_threads), _OpCalls() as seen:
            result, *self._pools = self._run(flow, inputs)
        self.calls = seen.calls
        pools = {f"next.{spec.name}": pool for spec, pool in zip(self._specs, self._pools, strict=True)}
        self.values |= {self._cut.flow_out: result} | pools
        return result

    def _run(self, flow: Tensor, inputs: StepInputs) -> tuple[Tensor, ...]:
        """What flows on, and the pools after the step."""
        if isinstance(self._module, Block):
            return self._module(flow.to(self._dtype), torch_step(inputs), *self._pools)  # type: ignore[no-any-return]
        if isinstance(self._module, nn.Embedding):
            return (self._module(torch.from_numpy(inputs.input_ids)).to(self._dtype),)
        return (self._module(flow.to(self._dtype), torch.from_numpy(inputs.logits_row)),)

    def router_logits(self) -> RouterLogits:
        """Of the last step's tokens, before another's choices took their place."""
        return tuple(self._tap.logits)


def _keep(
    values: dict[str, Tensor], name: str, _: nn.Module, __: object, results: tuple[Tensor, ...]
) -> None:
    values[name] = results[0]


class TracedTorchPart(TorchPart):
    """The part as it was traced for export, run operator by operator: every value inside it can be seen."""

    def __init__(
        self,
        modules: PartModules,
        cut: Cut,
        pools: Sequence[PoolSpec],
        dtype: torch.dtype,
        program: ExportedProgram,
        names: Mapping[str, str],
    ) -> None:
        """`program` is traced in `dtype`; `names` are its nodes' names → the graph's of the same values."""
        super().__init__(modules, cut, pools, dtype)
        self._program, self._names = program, names

    def _run(self, flow: Tensor, inputs: StepInputs) -> tuple[Tensor, ...]:
        interpreter = _Interpreter(self._program.graph_module, self._names, self._tap)
        results = interpreter.run(*self._arguments(flow, inputs))
        self.values |= interpreter.values
        return tuple(results)

    def _arguments(self, flow: Tensor, inputs: StepInputs) -> Iterator[Tensor]:
        """In the order of the program's own inputs, parameters first."""
        parameters = self._module.state_dict()
        sources = iter([flow if flow.dtype == torch.int64 else flow.to(self._dtype), *self._pools])
        for spec in self._program.graph_signature.input_specs:
            if spec.kind is not InputKind.USER_INPUT:
                yield parameters[str(spec.target)]
                continue
            # PyTorch flattens `step.slot` to `step_slot`.
            name = spec.arg.name.removeprefix("step_")
            is_step = name in STEP_INPUTS
            yield torch.from_numpy(getattr(inputs, name)) if is_step else next(sources)


class _Interpreter(fx.Interpreter):
    """Runs a traced graph and keeps what the graph has a name for; routers choose as the tap says."""

    def __init__(self, graph: fx.GraphModule, names: Mapping[str, str], tap: RouterTap) -> None:
        super().__init__(graph)
        self._names, self._tap = names, tap
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # of the meta tensors that were traced
        result = super().run_node(n)
        if n.name in self._names:
            self.values[self._names[n.name]] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.nemo.moe_dispatch.default:
            x_TL, router_logits_TE, *weights = args
            args = (x_TL, self._tap.routed(router_logits_TE), *weights)
        return super().call_function(target, args, kwargs)
