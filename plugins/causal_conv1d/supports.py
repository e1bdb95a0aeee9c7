"""The sizes and dtypes that the op's kernels support; needs neither Triton, torch nor a GPU."""

from __future__ import annotations

from collections.abc import Mapping

from nemotrt.plugins.causal_conv1d import SPEC
from nemotrt.plugins.spec import FLOATS
from nemotrt.plugins.variant import check_sm, require_multiple, require_one_of, require_packed

FAMILY_TAPS = (2, 3, 4)
"""The numbers of taps that the kernels are compiled for; the published models have 4."""

ALIGNMENT = 16
"""The number of channels is a multiple of this, so that each row is aligned for vector loads."""


def supports(sizes: Mapping[str, int], dtypes: Mapping[str, str], sm: int) -> None:
    """Raise ValueError if no kernel supports a call; the message names the op, the value and the supported values.

    `sizes` are the SPEC's axes by name, `dtypes` its dtype variables.
    """
    check_sm(SPEC.name, sm)
    require_one_of(SPEC.name, "X", dtypes["X"], FLOATS)
    require_one_of(SPEC.name, "K", sizes["K"], FAMILY_TAPS)
    require_multiple(SPEC.name, "C", sizes["C"], ALIGNMENT)
    require_packed(SPEC.name, sizes)
