"""Generates the C++ tables of ops and kernels (host/tables.h), and the assembler file that embeds the cubins."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from nemotrt.plugins.contract import DType
from nemotrt.plugins.kernel_index import Kernel, KernelError
from nemotrt.plugins.kernel_store import digest
from nemotrt.plugins.spec import DOMAIN, VERSION, OpSpec, TensorSpec

CUBIN_SYMBOL = "nemo_cubin_{}"


def specs_digest(ops: Iterable[OpSpec]) -> str:
    """A hash of what a library and a graph must agree on: inputs, outputs, attributes and dtypes of the ops."""
    return digest(
        [
            [
                spec.name,
                [[tensor.name, tensor.axes, tensor.dtype] for tensor in (*spec.inputs, *spec.outputs)],
                len(spec.inputs),
                [[name, kind.__name__] for name, kind in spec.attributes.items()],
                spec.dtypes,
                VERSION,
            ]
            for spec in ops
        ]
    )


class Tables:
    """Collects constant arrays, each distinct one once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[tuple[str, ...], str] = {}

    def array(self, kind: str, rows: Sequence[str]) -> str:
        """The expression for a `List<kind>` of these rows."""
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


def text(value: object) -> str:
    """A C++ string literal; JSON's escapes are valid, since names are ASCII."""
    return json.dumps(str(value))


def flag(value: bool) -> str:
    """A C++ bool literal."""
    return "true" if value else "false"


def row(*fields: object) -> str:
    """A C++ initializer list."""
    return f"{{{', '.join(map(str, fields))}}}"


def axis_row(axis: str | int) -> str:
    """An axis: a name and an offset (`B+1`), or a fixed size."""
    if isinstance(axis, int):
        return row("nullptr", axis)
    match = re.fullmatch(r"(\w+)([+-]\d+)?", axis)
    if not match:
        raise KernelError(f"axis {axis} is neither a name nor a name plus or minus a number")
    return row(text(match[1]), int(match[2] or 0))


def tensor_row(tables: Tables, spec: OpSpec, tensor: TensorSpec, replaces: int) -> str:
    """An input or output, whose dtype is the index of a variable (−1 for none) and a fixed dtype."""
    axes = tables.array("Axis", [axis_row(axis) for axis in tensor.axes])
    is_variable = tensor.dtype in spec.dtypes
    variable = list(spec.dtypes).index(tensor.dtype) if is_variable else -1
    fixed = dtype(DType.FLOAT32 if is_variable else DType(tensor.dtype))
    return row(text(tensor.name), axes, variable, fixed, replaces)


def dtype(kind: DType) -> str:
    """The C++ expression of a dtype."""
    return f"nvinfer1::DataType{{{kind.tensorrt}}}"


def kernel_row(tables: Tables, kernel: Kernel, symbol: str) -> str:
    """One compiled kernel."""
    variant = kernel.variant
    parameters = [
        row(text(name), text(kind), flag(name in variant.aligned)) for name, kind in variant.signature.items()
    ]
    # The host compares constants as text: integers in digits, true as 1.
    constants = [
        row(text(name), text(int(value) if isinstance(value, bool) else value))
        for name, value in variant.constants.items()
    ]
    return row(
        *map(text, (variant.kernel, variant.name, kernel.entry)),
        *(tables.array("Parameter", parameters), kernel.hidden_pointers, tables.array("Constant", constants)),
        *(32 * variant.num_warps, kernel.shared, symbol),
    )


def op_row(tables: Tables, spec: OpSpec, kernels: Sequence[tuple[Kernel, str]]) -> str:
    """One op, with its kernels grouped by SM."""
    inputs = [tensor_row(tables, spec, tensor, -1) for tensor in spec.inputs]
    outputs = [
        tensor_row(tables, spec, tensor, spec.pools.get(i, -1)) for i, tensor in enumerate(spec.outputs)
    ]
    attributes = [row(text(name), flag(kind is float)) for name, kind in spec.attributes.items()]
    variables = [
        row(text(name), tables.array("nvinfer1::DataType", [dtype(kind) for kind in allowed]))
        for name, allowed in spec.dtypes.items()
    ]
    sms = []
    for sm in sorted({kernel.sm for kernel, _ in kernels}):
        rows = [kernel_row(tables, kernel, symbol) for kernel, symbol in kernels if kernel.sm == sm]
        sms.append(row(sm, tables.array("KernelRow", rows)))
    code = "k" + "".join(part.capitalize() for part in spec.torch_name.split("_"))
    arrays = {"AttributeRow": attributes, "DtypeRow": variables, "SmRow": sms}
    return row(
        text(spec.name),
        *(tables.array("TensorRow", tensors) for tensors in (inputs, outputs)),
        *(tables.array(kind, rows) for kind, rows in arrays.items()),
        f"&{code}",
    )


def cpp_tables(ops: Sequence[OpSpec], kernels: Sequence[Kernel]) -> str:
    """The C++ source that defines `kOps`."""
    tables = Tables()
    named = [(kernel, CUBIN_SYMBOL.format(i)) for i, kernel in enumerate(kernels)]
    rows = [
        op_row(tables, spec, [(kernel, symbol) for kernel, symbol in named if kernel.op == spec.torch_name])
        for spec in ops
    ]
    all_ops = tables.array("OpRow", rows)
    cubins = [f'extern "C" unsigned char const {symbol}[];' for _, symbol in named]
    lines = [
        "// Generated from the op SPECs and the kernel index; do not edit.",
        '#include "host/tables.h"',
        *cubins,
        "namespace nemo {",
        "namespace {",
        *tables.lines,
        "}  // namespace",
        f"List<OpRow> const kOps{all_ops};",
        f"char const* const kNamespace = {text(DOMAIN)};",
        f"char const* const kVersion = {text(VERSION)};",
        "}  // namespace nemo",
    ]
    return "\n".join(lines) + "\n"


def cpp_description(description: dict[str, Any]) -> str:
    """The C++ source that defines `kDescription`."""
    literal = text(json.dumps(description))
    return (
        '#include "host/tables.h"\n'
        f"namespace nemo {{\nchar const* const kDescription = {literal};\n}}  // namespace nemo\n"
    )


def assembler(kernels: Sequence[Kernel]) -> str:
    """Assembler source that embeds each kernel's cubin, by its path relative to the index."""
    lines = ['.section .rodata.nemo,"a",%progbits']
    for i, kernel in enumerate(kernels):
        if not re.fullmatch(r"[\w./-]+", kernel.file):
            raise KernelError(f"{kernel.file} is not a valid path of a cubin: compile the kernels again")
        symbol = CUBIN_SYMBOL.format(i)
        lines += [f".balign 64\n.globl {symbol}\n.hidden {symbol}\n{symbol}:", f'.incbin "{kernel.file}"']
    lines.append('.section .note.GNU-stack,"",%progbits')
    return "\n".join(lines) + "\n"
