"""The ranges of a model's activations on text, layer by layer: memory holds one layer and the tokens' activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemotrt.exporter import environment
from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.quantization.text import Sequences
from nemotrt.model.block import Block
from nemotrt.model.moe import MoE
from nemotrt.model.pools import empty_pools, pool_specs
from nemotrt.model.recipe import EXPERTS, Recipe
from nemotrt.model.step import Step
from nemotrt.plugins.contract import DType
from nemotrt.plugins.moe_dispatch.reference import route

STEP_TOKENS = 1024
"""Tokens that pass a layer at once, in whole sequences."""
PAGE = 128

Packed = tuple[list[Any], Step]
"""Sequences that pass a layer at once, and the step that they are."""

STACKS = (f"mixer.{EXPERTS}.up", f"mixer.{EXPERTS}.down")
"""Of a layer's parameters, those that hold nearly all of a mixture of experts."""

LEAST_TOKENS = 16
"""An expert that saw fewer takes the largest range among the layer's experts that saw as many."""


@dataclass
class Ranges:
    """The largest magnitude of each quantized input, by the name of the module as checkpoints have it."""

    inputs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    caches: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of keys and values, by the name of their scale."""
    starved: list[str] = field(default_factory=list)
    """Experts that saw fewer than LEAST_TOKENS tokens."""


@torch.no_grad()
def calibrate(model: LoadedModel, recipe: Recipe, text: Sequences, advance: Advance = ignore) -> Ranges:
    """The ranges that the text gives, in FP32; `advance` hears of each layer that is done.

    Raises UsageError that names the layer where an activation is not finite or nothing but 0.
    """
    environment.hide_unusable_amx()
    ranges = Ranges()
    steps = list(_steps(text))
    table = _read(model, "backbone.embeddings.weight", (model.config.vocab_size, model.config.hidden_size))
    flows = [table[torch.from_numpy(np.concatenate(group))].float() for group, _ in steps]
    del table
    for index, kind in model.config.numbered_layers.items():
        watch = _Watch(f"backbone.layers.{index}", recipe, ranges)
        _pass(model, index, kind, steps, flows, watch)
        watch.finish()
        advance(1)
    return ranges


def _pass(
    model: LoadedModel, index: int, kind: str, steps: list[Packed], flows: list[Tensor], watch: _Watch
) -> None:
    """Replace what flows by what flows on from a layer, while `watch` watches it; the layer is gone afterwards."""
    block = _block(model, index, kind)
    watch.attach(block)
    specs = tuple(
        spec
        for spec in pool_specs(model.config, page_size=PAGE, dtype=DType.FLOAT32, kv_dtype=DType.FLOAT32)
        if spec.layer == index
    )
    for i, (group, step) in enumerate(steps):
        pools = empty_pools(specs, len(group) + 1, 1 + int(step.page_table.max()))
        flows[i] = block(flows[i], step, *pools)[0]
        if not torch.isfinite(flows[i]).all():
            raise UsageError(
                f"layer {index} gives NaN or infinity on the calibration text",
                hint="the checkpoint is damaged, or the text is not for this model",
            )


def _block(model: LoadedModel, index: int, kind: str) -> Block:
    """A layer in FP32, its experts' weights as they are stored: their op widens one expert at a time."""
    block = Block(model.config, kind, dtype=torch.float32, device="meta")
    state = {}
    for name, value in block.state_dict().items():
        full, shape = f"backbone.layers.{index}.{name}", tuple(value.shape)
        is_stack = name in STACKS
        state[name] = (
            _read(model, full, shape) if is_stack else weights.read(model.weights[full], shape, value.dtype)
        )
    block.load_state_dict(state, assign=True)
    return block


