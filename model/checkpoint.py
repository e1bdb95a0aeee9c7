"""Where each parameter comes from in a checkpoint: one table for every reader of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import dropwhile
from typing import TYPE_CHECKING

from nemotrt.model.config import ModelConfig
from nemotrt.model.recipe import EXPERTS

if TYPE_CHECKING:
    from torch import Tensor

    from nemotrt.model.hybrid import NemotronH

PREFIXES = ("backbone.", "model.")
"""What stands before every name but the head's: as published, and as in transformers 5's state dict."""

EMBEDDINGS = ("embeddings.weight", "embedding.weight")
"""What checkpoints call the embedding table."""


class Transform(Enum):
    """What happens to stored values on their way into the parameter, whose dtype they take at the end."""

    COPY = auto()
    NEG_EXP = auto()
    """−exp of the stored value, computed in FP32: A from A_log."""
    RESHAPE = auto()
    """The same values in order, in the parameter's shape."""
    ZEROS = auto()
    """No stored tensor: the parameter is 0."""
    ONES = auto()
    """No stored tensor: the parameter is 1."""
    SCALE = auto()
    """The same values in order, each a finite number above 0, and each repeated as often as fills the parameter."""
    LARGEST = auto()
    """The largest of the values of all stored tensors, each a finite number above 0."""


@dataclass(frozen=True)
class Source:
    """The stored tensors of one parameter.

    Each element of `names` is one stored tensor of `shape`, by each name that it may have; several are
    stacked along a new first axis, or one tensor [len(names), *shape] lies under a name of `stacked`.
    """

    names: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    transform: Transform = Transform.COPY
    stacked: tuple[str, ...] = ()


class TensorError(ValueError):
    """A checkpoint's tensors are not those of the model: missing, extra, misshapen or named twice."""


def is_mtp(name: str) -> bool:
    """Whether a stored tensor belongs to multi-token prediction, which is not part of the model."""
    return name.startswith("mtp.")


def tensor_sources(config: ModelConfig) -> dict[str, Source]:
    """The source of every parameter, by its name in NemotronH's state dict and in that order."""
    table = Source((_aliases(*EMBEDDINGS),), (config.vocab_size, config.hidden_size))
    head = Source((("lm_head.weight",),), table.shape)
    norm = (config.hidden_size,)
    sources = {"backbone.embeddings.weight": table}
    for i, kind in config.numbered_layers.items():
        layer = f"layers.{i}"
        sources[f"backbone.{layer}.norm.weight"] = Source((_aliases(f"{layer}.norm.weight"),), norm)
        for name, source in _MIXERS[kind](config, f"{layer}.mixer."):
            sources[f"backbone.{layer}.mixer.{name}"] = source
    sources["backbone.norm_f.weight"] = Source((_aliases("norm_f.weight"),), norm)
    sources["lm_head.weight"] = table if config.tie_word_embeddings else head
    return sources


def _aliases(*names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names for prefix in PREFIXES)


def _same(mixer: str, name: str, *shape: int) -> tuple[str, Source]:
    return name, Source((_aliases(mixer + name),), shape)


def _linear(
    config: ModelConfig, mixer: str, name: str, outputs: int, inputs: int, *, bias: bool
) -> Iterator[tuple[str, Source]]:
    yield _same(mixer, f"{name}.weight", outputs, inputs)
    if bias:
        yield _same(mixer, f"{name}.bias", outputs)
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
    yield "conv1d.weight", Source((conv,), (channels, 1, config.conv_kernel), Transform.RESHAPE)
    if config.use_conv_bias:
        yield _same(mixer, "conv1d.bias", channels)
    else:
        yield "conv1d.bias", Source((), (channels,), Transform.ZEROS)
    yield "A", Source((_aliases(f"{mixer}A_log"),), (heads,), Transform.NEG_EXP)
    yield _same(mixer, "D", heads)
    yield _same(mixer, "dt_bias", heads)
    yield _same(mixer, "norm.weight", inner)
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
        stored = _scale(f"{mixer}{scale[0]}_proj.{scale}")
        yield scale, stored if config.recipe.kv_scales else Source((), (1,), Transform.ONES)


