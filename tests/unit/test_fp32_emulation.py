"""The FP32 emulation of a BF16 or FP16 graph rounds where the graph does, and computes nothing in BF16 or FP16."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from op_attributes import MOE

from nemotrt.exporter.errors import BundleError
from nemotrt.exporter.runtime.fp32_emulation import MOVES, NARROW, emulate_in_fp32, needs_emulation
from nemotrt.plugins import onnx_op
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, ops

NUMPY = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
NAMES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
half_types = pytest.mark.parametrize("half", NUMPY, ids=NAMES.values())

Rounding = Callable[[np.ndarray], np.ndarray]


def rounding(half: int) -> Rounding:
    return lambda values: np.asarray(values).astype(NUMPY[half]).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, int],
    outputs: dict[str, int],
    weights: dict[str, np.ndarray] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    """A model whose every input is [rows, 4]."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, dtype, ["rows", 4]) for name, dtype in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            yield from all_graphs(attribute.g)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    return (node for inner in all_graphs(graph) for node in inner.node)


def random(half: int, *shape: int, seed: int = 0) -> np.ndarray:
    """FP32 values that the half type can represent."""
    return rounding(half)(np.random.default_rng(seed).standard_normal(shape))


def node(op_type: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


@half_types
def test_every_operator_is_rounded_once(half: int) -> None:
    r = rounding(half)
    weight, bias = random(half, 5, 4, seed=1), random(half, 5, seed=2)
    model = model_of(
        [
            node("Mul", "x x", "square"),
            node("Add", "square x", "sum"),
            node("Gemm", "sum weight bias", "linear", transB=1),
            node("Sigmoid", "linear", "gate"),
            node("Mul", "linear gate", "silu"),
            node("Cast", "silu", "y", to=TensorProto.FLOAT),
        ],
        {"x": half},
        {"y": TensorProto.FLOAT},
        {"weight": weight.astype(NUMPY[half]), "bias": bias.astype(NUMPY[half])},
    )
    x = random(half, 50, 4)
    linear = r(r(r(x * x) + x).astype(np.float64) @ weight.T.astype(np.float64) + bias)
    gate = r(1 / (1 + np.exp(-linear.astype(np.float64))))
    (y,) = run(emulate_in_fp32(model), x=x)
    # An FP32 sum in another order may fall on the other side of a rounding boundary, now and then.
    assert np.mean(y == r(linear * gate)) > 0.97
    np.testing.assert_array_equal(y, r(y))


@half_types
def test_moving_and_choosing_need_no_rounding(half: int) -> None:
    model = model_of(
        [
            node("Relu", "x", "positive"),
            node("Max", "positive table", "largest"),
            node("Concat", "x largest", "both", axis=0),
            node("Transpose", "both", "y", perm=[1, 0]),
        ],
        {"x": half},
        {"y": half},
        {"table": random(half, 1, 4, seed=1).astype(NUMPY[half])},
    )
    emulated = emulate_in_fp32(model)
    casts = [one for one in all_nodes(emulated.graph) if one.op_type == "Cast"]
    assert [(one.input[0], one.attribute[0].i) for one in casts] == [("table", TensorProto.FLOAT)]
    x = random(half, 3, 4)
    largest = np.maximum(np.maximum(x, 0), random(half, 1, 4, seed=1))
    np.testing.assert_array_equal(run(emulated, x=x)[0], np.concatenate([x, largest]).T)


@half_types
def test_a_gathered_weight_stays_half(half: int) -> None:
    table = random(half, 7, 4, seed=1)
    model = model_of(
        [
            node("Cast", "x", "index", to=TensorProto.INT64),
            node("Gather", "table index", "rows", axis=0),
            node("Reshape", "rows shape", "flat"),
            node("Mul", "flat flat", "y"),
        ],
        {"x": TensorProto.FLOAT},
        {"y": half},
        {"table": table.astype(NUMPY[half]), "shape": np.asarray([-1], np.int64)},
    )
    emulated = emulate_in_fp32(model)
    assert [tensor.data_type for tensor in emulated.graph.initializer] == [half, TensorProto.INT64]
    (widened,) = (one for one in emulated.graph.node if one.op_type == "Cast" and "flat" in one.input)
    assert widened.attribute[0].i == TensorProto.FLOAT
    index = np.asarray([[6, 0, 3, 3]], np.float32)
    expected = rounding(half)(table[index.astype(int)].reshape(-1) ** 2)
    np.testing.assert_array_equal(run(emulated, x=index)[0], expected)


@half_types
def test_a_weight_that_a_scan_hands_over_stays_half(half: int) -> None:
    stack = random(half, 3, 4, 4, seed=1)
    body = helper.make_graph(
        [node("Cast", "weight", "wide", to=TensorProto.FLOAT), node("MatMul", "state wide", "next")],
        "body",
        [onnx.ValueInfoProto(name="state"), onnx.ValueInfoProto(name="weight")],
        [onnx.ValueInfoProto(name="next")],
    )
    model = model_of(
        [
            node("Cast", "x", "first", to=TensorProto.FLOAT),
            node("Scan", "first stack", "last", body=body, num_scan_inputs=1),
            node("Cast", "last", "y", to=half),
        ],
        {"x": half},
        {"y": half},
        {"stack": stack.astype(NUMPY[half])},
    )
    emulated = emulate_in_fp32(model)
    assert [tensor.data_type for tensor in emulated.graph.initializer] == [half]
    (scan,) = (one for one in emulated.graph.node if one.op_type == "Scan")
    assert scan.input[1] == "stack"
    x = random(half, 2, 4)
    np.testing.assert_allclose(
        run(emulated, x=x)[0], rounding(half)(x @ stack[0] @ stack[1] @ stack[2]), rtol=1e-2
    )


@half_types
def test_a_half_output_straight_from_a_weight_is_widened(half: int) -> None:
    table = random(half, 7, 4, seed=1)
    model = model_of(
        [node("Cast", "x", "index", to=TensorProto.INT64), node("Gather", "table index", "y")],
        {"x": TensorProto.FLOAT},
        {"y": half},
        {"table": table.astype(NUMPY[half])},
    )
    emulated = emulate_in_fp32(model)
    # What was gathered is widened, not the table.
    (gather,) = (one for one in emulated.graph.node if one.op_type == "Gather")
    assert gather.input[0] == "table"
    (y,) = run(emulated, x=np.zeros((1, 4), np.float32))
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, table[np.zeros((1, 4), int)])


