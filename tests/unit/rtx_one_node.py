"""Builds TensorRT-RTX engines of one plugin node each: cases as JSON on stdin, results as JSON on stdout.

A program of its own, since TensorRT-RTX finds its library for plugins on LD_LIBRARY_PATH as it was at start, and
since an abort must not end the tests.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt_rtx as trt
from onnx import TensorProto, helper

from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, TensorSpec, ops

ONNX_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "int32": TensorProto.INT32,
}
SPECS = {spec.torch_name: spec for spec in ops()}


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, and the description of the engine's layers."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.engine_layers: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """As TensorRT calls it."""
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)
        if message.startswith("Engine Layer Information"):
            self.engine_layers += message.splitlines()[1:]


def size(axis: str | int, sizes: dict[str, Any]) -> Any:
    """An axis' fixed size, or its [least, best, most]."""
    return axis if isinstance(axis, int) else sizes[axis]


def model(spec: OpSpec, case: dict[str, Any]) -> bytes:
    """An ONNX model of the one node."""

    def value(tensor: TensorSpec) -> Any:
        dtype = case["dtypes"].get(tensor.dtype, tensor.dtype)
        shape = [
            str(axis).replace("+", "_")
            if isinstance(size(axis, case["sizes"]), list)
            else size(axis, case["sizes"])
            for axis in tensor.axes
        ]
        return helper.make_tensor_value_info(tensor.name, ONNX_DTYPES[dtype], shape)

    node = helper.make_node(
        spec.name,
        [tensor.name for tensor in spec.inputs],
        [tensor.name for tensor in spec.outputs],
        name="layers.0.op",
        domain=DOMAIN,
        plugin_namespace=DOMAIN,
        plugin_version=str(VERSION),
        **case["attributes"],
    )
    graph = helper.make_graph([node], "one", [*map(value, spec.inputs)], [*map(value, spec.outputs)])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()  # type: ignore[no-any-return]


def build(case: dict[str, Any]) -> dict[str, Any]:
    """What became of one case: its layers, its engine's bytes or None, and errors."""
    spec, log = SPECS[case["op"]], Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    result: dict[str, Any] = {"layers": [], "engine_bytes": None}
    if parser.parse(model(spec, case)):
        result["layers"] = [network.get_layer(i).type.name for i in range(network.num_layers)]
        config = builder.create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{case['sm']}"), 0)
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            bounds = [size(axis, case["sizes"]) for axis in tensor.axes]
            if any(isinstance(bound, list) for bound in bounds):
                shapes = [[b[i] if isinstance(b, list) else b for b in bounds] for i in range(3)]
                profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        result["engine_bytes"] = None if engine is None else engine.nbytes
    return result | {"errors": log.errors, "engine_layers": log.engine_layers}


def main() -> None:
    """Loads the library that the first argument names, and builds each case."""
    first = Log()
    trt.Builder(first)
    if trt.get_plugin_registry().load_library(sys.argv[1]) is None:
        raise SystemExit(f"the library was not loaded: {first.errors}")
    json.dump([build(case) for case in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
