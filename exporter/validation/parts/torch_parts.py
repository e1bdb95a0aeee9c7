"""The PyTorch model in parts, with only the weights of the part that runs in memory.

Legend: T tokens, D hidden size, R rows that need logits.
"""

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
from nemotrt.exporter.validation.parts.subgraphs import GraphPart
from nemotrt.exporter.validation.routing import RouterLogits
from nemotrt.exporter.validation.runners.router_hook import RouterTap
from nemotrt.exporter.validation.runners.torch import filled_pools, num_threads, threads, torch_step
from nemotrt.model.block import Block
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.recipe import EXPERTS
from nemotrt.plugins import torch_op
from nemotrt.plugins.contract import HEAD, STEP_INPUTS, DType, PoolSpec
from nemotrt.plugins.spec import OpSpec, ops

OPS = {torch_op.overload(spec): spec for spec in ops()}


class PartModules:
    """Makes the modules of one part at a time, with the checkpoint's weights.

    Modules of the same part share the tensors that have the same dtype. In FP32, experts and embeddings keep the dtype
    of the checkpoint, and their values are widened when they are read.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._empty: dict[torch.dtype, NemotronH] = {}
        self._current = ""
        self._tensors: dict[tuple[str, DType], Tensor] = {}

    def module(self, part: str, dtype: torch.dtype) -> nn.Module:
        """The module of a part (`embeddings`, `layers.7` or `head`) in `dtype`; drops the weights of other parts."""
        if part != self._current:
            self._current = part
            self._tensors.clear()
        if dtype not in self._empty:
            self._empty[dtype] = NemotronH(self._model.config, dtype=dtype, device="meta")
        network = self._empty[dtype]
        module = copy.deepcopy(network.head() if part == HEAD else network.backbone.get_submodule(part))
        prefix = "backbone." if part == HEAD else f"backbone.{part}."
        state = {
            name: self._weight(name if name.startswith("lm_head.") else prefix + name, parameter)
            for name, parameter in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True)
        return module

    def _weight(self, name: str, parameter: Tensor) -> Tensor:
        source = self._model.weights[name]
        dtype = DType.from_torch(parameter.dtype)
        if dtype == DType.FLOAT32 and self._current != HEAD and name.endswith(WIDENED_WHEN_READ):
            dtype = source.tensors[0].dtype
        if (name, dtype) not in self._tensors:
            self._tensors[name, dtype] = weights.read_or_map(source, tuple(parameter.shape), dtype)
        return self._tensors[name, dtype]


WIDENED_WHEN_READ = (f".{EXPERTS}.up", f".{EXPERTS}.down", ".embeddings.weight")
"""The op widens experts one by one, and the embedding widens rows."""


@dataclass(frozen=True)
class OpCall:
    """A call of one of our ops: its inputs and results in SPEC order, and its attributes."""

    spec: OpSpec
    tensors: tuple[Tensor, ...]
    attributes: dict[str, Any]
    results: tuple[Tensor, ...]


class _OpCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the calls of our ops while the mode is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[OpCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in OPS:
            results = result if isinstance(result, tuple) else (result,)
            self.calls.append(OpCall(OPS[func], args, dict(kwargs or {}), results))
        return result


class TorchPart:
    """One part of the model in one dtype, with its own pools."""

    def __init__(
        self, modules: PartModules, part: GraphPart, pools: Sequence[PoolSpec], dtype: torch.dtype
    ) -> None:
        self._part, self._dtype = part, dtype
        self._module = modules.module(part.name, dtype)
        self._num_threads = num_threads(self._module.state_dict())
        self._specs = tuple(spec for spec in pools if f"layers.{spec.layer}" == part.name)
        self._pools: list[Tensor] = []
        self._tap = RouterTap(self._module)
        self.values: dict[str, Tensor] = {}
        """The results of the last step, by the graph's names."""
        self.calls: list[OpCall] = []
        """The ops that the last step called."""
        if isinstance(self._module, Block):
            # A hook that refers to this object would make a cycle that keeps the weights until a garbage collection.
            self._module.mixer.register_forward_hook(partial(_record, self.values, part.addend))

    def reset(self, pools: Mapping[str, NDArray[np.float32]]) -> None:
        """Fill every pool, in its own dtype."""
        self._pools = filled_pools(self._specs, pools, self._dtype)

    @torch.no_grad()
    def step(
        self,
        flow: Tensor,
        inputs: StepInputs,
        forced: RouterLogits = (),
        is_imposed_T: NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """The part's output for this input; `forced` router logits, if any, choose the experts as in `RouterTap`."""
        self._tap.begin(forced, is_imposed_T)
        self.values.clear()
        with threads(self._num_threads), _OpCalls() as recorder:
            result, *self._pools = self._run(flow, inputs)
        self.calls = recorder.calls
        pools = {spec.output: pool for spec, pool in zip(self._specs, self._pools, strict=True)}
        self.values |= {self._part.flow_out: result} | pools
        return result

    def _run(self, flow: Tensor, inputs: StepInputs) -> tuple[Tensor, ...]:
        """The part's output, and the pools after the step."""
        if isinstance(self._module, Block):
            return self._module(flow.to(self._dtype), torch_step(inputs), *self._pools)  # type: ignore[no-any-return]
        if isinstance(self._module, nn.Embedding):
            return (self._module(torch.from_numpy(inputs.input_ids)).to(self._dtype),)
        return (self._module(flow.to(self._dtype), torch.from_numpy(inputs.logits_row)),)

    def router_logits(self) -> RouterLogits:
        """The router logits of the last step's tokens, before any were replaced."""
        return tuple(self._tap.logits)


def _record(
    values: dict[str, Tensor], name: str, _: nn.Module, __: object, results: tuple[Tensor, ...]
) -> None:
    values[name] = results[0]


class TracedTorchPart(TorchPart):
    """One part as it was traced for export, run operator by operator, so that every value inside it is known."""

    def __init__(
        self,
        modules: PartModules,
        part: GraphPart,
        pools: Sequence[PoolSpec],
        dtype: torch.dtype,
        program: ExportedProgram,
        names: Mapping[str, str],
    ) -> None:
        """`program` is traced in `dtype`; `names` maps the names of its nodes to the names of the graph's values."""
        super().__init__(modules, part, pools, dtype)
        self._program, self._names = program, names

    def _run(self, flow: Tensor, inputs: StepInputs) -> tuple[Tensor, ...]:
        interpreter = _Interpreter(self._program.graph_module, self._names, self._tap)
        results = interpreter.run(*self._arguments(flow, inputs))
        self.values |= interpreter.values
        return tuple(results)

    def _arguments(self, flow: Tensor, inputs: StepInputs) -> Iterator[Tensor]:
        """The program's inputs in order."""
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
    """Runs a traced graph and records the values that have a name in the ONNX graph; `tap` replaces router logits."""

    def __init__(self, graph: fx.GraphModule, names: Mapping[str, str], tap: RouterTap) -> None:
        super().__init__(graph)
        self._names, self._tap = names, tap
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # It checks the metadata of the meta tensors that were traced.
        result = super().run_node(n)
        if n.name in self._names:
            self.values[self._names[n.name]] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.nemo.moe_dispatch.default:
            x_TL, router_logits_TE, *weights = args
            args = (x_TL, self._tap.routed(router_logits_TE), *weights)
        return super().call_function(target, args, kwargs)