@half_types
def test_weights_that_meet_only_weights_are_computed_with_in_fp32(half: int) -> None:
    table, scale = random(half, 1, 4, seed=1), random(half, 1, 4, seed=2)
    model = model_of(
        [node("Mul", "table scale", "product"), node("Add", "x product", "y")],
        {"x": half},
        {"y": half},
        {"table": table.astype(NUMPY[half]), "scale": scale.astype(NUMPY[half])},
    )
    x, r = random(half, 3, 4), rounding(half)
    np.testing.assert_array_equal(run(emulate_in_fp32(model), x=x)[0], r(x + r(table * scale)))


@half_types
def test_rounding_inside_functions_branches_and_loops_is_kept(half: int) -> None:
    """A function that halves by CastLike, called from a branch and from a loop over rows."""
    body = helper.make_function(
        DOMAIN,
        "Twice",
        ["v"],
        ["w"],
        [
            node("Cast", "v", "wide", to=TensorProto.FLOAT),
            node("Mul", "wide wide", "exact"),
            node("CastLike", "exact v", "rounded"),
            node("Add", "rounded v", "w"),
        ],
        [helper.make_opsetid("", 23)],
    )

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(name, half, None)])

    step = helper.make_graph(
        [node("Add", "sum row", "next"), node("Twice", "next", "each", domain=DOMAIN)],
        "step",
        [helper.make_tensor_value_info(name, half, [4]) for name in ("sum", "row")],
        [helper.make_tensor_value_info(name, half, [4]) for name in ("next", "each")],
    )
    model = model_of(
        [
            node("ReduceSum", "x", "total", keepdims=0),
            node("Cast", "total", "wide_total", to=TensorProto.FLOAT),
            node("Greater", "wide_total zero", "is_positive"),
            node(
                "If",
                "is_positive",
                "chosen",
                then_branch=branch("then", node("Twice", "x", "then", domain=DOMAIN)),
                else_branch=branch("else", node("Identity", "x", "else")),
            ),
            node("Scan", "start chosen", "last y", body=step, num_scan_inputs=1),
        ],
        {"x": half},
        {"last": half, "y": half},
        {"zero": np.zeros((), np.float32), "start": np.zeros(4, NUMPY[half])},
        [body],
    )
    r = rounding(half)

    def twice(v: np.ndarray) -> np.ndarray:
        return r(r(v * v) + v)

    emulated = emulate_in_fp32(model)
    for x in (np.abs(random(half, 6, 4)), -np.abs(random(half, 6, 4))):
        rows = twice(x) if x.sum() > 0 else x
        total, expected = np.zeros(4, np.float32), []
        for row in rows:
            total = r(total + row)
            expected.append(twice(total))
        last, y = run(emulated, x=x)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(last, total)


