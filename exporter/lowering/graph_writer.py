"""Write the traced parts of a model as one ONNX graph, with one node for each op."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch.export.graph_signature import InputKind

from nemotrt.exporter.artifacts import TracedModel, TracedPart
from nemotrt.exporter.errors import LowerError
from nemotrt.exporter.lowering.aten_to_onnx import Constants, Translator
from nemotrt.plugins import onnx_op
from nemotrt.plugins.contract import LOGITS, STEP_INPUTS, DType
from nemotrt.plugins.spec import DOMAIN, VERSION

IR_VERSION = 10
"""The newest that all target readers accept. Opset 23 was released with IR 11, but needs nothing of it."""


def write_graph(traced: TracedModel) -> ir.Model:
    """The whole graph; a parameter is an initializer under its own name whose `const_value` is not set yet.

    Raises LowerError on an operator without an ONNX form, and on an op that two layers use with different sizes.
    """
    return _GraphWriter(traced).model()


def value_names(traced: TracedModel) -> list[dict[str, str]]:
    """For each part, the names of its traced nodes → the names of their values in the graph of `write_graph`."""
    writer = _GraphWriter(traced)
    writer.model()  # names the outputs
    return [translator.names() for translator in writer.translators]


class _GraphWriter:
    """Collects the nodes, parameters and functions of all parts."""

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._step = {
            name: ir.val(name, ir.DataType(dtype.onnx), axes) for name, (dtype, axes) in STEP_INPUTS.items()
        }
        self._pools = {
            pool.name: ir.val(pool.name, ir.DataType(pool.dtype.onnx), [pool.axis, *pool.row_shape])
            for pool in traced.pools
        }
        self._next_pools: dict[str, ir.Value] = {}
        self._parameters: dict[str, ir.Value] = {}
        self._constants = Constants()
        self._functions: dict[str, tuple[ir.Function, Any]] = {}
        self._hidden = self._step["input_ids"]
        self.translators: list[Translator] = []
        for part in traced.parts:
            self._write(part)

    def _write(self, part: TracedPart) -> None:
        """Write one part, whose first input is the output of the part before it."""
        flowing = iter([self._hidden, *(self._pools[pool.name] for pool in part.pools)])
        recorded = {node.name: node.meta["val"] for node in part.program.graph.find_nodes(op="placeholder")}
        placeholders: dict[str, ir.Value] = {}
        symbols: dict[str, str] = {}
        for spec in part.program.graph_signature.input_specs:
            name = spec.arg.name
            if spec.kind is not InputKind.USER_INPUT:
                placeholders[name] = self._parameter(part.parameters[str(spec.target)])
                continue
            # PyTorch flattens `step.slot` to `step_slot`.
            placeholders[name] = self._step.get(name.removeprefix("step_")) or next(flowing)
            symbols |= _symbols(recorded[name].shape, placeholders[name])
        translator = Translator(part.prefix, symbols, self._constants)
        self._hidden, *pools = translator.translate(part.program.graph, placeholders)
        self.translators.append(translator)
        self._next_pools |= {pool.name: value for pool, value in zip(part.pools, pools, strict=True)}
        self._define_functions(translator)

    def _parameter(self, name: str) -> ir.Value:
        if name not in self._parameters:
            recorded = self._traced.parameters[name]
            dtype = ir.DataType(DType.from_torch(recorded.dtype).onnx)
            self._parameters[name] = ir.val(name, dtype, list(recorded.shape))
        return self._parameters[name]

    def _define_functions(self, translator: Translator) -> None:
        """Define one function for each op, for the sizes and attributes that all its nodes share."""
        for spec, *form in translator.forms:
            if spec.name not in self._functions:
                self._functions[spec.name] = (onnx_op.function(spec, *form), form)
            elif (defined := self._functions[spec.name][1]) != form:
                raise LowerError(
                    f"layers use {spec.name} in two forms: {defined} and {form}",
                    hint="layers of one kind must have the same sizes",
                )

    def model(self) -> ir.Model:
        """The graph with its functions; each pool's output is named after the pool it replaces."""
        self._hidden.name = LOGITS
        for pool in self._traced.pools:
            self._next_pools[pool.name].name = pool.output
        nodes = [node for translator in self.translators for node in translator.nodes]
        used = {value for node in nodes for value in node.inputs}
        graph = ir.Graph(
            [value for value in (*self._step.values(), *self._pools.values()) if value in used],
            [self._hidden, *(self._next_pools[pool.name] for pool in self._traced.pools)],
            nodes=nodes,
            initializers=[*self._parameters.values(), *self._constants.values.values()],
            opset_imports={"": onnx_op.OPSET, DOMAIN: VERSION},
            name="nemotron_h",
        )
        functions = [function for function, _ in self._functions.values()]
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="nemo-export", functions=functions)


def _symbols(sizes: Sequence[Any], value: ir.Value) -> dict[str, str]:
    """PyTorch's symbols for an input's sizes → the names of its axes in the contract."""
    assert value.shape is not None
    named = zip(sizes, value.shape, strict=True)
    return {str(size): str(axis.value) for size, axis in named if isinstance(axis, ir.SymbolicDim)}
