"""A checkpoint's config.json, normalised: one name a fact, every field accounted for.

A field that the model has no name for is an error, and so is a value that would need what the model does not
do. What changes no output stands in `config_fields.INERT`, with the reason.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from nemotrt.model.config_fields import ALIASES, FIXED, INERT, LAYER_NAMES, PATTERN, USED_BY
from nemotrt.model.recipe import Recipe
from nemotrt.plugins.contract import DType

LAYER_KINDS = ("mamba", "attention", "mlp", "moe")
"""What a layer's mixer may be."""

DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
"""What a checkpoint's weights may be meant as."""

LARGEST = 3.4028234663852886e38
"""The largest FP32: time steps above it are meant as no limit, and ONNX attributes must be finite."""


class ConfigError(ValueError):
    """A config.json is contradictory, incomplete, or asks for what the model does not do."""


@dataclass(frozen=True)
class ModelConfig:
    """What decides the model's shapes and arithmetic; sizes of layer kinds that it has no layer of are 0."""

    hidden_size: int
    vocab_size: int
    layers: tuple[str, ...]
    """The kind of each layer, from LAYER_KINDS."""
    chosen_layers: tuple[int, ...] = ()
    """The index that each layer has in the checkpoint's model, where these are not all of its layers."""

    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 0
    """Groups of Mamba heads that share B and C, and that the gated norm normalises over."""
    conv_kernel: int = 0
    """Taps of the causal convolution, the newest included."""
    use_conv_bias: bool = True
    use_bias: bool = False
    """Of a Mamba mixer's in_proj and out_proj."""
    time_step_limit: tuple[float, float] = (0.0, LARGEST)
    """Bounds of softplus(dt + dt_bias), finite."""

    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False

    intermediate_size: int = 0
    mlp_bias: bool = False
    """Also of the shared expert and the latent projections; routed experts have no bias."""

    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_latent_size: int = 0
    """The routed experts' input and output size; 0 where that is the hidden size."""
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    """Groups of experts that the router chooses from."""
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    dtype: DType = DType.FLOAT32
    """What the checkpoint says its weights are, from DTYPES; if nothing, FP32, which holds every other."""
    ssm_state_dtype: DType = DType.FLOAT32
    max_position_embeddings: int = 0
    """Tokens a sequence that the checkpoint was made for, 0 if it does not say; no result depends on it."""
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_mtp_layers: int = 0
    """Tokens ahead that its multi-token prediction drafts; its weights are no part of this model."""

    quantization: dict[str, Any] | None = field(default=None, hash=False)
    """`quantization_config` as it stands, for the loader to interpret."""
    recipe: Recipe = field(default_factory=Recipe)
    """Which weights are FP8; nothing until a loader has read what says so."""
    inert: dict[str, str] = field(default_factory=dict, compare=False)
    """Fields that were met and change nothing, with the reason."""

    @property
    def numbered_layers(self) -> dict[int, str]:
        """Each layer's index in the checkpoint's model, in order → its kind."""
        return dict(zip(self.chosen_layers or range(len(self.layers)), self.layers, strict=True))

    def only(self, indices: Sequence[int]) -> ModelConfig:
        """The model of these layers alone, in order, each under the index that it has."""
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
        """Channels of the convolution: x, B and C side by side."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_size(self) -> int:
        """The routed experts' input and output size: the latent, or the hidden size."""
        return self.moe_latent_size or self.hidden_size

    def with_recipe(self, recipe: Recipe) -> ModelConfig:
        """The same model with these of its weights in FP8."""
        return dataclasses.replace(self, recipe=recipe)

    def unquantized(self) -> ModelConfig:
        """The same model with nothing said of quantization."""
        return dataclasses.replace(self, recipe=Recipe(), quantization=None)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """The normalised form of a parsed config.json; raises ConfigError that names the field."""
        raw = {name: _untagged(value) for name, value in raw.items()}
        _check_known(raw)
        _check_fixed(raw)
        layers = _layers(raw)
        inert = {name: INERT[name] for name in raw if name in INERT}
        values: dict[str, Any] = {}
        for spec in fields(cls):
            kinds = USED_BY.get(spec.name, LAYER_KINDS)
            if spec.name in NOT_GIVEN:
                continue
            name, value = _given(raw, spec.name)
            if not any(kind in layers for kind in kinds):
                inert |= {name: f"the model has no {' or '.join(kinds)} layer"} if name else {}
            elif value is not None:
                values[spec.name] = CONVERT[str(spec.type)](name, value)
            elif spec.default is MISSING or spec.name in REQUIRED:
                raise ConfigError(f"{ALIASES.get(spec.name, (spec.name,))[0]} is missing")
        if "attention" in layers:
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        config = cls(layers=layers, inert=inert, **values)
        for broken, message in _contradictions(config):
            if broken:
                raise ConfigError(message)
        return config

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """The normalised form of a config.json file; raises ConfigError, or OSError if it cannot be read."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} is not a JSON object")
        return cls.from_dict(raw)


NOT_GIVEN = ("layers", "chosen_layers", "recipe", "inert")
"""Fields of ModelConfig that are no field of a config.json."""

REQUIRED = {
    *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    *("num_attention_heads", "head_dim", "intermediate_size"),
    *(
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
}
"""Fields without which a layer kind that the model has cannot be built."""


def _untagged(value: Any) -> Any:
    """A value as transformers 5 means it, which writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(value["__float__"], value)
    return value


