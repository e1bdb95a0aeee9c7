#!/usr/bin/env python3
"""Measures the CPU figures of docs/performance.md: each subcommand builds a model and prints one JSON object.

Times that are compared are medians of alternating runs in one process. Peak memory is ru_maxrss of a child process.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
from make_random_checkpoint import write_checkpoint

from nemotrt.exporter.artifacts import ZeroWeights
from nemotrt.exporter.checkpoint import zero_weights
from nemotrt.exporter.checkpoint.loaded_model import stored_parameters
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.lowering import data_layout, external_data
from nemotrt.exporter.pipelines.build import build as build_bundle
from nemotrt.exporter.runtime import ort as onnxruntime
from nemotrt.exporter.runtime.session import Session
from nemotrt.exporter.runtime.step import StepInputs
from nemotrt.exporter.stages.load import load
from nemotrt.exporter.stages.lower import lower
from nemotrt.exporter.stages.trace import trace
from nemotrt.exporter.workspace import sync
from nemotrt.plugins import onnx_op
from nemotrt.plugins.contract import DType
from nemotrt.plugins.selective_scan import SPEC as SCAN

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny"

MAMBA = {"ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "mamba_head_dim": 64}
COMMON = {"model_type": "nemotron_h", "norm_eps": 1e-5, "tie_word_embeddings": False, **MAMBA}

DENSE_1270M = COMMON | {
    "vocab_size": 131072,
    "hidden_size": 2048,
    "hybrid_override_pattern": "M-M-M*-M-M-M*-M-M-M-M-M*-M-",
    "mamba_num_heads": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "torch_dtype": "bfloat16",
}

MOE_321M = COMMON | {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "hybrid_override_pattern": "MEMEM*EMEMEM",
    "mamba_num_heads": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 288,
    "moe_shared_expert_intermediate_size": 1024,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "torch_dtype": "float32",
}


PAUSE = 0.15
"""Seconds before each call: a decode that took 16 ms after a pause took 26 ms right after other sessions' calls."""

# A child's peak starts at its parent's memory, so a small process starts it.
LAUNCHER = """
import os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(child.pid, 0)
print(time.perf_counter() - started, usage.ru_maxrss, status)
"""


def build(checkpoint: Path, bundle: Path) -> dict[str, float]:
    """Seconds and peak resident bytes of `nemo-export build --no-validate`."""
    return alone("build", checkpoint, "--output", bundle, "--no-validate", "--runtime", "onnx")


def alone(command: str, *arguments: object) -> dict[str, float]:
    """Seconds and peak resident bytes of a command of nemo-export in a process of its own."""
    tool = str(Path(sys.executable).with_name("nemo-export"))
    launched = [sys.executable, "-S", "-c", LAUNCHER, tool, "--quiet", command, *map(str, arguments)]
    words = subprocess.run(launched, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    seconds, peak_kib, status = (float(word) for word in words[-3:])
    if status:
        raise SystemExit(f"{command} failed with status {status:.0f}")
    return {"seconds": seconds, "peak_gb": peak_kib * 1024 / 1e9}


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median milliseconds of each call; each round times every call once.

    A pause comes first, because ONNX Runtime's idle threads spin for tens of milliseconds after a call and take cores
    from the next one; then an untimed call, because the caches hold the weights of another session.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}


