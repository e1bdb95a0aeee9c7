"""The host picks the launches, arguments and workspace that each op's kernels.py says."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
from host_library import SPECS, kernels_of, library, shapes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from op_attributes import MOE

from nemotrt.plugins.library import Plugin, PluginError, TensorShape
from nemotrt.plugins.variant import SMS, Launch

MANY = settings(max_examples=150, deadline=None, derandomize=True, database=None)

FLOATS = st.sampled_from(["float32", "float16", "bfloat16"])
CACHES = st.sampled_from(["float32", "float16", "bfloat16", "float8_e4m3fn"])
SEQUENCES = st.sampled_from([1, 2, 3, 7, 16, 64, 65535, 65536])
TOKENS = st.one_of(st.integers(0, 20), st.sampled_from([64, 127, 128, 129, 256, 1000, 8192]))


def line(value: int) -> int:
    """A buffer's bytes in the workspace."""
    return -(-value // 256) * 256


class Expected:
    """What kernels.py says of one call."""

    def __init__(
        self, op: str, sizes: dict[str, int], attributes: dict[str, Any], dtypes: dict[str, str]
    ) -> None:
        self.op, self.sizes, self.attributes, self.dtypes = op, sizes, attributes, dtypes
        self.kernels = kernels_of(SPECS[op])

    def plan(self, sm: int) -> list[Launch]:
        """Raises ValueError where nothing fits."""
        attributes = [self.attributes] if self.op == "moe_dispatch" else []
        plan: list[Launch] = self.kernels.launches(self.sizes, *attributes, self.dtypes, sm)
        return plan

    def launches(self, sm: int) -> list[tuple[str, list[int], dict[str, int | float]]]:
        """Variant, grid, and each number that is passed."""
        found = []
        for launch in self.plan(sm):
            numbers = self.attributes | launch.integers
            passed = {
                name: numbers[name]
                for name, kind in launch.variant.signature.items()
                if not kind.startswith("*")
            }
            found.append((launch.variant.name, list(launch.grid), passed))
        return found

    def pointers(self, sm: int) -> list[list[str]]:
        """What each pointer of each launch points to."""
        return [
            [
                launch.renamed.get(name, name)
                for name, kind in launch.variant.signature.items()
                if kind.startswith("*")
            ]
            for launch in self.plan(sm)
        ]

    def scan_workspace(self, sm: int) -> int:
        """Bytes of the scan's scratch buffers in this very step."""
        buffers = self.kernels.workspace(self.sizes, self.dtypes, sm).values()
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}
        return sum(line(itemsize[dtype] * prod(shape)) for dtype, shape in buffers)

    def workspace(self) -> int:
        """Bytes of all scratch buffers, which follow from shapes alone."""
        if self.op == "causal_conv1d":
            return 0
        if self.op == "moe_dispatch":
            buffers = self.kernels.scratch(self.sizes, self.attributes, self.dtypes)
            return sum(buffer.num_bytes for buffer in buffers.values())
        return sum(line(4 * elements) for elements in self.kernels.workspace(self.sizes).values())


def bits(value: int | float) -> int:
    """A number as the kernel takes it, in the low bits."""
    form = "<f4x" if isinstance(value, float) else "<i4x"
    return int.from_bytes(struct.pack(form, value), "little")


def refused(plugin: Plugin, shapes: list[TensorShape], sm: int) -> None:
    """Shapes are refused as soon as they are set; a dtype that an SM lacks, when launches are asked for."""
    plugin.shape(shapes)
    plugin.launches(sm)


def check(
    op: str, sizes: dict[str, int], attributes: dict[str, Any], dtypes: dict[str, str], sm: int
) -> None:
    expected = Expected(op, sizes, attributes, dtypes)
    plugin = library().plugin(SPECS[op], attributes)
    shapes = shapes_of(SPECS[op], sizes, dtypes)
    try:
        wanted = expected.launches(sm)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(PluginError, match=SPECS[op].name):
            refused(plugin, shapes, sm)
        return
    workspace_bytes = plugin.shape(shapes).workspace_bytes
    if op == "selective_scan":
        assert workspace_bytes >= expected.scan_workspace(sm)
    else:
        assert workspace_bytes == expected.workspace()
    found = plugin.launches(sm)
    numbers = [{name: value for name, value in launch["arguments"] if value is not None} for launch in found]
    assert [launch["variant"] for launch in found] == [name for name, _, _ in wanted]
    assert [launch["grid"] for launch in found] == [grid for _, grid, _ in wanted]
    assert numbers == [{name: bits(value) for name, value in passed.items()} for _, _, passed in wanted]
    assert [
        [name for name, value in launch["arguments"] if value is None] for launch in found
    ] == expected.pointers(sm)


@MANY
@given(
    st.fixed_dictionaries(
        {
            "T": TOKENS,
            "B": SEQUENCES,
            "C": st.sampled_from([16, 64, 144, 256, 10240, 24]),
            "K": st.sampled_from([2, 3, 4, 5]),
            "S": st.just(3),
        }
    ),
    FLOATS,
    st.sampled_from(SMS),
)
def test_causal_conv1d(sizes: dict[str, int], X: str, sm: int) -> None:
    check("causal_conv1d", sizes, {}, {"X": X}, sm)


