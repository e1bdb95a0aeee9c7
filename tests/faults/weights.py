"""Faults of stored weights."""

from __future__ import annotations

import numpy as np

from faults.graph import Fault, Graph
from nemotrt.plugins.contract import EMBEDDINGS, HEAD


def zeroed_expert(graph: Graph) -> None:
    graph.weight("experts.up")[1] = 0


def swapped_experts(graph: Graph) -> None:
    for name in ("experts.up", "experts.down"):
        weight = graph.weight(name)
        weight[[0, 1]] = weight[[1, 0]]


def negated_expert(graph: Graph) -> None:
    weight = graph.weight("experts.down")
    weight[1] = -weight[1]


def transposed_latent(graph: Graph) -> None:
    """The bytes of the transposed weight: if it is square, no shape shows that."""
    weight = graph.weight("fc1_latent_proj.weight")
    weight[:] = weight.T.reshape(weight.shape).copy()


def shifted_a_log(graph: Graph) -> None:
    weight = graph.weight("mixer.A")
    weight[:] = np.roll(weight, 1)


def dropped_dt_bias(graph: Graph) -> None:
    graph.weight("dt_bias")[:] = 0


def reversed_taps(graph: Graph) -> None:
    weight = graph.weight("conv1d.weight")
    weight[:] = weight[:, ::-1].copy()


def dropped_conv_bias(graph: Graph) -> None:
    graph.weight("conv1d.bias")[:] = 0


def dropped_skip(graph: Graph) -> None:
    graph.weight("mixer.D")[:] = 0


def swapped_kv_heads(graph: Graph) -> None:
    """Queries of one group attend to the keys and values of another, as with a wrong map of heads to groups."""
    for name in ("k_proj.weight", "v_proj.weight"):
        weight = graph.weight(name)
        weight[:] = np.roll(weight, len(weight) // 2, axis=0)


def last_head_row(graph: Graph) -> None:
    graph.weight("lm_head.weight")[-1] = 0


def scaled_head_weight(graph: Graph) -> None:
    """The largest weight of one token."""
    row = graph.weight("lm_head.weight")[7]
    row[np.abs(row.astype(np.float32)).argmax()] *= 8


def last_embedding(graph: Graph) -> None:
    graph.weight("embeddings.weight")[-1] = 0


def first_embeddings(graph: Graph) -> None:
    graph.weight("embeddings.weight")[:16] = 0


FAULTS = (
    Fault("an expert is zero", "moe", zeroed_expert),
    Fault("two experts swapped", "moe", swapped_experts),
    Fault("one expert's weight negated", "moe", negated_expert),
    Fault("latent projection transposed", "moe", transposed_latent),
    Fault("A_log shifted by a head", "mamba", shifted_a_log),
    Fault("dt_bias dropped", "mamba", dropped_dt_bias),
    Fault("skip (D) dropped", "mamba", dropped_skip),
    Fault("convolution's taps reversed", "mamba", reversed_taps),
    Fault("convolution's bias dropped", "mamba", dropped_conv_bias),
    Fault("KV heads swapped", "attention", swapped_kv_heads),
    Fault("last row of the head zero", HEAD, last_head_row),
    Fault("one weight of the head × 8", HEAD, scaled_head_weight),
    Fault("last row of the embeddings zero", EMBEDDINGS, last_embedding),
    Fault("embeddings 0 to 15 zero", EMBEDDINGS, first_embeddings),
)
