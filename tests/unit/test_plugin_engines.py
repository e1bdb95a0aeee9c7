"""TensorRT-RTX loads the plugin library and builds engines with its plugins, on a machine with no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host_library import SPECS, library
from op_attributes import MOE

SEQUENCES = {"T": [1, 8, 16], "B": [1, 4, 8], "B+1": [2, 5, 9]}
SIZES: dict[str, dict[str, Any]] = {
    "causal_conv1d": SEQUENCES | {"C": 64, "K": 4, "K-1": 3, "S": 4},
    "selective_scan": SEQUENCES | {"H": 4, "P": 64, "G": 2, "N": 128, "S": 4},
    "paged_attention": SEQUENCES | {"Q": 4, "V": 2, "D": 64, "K": 6, "page": 64, "M": 4},
    "moe_dispatch": {"T": [1, 8, 16], "L": 64, "R": 8, "E": 8, "I": 32},
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "causal_conv1d": {},
    "selective_scan": {"dt_min": 0.0, "dt_max": 100.0},
    "paged_attention": {"scale": 0.125},
    "moe_dispatch": MOE,
}


def case(op: str, sm: int = 89, X: str = "float16", other: str = "float16", **changed: Any) -> dict[str, Any]:
    """One node of an op; `other` is its second dtype, of state, cache or weights."""
    dtypes = {"X": X} | {name: other for name in SPECS[op].dtypes if name != "X"}
    found = {"op": op, "sm": sm, "sizes": SIZES[op], "attributes": ATTRIBUTES[op], "dtypes": dtypes}
    return found | changed


GOOD = {
    **{f"{op}, SM {sm}": case(op, sm) for op in SIZES for sm in (89, 120)},
    **{
        f"{op}, BF16": case(op, X="bfloat16", other="bfloat16")
        for op in ("causal_conv1d", "paged_attention", "moe_dispatch")
    },
    **{f"{op}, FP32": case(op, 80, "float32", "float32") for op in SIZES},
    "selective_scan, FP32 state": case("selective_scan", X="bfloat16", other="float32"),
    "paged_attention, FP8 cache": case("paged_attention", X="bfloat16", other="float8_e4m3fn"),
    "moe_dispatch, FP8 weights": case("moe_dispatch", 120, other="float8_e4m3fn"),
}
BAD = {
    "NemoPagedAttention layers.0.op: attribute scale is missing": case("paged_attention", attributes={}),
    "NemoCausalConv1d layers.0.op: the kernels require C to be a multiple of 16, got 72": case(
        "causal_conv1d", sizes=SIZES["causal_conv1d"] | {"C": 72}
    ),
    "NemoCausalConv1d layers.0.op: context_len has shape [8], expected [B] with B = 9": case(
        "causal_conv1d", sizes=SIZES["causal_conv1d"] | {"B+1": [2, 5, 10]}
    ),
    "NemoPagedAttention layers.0.op: the kernels do not support a float32 cache with float16 queries": case(
        "paged_attention", other="float32"
    ),
    "NemoSelectiveScan layers.0.op: ssm_state is bfloat16, which NemoSelectiveScan does not support": case(
        "selective_scan", other="bfloat16"
    ),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What TensorRT-RTX made of each case, all in one child process."""
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    if libraries is None or libraries.origin is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'nemo-export[rtx]'")
    # Plugins need the library under its unsuffixed name, found before the process starts.
    folder = tmp_path_factory.mktemp("rtx")
    (folder / "libtensorrt_rtx.so").symlink_to(Path(libraries.origin).parent / "libtensorrt_rtx.so.1")
    environment = os.environ | {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    command = [sys.executable, str(Path(__file__).parent / "rtx_one_node.py"), str(library().path)]
    cases = GOOD | BAD
    result = subprocess.run(
        command,
        env=environment,
        input=json.dumps([*cases.values()]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(cases, json.loads(result.stdout), strict=True))


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", GOOD)
def test_tensorrt_rtx_builds_an_engine_with_the_plugin(engines: dict[str, dict[str, Any]], name: str) -> None:
    result = engines[name]
    # Without a GPU, its look for one fails, and is an error to TensorRT-RTX alone.
    assert [error for error in result["errors"] if "cudaError" not in error] == []
    assert result["layers"] == ["PLUGIN_V3"]
    assert result["engine_bytes"]
    assert "layers.0.op" in result["engine_layers"][0]


@pytest.mark.tensorrt
@pytest.mark.parametrize("message", BAD)
def test_tensorrt_rtx_logs_why_a_plugin_refused(engines: dict[str, dict[str, Any]], message: str) -> None:
    assert engines[message]["engine_bytes"] is None
    assert message in engines[message]["errors"]