def one_sequence(session: Session, tokens: int, context: int) -> Callable[[], Any]:
    """A call that runs `tokens` tokens of one sequence in slot 1 after `context` earlier ones."""
    pages = -(-(tokens + context) // session.page_size)
    step = StepInputs(
        np.ones(tokens, dtype=np.int64),
        np.asarray([0, tokens], dtype=np.int32),
        np.asarray([context], dtype=np.int32),
        np.asarray([1], dtype=np.int32),
        np.arange(1, pages + 1, dtype=np.int32)[None],
        np.asarray([tokens - 1], dtype=np.int32),
    )
    return lambda: session.step(step)


@click.group()
def main() -> None:
    """Measure one figure and print it as JSON."""
    torch.set_num_threads(os.cpu_count() or 1)


def report(figures: dict[str, Any]) -> None:
    """Print the figures with the number of cores and PyTorch's version."""
    click.echo(json.dumps(figures | {"cores": os.cpu_count(), "torch": torch.__version__}, indent=2))


@main.command()
def dense() -> None:
    """Lower a dense model of 1.27 B parameters in BF16."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        write_checkpoint(DENSE_1270M, Path(folder) / "checkpoint", dtype=torch.bfloat16)
        copied = _copy_seconds(Path(folder) / "checkpoint", Path(folder) / "copy")
        figures = build(Path(folder) / "checkpoint", Path(folder) / "bundle")
        report({"model": "1.27 B dense, bf16", "copy_of_the_checkpoint_seconds": copied, **figures})


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--layers", default="", help="As for build.")
def graph(checkpoint: Path, layers: str) -> None:
    """Load, trace and lower CHECKPOINT without writing its weights: how time grows with depth."""
    external_data.write = _write_hole
    config = BuildConfig(checkpoint, Path(), precision="fp8" if load(checkpoint).config.recipe else "bf16")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        model = load(checkpoint, layers)
        lowered = lower(model, trace(model, config), Path(folder) / "model.onnx", link=True)
    seconds = time.perf_counter() - started
    report({"layers": len(model.config.layers), "nodes": lowered.nodes, "seconds": seconds})


def _write_hole(path: Path, placed: tuple[data_layout.Placed, ...], **_: Any) -> int:
    """external_data.write without data: the file has its size and no block."""
    with path.open("wb") as file:
        file.truncate(data_layout.data_bytes(placed))
    return 0


@main.command()
@click.option("--repeats", default=5, show_default=True)
def zeros(repeats: int) -> None:
    """Build the dense model without validation, with the search for zero weights and without it, in turns."""
    ratios: dict[str, list[tuple[float, float]]] = {"cached": [], "not cached": []}
    searches = {"with": zero_weights.find, "without": lambda *_: ZeroWeights("", "", "")}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(DENSE_1270M, checkpoint, dtype=torch.bfloat16)
        config = BuildConfig(checkpoint, Path(folder) / "bundle", runtime="onnx", validate=False, force=True)
        build_bundle(config)  # imports everything
        for _ in range(repeats):
            for name, found in ratios.items():
                cost = {}
                for which, zero_weights.find in searches.items():
                    for path in checkpoint.iterdir():
                        _set_cached(path, is_cached=name == "cached")
                    started = time.perf_counter(), time.process_time()
                    build_bundle(config)
                    cost[which] = time.perf_counter() - started[0], time.process_time() - started[1]
                found.append((cost["with"][0] / cost["without"][0], cost["with"][1] / cost["without"][1]))
                searches = dict(reversed(searches.items()))
    report({"model": "1.27 B dense, bf16", "seconds_and_cpu_seconds_relative_to_no_search": ratios})


def _set_cached(path: Path, *, is_cached: bool) -> None:
    """Read the file into the page cache, or drop it from there."""
    with path.open("rb") as file:
        if is_cached:
            while file.read(1 << 24):
                pass
        else:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@main.command()
@click.option("--preset", default="published", show_default=True, help="Which modules stay unquantized.")
def quantize(preset: str) -> None:
    """Calibrate and quantize the dense model on the built-in text, with the example's tokenizer."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(DENSE_1270M, checkpoint, dtype=torch.bfloat16)
        shutil.copy(EXAMPLE / "tokenizer.json", checkpoint)
        shutil.copy(EXAMPLE / "tokenizer_config.json", checkpoint)
        figures = alone("quantize", checkpoint, "--output", Path(folder) / "fp8", "--preset", preset)
        report({"model": f"1.27 B dense, bf16 to fp8, {preset}", **figures})


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repeats", default=3, show_default=True)
def writing(checkpoint: Path, repeats: int) -> None:
    """Compare writing the weights of CHECKPOINT, unchanged and in FP16, with `cp` of its files."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        calls: dict[str, Callable[[], int]] = {"cp": partial(_copied, checkpoint, Path(folder) / "copy")}
        model = load(checkpoint)
        for dtype in (DType.BFLOAT16, DType.FLOAT16):
            placed = data_layout.lay_out(stored_parameters(model.config, model.weights, dtype), link=False)
            calls[str(dtype)] = partial(_written, placed, Path(folder) / "data")
        for call in calls.values():
            call()  # the first pages of memory that was unused for a while cost the most
        speeds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                speeds[name].append(_rate(call))
            calls = dict(reversed(calls.items()))
        share = {
            name: [a / b for a, b in zip(rates, speeds["cp"], strict=True)] for name, rates in speeds.items()
        }
        report({"checkpoint": checkpoint.name, "gb_a_second": speeds, "share_of_cp": share})


def _rate(call: Callable[[], int]) -> float:
    """GB a second of a call that returns the bytes it wrote to the disk."""
    started = time.perf_counter()
    return call() / (time.perf_counter() - started) / 1e9


def _copied(source: Path, target: Path) -> int:
    """Copy a folder to the disk and remove the copy; returns its bytes without holes."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    sync(target)
    size = sum(path.stat().st_blocks * 512 for path in target.iterdir())
    shutil.rmtree(target)
    return size


def _written(placed: tuple[data_layout.Placed, ...], target: Path) -> int:
    """Write the weights to one file on the disk and remove it; returns the bytes without holes."""
    written = external_data.write(target, placed, advance=lambda _: None, synced=lambda _: None)
    sync(target)
    target.unlink()
    return written


def _copy_seconds(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    return time.perf_counter() - started


@main.command()
@click.option("--peer/--no-peer", default=True, help="Export with transformers too (a minute or two).")
@click.option("--repeats", default=15, show_default=True)
def moe(peer: bool, repeats: int) -> None:
    """A model of 321 M parameters with 64 experts: lowering, loading, prefill of 512 tokens, decode."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        write_checkpoint(MOE_321M, checkpoint, dtype=torch.float32)
        figures: dict[str, Any] = {"model": "321 M MoE, fp32", "build": build(checkpoint, bundle)}
        graph = ir.load(bundle / "model.onnx")
        figures["nodes"] = len(graph.graph)
        started = time.perf_counter()
        session = Session(bundle / "model.onnx", num_slots=2, num_pages=10)
        figures["load_seconds"] = time.perf_counter() - started
        prefill = {"this tool": one_sequence(session, 512, 0)}
        decode = {"this tool": one_sequence(session, 1, 512)}
        eager_prefill, eager_decode, model = _eager(checkpoint)
        prefill["transformers, eager"], decode["transformers, eager"] = eager_prefill, eager_decode
        if peer:
            figures["peer"], peer_prefill, peer_decode = _peer(model)
            prefill["transformers' ONNX"], decode["transformers' ONNX"] = peer_prefill, peer_decode
        figures["prefill_512_ms"] = in_turns(prefill, max(repeats // 3, 3))
        figures["decode_ms"] = in_turns(decode, repeats)
        report(figures)


def _eager(checkpoint: Path) -> tuple[Callable[[], Any], Callable[[], Any], Any]:
    """Calls for prefill and decode of transformers' model in eager mode, and the model."""
    from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM

    raw = json.loads((checkpoint / "config.json").read_text())
    config = NemotronHConfig(**raw)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config).eval()
    ids = torch.ones(1, 512, dtype=torch.int64)

    @torch.no_grad()
    def prefill() -> Any:
        cache = DynamicCache(config=config)
        return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    cache = prefill().past_key_values

    @torch.no_grad()
    def decode() -> Any:
        return model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    return prefill, decode, model


def _peer(model: Any) -> tuple[dict[str, Any], Callable[[], Any], Callable[[], Any]]:
    """Figures of transformers' exporter, and calls for prefill and decode of its graphs in ONNX Runtime."""
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    ids = torch.ones(1, 512, dtype=torch.int64)
    with torch.no_grad():
        empty = DynamicCache(config=model.config)
        cache = model(input_ids=ids, past_key_values=empty, use_cache=True).past_key_values
    figures: dict[str, Any] = {}
    calls = []
    cases = {"prefill": {"input_ids": ids}, "decode": {"input_ids": ids[:, :1], "past_key_values": cache}}
    for name, inputs in cases.items():
        started = time.perf_counter()
        exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=False))
        figures[f"{name}_export_seconds"] = time.perf_counter() - started
        figures[f"{name}_nodes"] = len(exported.program.graph)
        calls.append(partial(exported, **inputs))
    return figures, calls[0], calls[1]


