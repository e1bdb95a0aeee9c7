"""Our declaration of TensorRT's plugin interfaces is TensorRT's: function tables, layouts, numbers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nemotrt.plugins.link import CUDA_TYPES, HEADER, HEADERS_VARIABLE, SOURCES, SYSTEM_HEADERS

if not shutil.which("g++"):
    pytest.skip("the plugin host needs a C++ compiler: install g++", allow_module_level=True)

PROBE = Path(__file__).parent / "abi_probe.cpp"

RECORDED = """
    slot IPluginV3.clone 5
    slot IPluginV3OneCore.getPluginNamespace 6
    slot IPluginV3OneBuildV2.configurePlugin 4
    slot IPluginV3OneBuildV2.getWorkspaceSize 9
    slot IPluginV3OneBuildV2.getMetadataString 14
    slot IPluginV3OneBuildV2.getAliasedInput 15
    slot IPluginV3OneRuntime.enqueue 6
    slot IPluginV3OneRuntime.getFieldsToSerialize 8
    slot IPluginCreatorV3One.getPluginNamespace 8
    slot ILogger.log 4
    slot ILoggerFinder.findLogger 4
    size PluginTensorDesc 88 align 8
    size DynamicPluginTensorDesc 304 align 8
    size DimsExprs 72 align 8
    size PluginField 24 align 8
    kind IPluginV3OneBuildV2 PLUGIN_V3ONE_BUILD 2.0
    kind IPluginCreatorV3One PLUGIN CREATOR_V3ONE 1.0
"""
"""Some of what the headers of TensorRT 11.1 gave: the last of each table, which shifts when any before it does."""


def probed(folder: Path, *flags: str) -> list[str]:
    program = folder / "probe"
    # NVIDIA's headers are not free of warnings, and offsetof is conditional on classes that are theirs.
    command = ["g++", "-std=c++17", "-Wno-invalid-offsetof", *flags, str(PROBE), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def found_headers() -> tuple[Path, int] | None:
    """A folder of TensorRT's headers of any version, and their major version; RTX counts as 11."""
    for folder in map(Path, filter(None, (os.environ.get(HEADERS_VARIABLE), *SYSTEM_HEADERS))):
        if (folder / HEADER).is_file():
            version = (folder / "NvInferVersion.h").read_text(errors="replace")
            major = re.search(r"TRT_MAJOR_ENTERPRISE\s+(\d+)", version)
            return folder, int(major[1]) if major else 11
    return None


def test_our_tables_are_as_recorded(tmp_path: Path) -> None:
    ours = probed(tmp_path, f"-I{SOURCES}")
    recorded = [line.strip() for line in RECORDED.strip().splitlines()]
    assert [line for line in recorded if line not in ours] == []


def test_our_declaration_is_nvidias(tmp_path: Path) -> None:
    found = found_headers()
    if found is None:
        pytest.skip(f"no {HEADER} in the system's folders: name TensorRT's headers in {HEADERS_VARIABLE}")
    headers, major = found
    # TensorRT 10's loggers are known to differ; the plugin interfaces must agree there too.
    flags = ["-DNEMO_OLD_LOGGER"] if major < 11 else []
    (tmp_path / "cuda_runtime_api.h").write_text(CUDA_TYPES)
    includes = ["-DNEMO_NVIDIA_HEADERS", "-isystem", str(headers), "-isystem", str(tmp_path)]
    theirs, ours = probed(tmp_path, *flags, *includes), probed(tmp_path, *flags, f"-I{SOURCES}")
    assert ours == theirs
    assert len(ours) > 80
