"""Reads a checkpoint's config.json into one normalized form and accounts for every field in it.

An unknown field is an error, and so is a value that asks for something the model does not compute. Fields that
change no output are listed in `config_fields.INERT` with the reason.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

from nemotrt.model.config_fields import (
    ALIASES,
    FIELDS_OF_KIND,
    FIXED,
    INERT,
    LAYER_FIELDS,
    PATTERN,
    REQUIRED,
)
from nemotrt.model.config_values import CONVERTERS, LARGEST, ConfigError, size
from nemotrt.model.family import FIELDS, other_model
from nemotrt.model.recipe import LATENT, PROJECTIONS, Recipe
from nemotrt.plugins.contract import DType

MAX_LAYERS, MAX_EXPERTS = 4096, 1 << 18
"""Of a model, in all layers: ten times those of the largest published one."""


class UnknownFieldsError(ConfigError):
    """A config.json has fields that are neither read nor known to have no effect; `names` lists them."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the model's shapes and arithmetic.

    Sizes of a layer kind that the model does not have are 0.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[str, ...]
    """The kind of each layer: mamba, attention, mlp or moe."""
    chosen_layers: tuple[int, ...] = ()
    """Each layer's index in the checkpoint, for a partial model; empty if all layers are present."""

    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 0
    """Groups of Mamba heads; each group shares B and C and is normalized together by the gated norm."""
    conv_kernel: int = 0
    """Taps of the causal convolution, including the current token."""
    use_conv_bias: bool = True
    use_bias: bool = False
    """Whether a Mamba mixer's in_proj and out_proj have a bias."""
    time_step_limit: tuple[float, float] = (0.0, LARGEST)
    """Finite bounds of softplus(dt + dt_bias)."""

    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False

    intermediate_size: int = 0
    mlp_bias: bool = False
    """Applies to the shared expert and the latent projections too; routed experts have no bias."""

    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_latent_size: int = 0
    """Input and output size of the routed experts; 0 means the hidden size."""
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    """Groups of experts; the router first chooses groups, then experts in them."""
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    norm_eps: float = 1e-5
    residual_in_fp32: bool = False
    """Whether the residual is FP32 in a model of another dtype; this model's has the model's dtype."""
    tie_word_embeddings: bool = False
    dtype: DType = DType.FLOAT32
    """The weights' dtype according to the checkpoint; FP32 if it does not say, since that can hold any other."""
    ssm_state_dtype: DType = DType.FLOAT32
    max_position_embeddings: int = 0
    """Context length the checkpoint was trained for, in tokens; 0 if unknown. Changes no output."""
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_mtp_layers: int = 0
    """Draft tokens of multi-token prediction; its weights are not part of this model."""

    quantization: dict[str, Any] | None = field(default=None, hash=False)
    """The raw `quantization_config`, for the loader to interpret."""
    recipe: Recipe = field(default_factory=Recipe)
    """Which modules have FP8 weights; the loader sets it."""
    inert: dict[str, str] = field(default_factory=dict, compare=False)
    """Fields of the file that change no output, each with the reason."""
    ignored_fields: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the file that the user asked to ignore."""

    @property
    def numbered_layers(self) -> dict[int, str]:
        """Each layer's index in the checkpoint, in order, and its kind."""
        return dict(zip(self.chosen_layers or range(len(self.layers)), self.layers, strict=True))

    def only(self, indices: Sequence[int]) -> ModelConfig:
        """The partial model of these layers, which keep their indices."""
        if len(indices) == len(self.layers):
            return self
        layers = tuple(self.numbered_layers[index] for index in indices)
        recipe = self.recipe.only(indices)
        return dataclasses.replace(self, layers=layers, chosen_layers=tuple(indices), recipe=recipe)

    @property
    def mamba_inner_size(self) -> int:
        """Channels of a Mamba mixer's x, z and y."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C concatenated."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_size(self) -> int:
        """Input and output size of the routed experts: the latent size, or the hidden size without a latent."""
        return self.moe_latent_size or self.hidden_size

    def quantizable_modules(self) -> Iterator[str]:
        """Every module that can have FP8 weights, in model order; the head, router and convolution cannot."""
        for i, kind in self.numbered_layers.items():
            latent = LATENT if kind == "moe" and self.moe_latent_size else ()
            for name in (*PROJECTIONS[kind], *latent):
                yield f"backbone.layers.{i}.mixer.{name}"

    def with_recipe(self, recipe: Recipe) -> ModelConfig:
        """The same model with the recipe's modules in FP8."""
        return dataclasses.replace(self, recipe=recipe)

    def unquantized(self) -> ModelConfig:
        """The same model without any quantization."""
        return dataclasses.replace(self, recipe=Recipe(), quantization=None)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], ignore_fields: Collection[str] = ()) -> ModelConfig:
        """The config for a parsed config.json; raises ConfigError that names the field.

        Fields in `ignore_fields` are as absent, if they are unknown or in IGNORABLE.
        """
        if other := other_model(raw):
            raise ConfigError(*other)
        ignored = [name for name in raw if name in ignore_fields and (name not in KNOWN or name in IGNORABLE)]
        raw = {name: _parse_infinity(value) for name, value in raw.items() if name not in ignored}
        _check_known([name for name in raw if name not in KNOWN])
        _check_fixed(raw)
        layers = _layers(raw)
        inert = {name: INERT[name] for name in raw if name in INERT}
        values: dict[str, Any] = {}
        for spec in JSON_FIELDS:
            name, value = _lookup(raw, spec.name)
            kinds = [kind for kind, names in FIELDS_OF_KIND.items() if spec.name in names]
            if kinds and not set(kinds) & set(layers):
                inert |= {name: f"the model has no {' or '.join(kinds)} layer"} if name else {}
            elif value is not None:
                values[spec.name] = CONVERTERS[TYPES[spec.name]](name, value)
            elif spec.default is MISSING or spec.name in REQUIRED:
                raise ConfigError(f"{ALIASES.get(spec.name, (spec.name,))[0]} is missing")
        if "attention" in layers:
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        config = cls(layers=layers, inert=inert, ignored_fields=tuple(ignored), **values)
        if contradiction := next(_contradictions(config), ""):
            raise ConfigError(contradiction)
        return config