@main.command()
def scan() -> None:
    """Time the scan's ONNX body at 512 and 4096 tokens, at the size of one of Nano's layers."""
    heads, head_dim, groups, state = 64, 64, 8, 128
    sizes = {"H": heads, "P": head_dim, "G": groups, "N": state}
    attributes = {"dt_min": 0.0, "dt_max": 3.4e38}
    types = dict.fromkeys(("X", "STATE", "float32"), ir.DataType.FLOAT) | {"int32": ir.DataType.INT32}
    shapes = [[sizes.get(axis, axis) for axis in tensor.axes] for tensor in SCAN.inputs]
    inputs = [ir.val(t.name, types[t.dtype], shape) for t, shape in zip(SCAN.inputs, shapes, strict=True)]
    outputs = [ir.val(t.name, types[t.dtype], [sizes.get(a, a) for a in t.axes]) for t in SCAN.outputs]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=[onnx_op.node(SCAN, inputs, outputs, attributes, "scan")],
        opset_imports={"": onnx_op.OPSET, "nemo": 1},
        name="scan",
    )
    model = ir.Model(graph, ir_version=10, functions=[onnx_op.function(SCAN, sizes, attributes)])
    session = onnxruntime.load().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    generator = np.random.default_rng(0)

    def feeds(tokens: int) -> dict[str, Any]:
        axes = {**sizes, "T": tokens, "B": 1, "B+1": 2, "S": 2}
        arrays: dict[str, Any] = {
            tensor.name: generator.standard_normal([axes[axis] for axis in tensor.axes], dtype=np.float32)
            for tensor in SCAN.inputs
        }
        integers = {"query_start": [0, tokens], "context_len": [0], "slot": [1]}
        arrays |= {name: np.asarray(values, dtype=np.int32) for name, values in integers.items()}
        return arrays | {"A": -(arrays["A"] ** 2)}

    calls = {str(tokens): partial(session.run, None, feeds(tokens)) for tokens in (1, 512, 4096)}
    times = in_turns(calls, 5)
    report({"scan_body_ms": times, "4096_over_512": times["4096"] / times["512"]})


if __name__ == "__main__":
    main()
