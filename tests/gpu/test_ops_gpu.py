"""The kernels at the models' full width on a GPU, checked as in `scripts/gpu_check.py`."""

from __future__ import annotations

import importlib
import random
from functools import partial

import pytest
import torch

from nemotrt.plugins.variant import SMS, supports_fp8

pytest.importorskip("triton", reason="kernels need Triton: install nemo-export[kernels]")
gpu_check = importlib.import_module("gpu_check")
op_cases = importlib.import_module("op_cases")

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def library() -> object:
    """The installed plugin library, or a new one for this GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    return gpu_check.plugin_library(gpu_check.device_sm(torch.device("cuda")))


CASES = list(gpu_check.chosen_cases(True, max(SMS)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_kernels_match_the_reference(case: object) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    device = torch.device("cuda")
    sm = gpu_check.device_sm(device)
    if case.needs_fp8 and not supports_fp8(sm):  # type: ignore[attr-defined]
        pytest.skip(f"SM {sm} has no FP8 tensor cores")
    seed = random.randrange(2**31)
    result = gpu_check.check(case, op_cases.kernels(case.op, False).run, device, seed)  # type: ignore[attr-defined]
    assert result.failure == "", f"seed {seed}: {result}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_library_matches_the_reference(case: object, library: object) -> None:
    device = torch.device("cuda")
    sm = gpu_check.device_sm(device)
    if case.needs_fp8 and not supports_fp8(sm):  # type: ignore[attr-defined]
        pytest.skip(f"SM {sm} has no FP8 tensor cores")
    seed = random.randrange(2**31)
    run = partial(library.run, case.spec)  # type: ignore[attr-defined]
    result = gpu_check.check(case, run, device, seed)
    assert result.failure == "", f"seed {seed}: {result}"
