"""An ONNX graph read once without its weights, and the ONNX Runtime session that runs it.

Legend: R rows that need logits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.environment import num_cores
from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime import ort as onnxruntime
from nemotrt.exporter.runtime.fp32_emulation import emulate_in_fp32, needs_emulation
from nemotrt.exporter.runtime.manifest import GraphSummary, GraphValue
from nemotrt.plugins.contract import LOGITS, NEXT, STEP_INPUTS, DType, PoolSpec

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort
    from onnx import ModelProto, ValueInfoProto

CPU = "CPUExecutionProvider"
PROVIDERS = {"cpu": (CPU,), "cuda": ("CUDAExecutionProvider", CPU)}
"""Device → ONNX Runtime's execution providers; the first one that implements an operator runs it."""

ORT_DTYPES = {
    "tensor(float)": DType.FLOAT32,
    "tensor(float16)": DType.FLOAT16,
    "tensor(int64)": DType.INT64,
    "tensor(int32)": DType.INT32,
}
"""ONNX Runtime's names of the types that a graph's inputs may have."""

KIND_OF_OP = {"NemoSelectiveScan": "mamba", "NemoPagedAttention": "attention", "NemoMoeDispatch": "moe"}
"""An op → the kind of a layer that has it; a layer with none of them is an MLP."""

WEIGHT_DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.FLOAT8_E4M3)


class OnnxGraph:
    """An ONNX graph, parsed once; its weights stay in the files next to `path`."""

    def __init__(self, proto: ModelProto, path: Path) -> None:
        """`path` is the graph's file, or the file of the graph that this one is a part of."""
        self.proto, self.path = proto, path

    @classmethod
    def read(cls, path: Path) -> OnnxGraph:
        """The graph of a file; raises BundleError if it is not an ONNX file."""
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            # Without the format, ONNX would read a .json file as another of its formats.
            proto = onnx.load(str(path), format="protobuf", load_external_data=False)
        except (OSError, DecodeError) as error:
            raise BundleError(f"{path} is not a readable ONNX file: {first_line(error)}") from error
        if not proto.graph.node:  # An empty file is a valid message.
            raise BundleError(f"{path} is not an ONNX file: it has no node")
        return cls(proto, path)

    @cached_property
    def model(self) -> ir.Model:
        """The graph in onnx_ir, whose import takes a second: only validation and reports use it."""
        import onnx_ir as ir

        model = ir.from_proto(self.proto)
        ir.external_data.set_base_dir(model.graph, self.path.parent)
        return model

    @cached_property
    def summary(self) -> GraphSummary:
        """The graph's inputs, outputs and pools."""
        graph = self.proto.graph
        inputs, outputs = (tuple(map(summarize, values)) for values in (graph.input, graph.output))
        output_names = {value.name for value in outputs}
        pools = tuple(
            PoolSpec(value.name, DType(value.dtype), tuple(s for s in value.axes[1:] if isinstance(s, int)))
            for value in inputs
            if NEXT + value.name in output_names
        )
        return GraphSummary(inputs, outputs, pools)

    @cached_property
    def needs_emulation(self) -> bool:
        """Whether any value is narrower than FP32."""
        return needs_emulation(self.proto)

    @cached_property
    def emulation(self) -> ModelProto:
        """The FP32 emulation."""
        return emulate_in_fp32(self.proto)

    @property
    def precision(self) -> DType:
        """The dtype of most weights; FP8 if any weight is FP8."""
        sizes: Counter[int] = Counter()
        for tensor in self.proto.graph.initializer:
            sizes[tensor.data_type] += prod(tensor.dims)
        if sizes[DType.FLOAT8_E4M3.onnx]:
            return DType.FLOAT8_E4M3
        return max(WEIGHT_DTYPES, key=lambda dtype: sizes[dtype.onnx])

    def is_emulated(self, providers: Sequence[str]) -> bool:
        """Whether ONNX Runtime runs the FP32 emulation."""
        return tuple(providers) == (CPU,) and self.needs_emulation

    def runs_as(self, providers: Sequence[str] = (CPU,)) -> str:
        """How ONNX Runtime runs the graph, in words: `BF16, emulated in FP32`."""
        return self.precision.label + (", emulated in FP32" if self.is_emulated(providers) else "")


