"""The rules of the code base that a linter does not know: sizes, who may import what, and what an op's folder holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nemotrt.plugins.spec import ops

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("exporter", "model", "plugins", "scripts") for path in (ROOT / folder).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION = 400, 60


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    if path.name == "kernels.py":
        return  # a kernel is one function, however long
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines"


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_tensorrt_is_known_to_the_compiler_and_the_runtime_only() -> None:
    knowing = {relative(path) for path in SOURCES if imports(path) & {"tensorrt", "tensorrt_rtx"}}
    allowed = (
        "exporter/stages/compile.py",
        "exporter/engines/engine_builder.py",
        "exporter/runtime/",
        "scripts/",
    )
    assert all(name.startswith(allowed) for name in knowing), knowing


def test_every_op_has_the_same_files() -> None:
    for spec in ops():
        folder = ROOT / "plugins" / spec.torch_name
        names = {path.name for path in folder.iterdir() if path.suffix in (".py", ".cpp")}
        own = {"reference.py", "onnx_body.py", "kernels.py", "supports.py", "plugin.cpp"}
        assert names == {"__init__.py", *own}, spec.name


LIGHT = [
    "nemotrt.exporter.cli",
    "nemotrt.plugins.spec",
    "nemotrt.exporter.runtime.manifest",
    "nemotrt.model.config",
    "nemotrt.exporter.engines.kernel_support",
    *(f"nemotrt.plugins.{spec.torch_name}.supports" for spec in ops()),
]
HEAVY = ["torch", "triton", "onnx", "onnx_ir", "onnxruntime", "transformers", "tensorrt", "tensorrt_rtx"]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == []


@pytest.mark.parametrize("form", ["onnx_body", "kernels"])
def test_an_op_s_declaration_loads_none_of_its_forms(form: str) -> None:
    code = (
        "import sys; from nemotrt.plugins.spec import ops; ops();"
        f"print(*(name for name in sys.modules if name.endswith('.{form}')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == []
