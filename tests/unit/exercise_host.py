"""Runs a plugin library through what TensorRT does with one, on the fake driver: for a build with sanitisers.

Arguments: the library, the fake driver.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from host_library import SPECS, FakeDriver, Launched, shapes_of

from nemotrt.plugins.library import PluginError, PluginLibrary

SIZES: dict[str, dict[str, int]] = {
    "causal_conv1d": {"T": 5, "B": 2, "C": 64, "K": 4, "S": 3},
    "selective_scan": {"T": 5, "B": 2, "H": 4, "P": 64, "G": 2, "N": 128, "S": 3},
    "paged_attention": {"T": 5, "B": 2, "Q": 4, "V": 2, "D": 64, "K": 5, "page": 64, "M": 4},
    "moe_dispatch": {"T": 500, "L": 64, "R": 8, "E": 8, "I": 32},
}
INTEGERS = {"num_groups": 1, "top_k": 2, "topk_group": 1, "norm_topk_prob": 1, "first_expert": 0}
DTYPES = {"X": "float16", "STATE": "float32", "CACHE": "float16", "W": "float16"}


def exercise(library: PluginLibrary, op: str) -> None:
    """Creates, shapes, lists and enqueues one op, and makes it refuse in several ways."""
    spec = SPECS[op]
    attributes: dict[str, Any] = {name: INTEGERS.get(name, 0.5) for name in spec.attributes}
    plugin = library.plugin(spec, attributes)
    inputs = [256 * (i + 1) for i in range(len(spec.inputs))]
    outputs = [inputs[spec.pools[i]] if i in spec.pools else 4096 for i in range(len(spec.outputs))]
    for tokens in (1, 5, 500):
        plugin.shape(shapes_of(spec, SIZES[op] | {"T": tokens}, DTYPES))
        plugin.launches(90)
        plugin.enqueue(inputs, outputs, 8192, 0)
        plugin.enqueue(inputs, outputs, 8192, 0)
    shapes = shapes_of(spec, SIZES[op], DTYPES)
    refused(library.plugin, spec, attributes | {"other": 1})
    refused(plugin.shape, shapes[1:])
    refused(plugin.shape, [("int32", (7,)), *shapes[1:]])
    refused(plugin.shape, [("float16", (1,) * 8), *shapes[1:]])
    refused(plugin.enqueue, [1] * len(inputs), [2] * len(outputs), 0, 0)
    refused(plugin.launches, 121)


def refused(call: Any, *arguments: Any) -> None:
    """Raises AssertionError where the call was not refused."""
    try:
        call(*arguments)
    except PluginError:
        return
    raise AssertionError(f"{call} took {arguments}")


def main() -> None:
    """Exercises each op; prints how many launches there were."""
    library, driver = PluginLibrary(Path(sys.argv[1])), FakeDriver(Path(sys.argv[2]))
    library.entry("driver")(str(driver.path).encode())
    count = 0

    def launched(_: Launched) -> None:
        nonlocal count
        count += 1

    with driver.running(launched):
        for op in SPECS:
            exercise(library, op)
    sys.stdout.write(f"launched {count}\n")


if __name__ == "__main__":
    main()
