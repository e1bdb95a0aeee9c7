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


def knows_tensorrt(source: str) -> bool:
    """Whether a file imports TensorRT, loads its module through a backend, or names its module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module).partition(".")[0], *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant):
            names = [node.value] if node.value == "tensorrt_rtx" else []
        else:
            continue
        if {"tensorrt", "tensorrt_rtx", "load_module"}.intersection(names):
            return True
    return False


@pytest.mark.parametrize(
    "source",
    [
        "import tensorrt as trt",
        "def late():\n    from tensorrt_rtx import Builder",
        "from nemotrt.exporter.runtime.backends import load_module",
        "import_module('tensorrt_rtx')",
    ],
)
def test_an_import_of_tensorrt_is_noticed(source: str) -> None:
    assert knows_tensorrt(source)


def test_tensorrt_is_known_to_engines_and_runtime_only() -> None:
    knowing = {relative(path) for path in SOURCES if knows_tensorrt(path.read_text())}
    assert knowing == {
        "exporter/engines/builder.py",
        "exporter/runtime/backends.py",
        "exporter/runtime/engine_session.py",
    }


def imports_onnxruntime(node: ast.AST) -> bool:
    """Whether code below the node imports ONNX Runtime; an import for type checkers alone does not count."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return False
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
        text = ast.unparse(node)
        if text.startswith(("import onnxruntime", "from onnxruntime", "import_module('onnxruntime")):
            return True
    return any(map(imports_onnxruntime, ast.iter_child_nodes(node)))


@pytest.mark.parametrize(
    "source",
    [
        "import onnxruntime as ort",
        "def late():\n    from onnxruntime.capi import state",
        "import_module('onnxruntime')",
    ],
)
def test_an_import_of_onnx_runtime_is_noticed(source: str) -> None:
    assert imports_onnxruntime(ast.parse(source))


def test_onnx_runtime_is_imported_in_one_place() -> None:
    """That place turns its telemetry off first."""
    importing = {relative(path) for path in SOURCES if imports_onnxruntime(ast.parse(path.read_text()))}
    assert importing == {"exporter/runtime/ort.py"}


def test_the_root_of_the_application_is_small() -> None:
    assert len(list((ROOT / "exporter").glob("*.py"))) <= 10


def test_the_documented_tree_is_the_tree_on_disk() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    documented = set()
    folder: list[str] = []
    for line in page.partition("```text\n")[2].partition("```")[0].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folder = [*folder[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            documented.add("/".join(folder))
    on_disk = {
        relative(path)
        for name in ("exporter", "model")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    assert documented == on_disk


def test_every_op_has_the_same_files() -> None:
    for spec in ops():
        folder = ROOT / "plugins" / spec.torch_name
        names = {path.name for path in folder.iterdir() if path.suffix in (".py", ".cpp")}
        own = {"reference.py", "onnx_body.py", "kernels.py", "plugin.cpp"}
        assert names == {"__init__.py", *own}, spec.name


LIGHT = [
    "nemotrt.exporter.cli",
    "nemotrt.plugins.spec",
    "nemotrt.exporter.runtime.manifest",
    "nemotrt.model.config",
    "nemotrt.exporter.engines.kernel_coverage",
    *(spec.package for spec in ops()),
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
