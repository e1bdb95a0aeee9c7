"""Measure the ranges of a model's activations on text, layer by layer, with one layer in memory at a time.

Legend: T tokens, D hidden size, L the experts' input size, I an expert's hidden size, J tokens routed to an expert,
k experts per token.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemotrt.exporter.checkpoint import weights
from nemotrt.exporter.checkpoint.loaded_model import LoadedModel
from nemotrt.exporter.errors import UsageError
from nemotrt.exporter.progress import Advance, ignore
from nemotrt.exporter.quantization.text import Sequences
from nemotrt.model.block import Block
from nemotrt.model.moe import MoE
from nemotrt.model.recipe import EXPERTS, Recipe
from nemotrt.model.step import Step, empty_pools, pool_specs
from nemotrt.plugins.contract import DType
from nemotrt.plugins.moe_dispatch.reference import route

STEP_TOKENS = 1024
"""Maximum tokens of a step, which has whole sequences only."""
PAGE_SIZE = 128

MIN_EXPERT_TOKENS = 16
"""An expert with fewer tokens takes the largest range of its layer's other experts."""

STACKED_EXPERTS = (f"mixer.{EXPERTS}.up", f"mixer.{EXPERTS}.down")
"""The parameters of a layer that hold nearly all weights of a mixture of experts."""

CACHE_SCALES = {"mixer.k_proj": "k_scale", "mixer.v_proj": "v_scale"}
"""The projections whose outputs the KV cache stores → their scales."""

Batch = tuple[list[Any], Step]
"""The sequences of a step, and the step."""


