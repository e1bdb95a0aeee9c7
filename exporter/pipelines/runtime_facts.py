"""Which runtimes a build on this machine makes something for, and why not the others."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.exporter.engines.kernel_support import check_supported
from nemotrt.exporter.engines.plugin_library import is_at_hand
from nemotrt.exporter.engines.targets import AUTO, ONNX, Target, settle
from nemotrt.exporter.errors import CompileError, UsageError
from nemotrt.exporter.runtime.backends import BACKENDS, Backend
from nemotrt.model.config import ModelConfig
from nemotrt.model.pools import pool_specs


@dataclass(frozen=True)
class RuntimeFact:
    """A runtime, whether a build makes what it runs, and why or how."""

    name: str
    is_built: bool
    why: str


def runtime_facts(config: ModelConfig, precision: str) -> tuple[RuntimeFact, ...]:
    """Every runtime, those first that need nothing."""
    how = {
        "fp32": "ONNX Runtime runs it on the CPU as it is",
        "fp16": "on a CPU, ONNX Runtime runs its FP32 twin, which rounds as the graph does",
        "bf16": "on a CPU, ONNX Runtime runs its FP32 twin: it has no BF16 arithmetic there",
        "fp8": "on a CPU, ONNX Runtime runs its FP32 twin: it has no BF16 and FP8 arithmetic there",
    }
    return (RuntimeFact(ONNX, True, how[precision]), *(_engine(config, one, precision) for one in BACKENDS))


def _engine(config: ModelConfig, backend: Backend, precision: str) -> RuntimeFact:
    try:
        target = engine_target(config, backend.runtime, (), precision)
    except (CompileError, UsageError) as error:
        return RuntimeFact(backend.runtime, False, f"{error}: {error.hint}")
    return RuntimeFact(backend.runtime, True, f"an engine for {target.gpus}")


def engines(config: ModelConfig, runtime: str, sms: tuple[int, ...], precision: str) -> dict[str, int]:
    """The runtimes whose engines would be built here if they were asked for → SMs for which no library is at hand."""
    found = {}
    for one in BACKENDS:
        if runtime in (AUTO, one.runtime):
            with suppress(CompileError, UsageError):
                target = engine_target(config, one.runtime, sms, precision)
                is_there = is_at_hand(BuildConfig(Path(), Path(), precision=precision), target.sms)
                found[one.runtime] = 0 if is_there else len(target.sms)
    return found


def engine_target(config: ModelConfig, runtime: str, sms: tuple[int, ...], precision: str) -> Target:
    """What a build with the other flags' defaults would make an engine for; raises as it would."""
    target = settle(runtime, sms, precision)
    build = BuildConfig(Path(), Path(), precision=precision)
    pools = pool_specs(
        config,
        page_size=build.page_size,
        dtype=COMPUTE_DTYPES[precision],
        state_dtype=COMPUTE_DTYPES[build.state_dtype],
    )
    check_supported(config, build, pools, target.sms)
    return target
