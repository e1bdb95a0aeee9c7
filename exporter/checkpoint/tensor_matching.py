"""Match a checkpoint's tensors to the model's parameters, and report every problem with them."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemotrt.exporter.checkpoint.loaded_model import WeightSource
from nemotrt.exporter.checkpoint.quant_config import HF_QUANT_CONFIG, SUPPORTED
from nemotrt.exporter.checkpoint.safetensors_reader import StoredTensor, read_pieces
from nemotrt.exporter.errors import CheckpointError
from nemotrt.model.checkpoint import HEAD, Source, TensorError, is_mtp, stored_names, tensor_sources
from nemotrt.model.config import ModelConfig
from nemotrt.plugins.contract import DType

WEIGHT_DTYPES = (DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
"""The dtypes of weights that are not quantized."""

SCHEME_OF_DTYPE = {
    DType.FLOAT8_E5M2: "FP8 (E5M2)",
    DType.FLOAT8_E8M0: "MXFP8",
    DType.UINT8: "packed 4-bit values",
}
"""A dtype that only unsupported quantization schemes store → the scheme."""

SCHEME_OF_SUFFIX = {
    ".weight_scale_2": "NVFP4",
    ".qweight": "INT4 (AWQ or GPTQ)",
    ".weight_scale_inv": "block-scaled FP8",
    ".weight_packed": "packed 4-bit values",
    ".pre_quant_scale": "INT4 (AWQ)",
}
"""The end of a tensor's name that only an unsupported quantization scheme uses → the scheme."""

SCALES = ("weight_scale", "input_scale", "k_scale", "v_scale")
"""Ends of the names of the tensors that quantization adds."""

OTHER_CHECKPOINT = "the description of the quantization and the weights are of different checkpoints"


@dataclass(frozen=True)
class MatchedTensors:
    """The stored tensors of each parameter, and the problems that prevent an export."""

    weights: dict[str, WeightSource]
    """By parameter, without those that are missing or have another shape or dtype."""
    not_exported: tuple[str, ...]
    problems: tuple[CheckpointError, ...]


def match(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> MatchedTensors:
    """Match each parameter; a tensor that is missing, extra, or has an unexpected shape or dtype is a problem."""
    if problem := _scheme_problem(config, stored):
        return MatchedTensors({}, (), (problem,))
    if tied := _tied_tensors(config, stored):
        stored = {name: tensor for name, tensor in stored.items() if tensor is not tied[1]}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    problems: list[CheckpointError] = []
    weights: dict[str, WeightSource] = {}
    used: set[str] = set()
    for parameter, source in tensor_sources(config).items():
        try:
            weights[parameter] = _weight_source(config, parameter, source, stored, shapes)
            used.update(tensor.name for tensor in weights[parameter].tensors)
        except CheckpointError as error:
            problems.append(error)
            names = {name for names in (*source.names, source.stacked) for name in names}
            used.update(stored[name].name for name in names & stored.keys())
    unused = [name for name in sorted(stored) if stored[name].name not in used]
    problems += [_extra(name) for name in unused if not is_mtp(name)]
    return MatchedTensors(weights, tuple(filter(is_mtp, unused)), tuple(problems))


def check_tied_head(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if the head of a model with tied embeddings is stored too, with other values."""
    if not (tied := _tied_tensors(config, stored)):
        return
    table, head = tied
    if any(a != b for a, b in zip(*map(read_pieces, tied), strict=True)):
        raise CheckpointError(
            f"{head.name} differs from {table.name}, but config.json has tie_word_embeddings true",
            hint=f"set tie_word_embeddings to false to use {head.name}, or remove it to use the embeddings",
        )


def _tied_tensors(
    config: ModelConfig, stored: Mapping[str, StoredTensor]
) -> tuple[StoredTensor, StoredTensor] | None:
    """The embedding table and the head of a model that ties them, if both are stored in one dtype and shape."""
    (names,) = tensor_sources(config)["backbone.embeddings.weight"].names
    table = next((stored[name] for name in names if name in stored), None)
    head = stored.get(HEAD)
    if not config.tie_word_embeddings or not table or not head or table is head:
        return None
    return (table, head) if (table.dtype, table.shape) == (head.dtype, head.shape) else None


def _scheme_problem(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> CheckpointError | None:
    """The problem of a checkpoint with an unsupported scheme, or with a description that contradicts the dtypes."""
    for suffix, scheme in SCHEME_OF_SUFFIX.items():
        if name := min((name for name in stored if name.endswith(suffix)), default=""):
            return CheckpointError(f"the checkpoint is quantized as {scheme} ({name})", hint=SUPPORTED)
    if name := min((name for name in stored if stored[name].dtype in SCHEME_OF_DTYPE), default=""):
        # MXFP8 stores its scales, powers of two, as E8M0 or as bytes.
        is_mx = name.endswith(".weight_scale")
        scheme = "MXFP8" if is_mx else SCHEME_OF_DTYPE[stored[name].dtype]
        return CheckpointError(f"the checkpoint is quantized as {scheme} ({name})", hint=SUPPORTED)
    fp8 = min((name for name in stored if stored[name].dtype == DType.FLOAT8_E4M3), default="")
    if fp8 and not config.recipe:
        return CheckpointError(
            f"{fp8} is FP8, but neither config.json nor {HF_QUANT_CONFIG} describes a quantization",
            hint=f"copy {HF_QUANT_CONFIG} from the model's repository into the folder",
        )
    if config.recipe.modules and not fp8:
        return CheckpointError(
            "the configuration describes a quantization, but no stored tensor is quantized",
            hint="the configuration and the weights are of different checkpoints",
        )
    return None


def _extra(name: str) -> CheckpointError:
    if name.endswith(SCALES):
        return CheckpointError(
            f"{name} is in the checkpoint, but its module is not quantized by the description",
            hint=OTHER_CHECKPOINT,
        )
    return CheckpointError(
        f"{name} is in the checkpoint, but not in the model that config.json describes",
        hint="the configuration and the weights are of different models",
    )


def _weight_source(
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
            str(error), hint="the configuration and the weights are of different models"
        ) from error
    # `in_proj.weight` or `experts.up`, and neither of their scales.
    module, _, attribute = parameter.rpartition(".")
    is_fp8 = module in config.recipe.modules and attribute in ("weight", "up", "down")
    for tensor in tensors:
        if is_fp8 != (tensor.dtype == DType.FLOAT8_E4M3):
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, but the checkpoint's description says it is"
                f" {'FP8' if is_fp8 else 'not quantized'}",
                hint=OTHER_CHECKPOINT,
            )
        if not is_fp8 and tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, which is not a supported dtype of weights",
                hint="use the BF16, FP16 or FP32 checkpoint",
            )
    return WeightSource(tensors, source.transform)
