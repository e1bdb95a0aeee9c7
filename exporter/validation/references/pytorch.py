"""PyTorch as the reference: it runs here, and again on the experts that a candidate chose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.config import BuildConfig
from nemotrt.exporter.progress import Advance
from nemotrt.exporter.report.model import NotCompared
from nemotrt.exporter.validation.comparison import (
    Extent,
    Recording,
    greedy,
    noise_of,
    num_routing_mismatches,
    observe,
    observe_one,
    on_own_choice,
    prompt_of,
)
from nemotrt.exporter.validation.gates import Compared, Observation, measured
from nemotrt.exporter.validation.graph_dtypes import expected_dtypes
from nemotrt.exporter.validation.routing import Choosing, RouterLogits
from nemotrt.exporter.validation.runners.torch import TorchRunner
from nemotrt.exporter.validation.scenarios import scenarios
from nemotrt.plugins.contract import DType, PoolSpec

REFERENCE = "PyTorch, FP32"


def record(
    model: LoadedModel,
    config: BuildConfig,
    extent: Extent,
    left_out: tuple[NotCompared, ...],
    advance: Advance,
) -> Recording:
    """What PyTorch shows in FP32, and what it loses at the graph's precision, on its own greedy continuation."""
    pools = model.pools(config)
    noise = noise_of(pools, extent)
    reference = TorchRunner(model, pools, torch.float32)
    continuation = greedy(reference, extent, noise, advance)
    plan = scenarios(prompt_of(extent), continuation, extent.page_size)
    seen, choosing = observe(reference, plan, noise, advance), reference.choosing
    del reference  # one copy of the weights at a time is enough
    dtypes = expected_dtypes(model, config)
    recording = Recording(REFERENCE, "", extent, plan, noise, seen, choosing, {}, dtypes, left_out)
    return with_baselines(recording, model, config, advance)


def record_plan(recording: Recording, model: LoadedModel, config: BuildConfig, advance: Advance) -> Recording:
    """What PyTorch shows in FP32 on another reference's plan, and what it loses at the precision of `config`."""
    reference = TorchRunner(model, model.pools(config), torch.float32)
    seen = observe(reference, recording.plan, recording.noise, advance)
    own = replace(recording, reference=REFERENCE, seen=seen, choosing=reference.choosing)
    del reference
    return with_baselines(own, model, config, advance)


def with_baselines(
    recording: Recording, model: LoadedModel, config: BuildConfig, advance: Advance
) -> Recording:
    """The recording of PyTorch in FP32, with what PyTorch loses at a lower precision."""
    dtype = config.dtype
    if dtype == "float32":
        return recording
    pools = model.pools(config)
    follower = Follower(model, pools, recording)
    runner = TorchRunner(model, pools, getattr(torch, dtype))
    seen = observe(runner, recording.plan, recording.noise, advance)
    baselines = {
        name: measured(follower.beside(name, found, found.routers), recording.noise)
        for name, found in seen.items()
    }
    return replace(recording, baseline=f"PyTorch, {dtype}", baselines=baselines)


@dataclass(frozen=True)
class Follower:
    """What PyTorch showed by itself, and shows on another runner's choice of experts."""

    model: LoadedModel
    pools: tuple[PoolSpec, ...]
    recording: Recording

    def beside(self, name: str, seen: Observation, routers: tuple[RouterLogits, ...]) -> Compared:
        """What another runner showed in a scenario, whose choice is in `routers`, beside PyTorch on that choice."""
        expected = self.recording.seen[name]
        if num_routing_mismatches(self.recording, name, routers):
            runner = TorchRunner(self.model, self.pools, torch.float32)
            scenario = next(scenario for scenario in self.recording.plan if scenario.name == name)
            expected = observe_one(
                runner,
                scenario,
                self.recording.noise,
                step=lambda number: runner.step(scenario.steps[number], routers[number]),
            )
        return on_own_choice(seen, routers, expected)


def choosing_of(model: LoadedModel) -> tuple[Choosing, ...]:
    """How each MoE layer of the model chooses experts; only their biases are read."""
    config = model.config
    shape = (config.n_routed_experts,)
    return tuple(
        Choosing(
            layer,
            weights.read(
                model.weights[f"backbone.layers.{layer}.mixer.gate.e_score_correction_bias"],
                shape,
                DType.FLOAT32,
            ).numpy(),
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        for layer, kind in config.numbered_layers.items()
        if kind == "moe"
    )
