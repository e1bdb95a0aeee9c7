"""What the op's kernels take: known without Triton, torch or a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.causal_conv1d import SPEC
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import check_packed, check_sm

FAMILY_TAPS = (2, 3, 4)
"""Taps that the kernels are compiled for; the family has 4."""

ALIGNMENT = 16
"""Channels come in multiples of this, so that a row of any dtype starts on a vector load's boundary."""


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError, naming the op, what does not fit and what does, where no kernel serves a call.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    for name, given, allowed in (("X", dtypes["X"], FLOATS), ("K", sizes["K"], FAMILY_TAPS)):
        if given not in allowed:
            raise ValueError(f"{SPEC.name}: kernels take {name} in {list(allowed)}, not {given}")
    if sizes["C"] % ALIGNMENT:
        raise ValueError(f"{SPEC.name}: kernels take C in multiples of {ALIGNMENT}, not {sizes['C']}")
    check_packed(SPEC.name, sizes)
