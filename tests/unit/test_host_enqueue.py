"""An enqueue gives the driver what was planned, once loaded allocates nothing, and reports what goes wrong."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from gpu_check import run_plugin
from host_library import (
    FOLDER,
    SPECS,
    Launched,
    driver,
    fake_shared,
    index,
    kernels_of,
    library,
    shapes_of,
)
from op_attributes import MOE

from nemotrt.plugins.library import Plugin, PluginError, PluginLibrary
from nemotrt.plugins.link import Toolchain, link

STREAM = 0x5000
WORKSPACE = 0x40000000
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "causal_conv1d": {},
    "selective_scan": {"dt_min": 0.125, "dt_max": 0.5},
    "paged_attention": {"scale": 0.25},
    "moe_dispatch": MOE,
}
SIZES = {
    "causal_conv1d": {"T": 5, "B": 2, "C": 64, "K": 4, "S": 3},
    "selective_scan": {"T": 50, "B": 2, "H": 4, "P": 64, "G": 2, "N": 128, "S": 3},
    "paged_attention": {"T": 5, "B": 2, "Q": 4, "V": 2, "D": 64, "K": 5, "page": 64, "M": 4},
    "moe_dispatch": {"T": 5, "L": 64, "R": 8, "E": 8, "I": 32},
}
DTYPES = {"X": "float16", "CACHE": "float16", "W": "float16", "STATE": "float32"}


def shaped(op: str, **changed: int) -> Plugin:
    plugin = library().plugin(SPECS[op], ATTRIBUTES[op], "layers.7")
    plugin.shape(shapes_of(SPECS[op], SIZES[op] | changed, DTYPES))
    return plugin


def addresses(op: str) -> tuple[list[int], list[int]]:
    """An address for each input, and for each output its own or its pool's."""
    spec = SPECS[op]
    inputs = [0x100000 * (i + 1) for i in range(len(spec.inputs))]
    outputs = [
        inputs[spec.pools[i]] if i in spec.pools else 0x700000 * (i + 3) for i in range(len(spec.outputs))
    ]
    return inputs, outputs


def enqueue(op: str, plugin: Plugin, **changed: Any) -> None:
    inputs, outputs = addresses(op)
    given = {"inputs": inputs, "outputs": outputs, "workspace": WORKSPACE, "stream": STREAM} | changed
    plugin.enqueue(given["inputs"], given["outputs"], given["workspace"], given["stream"])


@pytest.mark.parametrize("op", ATTRIBUTES)
@pytest.mark.parametrize("sm", [80, 89, 90])
def test_the_driver_gets_what_was_planned(op: str, sm: int) -> None:
    spec = SPECS[op]
    inputs, outputs = addresses(op)
    places = dict(zip([tensor.name for tensor in spec.outputs], outputs, strict=True))
    places |= dict(zip([tensor.name for tensor in spec.inputs], inputs, strict=True))
    forms = {form.name: form for form in kernels_of(spec).variants(sm)}
    plugin = shaped(op)
    plan = plugin.launches(sm)
    seen = []

    def check(launched: Launched) -> None:
        form, planned = forms[launched.variant.decode()], plan[len(seen)]
        seen.append(form.name)
        assert planned["variant"] == form.name
        assert launched.entry.decode() == form.kernel
        assert list(launched.grid) == planned["grid"]
        assert list(launched.block) == [32 * form.num_warps, 1, 1]
        assert launched.shared_bytes == fake_shared(form)
        assert launched.stream == STREAM
        kinds = [*form.signature.values(), "*", "*"]
        values = launched.values(kinds)
        assert values[-2:] == [0, 0]
        for (name, number), kind, value in zip(planned["arguments"], kinds, values, strict=False):
            if number is not None:
                assert value == (ATTRIBUTES[op][name] if kind == "fp32" else number)
            elif name in places:
                assert value == places[name]
            else:
                assert value is not None
                assert WORKSPACE <= value < WORKSPACE + 0x100000
                assert value % 256 == 0

    with driver().running(check, sm):
        enqueue(op, plugin)
    assert seen == [launch["variant"] for launch in plan]


def test_scratch_buffers_lie_apart() -> None:
    starts: dict[str, int] = {}

    def remember(launched: Launched) -> None:
        form = forms[launched.variant.decode()]
        for name, kind, value in zip(
            form.signature, form.signature.values(), launched.values([*form.signature.values()]), strict=True
        ):
            if kind.startswith("*") and value >= WORKSPACE:
                assert starts.setdefault(name, int(value)) == value

    forms = {form.name: form for form in kernels_of(SPECS["moe_dispatch"]).variants(90)}
    with driver().running(remember):
        enqueue("moe_dispatch", shaped("moe_dispatch"), outputs=[0x800000])
    assert len(starts) >= 7
    assert len(set(starts.values())) == len(starts)


def test_kernels_are_loaded_once_and_shapes_planned_once() -> None:
    plugin = shaped("paged_attention")
    count: list[str] = []
    with driver().running(lambda launched: count.append(launched.variant.decode())) as fake:
        enqueue("paged_attention", plugin)
        loads, devices = fake.calls("cuLibraryLoadData"), fake.calls("cuCtxGetDevice")
        enqueue("paged_attention", plugin)
        assert (fake.calls("cuLibraryLoadData"), fake.calls("cuCtxGetDevice")) == (loads, devices)
        assert len(count) == 2 * fake.calls("cuLaunchKernel") // 2
        enqueue("paged_attention", shaped("paged_attention"))
        assert fake.calls("cuLibraryLoadData") == loads