def summarize(value: ValueInfoProto) -> GraphValue:
    """The name, dtype and axes of a graph's value."""
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return GraphValue(value.name, dtype, tuple(size.dim_param or size.dim_value for size in tensor.shape.dim))


def open_graph(
    graph: OnnxGraph,
    *,
    threads: int,
    providers: Sequence[str],
    thread: onnxruntime.Interruptible,
    extra_outputs: Sequence[str] = (),
    disabled_optimizers: Sequence[str] = (),
) -> ort.InferenceSession:
    """The graph in ONNX Runtime; on a CPU, BF16, FP16 and FP8 are emulated in FP32.

    The values named in `extra_outputs` become outputs too. Raises BundleError if ONNX Runtime refuses the graph,
    UsageError if ONNX Runtime or a provider is missing.
    """
    import onnx

    ort, cores = onnxruntime.load(), num_cores()
    if not 0 <= threads <= cores:
        raise UsageError(
            f"{threads} threads are not between 0 and {cores}, the number of cores", hint="0 uses all cores"
        )
    available = ort.get_available_providers()
    if missing := [name for name in providers if name not in available]:
        raise UsageError(f"this ONNX Runtime has no {missing[0]}", hint="it has " + ", ".join(available))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors only. They are raised too, and the warnings are about machines without a GPU.
    options.log_severity_level = 3
    # Steps differ in size, and ONNX Runtime would keep a memory plan for each size forever.
    options.enable_mem_pattern = False
    # Weights stay in the mapped file: packing 1.3 GB took 0.55 s and made a step at most 4% faster.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Otherwise each step dequantizes every FP8 weight: 0.52 s, against 0.12 s, to decode with 0.4 B of them.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    folder = str(graph.path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    model = onnx.ModelProto()
    model.CopyFrom(graph.emulation if graph.is_emulated(providers) else graph.proto)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra_outputs)
    state = onnxruntime.errors()
    try:
        return thread.run(
            lambda: ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=list(providers),
                disabled_optimizers=list(disabled_optimizers),
            ),
            stop=lambda: options.set_load_cancellation_flag(True),
        )
    except (state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile) as error:
        raise BundleError(f"ONNX Runtime refuses {graph.path}: {first_line(error)}") from error
    except onnxruntime.failures() as error:
        onnxruntime.raise_if_memory_ran_out(error)
        raise BundleError(f"ONNX Runtime cannot run {graph.path}: {first_line(error)}") from error


def read_pools(session: ort.InferenceSession, extra_outputs: Sequence[str] = ()) -> dict[str, PoolSpec]:
    """The pools in the graph's order; their dtypes are those that the session holds, FP32 under emulation.

    Raises BundleError on an input or output that the contract does not have.
    """
    outputs = {value.name for value in session.get_outputs()}.difference(extra_outputs)
    pools: dict[str, PoolSpec] = {}
    for value in session.get_inputs():
        if value.type not in ORT_DTYPES:
            raise BundleError(f"the graph's input {value.name} has the unsupported type {value.type}")
        if NEXT + value.name in outputs:
            rows, *row_shape = value.shape
            pool = PoolSpec(value.name, ORT_DTYPES[value.type], tuple(row_shape))
            if rows != pool.axis or not all(isinstance(size, int) for size in row_shape):
                raise BundleError(
                    f"the pool {value.name} has shape {value.shape}; only its first axis may vary, {pool.axis}"
                )
            pools[value.name] = pool
        elif value.name not in STEP_INPUTS:
            raise BundleError(f"the graph's input {value.name} is unknown, and no output replaces it")
    if unpaired := sorted(outputs - {LOGITS} - {NEXT + name for name in pools}):
        raise BundleError(f"the graph's output {unpaired[0]} replaces no input")
    return pools


def read_vocab_size(session: ort.InferenceSession) -> int:
    """The width of the logits; raises BundleError if the graph has none."""
    for value in session.get_outputs():
        if value.name == LOGITS and len(value.shape) == 2 and isinstance(value.shape[1], int):
            return value.shape[1]
    raise BundleError(
        "the graph has no output logits [R, vocabulary]", hint="nemo-export did not write this graph"
    )


def first_line(error: Exception) -> str:
    """The error's first line, without ONNX Runtime's prefix."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    return text.splitlines()[0] if text else type(error).__name__