def _check_known(raw: dict[str, Any]) -> None:
    normalised = {spec.name for spec in fields(ModelConfig)} - {*NOT_GIVEN, "quantization", *ALIASES}
    known = normalised | {name for names in ALIASES.values() for name in names}
    known |= {*INERT, *FIXED, *LAYER_FIELDS}
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            raise ConfigError(
                f"{name} is not a field of this model family"
                + (f"; did you mean {near[0]}?" if near else ", so what it asks for cannot be done")
            )


def _check_fixed(raw: dict[str, Any]) -> None:
    for name, (allowed, reason) in FIXED.items():
        if raw.get(name) is not None and raw[name] not in allowed:
            raise ConfigError(f"{name} is {json.dumps(raw[name])}: {reason}")
    # transformers writes mamba_proj_bias and reads use_bias: the first, set alone, is a wish that is lost.
    if raw.get("mamba_proj_bias") and not raw.get("use_bias"):
        raise ConfigError("mamba_proj_bias is set but use_bias, which decides, is not")


LAYER_FIELDS = ("hybrid_override_pattern", "layers_block_type", "layer_types", "num_hidden_layers")
"""Fields that say which layers the model has."""


def _layers(raw: dict[str, Any]) -> tuple[str, ...]:
    """The layers that the pattern, the list, or both in agreement, say."""
    found: dict[str, tuple[str, ...]] = {}
    if (pattern := raw.get("hybrid_override_pattern")) is not None:
        found["hybrid_override_pattern"] = tuple(
            _kind("hybrid_override_pattern", character, PATTERN)
            for character in _text("hybrid_override_pattern", pattern)
        )
    for name in ("layers_block_type", "layer_types"):
        if (listed := raw.get(name)) is not None:
            if not isinstance(listed, list):
                raise ConfigError(f"{name} is not a list of layer kinds")
            found[name] = tuple(_kind(name, kind, LAYER_NAMES) for kind in listed)
    if not found:
        raise ConfigError(
            "neither hybrid_override_pattern nor layers_block_type says which layers the model has"
        )
    (first, layers), *others = found.items()
    for name, other in others:
        if other != layers:
            raise ConfigError(f"{first} and {name} describe different layers")
    if not layers:
        raise ConfigError(f"{first} is empty: the model has no layer")
    count = raw.get("num_hidden_layers")
    if count is not None and _whole("num_hidden_layers", count) != len(layers):
        raise ConfigError(f"num_hidden_layers is {count}, but {first} has {len(layers)} layers")
    return layers


def _kind(name: str, written: Any, table: dict[str, str]) -> str:
    if not isinstance(written, str) or written not in table:
        raise ConfigError(f"{name} holds {json.dumps(written)}; the layer kinds are {', '.join(table)}")
    return table[written]


