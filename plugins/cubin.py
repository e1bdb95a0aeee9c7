"""Compiles one variant of a kernel to a cubin, with no GPU: what a worker process of `build.py` runs.

    python -m nemotrt.plugins.cubin STORE

reads requests from stdin, a JSON object a line, and answers each with one on stdout:

- `{"package", "sms"}`: each SM's variants, and what identifies their source;
- `{"package", "sm", "variant", "key"}`: compiles a variant into the store under that key.

A failure is answered with `{"error"}` and ends the worker, whose state could be anything then. The same
source gives the same bytes, but for Blackwell: its assembler orders some instructions by addresses in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from nemotrt.plugins.kernel_store import KernelStore
from nemotrt.plugins.variant import Variant, supports_fp8

MAX_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications)."""

SCALARS = ("i32", "i64", "fp32")
"""Types that a parameter may have beside pointers: those that the host knows how to pass."""

PTX_VERSION = 90
"""For Blackwell, whose assembler would otherwise take a version that no 580 driver reads."""


def check_signature(variant: Variant, arg_names: list[str]) -> None:
    """Raise KernelError where parameters are not the kernel's, or are of a type that cannot be passed."""
    parameters = [name for name in arg_names if name not in variant.constants]
    if list(variant.signature) != parameters or set(variant.constants) - set(arg_names):
        given = [*variant.signature, *variant.constants]
        raise KernelError(f"the signature and constants {given} are not the kernel's {arg_names}")
    for name, kind in variant.signature.items():
        if not kind.startswith("*") and kind not in SCALARS:
            raise KernelError(
                f"parameter {name} is of type {kind}; pass a pointer or one of {', '.join(SCALARS)}"
            )
    if unknown := set(variant.aligned) - set(variant.signature):
        raise KernelError(f"aligned names {sorted(unknown)}, which are not runtime parameters")


def compile_variant(package: str, variant: Variant, sm: int) -> tuple[bytes, dict[str, Any]]:
    """The cubin of a variant, and the fields of `kernel_index.Kernel` that compiling decides.

    Raises KernelError where no launch could work: parameters that do not fit the kernel, more shared memory
    than the SM has, scratch that the host does not allocate. Triton's own errors pass through.
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
    entry = launch_facts(compiled.metadata, compiled.asm["ptx"], len(variant.signature))
    if entry["shared"] > (most := MAX_SHARED[sm] * 1024):
        raise KernelError(f"{entry['shared']} bytes of shared memory, where a block on SM {sm} has {most}")
    return compiled.asm["cubin"], entry | resources(log.getvalue(), entry["entry"])


def launch_facts(metadata: Any, ptx: str, num_parameters: int) -> dict[str, Any]:
    """What a launch needs to know, from Triton's metadata and the PTX."""
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise KernelError("the kernel wants scratch memory of Triton's own, which the host does not allocate")
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        raise KernelError("the kernel wants a cluster or a cooperative launch, which the host does not do")
    declared = re.search(r"\.entry\s+(\w+)\(([^)]*)\)", ptx)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if declared is None or target is None:
        raise KernelError("Triton's PTX declares no entry or no target")
    return {
        "entry": metadata.name,
        "target": target[1],
        "hidden_pointers": declared[2].count(".param") - num_parameters,
        "shared": metadata.shared,
        "num_warps": metadata.num_warps,
    }


def resources(log: str, entry: str) -> dict[str, int]:
    """Registers, stack and spills of an entry, in what `ptxas -v` prints."""
    found = re.search(
        rf"Function properties for {re.escape(entry)}\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        log,
    )
    if found is None:
        raise KernelError(f"ptxas does not say what {entry} uses: its log reads {log.strip()[:200]!r}")
    names = ("stack", "spill_stores", "spill_loads", "registers")
    return dict(zip(names, map(int, found.groups()), strict=True))


def listed(package: str, sms: list[int]) -> dict[str, list[dict[str, Any]]]:
    """An op's variants on each SM, each with a hash of its kernel's source and of all that it calls."""
    module = import_module(f"{package}.kernels")
    found = {}
    for sm in sms:
        variants = list(module.variants(sm))
        for name, count in Counter(variant.name for variant in variants).items():
            if count > 1:
                raise KernelError(f"{count} variants on SM {sm} are named {name}: names must be unique")
        if not supports_fp8(sm):
            for variant in variants:
                if "*fp8e4nv" in variant.signature.values():
                    raise KernelError(
                        f"SM {sm} has no FP8 tensor cores: leave {variant.name} out of its variants"
                    )
        found[str(sm)] = [
            asdict(variant) | {"name": variant.name, "source": getattr(module, variant.kernel).cache_key}
            for variant in variants
        ]
    return found


def variant_of(fields: dict[str, Any]) -> Variant:
    """A Variant from its fields as JSON gives them."""
    names = ("kernel", "signature", "constants", "num_warps", "num_stages")
    return Variant(**{name: fields[name] for name in names}, aligned=tuple(fields["aligned"]))


def answer(request: dict[str, Any], store: KernelStore) -> dict[str, Any]:
    """Do what one request says."""
    if "sms" in request:
        return {"variants": listed(request["package"], request["sms"])}
    cubin, entry = compile_variant(request["package"], variant_of(request["variant"]), request["sm"])
    entry |= {"sha256": hashlib.sha256(cubin).hexdigest(), "num_bytes": len(cubin)}
    store.put(request["key"], cubin, entry)
    return {}


def reason(error: BaseException) -> str:
    """One line that says why: of the innermost cause, the line with the assembler's complaint if any."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    complaints = [line for line in lines if re.search(r"\b(error|fatal)\s*:", line)]
    line = (complaints or lines)[0]
    return line if isinstance(error, KernelError) else f"{type(error).__name__}: {line}"


def main(store: Path) -> None:
    """Answer requests until stdin ends."""
    # The answers get the first stdout for themselves: Triton and its libraries print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    def report(_: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say({"error": reason(error), "details": "".join(traceback.format_exception(error))})

    sys.excepthook = report
    # Line tables hold this machine's paths, and change with every line above the kernel.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    for line in sys.stdin:
        say(answer(json.loads(line), KernelStore(store)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
