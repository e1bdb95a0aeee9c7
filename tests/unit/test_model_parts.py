"""The parts trace to few operators with free sizes, keep FP32 where it is meant, and name their pools."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from nemotrt.model.block import Block
from nemotrt.model.config import LARGEST, ModelConfig
from nemotrt.model.hybrid import NemotronH
from nemotrt.model.step import Step, empty_pools, pool_specs
from nemotrt.plugins.contract import DType, PoolSpec

CONFIG = ModelConfig(
    hidden_size=16,
    vocab_size=32,
    layers=("mamba", "moe", "attention", "mlp"),
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=16,
    n_groups=2,
    conv_kernel=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=12,
)

FP32 = (
    "norm.weight",
    "norm_f.weight",
    "mixer.A",
    ".D",
    ".dt_bias",
    "gate.weight",
    "correction_bias",
    "_scale",
)
"""Parameters that are FP32 in every precision."""

OPERATORS = {"mamba": 23, "attention": 13, "mlp": 8, "moe": 14}
"""Operators of a block, tuple indexing and metadata assertions left out."""


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.5
        parameter.data.copy_(
            -values.abs() if name.endswith(".A") else 1 + values if parameter.dim() == 1 else values
        )
    return model


def pools_of(kind: str, dtype: DType, kv_dtype: DType | None = None) -> tuple[PoolSpec, ...]:
    config = dataclasses.replace(CONFIG, layers=(kind,))
    return pool_specs(config, page_size=4, dtype=dtype, kv_dtype=kv_dtype or dtype)


def step_of(starts: list[int], device: str = "cpu") -> Step:
    sequences = len(starts) - 1
    rows = torch.arange(1, sequences + 1, dtype=torch.int32, device=device)
    table = torch.stack([2 * rows - 1, 2 * rows], dim=1)
    start = torch.tensor(starts, dtype=torch.int32, device=device)
    return Step(start, torch.zeros(sequences, dtype=torch.int32, device=device), rows, table)


def exported(kind: str, dtype: torch.dtype, device: str) -> ExportedProgram:
    with torch.device(device):
        block = Block(CONFIG, kind, dtype=dtype)
    block = randomised(block) if device == "cpu" else block
    pools = empty_pools(pools_of(kind, DType.from_torch(dtype)), 5, 9, device)
    x_TD = torch.zeros(7, CONFIG.hidden_size, dtype=dtype, device=device)
    any_size: Any = {0: Dim.DYNAMIC}
    any_sizes: Any = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    free: list[Any] = [any_size, Step(any_size, any_size, any_size, any_sizes)]
    if pools:
        free.append(tuple({0: Dim.DYNAMIC} for _ in pools))
    arguments = (x_TD, step_of([0, 3, 5, 7], device), *pools)
    return torch.export.export(block, arguments, dynamic_shapes=tuple(free))


def operators(program: ExportedProgram) -> Counter[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return Counter(name for name in names if "getitem" not in name and "_assert_tensor_metadata" not in name)


@pytest.mark.parametrize("kind", ["mamba", "attention", "mlp", "moe"])
def test_a_block_traces_on_meta_tensors_to_few_operators(kind: str) -> None:
    program = exported(kind, torch.bfloat16, "meta")
    found = operators(program)
    assert found.total() == OPERATORS[kind], found
    ops = {
        "mamba": {"causal_conv1d", "selective_scan"},
        "attention": {"paged_attention"},
        "moe": {"moe_dispatch"},
    }
    assert {name.split(".")[1] for name in found if name.startswith("nemo.")} == ops.get(kind, set())
    assert all(found[name] == 1 for name in found if name.startswith("nemo."))


@pytest.mark.parametrize("kind", ["mamba", "attention", "mlp", "moe"])
def test_a_trace_holds_for_other_sizes(kind: str) -> None:
    program = exported(kind, torch.float32, "cpu")
    block = randomised(Block(CONFIG, kind, dtype=torch.float32))
    for starts in ([0, 8], [0, 1, 2, 2, 4]):
        pools = empty_pools(pools_of(kind, DType.FLOAT32), 6, 13)
        x_TD = torch.randn(starts[-1] + 1, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
        expected = block(x_TD, step_of(starts), *pools)
        found = program.module()(x_TD, step_of(starts), *pools)
        assert len(found) == len(expected) == 1 + len(pools)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_time_step_limit_on_the_node_is_finite() -> None:
    graph = exported("mamba", torch.bfloat16, "meta").graph
    scan = next(node for node in graph.nodes if "selective_scan" in str(node.target))
    assert scan.kwargs == {"dt_min": 0.0, "dt_max": LARGEST}
    assert torch.tensor(LARGEST, dtype=torch.float32).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_stays_where_it_is_meant(dtype: torch.dtype) -> None:
    for name, parameter in NemotronH(CONFIG, dtype=dtype, device="meta").named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(FP32) else dtype), name
        assert not parameter.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("bfloat16", 4e-2)])
def test_a_lower_precision_stays_near_fp32(dtype: str, tolerance: float) -> None:
    """Some ten roundings to 11 or 8 bits (4.9e-4, 3.9e-3) lie between the embeddings and the logits."""
    tokens, step, rows = torch.arange(9), step_of([0, 4, 9]), torch.arange(9, dtype=torch.int32)
    exact = randomised(NemotronH(CONFIG))
    lower = NemotronH(CONFIG, dtype=getattr(torch, dtype))
    lower.load_state_dict(exact.state_dict())
    # Both start from the weights as the lower precision holds them.
    exact.load_state_dict(lower.state_dict())

    def run(model: torch.nn.Module, name: str) -> tuple[Tensor, list[Tensor]]:
        specs = pool_specs(CONFIG, page_size=4, dtype=DType(name))
        return model(tokens, step, rows, empty_pools(specs, 3, 5))  # type: ignore[no-any-return]

    (expected, _), (logits, pools) = run(exact, "float32"), run(lower, dtype)
    assert logits.dtype == torch.float32
    assert [pool.dtype for pool in pools] == [getattr(torch, dtype), torch.float32, getattr(torch, dtype)]
    error = ((logits - expected).norm() / expected.norm()).item()
    assert 0 < error <= tolerance


def test_an_fp8_cache_takes_its_scales_from_the_model() -> None:
    block: Any = randomised(Block(CONFIG, "attention", dtype=torch.float32))
    x_TD = torch.randn(4, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    (plain,) = empty_pools(pools_of("attention", DType.FLOAT32), 3, 5)
    (small,) = empty_pools(pools_of("attention", DType.FLOAT32, DType.FLOAT8_E4M3), 3, 5)
    block.mixer.k_scale.fill_(0.02)
    block.mixer.v_scale.fill_(0.05)
    expected, cache = block(x_TD, step_of([0, 4]), plain)
    found, stored = block(x_TD, step_of([0, 4]), small)
    assert stored.dtype == torch.float8_e4m3fn
    for half, scale in enumerate((0.02, 0.05)):
        held = stored[1, half].float() * scale
        assert (held - cache[1, half]).norm() <= 0.05 * cache[1, half].norm()
    assert 0 < (found - expected).norm() <= 0.05 * expected.norm()


def test_pools_are_named_in_layer_order() -> None:
    config = dataclasses.replace(CONFIG, layers=("moe", "mamba", "attention", "mlp", "mamba"))
    specs = pool_specs(config, dtype=DType.FLOAT16, kv_dtype=DType.FLOAT8_E4M3)
    assert specs == (
        PoolSpec("conv_state.1", DType.FLOAT16, (32 + 2 * 2 * 16, 3)),
        PoolSpec("ssm_state.1", DType.FLOAT32, (4, 8, 16)),
        PoolSpec("kv_cache.2", DType.FLOAT8_E4M3, (2, 2, 128, 8)),
        PoolSpec("conv_state.4", DType.FLOAT16, (32 + 2 * 2 * 16, 3)),
        PoolSpec("ssm_state.4", DType.FLOAT32, (4, 8, 16)),
    )
    pools = empty_pools(specs, 5, 9)
    assert [len(pool) for pool in pools] == [5, 5, 9, 5, 5]
    assert [str(pool.dtype).removeprefix("torch.") for pool in pools] == [spec.dtype for spec in specs]


def test_the_head_is_the_models_own() -> None:
    model = NemotronH(CONFIG)
    held = {id(parameter) for parameter in model.parameters()}
    assert [id(parameter) in held for parameter in model.head().parameters()] == [True, True]
    tied = NemotronH(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.backbone.embeddings.weight
