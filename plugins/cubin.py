"""The worker process that compiles kernel variants to cubins, with no GPU; `build.py` starts it.

    python -m nemotrt.plugins.cubin STORE

It reads requests from stdin, one JSON object per line, and answers each with one on stdout:

- `{"package", "sms"}`: lists the variants for each SM, with a hash of their source;
- `{"package", "sm", "variant", "key"}`: compiles a variant into the store under that key.

On failure it answers `{"error", "details"}` and exits, since its state is then undefined. The same source gives the
same bytes, except on Blackwell, whose assembler orders some instructions by addresses in memory.
"""

import contextlib
import io
import json
import os
import re
import sys
import traceback
from collections import Counter
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from nemotrt.plugins.kernel_index import KernelError
from nemotrt.plugins.kernel_store import KernelStore, digest
from nemotrt.plugins.variant import Variant, supports_fp8

MAX_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Maximum shared memory per block in KiB (CUDA C++ Programming Guide, technical specifications)."""

BANNED_INSTRUCTIONS = {
    "cvt.rz.f16.f32": "FP32 is converted to FP8 through FP16, which rounds twice: convert with inline assembly",
}
"""PTX instructions that no kernel may contain, and why."""

SCALARS = ("i32", "i64", "fp32")
"""The types of parameters, other than pointers, that the host can pass."""

PTX_VERSION = 90
"""The PTX version for Blackwell: Triton's default is too new for 580 drivers."""


def check_signature(variant: Variant, arg_names: list[str]) -> None:
    """Raise KernelError if the parameters are not the kernel's, or have a type that the host cannot pass."""
    parameters = [name for name in arg_names if name not in variant.constants]
    if list(variant.signature) != parameters or set(variant.constants) - set(arg_names):
        given = [*variant.signature, *variant.constants]
        raise KernelError(
            f"the signature and constants are {given}, but the kernel's parameters are {arg_names}"
        )
    for name, kind in variant.signature.items():
        if not kind.startswith("*") and kind not in SCALARS:
            raise KernelError(
                f"parameter {name} has type {kind}; it must be a pointer or one of {', '.join(SCALARS)}"
            )
    if unknown := set(variant.aligned) - set(variant.signature):
        raise KernelError(f"aligned lists {sorted(unknown)}, which are not runtime parameters")


def check_instructions(ptx: str) -> None:
    """Raise KernelError if the PTX contains an instruction that gives wrong results."""
    for instruction, why in BANNED_INSTRUCTIONS.items():
        if instruction in ptx:
            raise KernelError(f"the PTX contains {instruction}: {why}")


def compile_variant(package: str, variant: Variant, sm: int) -> tuple[bytes, str, dict[str, Any]]:
    """The cubin of a variant, its PTX, and the fields of `kernel_index.Kernel` that the compiler determines.

    Raises KernelError if no launch could work: wrong parameters, more shared memory than the SM has, or scratch
    memory that the host does not allocate; and for PTX that rounds wrongly. Errors of Triton pass through.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"{package}.kernels"), variant.kernel)
    arg_names: list[str] = kernel.arg_names
    check_signature(variant, arg_names)
    signature = {name: variant.signature.get(name, "constexpr") for name in arg_names}
    hints = {(arg_names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    options: dict[str, Any] = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if sm >= 100:
        options["ptx_version"] = PTX_VERSION
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(kernel, signature, variant.constants, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    check_instructions(ptx)
    facts = _launch_facts(compiled.metadata, ptx, variant)
    if facts["shared"] > (limit := MAX_SHARED[sm] * 1024):
        raise KernelError(f"{facts['shared']} bytes of shared memory, but a block on SM {sm} has {limit}")
    cubin: bytes = compiled.asm["cubin"]
    facts |= {"sha256": digest(cubin), "num_bytes": len(cubin)}
    return cubin, ptx, facts | _resources(log.getvalue(), facts["entry"])


def _launch_facts(metadata: Any, ptx: str, variant: Variant) -> dict[str, Any]:
    """How to launch the kernel, from Triton's metadata and the PTX."""
    if metadata.num_warps != variant.num_warps:
        raise KernelError(f"the kernel was compiled for {metadata.num_warps} warps, not {variant.num_warps}")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise KernelError("the kernel needs Triton's scratch memory, which the host does not allocate")
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        raise KernelError("the kernel needs a cluster or cooperative launch, which the host does not support")
    entry = re.search(r"\.entry\s+(\w+)\(([^)]*)\)", ptx)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if entry is None or target is None:
        raise KernelError("Triton's PTX declares no entry or no target")
    return {
        "entry": metadata.name,
        "target": target[1],
        "hidden_pointers": entry[2].count(".param") - len(variant.signature),
        "shared": metadata.shared,
    }


def _resources(log: str, entry: str) -> dict[str, int]:
    """Registers, stack and spills of an entry, parsed from the log of `ptxas -v`."""
    usage = re.search(
        rf"Function properties for {re.escape(entry)}\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        log,
    )
    if usage is None:
        raise KernelError(f"the ptxas log has no resource usage of {entry}: {log.strip()[:200]!r}")
    names = ("stack", "spill_stores", "spill_loads", "registers")
    return dict(zip(names, map(int, usage.groups()), strict=True))


def list_variants(package: str, sm: int) -> list[dict[str, Any]]:
    """The fields of an op's variants on an SM, each with a hash of its kernel's source and of all that it calls."""
    module = import_module(f"{package}.kernels")
    variants: list[Variant] = list(module.variants(sm))
    for name, count in Counter(variant.name for variant in variants).items():
        if count > 1:
            raise KernelError(f"{count} variants on SM {sm} are named {name}: names must be unique")
    for variant in variants:
        if "*fp8e4nv" in variant.signature.values() and not supports_fp8(sm):
            raise KernelError(f"SM {sm} has no FP8 tensor cores: remove {variant.name} from its variants")
    return [
        {"variant": asdict(variant), "source": getattr(module, variant.kernel).cache_key}
        for variant in variants
    ]


def answer(request: dict[str, Any], store: KernelStore) -> dict[str, Any]:
    """Carry out one request."""
    if "sms" in request:
        return {str(sm): list_variants(request["package"], sm) for sm in request["sms"]}
    variant = Variant.from_json(request["variant"])
    store.put(request["key"], *compile_variant(request["package"], variant, request["sm"]))
    return {}


def reason(error: BaseException) -> str:
    """One line of the innermost cause: the assembler's error if there is one, else the first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\s*:", line)]
    line = (errors or lines)[0]
    return line if isinstance(error, KernelError) else f"{type(error).__name__}: {line}"


def main(store: Path) -> None:
    """Answer requests until stdin ends."""
    # Answers go to the original stdout, and prints of Triton and its libraries go to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    def report(_: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        send({"error": reason(error), "details": "".join(traceback.format_exception(error))})

    sys.excepthook = report
    # Line tables contain this machine's paths and change with every line above the kernel.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    for line in sys.stdin:
        send(answer(json.loads(line), KernelStore(store)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
