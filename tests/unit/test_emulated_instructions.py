"""The emulator executes PTX as the PTX ISA says, and names the instruction, the thread and the address of a fault."""

from __future__ import annotations

import numpy as np
import pytest

from nemotrt.plugins.emulator.conversions import rounded, to_e4m3
from nemotrt.plugins.emulator.errors import Fault, NotEmulated
from nemotrt.plugins.emulator.launches import run_grid
from nemotrt.plugins.emulator.memory import Buffer, GlobalMemory
from nemotrt.plugins.emulator.ptx import parse

HEADER = """
.extern .shared .align 16 .b8 memory[];
.visible .entry toy(.param .u64 .ptr .global .align 1 toy_param_0)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [toy_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd2, %rd1, %rd2;
"""
STORE = "st.global.b32 [%rd2], %r2;"


def run(code: str, size: int = 64, shared: int = 256, grid: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    """What 64 threads leave in their 32-bit elements; `%r1` is the thread, `%rd2` the address of its element."""
    content = np.zeros(4 * size, np.uint8)
    memory = GlobalMemory({"out": Buffer(content, 4)})
    program = parse(f'{HEADER}{code}\nret;\n}}\n.file 1 "kernels.py"\n')
    run_grid(program, {"toy_param_0": memory.address["out"]}, memory, shared, grid)
    memory.copy_back()
    return content.view(np.int32)


def fault(code: str, **sizes: int) -> str:
    with pytest.raises(Fault) as caught:
        run(code, **sizes)
    return str(caught.value)


def test_threads_part_and_join() -> None:
    """Odd threads count to their index, even ones skip the loop."""
    out = run(f"""
        mov.b32 %r2, 0;
        and.b32 %r3, %r1, 1;
        setp.eq.b32 %p1, %r3, 0;
        @%p1 bra $end;
    $loop:
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p2, %r2, %r1;
        @%p2 bra $loop;
    $end:
        {STORE}""")
    assert out.tolist() == [i if i % 2 else 0 for i in range(64)]


def test_programs_of_a_grid_run_one_after_another() -> None:
    out = run(f"mov.u32 %r3, %ctaid.y; add.s32 %r2, %r3, 1; @!%p0 bra $end; $end: {STORE}", grid=(3, 50, 1))
    assert (out == 50).all()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.up.b32 %r2, %r1, 1, 0, -1;", lambda i: i - 1 if i % 32 else i),
        ("shfl.sync.down.b32 %r2, %r1, 1, 31, -1;", lambda i: i + 1 if i % 32 < 31 else i),
        ("shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;", lambda i: i ^ 16),
        ("shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;", lambda i: i // 32 * 32 + 3),
        ("shfl.sync.idx.b32 %r2, %r1, 3, 6175, -1;", lambda i: i // 8 * 8 + 3),
        ("redux.sync.add.s32 %r2, %r1, -1;", lambda i: 496 + 1024 * (i // 32)),
        ("bfe.u32 %r2, %r1, 2, 3;", lambda i: i >> 2 & 7),
        ("bfe.s32 %r2, %r1, 0, 6;", lambda i: i - 64 if i & 32 else i),
        ("prmt.b32 %r2, %r1, 0, 0x4440;", lambda i: i),
        ("shl.b32 %r2, %r1, 32;", lambda i: 0),
        ("neg.s32 %r3, %r1; shr.s32 %r2, %r3, 40;", lambda i: -(i > 0)),
        ("neg.s32 %r3, %r1; div.s32 %r2, %r3, 4;", lambda i: -(i // 4)),
        ("neg.s32 %r3, %r1; rem.s32 %r2, %r3, 4;", lambda i: -(i % 4)),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};", lambda i: i << 16),
        ("cvt.u16.u32 %rs1, %r1; cvt.s8.s16 %rs2, %rs1; cvt.s32.s16 %r2, %rs2;", lambda i: i),
    ],
)
def test_integers(code: str, expected: object) -> None:
    assert run(f"{code} {STORE}").tolist() == [expected(i) for i in range(64)]  # type: ignore[operator]


def test_comparisons_with_nan() -> None:
    out = run(f"""
        mov.b32 %f1, 0f7FC00000;
        setp.ne.f32 %p1, %f1, %f1;
        setp.neu.f32 %p2, %f1, %f1;
        selp.b32 %r2, 1, 0, %p1;
        @%p2 add.s32 %r2, %r2, 2;
        max.f32 %f2, %f1, 0f3F800000;
        setp.eq.f32 %p3, %f2, 0f3F800000;
        @%p3 add.s32 %r2, %r2, 4;
        max.NaN.f32 %f2, %f1, 0f3F800000;
        setp.nan.f32 %p4, %f2, %f2;
        @%p4 add.s32 %r2, %r2, 8;
        {STORE}""")
    assert (out == 14).all()


def test_conversions() -> None:
    values = np.array(
        [0.0, -0.0, 448.0, 465.0, -np.inf, np.nan, 2.0**-10, 2.0**-9 * 1.5, 17.0, 19.0], np.float32
    )
    assert to_e4m3(values).tolist() == [0, 0x80, 0x7E, 0x7E, 0xFE, 0x7F, 0, 2, 0x58, 0x5A]
    third = np.array([1 / 3, -1 / 3, 2 / 3], np.float32)
    toward_zero = rounded(third, np.dtype(np.float16), "rz").astype(np.float64)
    assert (np.abs(toward_zero) < np.abs(third)).all()
    assert (np.abs(toward_zero) > np.abs(third) * (1 - 2.0**-10)).all()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"add.s64 %rd2, %rd2, 4; {STORE}", "out of bounds at 4 bytes at out+256 of 256 bytes by thread 63"),
        (f"add.s64 %rd2, %rd2, -4; {STORE}", "out of bounds at 4 bytes at out-4 of 256 bytes by thread 0"),
        (
            "st.global.b32 [%rd1 + 2], %r1;",
            "misaligned for 4 bytes at 4 bytes at out+2 of 256 bytes by thread 0",
        ),
        ("st.global.v2.b32 [%rd1], {%r1, %r1};", "misaligned for 8 bytes"),
        (
            "st.shared.b32 [memory + 256], %r1;",
            "outside shared memory at shared+256 of 256 bytes by thread 0",
        ),
        ("ld.shared.b32 %r2, [memory];", "reads shared memory that was never written at shared+0"),
        ("st.shared.b32 [memory], %r1;", "two threads write different values to one address"),
        (
            "mov.b32 %r3, 5; st.shared.b32 [memory], %r3; ld.shared.b32 %r2, [memory];",
            "reads what another warp wrote, with no barrier in between",
        ),
        (
            "setp.lt.u32 %p1, %r1, 32; mov.b32 %r3, 5; @%p1 st.shared.b32 [memory], %r3; bar.sync 0;"
            "ld.shared.b32 %r2, [memory]; @%p1 st.shared.b32 [memory], %r3;",
            "writes over what another warp read, with no barrier in between",
        ),
        (
            "setp.lt.u32 %p1, %r1, 40; @%p1 bar.sync 0;",
            "a barrier that 40 of 64 threads reach, not reached by thread 40",
        ),
        (
            "setp.lt.u32 %p1, %r1, 40; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
            "not reached by the whole warp",
        ),
        (
            "shl.b32 %r3, %r1, 2; cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.commit_group;"
            "cp.async.wait_group 1; ld.shared.b32 %r2, [%r3];",
            "reads shared memory that a cp.async in flight writes",
        ),
        ("$loop: bra $loop;", "the program does not end"),
    ],
)
def test_faults(code: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotrt.plugins.emulator.execution.MAX_STEPS", 1000)
    assert message in fault(code)


def test_a_copy_arrives_when_it_is_waited_for() -> None:
    out = run(f"""
        {STORE.replace("%r2", "%r1")}
        shl.b32 %r3, %r1, 2;
        cp.async.ca.shared.global [%r3], [%rd2], 4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        xor.b32 %r3, %r3, 252;
        ld.shared.b32 %r2, [%r3];
        bar.sync 0;
        {STORE}""")
    assert out.tolist() == list(range(63, -1, -1))


def test_a_fault_names_the_lines_of_the_ptx_and_of_the_kernel() -> None:
    text = fault(".loc 1 27 3\nst.global.b32 [%rd2 + 4], %r1;")
    line = HEADER.count("\n") + 2
    assert text.startswith(f"toy, PTX line {line} (kernels.py:27): out of bounds")
    assert text.endswith("by thread 63 of program (0, 0, 0): st.global.b32 [%rd2 + 4], %r1")


@pytest.mark.parametrize(
    "code",
    [
        "atom.global.add.u32 %r2, [%rd2], 1;",
        "cvt.rna.tf32.f32 %r2, %f1;",
        "bar.sync 1, 32;",
        "mov.b32 %r2, %clock;",
    ],
)
def test_what_is_not_emulated_is_refused(code: str) -> None:
    with pytest.raises(NotEmulated):
        run(code)
