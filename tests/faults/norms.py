"""Faults of the norms: another epsilon, other groups, and a gate on the wrong side."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from faults.graph import Fault, Graph
from nemotrt.plugins.contract import HEAD

EPSILON = 1e-6
"""The default of many models; the checkpoints of this family have 1e-5."""


def _other_epsilon(graph: Graph, norm: str) -> None:
    node = graph.named(norm)
    assert node.attributes["epsilon"].value != np.float32(EPSILON)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", EPSILON)


def block_epsilon(graph: Graph) -> None:
    _other_epsilon(graph, ".norm.rms_norm")


def gated_epsilon(graph: Graph) -> None:
    _other_epsilon(graph, ".mixer.norm.rms_norm")


def final_epsilon(graph: Graph) -> None:
    _other_epsilon(graph, ".norm_f.rms_norm")


def gate_after_norm(graph: Graph) -> None:
    """norm(y · silu(z)) becomes norm(y) · silu(z)."""
    gated, scaled = graph.named("mixer.norm.mul"), graph.named("mixer.norm.mul_1")
    plain, gate = gated.inputs
    ir.convenience.replace_all_uses_with(gated.outputs[0], plain)
    following = scaled.outputs[0].consumers()[0]
    graph.feed(following, scaled.outputs[0].name, graph.before(following, "Mul", scaled.outputs[0], gate))


def one_norm_group(graph: Graph) -> None:
    """The gated norm covers all channels at once instead of each group."""
    norm = graph.named("mixer.norm.rms_norm")
    groups = norm.inputs[0].producer()
    size = math.prod(norm.inputs[0].shape[1:])
    groups.replace_input_with(1, graph.constant(groups, np.array([0, 1, size])))
    norm.replace_input_with(1, graph.constant(norm, np.ones(size, dtype=np.float32)))
    groups.outputs[0].shape = norm.outputs[0].shape = None


def strided_groups(graph: Graph) -> None:
    """A group of the gated norm is every second channel (with two groups) instead of adjacent ones."""
    norm = graph.named("mixer.norm.rms_norm")
    groups = norm.inputs[0].producer()
    num_groups, size = norm.inputs[0].shape[1:]
    groups.replace_input_with(1, graph.constant(groups, np.array([0, size, num_groups])))
    groups.outputs[0].shape = None
    graph.after(groups.outputs[0], "Transpose", perm=[0, 2, 1])
    graph.after(norm.outputs[0], "Transpose", perm=[0, 2, 1])


FAULTS = (
    Fault("eps of a block's norm", "mamba", block_epsilon),
    Fault("eps of the gated norm", "mamba", gated_epsilon),
    Fault("eps of the final norm", HEAD, final_epsilon),
    Fault("gate after the norm", "mamba", gate_after_norm),
    Fault("one norm group for all", "mamba", one_norm_group),
    Fault("strided norm groups", "mamba", strided_groups),
)
