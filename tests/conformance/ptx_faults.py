"""Faults put into compiled PTX, and the finding that each must give; test_emulator.py runs them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from emulation import EXPERTS, MIXTURE
from op_cases import FP8, TOY, Case, decode, prefill

WRONG = "CheckFailed"
"""The finding of a fault that no check of an access sees: the result is not the reference's."""

Edit = Callable[[str], str]


@dataclass(frozen=True)
class PtxFault:
    """A fault in one kernel of a case."""

    title: str
    case: Case
    sm: int
    kernel: str
    edit: Edit
    finding: str
    """A pattern in the finding."""


def swap(pattern: str, replacement: str, n: int = 0) -> Edit:
    """Replace the nth match of a pattern; from the end if n is negative."""

    def edit(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[n]
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    return edit


def drop(pattern: str, n: int = 0) -> Edit:
    """Remove the nth match of a pattern."""
    return swap(pattern, "", n)


def every(pattern: str, replacement: str) -> Edit:
    """Replace all matches of a pattern."""
    return lambda ptx: re.sub(pattern, replacement, ptx)


CONV = Case("causal_conv1d", TOY, MIXTURE, (("X", "bfloat16"),))
SCAN = Case("selective_scan", TOY, prefill(100), (("X", "bfloat16"), ("STATE", "float32")))
STEP = replace(SCAN, step=decode(3, 70))
EXPERT = Case("moe_dispatch", EXPERTS, prefill(90), (("X", "bfloat16"), ("W", "bfloat16")))
ATTENTION = Case("paged_attention", TOY, MIXTURE, (("X", "bfloat16"), ("CACHE", "bfloat16")))
FP8_CACHE = replace(ATTENTION, dtypes=(("X", "bfloat16"), ("CACHE", FP8)))

BARRIER = r"bar\.sync\s+0;"
WAIT = r"(cp\.async\.wait_group\s+)(\d+);"
DESCRIPTOR = r"\b4611686\d{12}\b"
RACE = "with no barrier in between|since the last barrier|in flight"
TO_E4M3 = r"(\.reg \.b16 low, high;)\s*cvt\.rn\.satfinite\.e4m3x2\.f32 low, (%r\d+), (%r\d+);"
TWICE = r"""\1
.reg .b16 half0, half1;
.reg .b32 pair;
cvt.rz.f16.f32 half0, \3;
cvt.rz.f16.f32 half1, \2;
mov.b32 pair, {half0, half1};
cvt.rn.satfinite.e4m3x2.f16x2 low, pair;"""


def wait_for_less(groups: int) -> Edit:
    """Let more groups of copies stay in flight at the first wait."""
    return lambda ptx: re.sub(WAIT, lambda match: f"{match[1]}{int(match[2]) + groups};", ptx, count=1)


def change_descriptors(difference: int) -> Edit:
    """Add a number to the constant part of every matrix descriptor."""
    return lambda ptx: re.sub(DESCRIPTOR, lambda match: str(int(match[0]) + difference), ptx)


def in_convolution(title: str, edit: Edit, finding: str, kernel: str = "conv_tokens") -> PtxFault:
    """A fault in a kernel without tensor cores."""
    return PtxFault(title, CONV, 90, kernel, edit, finding)


def in_scan(title: str, edit: Edit, finding: str, kernel: str = "scan_sequences") -> PtxFault:
    """A fault in a kernel with warpgroup products, copies in flight and exchanges through shared memory."""
    return PtxFault(title, SCAN, 90, kernel, edit, finding)


def in_experts(title: str, edit: Edit, finding: str) -> PtxFault:
    """A fault in a pipelined product of warpgroups."""
    return PtxFault(title, EXPERT, 90, "up_kernel", edit, finding)


def in_attention(title: str, edit: Edit, finding: str) -> PtxFault:
    """A fault in a pipelined product of warps."""
    return PtxFault(title, ATTENTION, 90, "paged_decode", edit, finding)


def in_fp8_cache(title: str, edit: Edit, finding: str) -> PtxFault:
    """A fault in the conversion to FP8, on the SM whose conversion by Triton rounds twice."""
    return PtxFault(title, FP8_CACHE, 89, "paged_append", edit, finding)


FAULTS = (
    in_convolution("loads without masks", every(r"@%p\d+ ld\.global", "ld.global"), "out of bounds"),
    in_convolution("a store without its mask", drop(r"@%p\d+ (?=st\.global)", -1), "out of bounds"),
    in_convolution("an address 4 bytes further", swap(r"(st\.global.*) \+ 0 \]", r"\1 + 4 ]"), "misaligned"),
    in_convolution("an address 16 bytes further", swap(r"(st\.global.*) \+ 0 \]", r"\1 + 16 ]"), WRONG),
    in_convolution("a barrier dropped", drop(BARRIER, -1), RACE),
    in_convolution(
        "a bound one too large", swap(r"setp\.lt\.s32", "setp.le.s32", -1), WRONG, "conv_sequences"
    ),
    in_convolution(
        "a selection reversed", swap(r"(selp\.b32\s+%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"), WRONG
    ),
    in_scan(
        "the stride of an address",
        swap(r"(mul\.wide\.s32\s+%rd\d+, %r\d+), \d+;", r"\1, 1;", 2),
        "misaligned",
        "prepare_chunks",
    ),
    in_scan("a difference reversed", swap(r"(sub\.f32\s+%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;"), WRONG),
    in_scan(
        "a reduction's distance",
        swap(r"(shfl\.sync\.bfly\.b32.*), 2,", r"\1, 1,"),
        f"out of bounds|{WRONG}",
        "prepare_chunks",
    ),
    in_scan(
        "a prefix sum's distance", every(r"(shfl\.sync\.up\.b32.*), 1,", r"\1, 2,"), WRONG, "prepare_chunks"
    ),
    in_scan("a barrier dropped in the loop", drop(BARRIER, 8), RACE),
    in_scan("the last barrier dropped", drop(BARRIER, -1), RACE),
    in_scan("copies waited for too late", wait_for_less(1), "in flight"),
    in_scan("copies never committed", every(r"cp\.async\.commit_group;", ""), "in flight"),
    in_scan("no proxy fences", every(r"fence\.proxy\.async[\w.:]*;", ""), "no proxy fence"),
    in_scan(
        "no fences of registers", every(r"wgmma\.fence\.sync\.aligned;", ""), "after the last wgmma.fence"
    ),
    in_scan(
        "products not waited for", every(r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1"), "not waited for"
    ),
    in_scan("a store to shared memory dropped", drop(r"@%p\d+ st\.shared[^;]*;"), "never written"),
    in_experts("copies waited for too late", wait_for_less(2), "in flight"),
    in_experts("weights without masks", every(r"0x10, %r\d+;", "0x10;"), "out of bounds"),
    in_experts(
        "copies over products in flight",
        every(r"(wgmma\.wait_group\.sync\.aligned) 1", r"\1 2"),
        "over what a wgmma in flight reads",
    ),
    in_experts("the swizzle of 64 bytes", change_descriptors(1 << 62), WRONG),
    in_experts("descriptors 16 bytes further", change_descriptors(1), f"never written|in flight|{WRONG}"),
    in_experts("the stride of descriptors", change_descriptors(1 << 32), f"never written|in flight|{WRONG}"),
    in_experts("no barrier after the wait", swap(rf"({WAIT})\s*{BARRIER}", r"\1"), RACE),
    in_experts("a barrier that some threads skip", swap(BARRIER, "@%p4 bar.sync 0;"), "threads reach"),
    in_experts(
        "a loop left after one iteration",
        swap(r"setp\.lt\.s32(\s+%p\d+, %r\d+, %r\d+;\s+@%p\d+ bra)", r"setp.gt.s32\1", -1),
        WRONG,
    ),
    in_attention(
        "registers of a product swapped",
        swap(r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        WRONG,
    ),
    in_attention("a matrix not transposed", swap(r"ldmatrix(.*)\.trans", r"ldmatrix\1"), WRONG),
    in_attention(
        "the stride of pages", swap(r"(shl\.b64\s+%rd\d+, %rd\d+), 8;", r"\1, 7;"), f"out of bounds|{WRONG}"
    ),
    in_fp8_cache("FP8 rounded twice", every(TO_E4M3, TWICE), WRONG),
    in_fp8_cache("the halves of pairs swapped", every(r"low, (%r\d+), (%r\d+);", r"low, \2, \1;"), WRONG),
)
