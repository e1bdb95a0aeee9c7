"""PyTorch as the reference, which can run again with the experts that a candidate chose."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch

from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.report.model import NotCompared
from nemotrt.exporter.validation.comparison import (
    AlignRouting,
    ReferenceRun,
    observe,
    observe_all,
    observe_greedy,
)
from nemotrt.exporter.validation.gates import expected_dtypes, measure
from nemotrt.exporter.validation.observation import Observation
from nemotrt.exporter.validation.plan import Workload
from nemotrt.exporter.validation.routing import router_policies
from nemotrt.exporter.validation.runners.torch import TorchRunner
from nemotrt.plugins.contract import DType

REFERENCE = "PyTorch (FP32)"

WhileLoaded = Callable[[TorchRunner], None]
"""Further work for a network while its weights are in memory."""


class LoadedReference:
    """PyTorch in FP32: loaded when it is first needed, and kept until it is released."""

    def __init__(self, model: LoadedModel, config: BuildConfig) -> None:
        self.model, self.config = model, config
        self.pools = model.pools(config)

    @cached_property
    def runner(self) -> TorchRunner:
        """The network in FP32."""
        return TorchRunner(self.model, self.pools, torch.float32)

    def release(self) -> None:
        """Free the weights; the next use loads them again."""
        self.__dict__.pop("runner", None)

    def align(self, run: ReferenceRun) -> AlignRouting:
        """Aligns routing with PyTorch, which runs again with the candidate's experts if any token's differ."""

        def align(scenario: str, candidate: Observation) -> tuple[Observation, Observation]:
            if not run.num_mismatches(scenario, candidate.routers):
                return candidate, run.observations[scenario]
            steps, forced = run.scenarios[scenario], candidate.routers
            return candidate, observe(self.runner, steps, run.noise_of(scenario), forced=forced)

        return align


def record(
    reference: LoadedReference,
    workload: Workload,
    not_compared: tuple[NotCompared, ...],
    *,
    advance: Advance = ignore,
    while_loaded: WhileLoaded = lambda runner: None,
) -> ReferenceRun:
    """PyTorch's run in FP32 on its own greedy continuation, with the rounding baseline of a lower precision.

    The reference is released before the baseline is loaded.
    """
    noise = workload.noises(reference.pools)
    scenarios, observations = observe_greedy(reference.runner, workload, noise, advance)
    while_loaded(reference.runner)
    run = ReferenceRun(
        reference=REFERENCE,
        workload=workload,
        scenarios=scenarios,
        noise=noise,
        observations=observations,
        policies=router_policies(reference.model),
        dtypes=expected_dtypes(reference.model, reference.config),
        not_compared=not_compared,
    )
    return _with_baselines(run, reference, advance, while_loaded)


def with_baselines_of(run: ReferenceRun, reference: LoadedReference, advance: Advance) -> ReferenceRun:
    """Another reference's run with the rounding baseline of PyTorch on its scenarios."""
    observations = observe_all(reference.runner, run.scenarios, run.noise_of, advance)
    pytorch = replace(run, observations=observations, policies=router_policies(reference.model))
    pytorch = _with_baselines(pytorch, reference, advance, lambda runner: None)
    return replace(pytorch, observations=run.observations)


def _with_baselines(
    run: ReferenceRun, reference: LoadedReference, advance: Advance, while_loaded: WhileLoaded
) -> ReferenceRun:
    """The run with the errors of PyTorch at the graph's precision, which takes the reference's experts."""
    dtype = reference.config.dtype
    if dtype is DType.FLOAT32:
        return run
    reference.release()
    runner = TorchRunner(reference.model, reference.pools, dtype.torch)
    baselines = {}
    for name, steps in run.scenarios.items():
        exact = run.observations[name]
        rounded = observe(runner, steps, run.noise_of(name), forced=exact.routers, advance=advance)
        baselines[name] = measure(rounded, exact)
    while_loaded(runner)
    return replace(run, baseline=f"PyTorch ({dtype.label})", baselines=baselines)
