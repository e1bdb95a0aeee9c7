"""Kernels with one operation each, to test what the interpreter does with it."""

import triton
import triton.language as tl


@triton.jit
def cast(source, target, SIZE: tl.constexpr):
    """Target = source, in the target's dtype."""
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def product(a, b, target, SIZE: tl.constexpr):
    """Target = a · b in the operands' dtype."""
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(a + index) * tl.load(b + index))


@triton.jit
def dot(a, b, target, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Target = a @ b for square matrices, in FP32."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(target + index, tl.dot(tl.load(a + index), tl.load(b + index), input_precision=PRECISION))


@triton.jit
def row_sums(source, target, SIZE: tl.constexpr):
    """Target = the sums of source's rows, by a function and by a method."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    rows = tl.load(source + index)
    tl.store(target + tl.arange(0, SIZE), tl.sum(rows, axis=1) / 2 + rows.sum(axis=1) / 2)
