"""The table that maps each parameter of the model to its tensors in a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import dropwhile

from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS
from nemotrt.plugins.contract import DType

PREFIXES = ("backbone.", "model.")
"""Prefixes of every stored name but the head's: the published one, and that of transformers 5."""

EMBEDDINGS = ("embeddings.weight", "embedding.weight")
"""Names of the embedding table."""

HEAD = "lm_head.weight"
"""The name of the head; also a name of the embedding table, if the two are tied."""

FP32, FP32_MODULES = ("A", "D", "dt_bias"), (".norm", ".norm_f", ".gate")
"""Parameters, and modules whose parameters, are FP32 in every model; so is every scale."""


class Transform(Enum):
    """How stored values become the parameter's values; in the end they are cast to the parameter's dtype."""

    COPY = auto()
    NEG_EXP = auto()
    """A = −exp(A_log), computed in FP32."""
    RESHAPE = auto()
    """The values in the same order, in the parameter's shape."""
    ZEROS = auto()
    """No stored tensor: the parameter is 0."""
    ONES = auto()
    """No stored tensor: the parameter is 1."""
    SCALE = auto()
    """Positive finite values in the same order, each repeated equally often to fill the parameter."""
    LARGEST = auto()
    """The maximum over all stored tensors of positive finite values."""


