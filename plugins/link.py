"""Links the compiled kernels and the C++ host into `libnemo_plugins.so`; see `scripts/make_plugin_library.py`.

This needs g++ or a cross compiler, but no CUDA toolkit, TensorRT or GPU. The host is compiled against TensorRT's
headers if they are found, else against host/tensorrt_abi.h.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotrt.plugins.kernel_index import KernelError, KernelIndex
from nemotrt.plugins.kernel_store import digest, write
from nemotrt.plugins.link_tables import assembler, cpp_description, cpp_tables, specs_digest
from nemotrt.plugins.spec import VERSION, ops

LIBRARY_NAME = "libnemo_plugins.so"
DESCRIPTION_NAME = "libnemo_plugins.json"

SOURCES = Path(__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wnon-virtual-dtor")
COMPILE = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", *WARNINGS)
LINK = ("-shared", "-pthread", "-Wl,--no-undefined", "-Wl,-z,relro,-z,now", "-Wl,--build-id=none")
RELEASE = ("-static-libstdc++", "-static-libgcc", "-Wl,-s")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")

HEADER = "NvInferRuntime.h"
HEADERS_VARIABLE = "TENSORRT_INCLUDE_DIR"
SYSTEM_HEADERS = (
    "/usr/include",
    f"/usr/include/{os.uname().machine}-linux-gnu",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
CUDA_TYPES = "typedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"
"""A replacement for cuda_runtime_api.h with all that NVIDIA's plugin headers use, so that CUDA is not needed."""