def _mlp(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield from _linear(config, mixer, "up_proj", inner, hidden, bias=config.mlp_bias)
    yield from _linear(config, mixer, "down_proj", hidden, inner, bias=config.mlp_bias)


def _moe(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    hidden, size, experts = config.hidden_size, config.expert_size, config.n_routed_experts
    inner, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
    yield _same(mixer, "gate.weight", experts, hidden)
    yield _same(mixer, "gate.e_score_correction_bias", experts)
    yield "experts.up", _stack(mixer, "up_proj", experts, (inner, size))
    yield "experts.down", _stack(mixer, "down_proj", experts, (size, inner))
    yield from _expert_scales(config, mixer)
    yield from _linear(config, mixer, "shared_experts.up_proj", shared, hidden, bias=config.mlp_bias)
    yield from _linear(config, mixer, "shared_experts.down_proj", hidden, shared, bias=config.mlp_bias)
    if config.moe_latent_size:
        yield from _linear(config, mixer, "fc1_latent_proj", size, hidden, bias=config.mlp_bias)
        yield from _linear(config, mixer, "fc2_latent_proj", hidden, size, bias=config.mlp_bias)


def _expert_scales(config: ModelConfig, mixer: str) -> Iterator[tuple[str, Source]]:
    """A scale for each output of each expert, and one of each activation for all: the largest, as vLLM takes it."""
    module, experts = f"{mixer}{EXPERTS}", range(config.n_routed_experts)
    is_fp8, is_per_channel = (
        f"backbone.{module}" in modules for modules in (config.recipe.modules, config.recipe.per_channel)
    )

    def stored(name: str) -> tuple[tuple[str, ...], ...]:
        return tuple(_aliases(f"{module}.{e}.{name}") for e in experts)

    for name, projection, outputs in (
        ("up_scale", "up_proj", config.moe_intermediate_size),
        ("down_scale", "down_proj", config.expert_size),
    ):
        shape = (outputs,) if is_per_channel else ()
        scales = Source(stored(f"{projection}.weight_scale"), shape, Transform.SCALE)
        yield f"{EXPERTS}.{name}", scales if is_fp8 else Source((), (len(experts), outputs), Transform.ONES)
    for name, projection in (("input_scale", "up_proj"), ("hidden_scale", "down_proj")):
        largest = Source(stored(f"{projection}.input_scale"), (), Transform.LARGEST)
        yield f"{EXPERTS}.{name}", largest if is_fp8 else Source((), (1,), Transform.ONES)


def _stack(mixer: str, projection: str, experts: int, shape: tuple[int, ...]) -> Source:
    names = tuple(_aliases(f"{mixer}experts.{e}.{projection}.weight") for e in range(experts))
    return Source(names, shape, stacked=_aliases(f"{mixer}experts.{projection}"))


_MIXERS = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}


def load_into(model: NemotronH, tensors: Mapping[str, Tensor]) -> None:
    """Fill every parameter of the model from stored tensors, leaving out what `is_mtp`.

    Raises TensorError on a tensor that is missing, extra, misshapen or stored under two names.
    """
    import torch

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    parameters = model.state_dict(keep_vars=True)
    used: set[str] = set()
    with torch.no_grad():
        for name, source in tensor_sources(model.config).items():
            stored = find(source, shapes)
            used.update(stored)
            parameters[name].copy_(_value(source, [tensors[key] for key in stored], parameters[name]))
    if extra := sorted(key for key in tensors if key not in used and not is_mtp(key)):
        raise TensorError(f"{extra[0]} is stored, but not in the model that the configuration describes")


def find(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names under which a source's tensors are stored, of all that are stored; one if they lie stacked.

    Raises TensorError on a tensor that is missing, misshapen or stored under two names.
    """
    whole = [name for name in source.stacked if name in shapes]
    wanted = (source.stacked,) if whole else source.names
    shape = (len(source.names), *source.shape) if whole else source.shape
    found: list[str] = []
    for aliases in wanted:
        present = [name for name in aliases if name in shapes]
        if not present:
            raise TensorError(f"{aliases[0]} is missing")
        if len(present) > 1:
            raise TensorError(f"{present[0]} and {present[1]} are two names of one tensor; keep one")
        if _bare(shapes[present[0]], source) != _bare(shape, source):
            raise TensorError(
                f"{present[0]} has shape {list(shapes[present[0]])}, the configuration asks for {list(shape)}"
            )
        found += present
    return tuple(found)


def _bare(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """A scale's shape without sizes of 1 at its end, which writers put there for broadcasting; another's as it is."""
    if source.transform not in (Transform.SCALE, Transform.LARGEST):
        return shape
    return tuple(reversed([*dropwhile(lambda size: size == 1, reversed(shape))]))


def _value(source: Source, stored: list[Tensor], parameter: Tensor) -> Tensor:
    import torch

    match source.transform:
        case Transform.ZEROS:
            return torch.zeros_like(parameter)
        case Transform.ONES:
            return torch.ones_like(parameter)
        case Transform.NEG_EXP:
            return -torch.exp(stored[0].float())
        case Transform.LARGEST:
            return torch.stack(stored).max().reshape(parameter.shape)
        case Transform.SCALE:
            scales = torch.stack(stored).flatten()
            return scales.repeat_interleave(parameter.numel() // len(scales)).reshape(parameter.shape)
    return (torch.stack(stored) if len(stored) > 1 else stored[0]).reshape(parameter.shape)
