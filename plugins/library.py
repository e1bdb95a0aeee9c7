"""A plugin library in this process: what it says of itself, and its ops run one by one, without TensorRT.

What TensorRT does with a plugin, the library's test entry does (host/test_entry.cpp): create it from fields,
ask for shapes and workspace, serialise it, create it again, enqueue. Without a GPU all but the launch runs.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotrt.plugins.link_tables import specs_digest
from nemotrt.plugins.spec import VERSION, OpSpec, ops

if TYPE_CHECKING:
    import torch

DTYPE_NUMBERS = {
    "float32": 0,
    "float16": 1,
    "int32": 3,
    "float8_e4m3fn": 6,
    "bfloat16": 7,
    "int64": 8,
}
"""Dtype names as the SPECs write them → TensorRT's numbers."""

FIELD_FLOAT32, FIELD_INT32 = 1, 5
MAX_RANK = 8

FieldValue = int | float
TensorShape = tuple[str, tuple[int, ...]]
"""A tensor's dtype, as the SPECs write it, and its sizes."""


class PluginError(ValueError):
    """A plugin library or one of its plugins refused: one line that says what, and which."""


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
    )

    @classmethod
    def of(cls, tensor: TensorShape) -> _Tensor:
        name, sizes = tensor
        return cls(DTYPE_NUMBERS[name], len(sizes), (ctypes.c_int64 * MAX_RANK)(*sizes))

    def read(self) -> TensorShape:
        names = {number: name for name, number in DTYPE_NUMBERS.items()}
        return names[self.dtype], tuple(self.shape[: self.rank])


_ENTRY = "nemo_plugin_test_"
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "errors": (ctypes.c_char_p, []),
    "driver": (None, [ctypes.c_char_p]),
    "create": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Field), ctypes.c_int32]),
    "destroy": (None, [ctypes.c_void_p]),
    "shape": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(_Tensor),
            ctypes.c_int32,
            ctypes.POINTER(_Tensor),
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(ctypes.c_uint64),
        ],
    ),
    "enqueue": (
        ctypes.c_int32,
        [
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_void_p,
            ctypes.c_void_p,
        ],
    ),
    "launches": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int32]),
}


@dataclass(frozen=True)
class Shapes:
    """What a plugin says of a call: its outputs, which input each one lives in, and its workspace."""

    outputs: tuple[TensorShape, ...]
    aliases: tuple[int, ...]
    """The input that an output updates in place, −1 where it has memory of its own."""
    workspace_bytes: int


