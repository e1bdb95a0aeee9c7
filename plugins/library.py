"""Loads a plugin library without TensorRT, and creates single plugins of it.

The library's test entry (host/test_entry.cpp) does with a plugin what TensorRT does: create it from fields, ask for
shapes and workspace, serialize and recreate it, and enqueue it. Everything but the launch works without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from nemotrt.plugins.contract import DType
from nemotrt.plugins.kernel_store import digest
from nemotrt.plugins.link import DESCRIPTION_NAME, LIBRARY_NAME
from nemotrt.plugins.link_tables import specs_digest
from nemotrt.plugins.spec import VERSION, OpSpec, ops

PREBUILT = Path(__file__).parent / "prebuilt"
"""The folder of the library and its description, made by `scripts/make_wheel.py`; absent in a checkout."""

FIELD_FLOAT32, FIELD_INT32 = 1, 5
MAX_RANK = 8

FieldValue = int | float
TensorShape = tuple[str, tuple[int, ...]]
"""A tensor's dtype and sizes."""


class PluginError(ValueError):
    """A plugin library cannot be used, or one of its plugins failed; the message is one line."""


class _Field(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class _Tensor(ctypes.Structure):
    _fields_ = (("dtype", c_int32), ("rank", c_int32), ("shape", c_int64 * MAX_RANK))

    @classmethod
    def of(cls, tensor: TensorShape) -> _Tensor:
        name, sizes = tensor
        return cls(DType(name).tensorrt, len(sizes), (c_int64 * MAX_RANK)(*sizes))

    def read(self) -> TensorShape:
        return DType.lookup("tensorrt", self.dtype), tuple(self.shape[: self.rank])


_ENTRY = "nemo_plugin_test_"
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "errors": (c_char_p, []),
    "driver": (None, [c_char_p]),
    "create": (c_void_p, [c_char_p, c_char_p, POINTER(_Field), c_int32]),
    "destroy": (None, [c_void_p]),
    "shape": (
        c_int32,
        [c_void_p, POINTER(_Tensor), c_int32, POINTER(_Tensor), POINTER(c_int32), POINTER(c_uint64)],
    ),
    "enqueue": (c_int32, [c_void_p, POINTER(c_void_p), POINTER(c_void_p), c_void_p, c_void_p]),
    "launches": (c_char_p, [c_void_p, c_int32]),
}


class Shapes(NamedTuple):
    """The outputs of a plugin for given inputs, and the size of its workspace."""

    outputs: tuple[TensorShape, ...]
    aliases: tuple[int, ...]
    """For each output, the input that it updates in place, or −1."""
    workspace_bytes: int


class PluginLibrary:
    """A loaded plugin library; raises PluginError if it cannot be loaded or has other ops than this package."""

    def __init__(self, path: Path, expected_hash: str | None = None) -> None:
        """Load the library; `expected_hash` is the build that a bundle or wheel requires."""
        try:
            self._library = ctypes.CDLL(str(path))
            describe = self._library.nemo_plugin_describe
        except OSError as error:
            raise PluginError(f"{path} cannot be loaded ({error}): link it again") from None
        except AttributeError:
            raise PluginError(f"{path} is not a plugin library of nemo-export") from None
        describe.restype = c_char_p
        self.path = path
        self.description: dict[str, Any] = json.loads(describe())
        self._check(expected_hash)
        for name, (restype, argtypes) in _SIGNATURES.items():
            function = getattr(self._library, _ENTRY + name)
            function.restype, function.argtypes = restype, argtypes

    def _check(self, expected_hash: str | None) -> None:
        version, build = self.description["version"], self.description["hash"]
        if self.description["op_version"] != VERSION or self.description["specs"] != specs_digest(ops()):
            raise PluginError(
                f"{self.path} has the ops of nemo-export {version}, not of this one: link it again"
            )
        if expected_hash is not None and build != expected_hash:
            raise PluginError(
                f"{self.path} is build {build[:12]}, but build {expected_hash[:12]} is required:"
                " use that library, or build the engine again with this one"
            )

    def entry(self, name: str) -> Any:
        """A function of the test entry."""
        return getattr(self._library, _ENTRY + name)

    def last_error(self) -> PluginError:
        """The error of this thread's last call."""
        lines = self.entry("errors")().decode(errors="replace").splitlines()
        return PluginError("; ".join(lines) or f"{self.path} failed without a message")

    def plugin(self, spec: OpSpec, attributes: Mapping[str, FieldValue], layer: str = "") -> Plugin:
        """A new plugin of an op; raises PluginError if an attribute is missing, unknown or of the wrong type."""
        values = [
            (name, c_float(value) if isinstance(value, float) else c_int32(value))
            for name, value in attributes.items()
        ]
        fields = (_Field * len(values))()
        for field, (name, value) in zip(fields, values, strict=True):
            kind = FIELD_FLOAT32 if isinstance(value, c_float) else FIELD_INT32
            field.name, field.type, field.length = name.encode(), kind, 1
            field.data = ctypes.addressof(value)
        handle = self.entry("create")(spec.name.encode(), layer.encode(), fields, len(values))
        if not handle:
            raise self.last_error()
        return Plugin(self, handle, spec)