def test_other_shapes_are_planned_again() -> None:
    plugin = shaped("causal_conv1d")
    grids: list[list[int]] = []
    with driver().running(lambda launched: grids.append(list(launched.grid))):
        enqueue("causal_conv1d", plugin)
        first = len(grids)
        plugin.shape(shapes_of(SPECS["causal_conv1d"], SIZES["causal_conv1d"] | {"B": 5}, DTYPES))
        enqueue("causal_conv1d", plugin)
    assert grids[first:] == [launch["grid"] for launch in plugin.launches(90)]


@pytest.mark.parametrize(
    ("sm", "runs"), [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100), (120, 120)]
)
def test_a_gpu_runs_the_kernels_of_its_generation(sm: int, runs: int) -> None:
    plugin = shaped("paged_attention")
    plan = plugin.launches(runs)
    seen: list[str] = []
    with driver().running(lambda launched: seen.append(launched.variant.decode()), sm):
        enqueue("paged_attention", plugin)
    assert seen == [launch["variant"] for launch in plan]


@pytest.mark.parametrize("sm", [75, 91, 103, 121])
def test_a_gpu_without_kernels_is_named(sm: int) -> None:
    plugin = shaped("causal_conv1d")
    with (
        driver().running(lambda _: None, sm),
        pytest.raises(PluginError, match=f"kernels for SM 80, 86, 89, 90, 100, 120, not for SM {sm}"),
    ):
        enqueue("causal_conv1d", plugin)


@pytest.mark.parametrize("call", ["cuCtxGetDevice", "cuDeviceGetAttribute", "cuLaunchKernel"])
def test_a_drivers_error_is_reported_by_name(call: str) -> None:
    plugin = shaped("causal_conv1d")
    with driver().running(lambda _: None) as fake:
        fake.fail(call)
        with pytest.raises(
            PluginError, match=f"NemoCausalConv1d test: {call} returned CUDA_ERROR_OUT_OF_MEMORY"
        ) as caught:
            enqueue("causal_conv1d", plugin)
        if call == "cuLaunchKernel":
            assert "conv_" in str(caught.value)


@pytest.mark.parametrize(
    "call", ["cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction"]
)
def test_a_kernel_that_failed_to_load_is_loaded_again(call: str) -> None:
    # A library of its own: in the shared one, these kernels may be loaded already.
    own = copied(f"again-{call}")
    own.entry("driver")(str(driver().path).encode())
    plugin = own.plugin(SPECS["causal_conv1d"], {})
    plugin.shape(shapes_of(SPECS["causal_conv1d"], SIZES["causal_conv1d"], DTYPES))
    with driver().running(lambda _: None) as fake:
        fake.fail(call)
        with pytest.raises(PluginError, match=f"{call} returned CUDA_ERROR_OUT_OF_MEMORY for conv_"):
            enqueue("causal_conv1d", plugin)
        fake.fail("")
        enqueue("causal_conv1d", plugin)


def copied(name: str) -> PluginLibrary:
    """A copy of the library with its own state; the name must be new, for what is loaded is found by its path."""
    path = FOLDER / f"{name}.so"
    path.unlink(missing_ok=True)  # a loaded file must not change: the copy is a new one
    shutil.copy(link(index(), FOLDER / "release", Toolchain()), path)
    return PluginLibrary(path)


def test_without_a_driver_all_works_but_the_launch() -> None:
    own = copied("driverless")
    own.entry("driver")(b"/nowhere/libcuda.so.1")
    plugin = own.plugin(SPECS["causal_conv1d"], {})
    assert plugin.shape(shapes_of(SPECS["causal_conv1d"], SIZES["causal_conv1d"], DTYPES)).aliases == (-1, 3)
    assert plugin.launches(90)
    with pytest.raises(PluginError, match=r"without the NVIDIA driver's /nowhere/libcuda\.so\.1"):
        enqueue("causal_conv1d", plugin)


def test_run_leaves_its_inputs_alone() -> None:
    pool = torch.arange(3 * 64 * 3).view(3, 64, 3).half()
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    indices = torch.tensor([1, 2], dtype=torch.int32)
    inputs = [torch.zeros(5, 64).half(), torch.zeros(64, 4).half(), torch.zeros(64).half(), pool, starts]
    places: list[int] = []

    def write(launched: Launched) -> None:
        places.append(int(launched.values(["*"] * 4)[3]))

    with driver().running(write):
        y, next_pool = run_plugin(library(), SPECS["causal_conv1d"], *inputs, indices, indices)
    assert (y.shape, y.dtype) == ((5, 64), torch.float16)
    assert torch.equal(next_pool, pool)
    assert next_pool.data_ptr() != pool.data_ptr()
    assert next_pool.data_ptr() in places


def test_a_state_of_its_own_memory_is_refused() -> None:
    _, outputs = addresses("causal_conv1d")
    with pytest.raises(PluginError, match=r"does not have the address of conv_state.*ALIASED_PLUGIN_IO"):
        enqueue("causal_conv1d", shaped("causal_conv1d"), outputs=[outputs[0], outputs[1] + 256])


def test_a_missing_workspace_is_refused() -> None:
    with driver().running(lambda _: None), pytest.raises(PluginError, match="the workspace is null"):
        enqueue("moe_dispatch", shaped("moe_dispatch"), workspace=0)


def test_an_address_that_kernels_cannot_take_is_refused() -> None:
    inputs, _ = addresses("causal_conv1d")
    with (
        driver().running(lambda _: None),
        pytest.raises(PluginError, match="the address of x is not a multiple of 16 bytes"),
    ):
        enqueue("causal_conv1d", shaped("causal_conv1d"), inputs=[inputs[0] + 8, *inputs[1:]])


def test_an_enqueue_before_shapes_is_refused() -> None:
    plugin = library().plugin(SPECS["causal_conv1d"], {})
    with pytest.raises(PluginError, match="the shapes must be set before enqueue"):
        enqueue("causal_conv1d", plugin)
