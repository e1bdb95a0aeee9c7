"""PyTorch as the reference: it runs here, and again on the experts that a candidate chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemotrt.exporter.artifacts import LoadedModel
from nemotrt.exporter.comparison import (
    Advance,
    Extent,
    Recording,
    greedy,
    noise_of,
    observe,
    observe_one,
    on_own_choice,
    prompt_of,
    times_rerouted,
)
from nemotrt.exporter.config import COMPUTE_DTYPES, BuildConfig
from nemotrt.exporter.gates import Compared, Measured, Observation, measured
from nemotrt.exporter.routing import RouterLogits
from nemotrt.exporter.scenarios import scenarios
from nemotrt.exporter.torch_runner import TorchRunner
from nemotrt.model.pools import PoolSpec


def record(
    model: LoadedModel, config: BuildConfig, extent: Extent, left_out: tuple[str, ...], advance: Advance
) -> Recording:
    """What PyTorch shows in FP32, and what it loses at the graph's precision."""
    pools = model.pools(config)
    noise = noise_of(pools, extent)
    reference = TorchRunner(model, pools, torch.float32)
    continuation = greedy(reference, extent, noise, advance)
    plan = scenarios(prompt_of(extent), continuation, extent.page_size)
    seen, choosing = observe(reference, plan, noise, advance), reference.choosing
    del reference  # one copy of the weights at a time is enough
    dtype = COMPUTE_DTYPES[config.precision]
    recording = Recording("PyTorch, FP32", "", extent, plan, noise, seen, choosing, {}, left_out)
    if dtype == "float32":
        return recording
    floors = floors_of(recording, model, pools, dtype, advance)
    return Recording(
        "PyTorch, FP32", f"PyTorch, {dtype}", extent, plan, noise, seen, choosing, floors, left_out
    )


def floors_of(
    recording: Recording, model: LoadedModel, pools: tuple[PoolSpec, ...], dtype: str, advance: Advance
) -> dict[str, Measured]:
    """How far PyTorch in `dtype` is from PyTorch in FP32, in each scenario."""
    follower = Follower(model, pools, recording)
    seen = observe(TorchRunner(model, pools, getattr(torch, dtype)), recording.plan, recording.noise, advance)
    return {
        name: measured(follower.beside(name, found, found.routers), recording.noise)
        for name, found in seen.items()
    }


@dataclass(frozen=True)
class Follower:
    """What PyTorch showed by itself, and shows on another runner's choice of experts."""

    model: LoadedModel
    pools: tuple[PoolSpec, ...]
    recording: Recording

    def beside(self, name: str, seen: Observation, routers: tuple[RouterLogits, ...]) -> Compared:
        """What another runner showed in a scenario, whose choice is in `routers`, beside PyTorch on that choice."""
        expected = self.recording.seen[name]
        if times_rerouted(self.recording, name, routers):
            runner = TorchRunner(self.model, self.pools, torch.float32)
            scenario = next(scenario for scenario in self.recording.plan if scenario.name == name)
            expected = observe_one(
                runner,
                scenario,
                self.recording.noise,
                step=lambda number: runner.step(scenario.steps[number], routers[number]),
            )
        return on_own_choice(seen, routers, expected)