def test_constants_and_casts_between_the_halves_are_followed() -> None:
    value = numpy_helper.from_array(np.asarray([0.1], ml_dtypes.bfloat16))
    model = model_of(
        [
            node("Constant", "", "tenth", value=value),
            node("Mul", "x tenth", "product"),
            node("Cast", "product", "y", to=TensorProto.FLOAT16),
        ],
        {"x": TensorProto.BFLOAT16},
        {"y": TensorProto.FLOAT16},
    )
    x = random(TensorProto.BFLOAT16, 20, 4)
    tenth = rounding(TensorProto.BFLOAT16)(np.asarray([0.1]))
    expected = rounding(TensorProto.FLOAT16)(rounding(TensorProto.BFLOAT16)(x * tenth))
    np.testing.assert_array_equal(run(emulate_in_fp32(model), x=x)[0], expected)


def test_an_overflow_of_fp16_shows_in_the_emulation_and_not_in_onnx_runtime_itself() -> None:
    # Why FP16 is emulated too. When the second assertion fails, ONNX Runtime rounds between operators.
    model = model_of(
        [node("Mul", "x x", "large"), node("Div", "large x", "y")],
        {"x": TensorProto.FLOAT16},
        {"y": TensorProto.FLOAT16},
    )
    x = np.full((1, 4), 1000, np.float32)
    assert np.isinf(run(emulate_in_fp32(model), x=x)[0]).all()
    assert (run(model, x=x.astype(np.float16))[0] == 1000).all()


def test_only_narrow_graphs_need_an_emulation() -> None:
    same = [node("Identity", "x", "y")]
    assert not needs_emulation(model_of(same, {"x": TensorProto.FLOAT}, {"y": TensorProto.FLOAT}))
    assert needs_emulation(model_of(same, {"x": TensorProto.BFLOAT16}, {"y": TensorProto.BFLOAT16}))
    inside = [
        node("Cast", "x", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "y", to=TensorProto.FLOAT),
    ]
    assert needs_emulation(model_of(inside, {"x": TensorProto.FLOAT}, {"y": TensorProto.FLOAT}))
    opsets = [helper.make_opsetid("", 23)]
    function = helper.make_function(DOMAIN, "Half", ["x"], ["y"], inside, opsets)
    call = [node("Half", "x", "y", domain=DOMAIN)]
    float32 = TensorProto.FLOAT
    assert needs_emulation(model_of(call, {"x": float32}, {"y": float32}, functions=[function]))


def test_a_graph_whose_types_contradict_is_refused() -> None:
    model = model_of([node("Identity", "x", "y")], {"x": TensorProto.BFLOAT16}, {"y": TensorProto.BFLOAT16})
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(BundleError, match="types cannot be inferred"):
        emulate_in_fp32(model)


SIZES = {"C": 12, "K": 4, "K-1": 3, "S": 4, "T": 9, "B": 3, "B+1": 4, "H": 4, "P": 4, "G": 2, "N": 8} | {
    "Q": 4, "V": 2, "D": 8, "page": 4, "M": 2, "E": 4, "R": 4, "L": 16, "I": 8
}  # fmt: skip
PACKED = {
    "query_start": [0, 6, 6, 7],
    "context_len": [0, 0, 2],
    "slot": [3, 0, 1],
    "page_table": [[4, 5], [0, 0], [7, 2]],
}
ATTRIBUTES = {
    "dt_min": 0.0,
    "dt_max": float("inf"),
    "scale": 8**-0.5,
    **MOE,
}