def _read(model: LoadedModel, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter in the dtype that it is stored in."""
    source = model.weights[name]
    return weights.read(source, shape, getattr(torch, source.tensors[0].dtype))


def _steps(text: Sequences) -> Iterator[Packed]:
    """Whole sequences packed into steps, each sequence in a slot and in pages of its own."""
    group: list[Any] = []
    for i, sequence in enumerate(text):
        group.append(sequence)
        if i + 1 == len(text) or sum(map(len, group)) + len(text[i + 1]) > STEP_TOKENS:
            yield group, _step(group)
            group = []


def _step(group: Sequence[Any]) -> Step:
    starts = np.cumsum([0, *map(len, group)])
    per_sequence = -(-max(map(len, group)) // PAGE)
    count = len(group)
    return Step(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.zeros(count, dtype=torch.int32),
        slot=torch.arange(1, count + 1, dtype=torch.int32),
        page_table=torch.arange(1, count * per_sequence + 1, dtype=torch.int32).view(count, per_sequence),
    )


class _Watch:
    """Takes the ranges of one layer while it runs."""

    def __init__(self, layer: str, recipe: Recipe, ranges: Ranges) -> None:
        self._layer, self._recipe, self._ranges = layer, recipe, ranges
        self._seen: dict[str, int] = {}
        """Experts of the layer → tokens that they saw."""

    def attach(self, block: Block) -> None:
        """Watch the layer's quantized modules."""
        for name, module in block.named_modules():
            full = f"{self._layer}.{name}"
            if isinstance(module, nn.Linear) and full in self._recipe.modules:
                module.register_forward_pre_hook(self._input_of(full))
            if name in ("mixer.k_proj", "mixer.v_proj") and self._recipe.kv_cache:
                module.register_forward_hook(self._output_of(f"{full}.{name[6]}_scale"))
            if isinstance(module, MoE) and f"{full}.{EXPERTS}" in self._recipe.modules:
                module.register_forward_hook(self._experts_of(f"{full}.{EXPERTS}"))

    def finish(self) -> None:
        """Give experts that saw too little the range of those that saw enough; refuse what has none."""
        found = self._ranges.inputs
        for projection in ("up_proj", "down_proj"):
            enough = [
                found[f"{name}.{projection}"] for name, seen in self._seen.items() if seen >= LEAST_TOKENS
            ]
            for name, seen in self._seen.items():
                if seen < LEAST_TOKENS:
                    found[f"{name}.{projection}"] = max(enough, default=0.0)
        self._ranges.starved += [name for name, seen in self._seen.items() if seen < LEAST_TOKENS]
        for name, largest in {**found, **self._ranges.caches}.items():
            if name.startswith(f"{self._layer}.") and not 0 < largest < float("inf"):
                what = "nothing but 0" if largest == 0 else "NaN or infinity"
                raise UsageError(
                    f"{name} saw {what} on the calibration text",
                    hint="give a longer or another text, or leave the module out with --exclude",
                )

    def _input_of(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._ranges.inputs[name] = _larger(self._ranges.inputs[name], inputs[0])

        return hook

    def _output_of(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._ranges.caches[name] = _larger(self._ranges.caches[name], output)

        return hook

    def _experts_of(self, name: str) -> Callable[..., None]:
        """Of each expert's input, and of its hidden activation."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            assert isinstance(module, MoE)
            x_TD = inputs[0]
            x_TL = module.fc1_latent_proj(x_TD)
            chosen_Tk, _weights = route(
                module.gate(x_TD),
                module.gate.e_score_correction_bias,
                top_k=module.top_k,
                num_groups=module.num_groups,
                topk_group=module.topk_group,
                norm_topk_prob=module.norm_topk_prob,
                routed_scaling_factor=module.routed_scaling_factor,
            )
            found = self._ranges.inputs
            for expert in range(len(module.experts.up)):
                each = f"{name}.{expert}"
                rows_JL = x_TL[(chosen_Tk == expert).any(1)]
                self._seen[each] = self._seen.get(each, 0) + len(rows_JL)
                if len(rows_JL):
                    hidden_JI = torch.relu(rows_JL @ module.experts.up[expert].float().T).square()
                    found[f"{each}.up_proj"] = _larger(found[f"{each}.up_proj"], rows_JL)
                    found[f"{each}.down_proj"] = _larger(found[f"{each}.down_proj"], hidden_JI)

        return hook


def _larger(before: float, values: Tensor) -> float:
    """The larger of the magnitude so far and that of the values; NaN stays."""
    return float(torch.maximum(values.abs().max().float(), torch.tensor(before)))