@dataclass(frozen=True)
class Toolchain:
    """The compiler and its options; `headers` is the folder of TensorRT's headers, None for tensorrt_abi.h."""

    compiler: str = "g++"
    headers: Path | None = None
    sanitize: bool = False

    def flags(self) -> list[str]:
        """The compiler options of every source, except for include folders."""
        headers = ["-DNEMO_NVIDIA_HEADERS"] if self.headers else []
        return [*COMPILE, *headers, *(("-O1", *SANITIZE) if self.sanitize else ("-O2",))]

    def version(self) -> str:
        """The compiler's name, version and target; raises KernelError if it is not installed."""
        if not shutil.which(self.compiler):
            raise KernelError(
                f"compiler {self.compiler} is not installed: install g++, or choose another one"
            )
        command = [self.compiler, "--version"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return "\n".join(output.splitlines()[:2])  # the target is on GCC's first line, and on Clang's second


def headers_version(folder: Path) -> str:
    """The version of a folder's TensorRT headers; raises KernelError if they are missing or too old."""
    try:
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise KernelError(f"{folder} has no {HEADER}: it is not a folder of TensorRT headers") from None
    product = "RTX" if "TRT_MAJOR_RTX" in text else "ENTERPRISE"
    numbers = [re.search(rf"define TRT_{part}_{product}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(number[1]) if number else 0 for number in numbers)
    if not (folder / HEADER).is_file() or (product == "ENTERPRISE" and major < 11):
        raise KernelError(
            f"{folder} has headers of TensorRT {major}.{minor}: TensorRT 11 or TensorRT-RTX is required"
        )
    return f"TensorRT{'-RTX' if product == 'RTX' else ''} {major}.{minor}"


def find_headers(environment: Mapping[str, str], system: Sequence[str] = SYSTEM_HEADERS) -> Path | None:
    """The folder of TensorRT's headers: $TENSORRT_INCLUDE_DIR, which must be valid, or a system folder, or None."""
    if chosen := environment.get(HEADERS_VARIABLE):
        headers_version(Path(chosen))
        return Path(chosen)
    for folder in map(Path, system):
        with contextlib.suppress(KernelError):
            headers_version(folder)
            return folder
    return None


def host_sources() -> list[Path]:
    """The C++ sources of the host and of each op."""
    return sorted(
        [*SOURCES.glob("host/*.cpp"), *(SOURCES / spec.torch_name / "plugin.cpp" for spec in ops())]
    )


def describe(index: KernelIndex, toolchain: Toolchain) -> dict[str, Any]:
    """The description of a library with these kernels; its `hash` covers everything that decides the contents."""
    files = sorted([*host_sources(), *SOURCES.glob("host/*.h"), SOURCES / "host" / "exports.map"])
    identity = {
        "sources": {str(path.relative_to(SOURCES)): digest(path.read_bytes()) for path in files},
        "tables": digest(cpp_tables(ops(), index.kernels).encode()),
        "cubins": [kernel.sha256 for kernel in index.kernels],
        "compiler": [toolchain.version(), toolchain.flags(), LINK, RELEASE],
        "headers": headers_version(toolchain.headers) if toolchain.headers else None,
    }
    return {
        "name": "nemo_plugins",
        "version": importlib.metadata.version("nemo-export"),
        "op_version": VERSION,
        "hash": digest(identity),
        "specs": specs_digest(ops()),
        "sms": sorted({kernel.sm for kernel in index.kernels}),
        "num_kernels": len(index.kernels),
        "triton": index.triton,
        "headers": identity["headers"] or "own",
    }


def link(index: KernelIndex, output: Path, toolchain: Toolchain | None = None) -> Path:
    """Link the library of these kernels into the folder `output`, with a description, unless it is up to date.

    Returns the library's path. Raises KernelError if a cubin is missing or has changed, or if the compiler fails.
    """
    toolchain = toolchain or Toolchain(headers=find_headers(os.environ))
    description = describe(index, toolchain)
    path = output / LIBRARY_NAME
    if _is_current(path, description):
        return path
    for kernel in index.kernels:
        index.cubin(kernel)
    with tempfile.TemporaryDirectory(prefix="nemo-link-") as temporary:
        built = _compile(index, description, toolchain, Path(temporary))
        content = built.read_bytes()
    write(path, content)
    path.chmod(0o755)
    note = output / DESCRIPTION_NAME
    write(note, (json.dumps(description | {"sha256": digest(content)}, indent=1) + "\n").encode())
    note.chmod(0o644)
    return path


def _is_current(path: Path, description: dict[str, Any]) -> bool:
    try:
        note = json.loads(path.with_name(DESCRIPTION_NAME).read_bytes())
        return bool(note == description | {"sha256": digest(path.read_bytes())})
    except (FileNotFoundError, ValueError):
        return False


def _compile(index: KernelIndex, description: dict[str, Any], toolchain: Toolchain, folder: Path) -> Path:
    """Compile and link the library in `folder`."""
    (folder / "cuda_runtime_api.h").write_text(CUDA_TYPES)
    generated = {
        "tables.cpp": cpp_tables(ops(), index.kernels),
        "description.cpp": cpp_description(description),
        "cubins.s": assembler(index.kernels),
    }
    for name, content in generated.items():
        (folder / name).write_text(content, encoding="utf-8")
    sources = [*host_sources(), *(folder / name for name in generated)]
    includes = [f"-I{SOURCES}"]
    if toolchain.headers:
        includes += ["-isystem", str(toolchain.headers), "-isystem", str(folder)]
    commands, objects = [], []
    for i, source in enumerate(sources):
        objects.append(str(folder / f"{i}.o"))
        flags = [] if source.suffix == ".s" else [*toolchain.flags(), *includes]
        commands.append([*flags, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda command: _run(toolchain, command, index.folder), commands))
    library = folder / LIBRARY_NAME
    kind = SANITIZE if toolchain.sanitize else RELEASE
    exports = f"-Wl,--version-script={SOURCES / 'host' / 'exports.map'}"
    _run(toolchain, [*LINK, *kind, exports, *objects, "-ldl", "-o", str(library)], index.folder)
    return library


def _run(toolchain: Toolchain, arguments: Sequence[str], folder: Path) -> None:
    command = [toolchain.compiler, *arguments]
    environment = os.environ | {"LC_ALL": "C"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        error = KernelError(f"{toolchain.compiler} failed: {_first_error(result.stderr)}")
        error.add_note(result.stderr)
        raise error


def _first_error(stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["no error message"]
    errors = [line for line in lines if re.search(r"error:|undefined reference|multiple definition", line)]
    return (errors or lines)[0]
