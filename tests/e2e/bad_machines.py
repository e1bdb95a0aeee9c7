"""Machines on which a package is missing or broken, or memory is limited."""

from __future__ import annotations

CHECK = ("check", "--deep", "checkpoint")
GENERATE = ("generate", "bundle", "--prompt", "for")

PACKAGES: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "torch-missing": (
        CHECK,
        "torch",
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        "check needs torch, which is not installed",
    ),
    "torch-without-a-library": (
        CHECK,
        "torch",
        "raise OSError('libcudart.so.13: cannot open shared object file')",
        "torch is installed, but cannot be imported: libcudart.so.13: cannot open",
    ),
    "torch-of-another-build": (
        CHECK,
        "torch",
        "raise ImportError('libtorch_cpu.so: undefined symbol: at')",
        "torch is installed, but cannot be imported: libtorch_cpu.so: undefined symbol",
    ),
    "onnxruntime-broken": (
        GENERATE,
        "onnxruntime",
        "raise ImportError('cannot import name x')",
        "onnxruntime is installed, but cannot be imported: cannot import name x",
    ),
    "onnx-without-its-own-package": (
        GENERATE,
        "onnx",
        "import a_package_that_does_not_exist",
        "onnx is installed, but cannot be imported: No module named 'a_package_that_does_not_exist'",
    ),
    "onnxruntime-too-old": (
        GENERATE,
        "onnxruntime",
        "",
        "onnxruntime is too old or incomplete: module 'onnxruntime' has no attribute",
    ),
    "tokenizers-too-old": (
        GENERATE,
        "tokenizers",
        "",
        "tokenizers is too old or incomplete: cannot import name 'Tokenizer' from 'tokenizers'",
    ),
    "tokenizers-missing": (
        GENERATE,
        "tokenizers",
        "raise ModuleNotFoundError(\"No module named 'tokenizers'\", name='tokenizers')",
        "generate needs tokenizers, which is not installed",
    ),
}
"""A command, the package, what its code is in place of the real one, and the error message."""

ADDRESSES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "build-in-little": (
        ("build", "checkpoint", "-o", "out"),
        1_000_000_000,
        r"build needs 1\.5 GB of address space, ulimit -v allows 1 GB",
    ),
    "generate-in-little": (GENERATE, 200_000_000, r"generate needs 0\.4 GB of address space"),
    "validation-in-little": (
        ("build", "checkpoint", "--runtime", "onnx", "-o", "out"),
        1_600_000_000,
        r"needs about .* GB of memory, this machine has 0\.4 GB",
    ),
}
"""A command, `ulimit -v` in bytes, and the error message."""
