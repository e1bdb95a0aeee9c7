"""Runs a `kernels.py` in Triton's interpreter on a CPU, with fixes of the interpreter's number formats.

`interpreted(name)` loads a private copy of a module, its kernels interpreted. The module itself, Triton's
compiler and the environment stay as they were: kernels can be compiled or run on a GPU in the same process.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="kernels need Triton: install nemo-export[kernels]")

import triton.language as tl  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

NARROW = {
    tl.bfloat16: (np.dtype(ml_dtypes.bfloat16), np.inf),
    tl.float8e4nv: (np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
    tl.float8e5: (np.dtype(ml_dtypes.float8_e5m2), 57344.0),
}
"""The formats that the interpreter stores as raw bits: NumPy dtype, and where a GPU's cast saturates."""

PATCHED = (
    *(tl, tl.core, tl.math, tl.standard, tl.random),
    *(tl.tensor, tl.dtype, tl.core.tensor_descriptor_base),
    *(InterpreterBuilder, InterpretedFunction),
)
"""The attributes that an interpreted launch replaces and does not always restore."""


def values(data: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers in an interpreter's array: FP32 for a format stored as bits, else the array itself."""
    narrow = NARROW.get(dtype.scalar)
    return data if narrow is None else data.view(narrow[0]).astype(np.float32)


def stored(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """The interpreter's array for these numbers in a dtype: round to nearest even, saturate FP8, keep NaN."""
    narrow = NARROW.get(dtype.scalar)
    if narrow is None:
        return numbers.astype(interpreter._get_np_dtype(dtype))
    kind, largest = narrow
    return np.clip(numbers.astype(np.float32), -largest, largest).astype(kind).view(f"u{kind.itemsize}")


def _cast(self: Any, source: Any, dtype: Any) -> Any:
    # Upstream truncates FP32 → BF16, and takes a BF16 as its bits when the other side is an integer.
    return TensorHandle(stored(values(source.data, source.dtype), dtype), dtype.scalar)


def _fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
    # Upstream's FP8 casts round half away without carrying into the exponent, and lose NaN and saturation.
    if rounding not in (None, ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"the mended interpreter rounds to nearest even only, not {rounding}")
    return TensorHandle(stored(values(source.data, source.dtype), dtype), dtype.scalar)


_binary_op = InterpreterBuilder.binary_op


def _narrow_binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., np.ndarray]) -> Any:
    # Upstream adds, multiplies and compares the bits of BF16 operands.
    if lhs.dtype.scalar not in NARROW:
        return _binary_op(self, lhs, rhs, op)
    result = op(values(lhs.data, lhs.dtype), values(rhs.data, rhs.dtype))
    return TensorHandle(result if result.dtype == bool else stored(result, lhs.dtype), lhs.dtype.scalar)


_create_dot = InterpreterBuilder.create_dot


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
    # Upstream multiplies the bits of BF16, and computes FP32 exactly where a GPU drops 13 bits of each
    # operand unless the kernel asks for input_precision="ieee".
    if not a.dtype.scalar.is_floating():
        return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    a_values, b_values = values(a.data, a.dtype), values(b.data, b.dtype)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        a_values, b_values = _tf32(a_values), _tf32(b_values)
    return TensorHandle(np.matmul(a_values, b_values, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _tf32(numbers: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(numbers).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _inline_asm(
    self: Any, asm: str, constraints: str, arguments: Any, dtypes: Any, is_pure: bool, pack: int
) -> Any:
    # Upstream runs no assembly. The kernels have one piece: the conversion of FP32 to E4M3.
    if "cvt.rn.satfinite.e4m3x2.f32" not in asm:
        raise NotImplementedError(f"the interpreter does not run {asm.strip()}")
    ((source,), dtype) = arguments, tl.float8e4nv
    result = TensorHandle(stored(values(source.data, source.dtype), dtype), dtype)
    return SimpleNamespace(get_result=lambda index: result)


MENDS: dict[str, Callable[..., Any]] = {
    "cast_impl": _cast,
    "create_fp_to_fp": _fp_to_fp,
    "binary_op": _narrow_binary_op,
    "create_dot": _dot,
    "create_inline_asm": _inline_asm,
}
"""Methods of the interpreter that are wrong for BF16, FP8 or TF32, or missing, and their replacements."""


@functools.cache
def _interpreted_function(function: Callable[..., Any]) -> InterpretedFunction:
    return InterpretedFunction(function)


def _method(function: InterpretedFunction) -> Callable[..., Any]:
    return lambda *arguments, **named: function(*arguments, **named)


def _call(self: InterpretedFunction, *arguments: Any, **named: Any) -> Any:
    # Upstream patches the whole language again at each call of a device function, `tl.sum` among them: 10 ms.
    return self.rewrite()(*arguments, **named)


def _interpret_language() -> None:
    """Replace Triton's own jit functions (`tl.sum`, `tl.cdiv`) by interpreted ones, including methods."""
    interpreter._patch_lang(tl.standard.sum.fn)  # tl.core; a launch patches what its kernel sees, tl
    for module in (tl, tl.standard, tl.random):
        for name, member in list(vars(module).items()):
            if isinstance(member, JITFunction):
                setattr(module, name, _interpreted_function(member.fn))
                if isinstance(vars(tl.tensor).get(name), JITFunction):
                    setattr(tl.tensor, name, _method(_interpreted_function(member.fn)))


@contextmanager
def interpreting(mends: Sequence[str] = tuple(MENDS)) -> Iterator[None]:
    """A context in which interpreted kernels run with the fixes; it may be nested."""
    before = [(owner, dict(vars(owner))) for owner in PATCHED]
    try:
        with triton.knobs.runtime.scope(), np.errstate(all="ignore"):  # a GPU does not trap on inf − inf
            triton.knobs.runtime.interpret = True
            _interpret_language()
            InterpretedFunction.__call__ = _call
            for name in mends:
                setattr(InterpreterBuilder, name, MENDS[name])
            yield
    finally:
        for owner, members in before:
            _restore(owner, members)


def _restore(owner: Any, members: dict[str, Any]) -> None:
    for name, member in list(vars(owner).items()):
        if name in members:
            if member is not members[name]:
                setattr(owner, name, members[name])
        elif isinstance(
            owner, type
        ):  # names added to a module are what its rewritten functions look up: they stay
            delattr(owner, name)


def interpreted(name: str) -> ModuleType:
    """A private copy of a module with interpreted kernels: call `run`, or launch kernels within `interpreting()`."""
    source = importlib.util.find_spec(name)
    if source is None or source.origin is None:
        raise ModuleNotFoundError(f"no module {name}: a kernels module is wanted")
    copy_name = f"{name}__interpreted"
    if copy_name in sys.modules:
        return sys.modules[copy_name]
    spec = importlib.util.spec_from_file_location(copy_name, source.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[copy_name] = module  # dataclasses look their module up
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    foreign = [key for key, member in vars(module).items() if isinstance(member, JITFunction)]
    if foreign:
        raise TypeError(
            f"{name} imports jit functions {foreign}: define them in the module, so that they are interpreted"
        )
    if hasattr(module, "run"):
        module.run = _under_interpreter(module.run)  # type: ignore[attr-defined]
    return module


def _under_interpreter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with interpreting():
            return function(*arguments, **named)

    return run