TYPES = get_type_hints(ModelConfig)

JSON_FIELDS = [
    spec
    for spec in fields(ModelConfig)
    if spec.name not in ("layers", "chosen_layers", "recipe", "inert", "ignored_fields")
]
"""The fields that are read from a config.json, possibly under another name."""

KNOWN = {
    *(name for spec in JSON_FIELDS for name in ALIASES.get(spec.name, (spec.name,))),
    *(*INERT, *FIXED, *LAYER_FIELDS, *FIELDS, "num_hidden_layers"),
}
"""Every name that a config.json may have."""

IGNORABLE = ("residual_in_fp32",)
"""Known fields that can be ignored on request, because transformers does not read them either."""


def _parse_infinity(value: Any) -> Any:
    """Replace {"__float__": "Infinity"}, which transformers 5 writes, by the number."""
    if isinstance(value, list):
        return [_parse_infinity(item) for item in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(value["__float__"], value)
    return value


def _check_known(unknown: Sequence[str]) -> None:
    if not unknown:
        return
    *others, last = (name or '""' for name in unknown)
    what = f"{', '.join(others)} and {last} are not fields" if others else f"{last} is not a field"
    near = difflib.get_close_matches(unknown[0], KNOWN, n=1, cutoff=0.8)
    asked = "what they ask for" if others else "what it asks for"
    hint = f"; did you mean {near[0]}?" if near else f", so {asked} is not supported"
    raise UnknownFieldsError(f"{what} of this model family{hint}", tuple(unknown))


def _check_fixed(raw: dict[str, Any]) -> None:
    for name, (allowed, reason) in FIXED.items():
        if raw.get(name) is not None and raw[name] not in allowed:
            raise ConfigError(f"{name} is {json.dumps(raw[name])}: {reason}")
    # transformers writes mamba_proj_bias but reads use_bias, so mamba_proj_bias alone would have no effect.
    if raw.get("mamba_proj_bias") and not raw.get("use_bias"):
        raise ConfigError("mamba_proj_bias is set, but use_bias, which takes effect, is not")


def _layers(raw: dict[str, Any]) -> tuple[str, ...]:
    """The kind of each layer, from the pattern or a list; if both are present, they must agree."""
    layers_by_field: dict[str, tuple[str, ...]] = {}
    for name, names in LAYER_FIELDS.items():
        if (written := raw.get(name)) is None:
            continue
        if type(written) is not (str if names is PATTERN else list):
            expected = "a string" if names is PATTERN else "a list of layer kinds"
            raise ConfigError(f"{name} is not {expected}")
        layers_by_field[name] = tuple(_kind(name, kind, names) for kind in written)
    if not layers_by_field:
        raise ConfigError("neither hybrid_override_pattern nor layers_block_type lists the model's layers")
    (first, layers), *others = layers_by_field.items()
    for name, other in others:
        if other != layers:
            raise ConfigError(f"{first} and {name} describe different layers")
    if not layers:
        raise ConfigError(f"{first} is empty: the model has no layer")
    count = raw.get("num_hidden_layers")
    if count is not None and size("num_hidden_layers", count) != len(layers):
        raise ConfigError(f"num_hidden_layers is {count}, but {first} has {len(layers)} layers")
    return layers


def _kind(field_name: str, written: Any, names: dict[str, str]) -> str:
    if not isinstance(written, str) or written not in names:
        raise ConfigError(f"{field_name} holds {json.dumps(written)}; the layer kinds are {', '.join(names)}")
    return names[written]


def _lookup(raw: dict[str, Any], field_name: str) -> tuple[str, Any]:
    """The name used in the file and its value, ("", None) if absent or null; two names must have equal values."""
    names = [name for name in ALIASES.get(field_name, (field_name,)) if raw.get(name) is not None]
    for other in names[1:]:
        if raw[other] != raw[names[0]]:
            raise ConfigError(
                f"{names[0]} is {json.dumps(raw[names[0]])} and {other} is {json.dumps(raw[other])}:"
                " two names of one field must have the same value"
            )
    return (names[0], raw[names[0]]) if names else ("", None)


def _contradictions(c: ModelConfig) -> Iterator[str]:
    """A message for each contradiction; only the first is reliable, since later checks assume earlier ones."""
    sizes = {"hidden_size", "vocab_size"}
    for kind in set(c.layers):
        sizes |= REQUIRED & set(FIELDS_OF_KIND[kind]) | (
            {"num_key_value_heads"} if kind == "attention" else set()
        )
    for name in sorted(sizes):
        if getattr(c, name) < 1:
            yield f"{ALIASES.get(name, (name,))[0]} is 0; it must be at least 1"
    if len(c.layers) > MAX_LAYERS:
        yield f"the model has {len(c.layers)} layers; at most {MAX_LAYERS} are supported"
    if not 0 < c.norm_eps < 1:
        yield f"layer_norm_epsilon is {c.norm_eps}; it must be between 0 and 1"
    if "mamba" in c.layers:
        yield from _mamba_contradictions(c)
    if "attention" in c.layers and c.num_attention_heads % c.num_key_value_heads:
        yield (
            f"num_attention_heads {c.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {c.num_key_value_heads}"
        )
    if "moe" in c.layers:
        yield from _moe_contradictions(c)


def _mamba_contradictions(c: ModelConfig) -> Iterator[str]:
    if c.mamba_num_heads % c.n_groups:
        yield f"mamba_num_heads {c.mamba_num_heads} is not a multiple of n_groups {c.n_groups}"
    if c.conv_kernel < 2:
        yield f"conv_kernel is {c.conv_kernel}: a convolution with one tap has no state"
    if c.ssm_state_dtype == DType.BFLOAT16:
        yield "mamba_ssm_cache_dtype is bfloat16; the recurrent state is float32 or float16"


def _moe_contradictions(c: ModelConfig) -> Iterator[str]:
    experts, groups, top_k = c.n_routed_experts, c.n_group, c.num_experts_per_tok
    if (total := experts * c.layers.count("moe")) > MAX_EXPERTS:
        yield f"n_routed_experts {experts} makes {total} experts in all; at most {MAX_EXPERTS} are supported"
    if groups < 1:
        yield "n_group is 0; it must be at least 1"
    if experts % groups:
        yield f"n_routed_experts {experts} is not a multiple of n_group {groups}"
    if not 1 <= c.topk_group <= groups:
        yield f"topk_group is {c.topk_group}; it must be between 1 and n_group {groups}"
    if top_k > experts:
        yield f"num_experts_per_tok {top_k} is more than n_routed_experts {experts}"
    available = c.topk_group * (experts // groups)
    if top_k > available:
        yield f"num_experts_per_tok {top_k} is more than the {available} experts of topk_group {c.topk_group}"
    if c.n_shared_experts != 1:
        yield f"n_shared_experts is {c.n_shared_experts}; every MoE layer has one shared expert"
