"""Which stored tensors fill which parameter, and every problem that stands in the way of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.quant_config import HF_QUANT_CONFIG, SUPPORTED
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import Source, TensorError, is_mtp, stored_names, tensor_sources
from nemotrt.model.config import ModelConfig

FLOATING = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that a weight may be stored in."""


FP8 = "float8_e4m3fn"


QUANTIZED = {
    FP8: "FP8",
    "float8_e5m2": "FP8 (E5M2)",
    "float8_e8m0fnu": "MXFP8",
    "uint8": "packed 4-bit values",
}
"""A dtype that only quantized weights have → what it is called."""


FOREIGN = {
    ".weight_scale_2": "NVFP4",
    ".qweight": "INT4 (AWQ or GPTQ)",
    ".weight_scale_inv": "block-scaled FP8",
    ".weight_packed": "packed 4-bit values",
    ".pre_quant_scale": "INT4 (AWQ)",
}
"""How a tensor's name ends that only a quantization has which is not supported → that quantization."""


SCALES = ("weight_scale", "input_scale", "k_scale", "v_scale")
"""Last parts of the names that quantization adds to a checkpoint."""


@dataclass(frozen=True)
class Survey:
    """What a table of stored tensors gives a configuration, and all that stands in the way of an export."""

    weights: dict[str, WeightSource]
    """By parameter; those that are missing or misshapen left out."""
    not_exported: tuple[str, ...]
    problems: tuple[CheckpointError, ...]


def match(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Survey:
    """Each parameter's stored tensors, and every problem: missing, misshapen, extra, not as the recipe says."""
    if foreign := _foreign(config, stored):
        return Survey({}, (), (foreign,))
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    problems: list[CheckpointError] = []
    weights: dict[str, WeightSource] = {}
    used: set[str] = set()
    for parameter, source in tensor_sources(config).items():
        try:
            weights[parameter] = _find(config, parameter, source, stored, shapes)
            used.update(tensor.name for tensor in weights[parameter].tensors)
        except CheckpointError as error:
            problems.append(error)
            names = {name for names in (*source.names, source.stacked) for name in names}
            used.update(stored[name].name for name in names & stored.keys())
    unused = [name for name in sorted(stored) if stored[name].name not in used]
    problems += [_extra(name) for name in unused if not is_mtp(name)]
    return Survey(weights, tuple(name for name in unused if is_mtp(name)), tuple(problems))


def _foreign(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> CheckpointError | None:
    """The one problem of a checkpoint that is quantized as nothing here is, or quantized and not described."""
    for sign, scheme in FOREIGN.items():
        if found := sorted(name for name in stored if name.endswith(sign)):
            return CheckpointError(f"the checkpoint is quantized as {scheme} ({found[0]})", hint=SUPPORTED)
    quantized = sorted(name for name, tensor in stored.items() if tensor.dtype in QUANTIZED)
    own = [name for name in quantized if stored[name].dtype != FP8]
    if own:
        # Powers of two, in a type of their own or as bare bytes.
        is_mx = own[0].endswith(".weight_scale")
        what = "MXFP8" if is_mx else QUANTIZED[stored[own[0]].dtype]
        return CheckpointError(f"the checkpoint is quantized as {what} ({own[0]})", hint=SUPPORTED)
    if quantized and not config.recipe:
        return CheckpointError(
            f"{quantized[0]} is FP8, but neither config.json nor {HF_QUANT_CONFIG} describes a quantization",
            hint=f"copy the {HF_QUANT_CONFIG} of the model's repository into the folder",
        )
    if config.recipe and not quantized:
        return CheckpointError(
            "the checkpoint says that it is quantized, but no stored tensor is",
            hint="the configuration and the weights are of different checkpoints",
        )
    return None


def _extra(name: str) -> CheckpointError:
    if name.endswith(SCALES):
        return CheckpointError(
            f"{name} is in the checkpoint, which says that this is not quantized",
            hint="the description of the quantization and the weights are of different checkpoints",
        )
    return CheckpointError(
        f"{name} is in the checkpoint, but not in the model that config.json describes",
        hint="the configuration and the weights are of different models",
    )


def _find(
    config: ModelConfig,
    parameter: str,
    source: Source,
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> WeightSource:
    """The stored tensors of one parameter, in the order in which they are stacked."""
    try:
        tensors = tuple(stored[name] for name in stored_names(source, shapes))
    except TensorError as error:
        raise CheckpointError(
            str(error), hint="the configuration and the weights do not belong together"
        ) from error
    # in_proj.weight, and experts.up: its scales' names have a last part of their own.
    module, _, own = parameter.rpartition(".")
    is_fp8 = module in config.recipe.modules and own in ("weight", "up", "down")
    for tensor in tensors:
        if is_fp8 != (tensor.dtype == FP8):
            wanted = "is FP8 by the checkpoint's description" if is_fp8 else "is not quantized by it"
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, and {wanted}",
                hint="the description of the quantization and the weights are of different checkpoints",
            )
        if not is_fp8 and tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, which is no weight format that this tool reads",
                hint="use the BF16, FP16 or FP32 checkpoint",
            )
    return WeightSource(parameter, tensors, source.transform)
