"""An ONNX file opened in ONNX Runtime: which inputs are pools, and the graph or its twin, loaded.

Legend: R rows that want logits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from nemotrt.exporter.errors import BundleError, UsageError
from nemotrt.exporter.runtime.fp32_emulation import fp32_twin, needs_twin
from nemotrt.exporter.runtime.interruptible import Interruptible
from nemotrt.plugins.contract import LOGITS, NEXT, STEP_INPUTS, DType, PoolSpec

if TYPE_CHECKING:
    import onnxruntime as ort
    from onnx import ModelProto


CPU = "CPUExecutionProvider"
PROVIDERS = {"cpu": (CPU,), "cuda": ("CUDAExecutionProvider", CPU)}
"""What ONNX Runtime runs a graph on → its providers, the first that knows an operator running it."""

DTYPES = {
    "tensor(float)": DType.FLOAT32,
    "tensor(float16)": DType.FLOAT16,
    "tensor(int64)": DType.INT64,
    "tensor(int32)": DType.INT32,
}
"""ONNX Runtime's names of the dtypes that the graph's inputs may have."""

PRECISIONS = {1: "fp32", 10: "fp16", 16: "bf16", 17: "fp8"}
"""onnx.TensorProto's numbers of weight types → what they are called here."""


def open_graph(
    path: Path,
    *,
    threads: int,
    providers: Sequence[str],
    thread: Interruptible,
    shown: Sequence[str] = (),
) -> tuple[ort.InferenceSession, str]:
    """The graph, or its twin where the CPU would not round as the graph does, and how it runs in words.

    The values named in `shown` are outputs too. Raises BundleError on a file that ONNX Runtime refuses,
    UsageError where it or a provider is missing.
    """
    return open_model(
        read_proto(path), path, threads=threads, providers=providers, thread=thread, shown=shown
    )


def open_model(
    model: ModelProto,
    path: Path,
    *,
    threads: int,
    providers: Sequence[str],
    thread: Interruptible,
    shown: Sequence[str] = (),
    unoptimised: Sequence[str] = (),
) -> tuple[ort.InferenceSession, str]:
    """As `open_graph`, of a model in memory whose external data lies beside `path`.

    `unoptimised` names optimisers of ONNX Runtime's to do without.
    """
    if find_spec("onnxruntime") is None:
        raise UsageError("ONNX Runtime is not installed", hint="pip install 'nemo-export[cpu]'")
    import onnx
    import onnxruntime as ort

    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise UsageError(
            f"this ONNX Runtime has no {missing[0]}",
            hint="it has " + ", ".join(ort.get_available_providers()),
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors only: those are raised too, and its warnings are about machines without a GPU.
    options.log_severity_level = 3
    # Every step has other sizes; a plan of the memory for each would be kept for ever.
    options.enable_mem_pattern = False
    # Weights stay in the mapped file: packed copies of 1.3 GB took 0.55 s to make, and a step gained 4% at most.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Else an FP8 weight is dequantized in every step, and not once: 0.52 s for 0.12 s of a decode of 0.4 B of them.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    runs_as = _precision(model)
    if tuple(providers) == (CPU,) and needs_twin(model):
        model, runs_as = fp32_twin(model), f"{runs_as} as an FP32 twin"
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
    folder = str(path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return _create(path, model.SerializeToString(), options, providers, thread, unoptimised), runs_as


def read_proto(path: Path) -> ModelProto:
    """The graph without its external data; raises BundleError when it is no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        # By its name alone, a .json file would be read as another of ONNX's formats.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path} is not a readable ONNX file: {first_line(error)}") from error
    if not model.graph.node:  # an empty file is a message too
        raise BundleError(f"{path} is not an ONNX file: it has no node")
    return model


def _precision(model: ModelProto) -> str:
    """What most of the weights are stored in; FP8 where any are."""
    sizes = dict.fromkeys(PRECISIONS, 0)
    for tensor in model.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += prod(tensor.dims)
    return "fp8" if sizes[17] else PRECISIONS[max(sizes, key=sizes.__getitem__)]


def _create(
    path: Path,
    source: bytes,
    options: ort.SessionOptions,
    providers: Sequence[str],
    thread: Interruptible,
    unoptimised: Sequence[str],
) -> ort.InferenceSession:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        return thread.run(
            lambda: ort.InferenceSession(
                source, options, providers=list(providers), disabled_optimizers=list(unoptimised)
            ),
            stop=lambda: options.set_load_cancellation_flag(True),
        )
    except (state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile) as error:
        raise BundleError(f"ONNX Runtime refuses {path}: {first_line(error)}") from error
    except (state.Fail, state.NotImplemented, state.RuntimeException) as error:
        raise BundleError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from error


def router_logits_names(model: ModelProto) -> tuple[str, ...]:
    """The values by which the graph's MoE layers choose experts, in order."""
    return tuple(node.input[1] for node in model.graph.node if node.op_type == "NemoMoeDispatch")


def recurrence_inputs(model: ModelProto) -> dict[str, tuple[str, str, str]]:
    """The values x, dt and B of each recurrence, by its layer's pool: nodes are named for their layers."""
    scans = (node for node in model.graph.node if node.op_type == "NemoSelectiveScan")
    return {
        f"ssm_state.{node.name.split('.')[1]}": (node.input[0], node.input[1], node.input[3])
        for node in scans
    }


def read_pools(session: ort.InferenceSession, shown: Sequence[str] = ()) -> dict[str, PoolSpec]:
    """The pools in the graph's order; their dtypes are those that the session holds, FP32 under emulation.

    Raises BundleError on an input or output that the contract does not have.
    """
    outputs = {value.name for value in session.get_outputs()}.difference(shown)
    pools: dict[str, PoolSpec] = {}
    for value in session.get_inputs():
        if value.type not in DTYPES:
            raise BundleError(f"the graph's input {value.name} is {value.type}, which cannot be held")
        if NEXT + value.name in outputs:
            rows, *row_shape = value.shape
            pool = PoolSpec(value.name, DTYPES[value.type], tuple(row_shape))
            if rows != pool.axis or not all(isinstance(size, int) for size in row_shape):
                raise BundleError(
                    f"the pool {value.name} has shape {value.shape}; only its first axis may vary, {pool.axis}"
                )
            pools[value.name] = pool
        elif value.name not in STEP_INPUTS:
            raise BundleError(f"the graph's input {value.name} is not known, and no output replaces it")
    unpaired = sorted(outputs - {LOGITS} - {NEXT + name for name in pools})
    if unpaired:
        raise BundleError(f"the graph's output {unpaired[0]} replaces no input")
    return pools


def read_vocab_size(session: ort.InferenceSession) -> int:
    """The width of the logits; raises BundleError when the graph has none."""
    for value in session.get_outputs():
        if value.name == LOGITS and len(value.shape) == 2 and isinstance(value.shape[1], int):
            return value.shape[1]
    raise BundleError(
        "the graph has no output logits [R, vocabulary]", hint="it was not written by this tool"
    )


def first_line(error: Exception) -> str:
    """What the error says, in one line."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    return text.splitlines()[0] if text else type(error).__name__