@dataclass(frozen=True)
class Source:
    """The stored tensors of one parameter.

    Each element of `names` lists the possible names of one tensor of `shape`. Several tensors are stacked along a
    new first axis, unless a single tensor [len(names), *shape] is stored under a name in `stacked`.
    """

    names: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    transform: Transform = Transform.COPY
    stacked: tuple[str, ...] = ()
    parameter: tuple[int, ...] | None = None
    """The parameter's shape, if it is not that of the tensors."""

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the model."""
        if self.parameter is not None:
            return self.parameter
        return (len(self.names), *self.shape) if self.stacked else self.shape


class TensorError(ValueError):
    """A tensor of the checkpoint is missing, has the wrong shape, or is stored under two names."""


def is_mtp(name: str) -> bool:
    """Whether a stored tensor belongs to multi-token prediction, which is not exported."""
    return name.startswith("mtp.")


def tensor_sources(config: ModelConfig) -> dict[str, Source]:
    """The source of every parameter of NemotronH."""
    names = _aliases(*EMBEDDINGS) + ((HEAD,) if config.tie_word_embeddings else ())
    table = Source((names,), (config.vocab_size, config.hidden_size))
    head = Source(((HEAD,),), table.shape)
    norm = (config.hidden_size,)
    sources = {"backbone.embeddings.weight": table}
    for i, kind in config.numbered_layers.items():
        layer = f"layers.{i}"
        sources[f"backbone.{layer}.norm.weight"] = Source((_aliases(f"{layer}.norm.weight"),), norm)
        for name, source in _MIXERS[kind](config, f"{layer}.mixer."):
            sources[f"backbone.{layer}.mixer.{name}"] = source
    sources["backbone.norm_f.weight"] = Source((_aliases("norm_f.weight"),), norm)
    sources[HEAD] = table if config.tie_word_embeddings else head
    return sources


def parameters(config: ModelConfig, dtype: DType) -> dict[str, tuple[tuple[int, ...], DType]]:
    """The shape and dtype of every parameter of a NemotronH that computes in `dtype`; a tied head is not listed."""
    return {
        name: (source.parameter_shape, parameter_dtype(config, name, dtype))
        for name, source in tensor_sources(config).items()
        if not (name == HEAD and config.tie_word_embeddings)
    }


def parameter_dtype(config: ModelConfig, name: str, dtype: DType) -> DType:
    """The dtype of a parameter in a model that computes in `dtype`: FP32 and FP8 parameters have their own."""
    module, _, attribute = name.rpartition(".")
    if attribute in FP32 or attribute.endswith("_scale") or module.endswith(FP32_MODULES):
        return DType.FLOAT32
    return DType.FLOAT8_E4M3 if is_fp8(config, name) else dtype


def is_fp8(config: ModelConfig, name: str) -> bool:
    """Whether a parameter is an FP8 weight: of a linear, or of stacked experts."""
    module, _, attribute = name.rpartition(".")
    return module in config.recipe.modules and attribute in ("weight", "up", "down")


def _aliases(*names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names for prefix in PREFIXES)


def _copy(mixer: str, name: str, *shape: int) -> tuple[str, Source]:
    return name, Source((_aliases(mixer + name),), shape)


def _linear(
    config: ModelConfig, mixer: str, name: str, outputs: int, inputs: int, *, bias: bool
) -> Iterator[tuple[str, Source]]:
    yield _copy(mixer, f"{name}.weight", outputs, inputs)
    if bias:
        yield _copy(mixer, f"{name}.bias", outputs)
    module = f"backbone.{mixer}{name}"
    if module in config.recipe.modules:
        shape = (outputs,) if module in config.recipe.per_channel else ()
        yield f"{name}.weight_scale", _scale(f"{mixer}{name}.weight_scale", shape)
        yield f"{name}.input_scale", _scale(f"{mixer}{name}.input_scale")


def _scale(name: str, shape: tuple[int, ...] = ()) -> Source:
    return Source((_aliases(name),), shape, Transform.SCALE)


def _mamba(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    heads, inner, channels = config.mamba_num_heads, config.mamba_inner_size, config.conv_channels
    bias = config.use_bias
    yield from _linear(config, mixer, "in_proj", inner + channels + heads, config.hidden_size, bias=bias)
    conv = _aliases(f"{mixer}conv1d.weight")
    taps = config.conv_kernel
    weight = Source((conv,), (channels, 1, taps), Transform.RESHAPE, parameter=(channels, taps))
    yield "conv1d.weight", weight
    if config.use_conv_bias:
        yield _copy(mixer, "conv1d.bias", channels)
    else:
        yield "conv1d.bias", Source((), (channels,), Transform.ZEROS)
    yield "A", Source((_aliases(f"{mixer}A_log"),), (heads,), Transform.NEG_EXP)
    yield _copy(mixer, "D", heads)
    yield _copy(mixer, "dt_bias", heads)
    yield _copy(mixer, "norm.weight", inner)
    yield from _linear(config, mixer, "out_proj", config.hidden_size, inner, bias=bias)


def _attention(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    hidden, bias = config.hidden_size, config.attention_bias
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    yield from _linear(config, mixer, "q_proj", query, hidden, bias=bias)
    yield from _linear(config, mixer, "k_proj", kv, hidden, bias=bias)
    yield from _linear(config, mixer, "v_proj", kv, hidden, bias=bias)
    yield from _linear(config, mixer, "o_proj", hidden, query, bias=bias)
    for scale in ("k_scale", "v_scale"):
        stored = replace(_scale(f"{mixer}{scale[0]}_proj.{scale}"), parameter=(1,))
        yield scale, stored if config.recipe.kv_scales else Source((), (1,), Transform.ONES)


def _mlp(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield from _linear(config, mixer, "up_proj", inner, hidden, bias=config.mlp_bias)
    yield from _linear(config, mixer, "down_proj", hidden, inner, bias=config.mlp_bias)


def _moe(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    hidden, size, experts = config.hidden_size, config.expert_size, config.n_routed_experts
    inner, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
    yield _copy(mixer, "gate.weight", experts, hidden)
    yield _copy(mixer, "gate.e_score_correction_bias", experts)
    yield "experts.up", _stack(mixer, "up_proj", experts, (inner, size))
    yield "experts.down", _stack(mixer, "down_proj", experts, (size, inner))
    yield from _expert_scales(config, mixer)
    yield from _linear(config, mixer, "shared_experts.up_proj", shared, hidden, bias=config.mlp_bias)
    yield from _linear(config, mixer, "shared_experts.down_proj", hidden, shared, bias=config.mlp_bias)
    if config.moe_latent_size:
        yield from _linear(config, mixer, "fc1_latent_proj", size, hidden, bias=config.mlp_bias)
        yield from _linear(config, mixer, "fc2_latent_proj", hidden, size, bias=config.mlp_bias)


def _expert_scales(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    """One weight scale per output and expert, and one scale per activation: the maximum over experts, as in vLLM."""
    module, experts = f"{mixer}{EXPERTS}", range(config.n_routed_experts)
    is_fp8 = f"backbone.{module}" in config.recipe.modules
    is_per_channel = f"backbone.{module}" in config.recipe.per_channel

    def stored(name: str) -> tuple[tuple[str, ...], ...]:
        return tuple(_aliases(f"{module}.{e}.{name}") for e in experts)

    for name, projection, outputs in (
        ("up_scale", "up_proj", config.moe_intermediate_size),
        ("down_scale", "down_proj", config.expert_size),
    ):
        shape = (outputs,) if is_per_channel else ()
        repeated = (len(experts), outputs)
        scales = Source(stored(f"{projection}.weight_scale"), shape, Transform.SCALE, parameter=repeated)
        yield f"{EXPERTS}.{name}", scales if is_fp8 else Source((), repeated, Transform.ONES)
    for name, projection in (("input_scale", "up_proj"), ("hidden_scale", "down_proj")):
        largest = Source(stored(f"{projection}.input_scale"), (), Transform.LARGEST, parameter=(1,))
        yield f"{EXPERTS}.{name}", largest if is_fp8 else Source((), (1,), Transform.ONES)


def _stack(mixer: str, projection: str, experts: int, shape: tuple[int, ...]) -> Source:
    names = tuple(_aliases(f"{mixer}experts.{e}.{projection}.weight") for e in range(experts))
    return Source(names, shape, stacked=_aliases(f"{mixer}experts.{projection}"))


_MIXERS = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}


def stored_names(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names under which a source's tensors are stored; one name if they are stored as one stacked tensor.

    `shapes` has the shape of every stored tensor. Raises TensorError on a missing, misshapen or duplicate tensor.
    """
    is_stacked = any(name in shapes for name in source.stacked)
    shape = (len(source.names), *source.shape) if is_stacked else source.shape
    names: list[str] = []
    for aliases in (source.stacked,) if is_stacked else source.names:
        matches = [name for name in aliases if name in shapes]
        if not matches:
            raise TensorError(f"{aliases[0]} is missing")
        if len(matches) > 1:
            raise TensorError(f"{matches[0]} and {matches[1]} are two names of one tensor; keep one")
        if _squeezed(shapes[matches[0]], source) != _squeezed(shape, source):
            raise TensorError(
                f"{matches[0]} has shape {list(shapes[matches[0]])}, but the configuration requires {list(shape)}"
            )
        names += matches
    return tuple(names)


def _squeezed(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """A scale's shape without trailing sizes of 1, which some writers add for broadcasting."""
    if source.transform not in (Transform.SCALE, Transform.LARGEST):
        return shape
    return tuple(reversed([*dropwhile(lambda size: size == 1, reversed(shape))]))