def _given(raw: dict[str, Any], field_name: str) -> tuple[str, Any]:
    """The name under which a fact was given and its value, null being none; two names must say the same."""
    names = [name for name in ALIASES.get(field_name, (field_name,)) if raw.get(name) is not None]
    for other in names[1:]:
        if raw[other] != raw[names[0]]:
            raise ConfigError(
                f"{names[0]} is {json.dumps(raw[names[0]])} and {other} is {json.dumps(raw[other])}:"
                " two names of one thing must agree"
            )
    return (names[0], raw[names[0]]) if names else ("", None)


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(f"{name} is {json.dumps(value)}; it must be a whole number, 0 or more")
    return value


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"{name} is {json.dumps(value)}; it must be true or false")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {json.dumps(value)}; it must be a finite number")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {json.dumps(value)}; it must be a string")
    return value


def _dtype(name: str, value: Any) -> DType:
    dtype = _text(name, value).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{name} is {dtype}; it must be one of {', '.join(DTYPES)}")
    return DType(dtype)


def _limits(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"{name} is {json.dumps(value)}; it must be two numbers")
    low, high = (_number(name, LARGEST if bound == math.inf else bound) for bound in value)
    if not 0 <= low <= high:
        raise ConfigError(f"{name} is {json.dumps(value)}; it must be two rising numbers, 0 or more")
    return min(low, LARGEST), min(high, LARGEST)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_whole(name, token) for token in (value if isinstance(value, list) else [value]))


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is not a JSON object")
    return value


CONVERT: dict[str, Callable[[str, Any], Any]] = {
    "bool": _flag,
    "int": _whole,
    "int | None": _whole,
    "float": _number,
    "DType": _dtype,
    "tuple[float, float]": _limits,
    "tuple[int, ...]": _ids,
    "dict[str, Any] | None": _object,
}
"""A field's type as written above → how its JSON value is read."""


def _contradictions(c: ModelConfig) -> list[tuple[bool, str]]:
    """What must not be, with the message that says so."""
    sizes = ("hidden_size", "vocab_size", *sorted(_required_of(c)))
    zero = next((name for name in sizes if getattr(c, name) < 1), "")
    if zero:
        return [(True, f"{ALIASES.get(zero, (zero,))[0]} is 0; it must be at least 1")]
    found = [(not 0 < c.norm_eps < 1, f"layer_norm_epsilon is {c.norm_eps}; it must lie between 0 and 1")]
    if "mamba" in c.layers:
        found += [
            (
                c.mamba_num_heads % c.n_groups != 0,
                f"mamba_num_heads {c.mamba_num_heads} is no multiple of n_groups {c.n_groups}",
            ),
            (c.conv_kernel < 2, f"conv_kernel is {c.conv_kernel}: a convolution of one tap keeps no state"),
            (
                c.ssm_state_dtype == DType.BFLOAT16,
                "mamba_ssm_cache_dtype is bfloat16; the recurrent state is float32 or float16",
            ),
        ]
    if "attention" in c.layers:
        q, kv = c.num_attention_heads, c.num_key_value_heads
        found += [(q % kv != 0, f"num_attention_heads {q} is no multiple of num_key_value_heads {kv}")]
    if "moe" in c.layers:
        found += _moe_contradictions(c)
    return found


def _required_of(c: ModelConfig) -> list[str]:
    used = [name for name in REQUIRED if any(kind in c.layers for kind in USED_BY[name])]
    return used + (["num_key_value_heads"] if "attention" in c.layers else [])


def _moe_contradictions(c: ModelConfig) -> list[tuple[bool, str]]:
    experts, groups, top_k = c.n_routed_experts, c.n_group, c.num_experts_per_tok
    if groups < 1:
        return [(True, "n_group is 0; it must be at least 1")]
    chosen = c.topk_group * (experts // groups)
    return [
        (experts % groups != 0, f"n_routed_experts {experts} is no multiple of n_group {groups}"),
        (
            not 1 <= c.topk_group <= groups,
            f"topk_group is {c.topk_group}; it must lie between 1 and n_group {groups}",
        ),
        (top_k > experts, f"num_experts_per_tok {top_k} is more than n_routed_experts {experts}"),
        (
            top_k > chosen,
            f"num_experts_per_tok {top_k} is more than the {chosen} experts of topk_group {c.topk_group}",
        ),
        (
            c.n_shared_experts != 1,
            f"n_shared_experts is {c.n_shared_experts}; every layer of experts has one shared expert",
        ),
    ]
