"""The op SPECs and the kernel index as C++ tables (host/tables.h), and the assembler file of cubins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from nemotrt.plugins.kernel_index import Kernel, KernelError
from nemotrt.plugins.kernel_store import digest
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, TensorSpec

TENSORRT_DTYPES = {
    "float32": "kFLOAT",
    "float16": "kHALF",
    "bfloat16": "kBF16",
    "float8_e4m3fn": "kFP8",
    "int32": "kINT32",
    "int64": "kINT64",
}
"""Dtype names as the SPECs write them → TensorRT's enumerators."""

CUBIN_SYMBOL = "nemo_cubin_{}"


def specs_digest(ops: Iterable[OpSpec]) -> str:
    """A hash of what a library and a graph must agree on: the ops' inputs, outputs, attributes and dtypes."""
    return digest(
        [
            [
                spec.name,
                [[tensor.name, tensor.axes, tensor.dtype] for tensor in (*spec.inputs, *spec.outputs)],
                len(spec.inputs),
                [[attribute.name, attribute.type.__name__] for attribute in spec.attributes],
                spec.dtypes,
                VERSION,
            ]
            for spec in ops
        ]
    )


class Tables:
    """Writes constant arrays, equal ones once: `array` gives the expression that names one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[tuple[str, ...], str] = {}

    def array(self, kind: str, rows: Sequence[str]) -> str:
        """A `List<kind>` of these rows."""
        if not rows:
            return "{nullptr, 0}"
        key = (kind, *rows)
        if key not in self._known:
            name = f"k{kind.rpartition(':')[2]}{len(self._known)}"
            self.lines.append(f"{kind} const {name}[] = {{")
            self.lines += [f"    {row}," for row in rows]
            self.lines.append("};")
            self._known[key] = f"{{{name}, {len(rows)}}}"
        return self._known[key]


def text(value: str) -> str:
    """A C++ string literal; its escapes are JSON's where a name holds only ASCII."""
    return json.dumps(value)


def axis_row(axis: str | int) -> str:
    """An axis: a name and an offset (`B+1`), or a literal size."""
    if isinstance(axis, int):
        return f"{{nullptr, {axis}}}"
    found = re.fullmatch(r"(\w+)([+-]\d+)?", axis)
    if not found:
        raise KernelError(f"axis {axis} is neither a name nor a name plus or minus a number")
    return f"{{{text(found[1])}, {int(found[2] or 0)}}}"


def tensor_row(tables: Tables, spec: OpSpec, tensor: TensorSpec, replaces: int) -> str:
    """An input or output; its dtype is a variable's index or a literal."""
    axes = tables.array("Axis", [axis_row(axis) for axis in tensor.axes])
    variable = list(spec.dtypes).index(tensor.dtype) if tensor.dtype in spec.dtypes else -1
    literal = dtype(tensor.dtype if variable < 0 else "float32")
    return f"{{{text(tensor.name)}, {axes}, {variable}, {literal}, {replaces}}}"


def dtype(name: str) -> str:
    """TensorRT's enumerator of a dtype."""
    return f"nvinfer1::DataType::{TENSORRT_DTYPES[name]}"


def constant(value: Any) -> str:
    """A compile-time constant as the host compares it: integers in digits, true as 1."""
    return str(int(value) if isinstance(value, bool) else value)


def kernel_row(tables: Tables, kernel: Kernel, symbol: str) -> str:
    """One compiled form of a kernel."""
    parameters = [
        f"{{{text(parameter.name)}, {text(parameter.type)}, {str(parameter.aligned).lower()}}}"
        for parameter in kernel.parameters
    ]
    constants = [f"{{{text(name)}, {text(constant(value))}}}" for name, value in kernel.constants.items()]
    fields = [
        text(kernel.kernel),
        text(kernel.variant),
        text(kernel.entry),
        tables.array("Parameter", parameters),
        str(kernel.hidden_pointers),
        tables.array("Constant", constants),
        str(32 * kernel.num_warps),
        str(kernel.shared),
        symbol,
    ]
    return f"{{{', '.join(fields)}}}"


def op_row(tables: Tables, spec: OpSpec, kernels: Sequence[tuple[Kernel, str]]) -> str:
    """One op with its kernels by SM."""
    inputs = [tensor_row(tables, spec, tensor, -1) for tensor in spec.inputs]
    outputs = [
        tensor_row(tables, spec, tensor, spec.pools.get(i, -1)) for i, tensor in enumerate(spec.outputs)
    ]
    attributes = [
        f"{{{text(attribute.name)}, {str(attribute.type is float).lower()}}}" for attribute in spec.attributes
    ]
    variables = [
        f"{{{text(name)}, {tables.array('nvinfer1::DataType', [dtype(one) for one in allowed])}}}"
        for name, allowed in spec.dtypes.items()
    ]
    sms = []
    for sm in sorted({kernel.sm for kernel, _ in kernels}):
        rows = [kernel_row(tables, kernel, symbol) for kernel, symbol in kernels if kernel.sm == sm]
        sms.append(f"{{{sm}, {tables.array('KernelRow', rows)}}}")
    code = "k" + "".join(part.capitalize() for part in spec.torch_name.split("_"))
    fields = [
        text(spec.name),
        tables.array("TensorRow", inputs),
        tables.array("TensorRow", outputs),
        tables.array("AttributeRow", attributes),
        tables.array("DtypeRow", variables),
        tables.array("SmRow", sms),
        f"&{code}",
    ]
    return f"{{{', '.join(fields)}}}"


def cpp_tables(ops: Sequence[OpSpec], kernels: Sequence[Kernel]) -> str:
    """The C++ source of `kOps` and what it refers to."""
    tables = Tables()
    named = [(kernel, CUBIN_SYMBOL.format(i)) for i, kernel in enumerate(kernels)]
    rows = [
        op_row(tables, spec, [(kernel, symbol) for kernel, symbol in named if kernel.op == spec.torch_name])
        for spec in ops
    ]
    all_ops = tables.array("OpRow", rows)
    cubins = [f'extern "C" unsigned char const {symbol}[];' for _, symbol in named]
    lines = [
        "// Written from the op SPECs and the kernel index: change those, not this.",
        '#include "host/tables.h"',
        *cubins,
        "namespace nemo {",
        "namespace {",
        *tables.lines,
        "}  // namespace",
        f"List<OpRow> const kOps{all_ops};",
        f"char const* const kNamespace = {text(DOMAIN)};",
        f"char const* const kVersion = {text(str(VERSION))};",
        "}  // namespace nemo",
    ]
    return "\n".join(lines) + "\n"


def cpp_description(description: dict[str, Any]) -> str:
    """The C++ source of `kDescription`."""
    literal = text(json.dumps(description))
    return (
        '#include "host/tables.h"\n'
        f"namespace nemo {{\nchar const* const kDescription = {literal};\n}}  // namespace nemo\n"
    )


def assembler(kernels: Sequence[Kernel]) -> str:
    """Assembler that embeds each kernel's cubin, by its path relative to the index."""
    lines = ['.section .rodata.nemo,"a",%progbits']
    for i, kernel in enumerate(kernels):
        if not re.fullmatch(r"[\w./-]+", kernel.file):
            raise KernelError(f"{kernel.file} is no path of a cubin: compile the kernels again")
        symbol = CUBIN_SYMBOL.format(i)
        lines += [f".balign 64\n.globl {symbol}\n.hidden {symbol}\n{symbol}:", f'.incbin "{kernel.file}"']
    lines.append('.section .note.GNU-stack,"",%progbits')
    return "\n".join(lines) + "\n"