class Plugin:
    """A plugin object of one op, destroyed together with this object."""

    def __init__(self, library: PluginLibrary, handle: int, spec: OpSpec) -> None:
        self._library, self._handle, self._spec = library, handle, spec

    def __del__(self) -> None:
        self._library.entry("destroy")(self._handle)

    def shape(self, inputs: Sequence[TensorShape]) -> Shapes:
        """Set the inputs' dtypes and shapes; raises PluginError if the plugin does not support them."""
        count = len(self._spec.outputs)
        tensors = (_Tensor * len(inputs))(*map(_Tensor.of, inputs))
        outputs, aliases = (_Tensor * count)(), (c_int32 * count)()
        workspace = c_uint64()
        if self._library.entry("shape")(
            self._handle, tensors, len(inputs), outputs, aliases, ctypes.byref(workspace)
        ):
            raise self._library.last_error()
        return Shapes(tuple(tensor.read() for tensor in outputs), tuple(aliases), workspace.value)

    def launches(self, sm: int) -> list[dict[str, Any]]:
        """The launches of an enqueue on an SM, in order: variant, grid, and arguments as [name, value or None]."""
        text = self._library.entry("launches")(self._handle, sm)
        if text is None:
            raise self._library.last_error()
        return json.loads(text)  # type: ignore[no-any-return]

    def enqueue(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int) -> None:
        """Enqueue on a stream in the calling thread's CUDA context; takes the addresses of contiguous tensors.

        Raises PluginError if the plugin or the driver fails.
        """
        input_array = (c_void_p * len(inputs))(*inputs)
        output_array = (c_void_p * len(outputs))(*outputs)
        if self._library.entry("enqueue")(self._handle, input_array, output_array, workspace, stream):
            raise self._library.last_error()


def is_shipped() -> bool:
    """Whether this installation contains a plugin library."""
    return PREBUILT.is_dir()


def shipped_library() -> PluginLibrary:
    """The installation's library, loaded; raises PluginError if it differs from what was shipped."""
    path = PREBUILT / LIBRARY_NAME
    try:
        note = json.loads((PREBUILT / DESCRIPTION_NAME).read_bytes())
        content = path.read_bytes()
        sha256, version, build = note["sha256"], note["version"], note["hash"]
    except (OSError, ValueError, KeyError) as error:
        raise PluginError(f"{PREBUILT} is damaged ({error!r}): install nemo-export again") from None
    if digest(content) != sha256:
        raise PluginError(f"{path} has changed since it was installed: install nemo-export again")
    installed = importlib.metadata.version("nemo-export")
    if version != installed:
        raise PluginError(
            f"{path} belongs to nemo-export {version}, not to {installed}: install nemo-export again"
        )
    return PluginLibrary(path, build)