def op_inputs(spec: OpSpec, half: int) -> dict[str, torch.Tensor]:
    """A mixed batch: a fresh prompt, an empty sequence, one decoding token, padding."""
    sizes = SIZES | ({"K": 8} if spec.label == "attention" else {})
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for tensor in spec.inputs:
        if tensor.name in PACKED:
            inputs[tensor.name] = torch.tensor(PACKED[tensor.name], dtype=torch.int32)
            continue
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes]
        values = torch.randn(shape, generator=generator)
        values = -values.abs() if tensor.name == "A" else values
        is_one = tensor.name.endswith("_scale")
        dtype = getattr(torch, NAMES[half] if tensor.dtype in spec.dtypes else tensor.dtype)
        inputs[tensor.name] = (torch.ones(shape) if is_one else values).to(dtype)
    if "ssm_state" in inputs:
        inputs["ssm_state"] = inputs["ssm_state"].float()
    return inputs


def op_model(spec: OpSpec, inputs: dict[str, torch.Tensor], half: int) -> onnx.ModelProto:
    """The op alone, as a node with its function."""
    types = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}
    values = [ir.val(name, ir.DataType(types.get(t.dtype, half)), t.shape) for name, t in inputs.items()]
    state = TensorProto.FLOAT
    results = [
        ir.val(tensor.name, ir.DataType(state if tensor.name == "next_ssm_state" else half))
        for tensor in spec.outputs
    ]
    attributes = {name: ATTRIBUTES[name] for name in spec.attributes}
    found = spec.sizes([tuple(t.shape) for t in inputs.values()])
    sizes = {axis: size for axis, size in found.items() if axis not in ("T", "B", "S", "M")}
    call = onnx_op.node(spec, values, results, attributes, spec.label)
    opsets = {"": onnx_op.OPSET, DOMAIN: VERSION}
    graph = ir.Graph(values, results, nodes=[call], opset_imports=opsets, name="op")
    functions = [onnx_op.function(spec, sizes, attributes)]
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=functions))


@half_types
@pytest.mark.parametrize("spec", ops(), ids=lambda spec: spec.label)
def test_every_op_is_within_its_tolerance_of_the_half_reference(spec: OpSpec, half: int) -> None:
    inputs = op_inputs(spec, half)
    emulated = emulate_in_fp32(op_model(spec, inputs, half))
    feeds = {name: t.float().numpy() if t.is_floating_point() else t.numpy() for name, t in inputs.items()}
    attributes = {name: ATTRIBUTES[name] for name in spec.attributes}
    expected = spec.reference()(*inputs.values(), **attributes)
    tolerance = spec.tolerances[NAMES[half]].relative_l2
    for tensor, candidate, reference in zip(spec.outputs, run(emulated, **feeds), expected, strict=True):
        wanted = reference.float().numpy()
        if tensor.name.startswith("next_"):
            # Row 0 of a pool is scratch: nobody's values.
            candidate, wanted = candidate[1:], wanted[1:]
        error = np.linalg.norm(candidate - wanted) / np.linalg.norm(wanted)
        assert error <= tolerance, f"{tensor.name}: {error:.2e}"
        if tensor.name != "next_ssm_state":
            np.testing.assert_array_equal(candidate, rounding(half)(candidate))


@pytest.mark.parametrize("spec", ops(), ids=lambda spec: spec.label)
def test_no_half_value_is_computed_with(spec: OpSpec) -> None:
    model = op_model(spec, op_inputs(spec, TensorProto.BFLOAT16), TensorProto.BFLOAT16)
    typed = onnx.shape_inference.infer_shapes(emulate_in_fp32(model), strict_mode=True)
    infos = [value for graph in all_graphs(typed.graph) for value in graph.value_info]
    half = {value.name for value in infos if value.type.tensor_type.elem_type in NARROW}
    assert half
    for one in all_nodes(typed.graph):
        assert one.op_type in MOVES | {"Cast"} or not half.intersection(one.input)