class PluginLibrary:
    """A plugin library, loaded; raises PluginError where it is none, or not of this package's ops."""

    def __init__(self, path: Path, expected_hash: str | None = None) -> None:
        """Loads it; `expected_hash` is the build that a bundle or a wheel was made with."""
        try:
            self._library = ctypes.CDLL(str(path))
            describe = self._library.nemo_plugin_describe
        except OSError as error:
            raise PluginError(f"{path} cannot be loaded ({error}): link it again") from None
        except AttributeError:
            raise PluginError(f"{path} is no plugin library of this project") from None
        describe.restype = ctypes.c_char_p
        self.path = path
        self.description: dict[str, Any] = json.loads(describe())
        self._check(expected_hash)
        for name, (restype, argtypes) in _SIGNATURES.items():
            function = getattr(self._library, _ENTRY + name)
            function.restype, function.argtypes = restype, argtypes

    def _check(self, expected_hash: str | None) -> None:
        said = self.description
        if said["op_version"] != VERSION or said["specs"] != specs_digest(ops()):
            raise PluginError(
                f"{self.path} has ops of version {said['version']}, not this package's: link it again"
            )
        if expected_hash is not None and said["hash"] != expected_hash:
            raise PluginError(
                f"{self.path} is build {said['hash'][:12]}, wanted is {expected_hash[:12]}:"
                " use that library, or build the engine again with this one"
            )

    def entry(self, name: str) -> Any:
        """A function of the library's test entry."""
        return getattr(self._library, _ENTRY + name)

    def use_driver(self, path: Path) -> None:
        """Takes this library for CUDA's driver, where none was used yet: for tests."""
        self.entry("driver")(str(path).encode())

    def refusal(self) -> PluginError:
        """Why this thread's last call failed, as an exception."""
        lines = self.entry("errors")().decode(errors="replace").splitlines()
        return PluginError("; ".join(lines) or f"{self.path} failed and said nothing")

    def plugin(self, spec: OpSpec, attributes: Mapping[str, FieldValue], layer: str = "") -> Plugin:
        """A plugin of an op; raises PluginError where an attribute is missing, unknown or of another type."""
        values = [
            (name, ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value))
            for name, value in attributes.items()
        ]
        fields = (_Field * len(values))()
        for field, (name, value) in zip(fields, values, strict=True):
            kind = FIELD_FLOAT32 if isinstance(value, ctypes.c_float) else FIELD_INT32
            field.name, field.type, field.length = name.encode(), kind, 1
            field.data = ctypes.addressof(value)
        handle = self.entry("create")(spec.name.encode(), layer.encode(), fields, len(values))
        if not handle:
            raise self.refusal()
        return Plugin(self, handle, spec)

    def run(self, spec: OpSpec, *tensors: torch.Tensor, **attributes: FieldValue) -> tuple[torch.Tensor, ...]:
        """What the op's reference gives, by the library: inputs in SPEC order → outputs, new pools.

        Tensors lie on one device, whose context is current. Raises PluginError where the plugin refuses.
        """
        import torch

        inputs = [tensor.contiguous() for tensor in tensors]
        plugin = self.plugin(spec, attributes)
        described = [(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in inputs]
        shapes = plugin.shape(described)
        outputs = []
        for (name, sizes), alias in zip(shapes.outputs, shapes.aliases, strict=True):
            if alias >= 0:
                inputs[alias] = inputs[alias].clone()
                outputs.append(inputs[alias])
            else:
                outputs.append(torch.empty(sizes, dtype=getattr(torch, name), device=inputs[0].device))
        workspace = torch.empty(shapes.workspace_bytes, dtype=torch.uint8, device=inputs[0].device)
        is_gpu = inputs[0].is_cuda
        stream = torch.cuda.current_stream(inputs[0].device).cuda_stream if is_gpu else 0
        plugin.enqueue(
            [tensor.data_ptr() for tensor in inputs],
            [tensor.data_ptr() for tensor in outputs],
            workspace.data_ptr(),
            stream,
        )
        if is_gpu:  # the workspace must outlive the launches
            torch.cuda.current_stream(inputs[0].device).synchronize()
        return tuple(outputs)


class Plugin:
    """One op's plugin object; freed with this one."""

    def __init__(self, library: PluginLibrary, handle: int, spec: OpSpec) -> None:
        self._library, self._handle, self._spec = library, handle, spec

    def __del__(self) -> None:
        self._library.entry("destroy")(self._handle)

    def shape(self, inputs: Sequence[TensorShape]) -> Shapes:
        """Sets the inputs' dtypes and shapes; raises PluginError where the plugin refuses them."""
        count = len(self._spec.outputs)
        given = (_Tensor * len(inputs))(*map(_Tensor.of, inputs))
        outputs, aliases = (_Tensor * count)(), (ctypes.c_int32 * count)()
        workspace = ctypes.c_uint64()
        if self._library.entry("shape")(
            self._handle, given, len(inputs), outputs, aliases, ctypes.byref(workspace)
        ):
            raise self._library.refusal()
        return Shapes(tuple(tensor.read() for tensor in outputs), tuple(aliases), workspace.value)

    def launches(self, sm: int) -> list[dict[str, Any]]:
        """What an enqueue launches on an SM, in order: variant, grid, arguments as [name, value or None]."""
        text = self._library.entry("launches")(self._handle, sm)
        if text is None:
            raise self._library.refusal()
        return json.loads(text)  # type: ignore[no-any-return]

    def enqueue(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        """Enqueues on a stream, in the calling thread's CUDA context; addresses are of contiguous tensors.

        Raises PluginError where the plugin or the driver refuses.
        """
        given = (ctypes.c_void_p * len(inputs))(*inputs)
        taken = (ctypes.c_void_p * len(outputs))(*outputs)
        if self._library.entry("enqueue")(self._handle, given, taken, workspace, stream):
            raise self._library.refusal()