SCAN_SIZES = st.fixed_dictionaries(
    {
        "T": TOKENS,
        "B": SEQUENCES,
        "H": st.sampled_from([8, 48, 64, 96, 128, 12]),
        "P": st.sampled_from([32, 64, 80, 96, 48]),
        "G": st.sampled_from([1, 2, 8, 5]),
        "N": st.sampled_from([128, 256, 64]),
        "S": st.just(3),
    }
)
LIMITS = {"dt_min": 0.001, "dt_max": 0.5}


@MANY
@given(SCAN_SIZES, FLOATS, st.sampled_from(["float32", "float16"]), st.sampled_from(SMS))
def test_selective_scan(sizes: dict[str, int], X: str, STATE: str, sm: int) -> None:
    check("selective_scan", sizes, LIMITS, {"X": X, "STATE": STATE}, sm)


@MANY
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from(["float32", "float16"]),
)
def test_the_scans_largest_workspace_serves_every_step_on_every_gpu(
    T: int, B: int, more_tokens: int, more_sequences: int, X: str
) -> None:
    sizes = {"T": T, "B": B, "H": 8, "P": 64, "G": 2, "N": 128, "S": 3}
    largest = sizes | {"T": T + more_tokens, "B": B + more_sequences}
    dtypes = {"X": X, "STATE": "float32"}
    plugin = library().plugin(SPECS["selective_scan"], LIMITS)
    found = plugin.shape(shapes_of(SPECS["selective_scan"], largest, dtypes)).workspace_bytes
    own = plugin.shape(shapes_of(SPECS["selective_scan"], sizes, dtypes)).workspace_bytes
    needed = max(Expected("selective_scan", sizes, LIMITS, dtypes).scan_workspace(sm) for sm in SMS)
    assert found >= own >= needed


@MANY
@given(
    st.fixed_dictionaries(
        {
            "T": TOKENS,
            "B": SEQUENCES,
            "V": st.sampled_from([1, 2, 8]),
            "group": st.sampled_from([1, 3, 4, 5, 16, 17]),
            "D": st.sampled_from([64, 128, 96]),
            "page": st.sampled_from([64, 128, 192, 256, 32]),
            "M": st.sampled_from([1, 2, 64, 1000]),
        }
    ),
    FLOATS,
    CACHES,
    st.sampled_from(SMS),
)
def test_paged_attention(sizes: dict[str, int], X: str, CACHE: str, sm: int) -> None:
    sizes = sizes | {"Q": sizes["V"] * sizes["group"], "K": 5}
    del sizes["group"]
    check("paged_attention", sizes, {"scale": 0.125}, {"X": X, "CACHE": CACHE}, sm)


@MANY
@given(
    st.fixed_dictionaries(
        {
            "T": TOKENS,
            "L": st.sampled_from([16, 512, 528, 1024, 24]),
            "R": st.sampled_from([8, 128, 129, 512, 513]),
            "share": st.sampled_from([1, 2]),
            "I": st.sampled_from([32, 1856, 2688, 40]),
        }
    ),
    st.fixed_dictionaries(
        {
            "top_k": st.sampled_from([0, 1, 2, 6, 8, 9, 22, 33]),
            "num_groups": st.sampled_from([1, 4, 3]),
            "topk_group": st.sampled_from([1, 2]),
            "norm_topk_prob": st.sampled_from([0, 1]),
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
            "first_expert": st.sampled_from([0, 4, -1]),
        }
    ),
    FLOATS,
    CACHES,
    st.sampled_from(SMS),
)
def test_moe_dispatch(sizes: dict[str, int], attributes: Mapping[str, Any], X: str, W: str, sm: int) -> None:
    sizes = sizes | {"E": sizes["R"] // sizes["share"]}
    del sizes["share"]
    check("moe_dispatch", sizes, dict(attributes), {"X": X, "W": W}, sm)


@pytest.mark.parametrize("W", ["float32", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("rows", [15, 16, 17, 63, 64, 65, 128])
@pytest.mark.parametrize("I", [256, 2688, 1856])
def test_the_experts_tiles_change_where_their_rows_say(rows: int, W: str, I: int) -> None:  # noqa: E741
    sizes = {"T": 4 * rows, "L": 1024, "R": 8, "E": 8, "I": I}
    X = "bfloat16" if W == "float8_e4m3fn" else W
    check("moe_dispatch", sizes, MOE, {"X": X, "W": W}, 90)


def test_the_workspace_of_a_step_holds_its_parts() -> None:
    """One workspace computed by hand, so that both sides cannot be wrong in the same way."""
    sizes = {"T": 3, "B": 2, "Q": 4, "V": 2, "D": 64, "K": 5, "page": 64, "M": 4}
    plugin = library().plugin(SPECS["paged_attention"], {"scale": 0.125})
    shapes = plugin.shape(shapes_of(SPECS["paged_attention"], sizes, {"X": "float16", "CACHE": "float16"}))
    rows = 8 * 4 * 4  # 16 / 2 tokens of a short sequence, 4 heads, 2 sequences in 2 parts of 128 keys
    assert shapes.workspace_bytes == line(4 * prod((rows, 64))) + line(4 * rows)