class Ranges:
    """The largest magnitudes of the inputs of a recipe's modules, and of the keys and values."""

    def __init__(self, recipe: Recipe) -> None:
        self.inputs: dict[str, float] = defaultdict(float)
        """By the name of the module in checkpoints: `backbone.layers.1.mixer.experts.0.up_proj`."""
        self.caches: dict[str, float] = defaultdict(float)
        """By the name of the scale."""
        self.starved: list[str] = []
        """Experts with fewer than MIN_EXPERT_TOKENS tokens."""
        self._recipe = recipe
        self._expert_tokens: dict[str, int] = defaultdict(int)

    def watch(self, block: Block, layer: str) -> None:
        """Measure a layer while it runs."""
        for inner, module in block.named_modules():
            name = f"{layer}.{inner}"
            if isinstance(module, nn.Linear) and name in self._recipe.modules:
                module.register_forward_pre_hook(partial(self._measure_input, name))
            if inner in CACHE_SCALES and self._recipe.kv_cache:
                scale = f"{name}.{CACHE_SCALES[inner]}"
                module.register_forward_hook(partial(self._measure_cache, scale))
            if isinstance(module, MoE) and f"{name}.{EXPERTS}" in self._recipe.modules:
                module.register_forward_hook(partial(self._measure_experts, f"{name}.{EXPERTS}"))

    def finish(self, layer: str) -> None:
        """Complete the ranges of a layer that has run; raises UsageError on one that is 0 or not finite."""
        starved = [name for name, count in self._expert_tokens.items() if count < MIN_EXPERT_TOKENS]
        for projection in ("up_proj", "down_proj"):
            largest = max(
                (self.inputs[f"{name}.{projection}"] for name in self._expert_tokens.keys() - starved),
                default=0.0,
            )
            self.inputs |= {f"{name}.{projection}": largest for name in starved}
        self.starved += starved
        self._expert_tokens.clear()
        for name, largest in (self.inputs | self.caches).items():
            if name.startswith(f"{layer}.") and not 0 < largest < float("inf"):
                values = "only zeros" if largest == 0 else "NaN or infinity"
                raise UsageError(
                    f"{name} has {values} on the calibration text",
                    hint="use a longer or another text, or exclude the module with --exclude",
                )

    def _measure_input(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs[name] = _max_magnitude(self.inputs[name], inputs[0])

    def _measure_cache(self, scale: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self.caches[scale] = _max_magnitude(self.caches[scale], output)

    def _measure_experts(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        """Measure each expert's input and hidden activation."""
        assert isinstance(module, MoE)
        x_TD = inputs[0]
        x_TL = module.fc1_latent_proj(x_TD)
        bias_E = module.gate.e_score_correction_bias
        expert_Tk, _weights = route(module.gate(x_TD), bias_E, **module.routing)
        for index, up_IL in enumerate(module.experts.up):
            expert = f"{name}.{index}"
            x_JL = x_TL[(expert_Tk == index).any(1)]
            self._expert_tokens[expert] += len(x_JL)
            if len(x_JL):
                hidden_JI = torch.relu(x_JL @ up_IL.float().T).square()
                for projection, values in (("up_proj", x_JL), ("down_proj", hidden_JI)):
                    key = f"{expert}.{projection}"
                    self.inputs[key] = _max_magnitude(self.inputs[key], values)


def _max_magnitude(before: float, values: Tensor) -> float:
    """The larger of the magnitude before and that of the values; NaN if either is NaN."""
    return float(torch.maximum(values.abs().max().float(), torch.tensor(before)))


@torch.no_grad()
def calibrate(model: LoadedModel, recipe: Recipe, text: Sequences, advance: Advance = ignore) -> Ranges:
    """The ranges of the recipe's modules on the text, computed in FP32; `advance` counts layers.

    Raises UsageError that names the module or layer whose activations are all 0 or not finite.
    """
    ranges = Ranges(recipe)
    batches = list(_batches(text))
    table = _read(model, "backbone.embeddings.weight", (model.config.vocab_size, model.config.hidden_size))
    hidden = [table[torch.from_numpy(np.concatenate(group))].float() for group, _ in batches]
    del table
    for index, kind in model.config.numbered_layers.items():
        layer = f"backbone.layers.{index}"
        block = _block(model, layer, kind)
        ranges.watch(block, layer)
        _run(model, index, block, batches, hidden)
        ranges.finish(layer)
        del block  # before the next layer is read
        advance(1)
    return ranges


def _run(model: LoadedModel, index: int, block: Block, batches: list[Batch], hidden: list[Tensor]) -> None:
    """Replace the hidden states of each batch by the layer's outputs."""
    specs = tuple(
        spec
        for spec in pool_specs(model.config, page_size=PAGE_SIZE, dtype=DType.FLOAT32, kv_dtype=DType.FLOAT32)
        if spec.layer == index
    )
    for i, (group, step) in enumerate(batches):
        pools = empty_pools(specs, len(group) + 1, 1 + int(step.page_table.max()))
        hidden[i] = block(hidden[i], step, *pools)[0]
        if not torch.isfinite(hidden[i]).all():
            raise UsageError(
                f"the output of layer {index} has NaN or infinity on the calibration text",
                hint="the checkpoint is damaged, or the text is not for this model",
            )


def _block(model: LoadedModel, layer: str, kind: str) -> Block:
    """A layer in FP32, except that the experts' weights stay as they are stored: their op widens them one by one."""
    with torch.device("meta"):
        block = Block(model.config, kind, dtype=torch.float32)
    state = {}
    for name, value in block.state_dict().items():
        dtype = None if name in STACKED_EXPERTS else DType.from_torch(value.dtype)
        state[name] = _read(model, f"{layer}.{name}", tuple(value.shape), dtype)
    block.load_state_dict(state, assign=True)
    return block


def _read(model: LoadedModel, name: str, shape: tuple[int, ...], dtype: DType | None = None) -> Tensor:
    """A parameter in the given dtype, or in the one in which it is stored."""
    source = model.weights[name]
    return weights.read(source, shape, dtype or source.tensors[0].dtype)


def _batches(text: Sequences) -> Iterator[Batch]:
    """Pack whole sequences into steps; each sequence has its own slot and pages."""
    group: list[Any] = []
    for i, sequence in enumerate(text):
        group.append(sequence)
        if i + 1 == len(text) or sum(map(len, group)) + len(text[i + 1]) > STEP_TOKENS:
            yield group, _step(group)
            group = []


def _step(group: Sequence[Any]) -> Step:
    starts = np.cumsum([0, *map(len, group)])
    num_pages = -(-max(map(len, group)) // PAGE_SIZE)
    count = len(group)
    return Step(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.zeros(count, dtype=torch.int32),
        slot=torch.arange(1, count + 1, dtype=torch.int32),
        page_table=torch.arange(1, count * num_pages + 1, dtype=torch.int32).view(count, num_pages),
    )
