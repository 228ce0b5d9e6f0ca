"""Kernels run in Triton's interpreter, whatever the machine has."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from kernels.gpu import attention
from tests.kernels.gpu.interpreter import patch

patch()
# Of these the launches themselves are looked at; others are of whole programs, one of whose kernel
# programs the interpreter takes milliseconds for, whether it has something to do or not.
LAUNCHES = ("test_attention", "test_static", "test_warm_up")


@pytest.fixture(autouse=True, scope="module")
def few_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Contexts are split in two or so, not as often as would fill a device."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith(LAUNCHES):
            patch.setattr(attention, "WANTED_PROGRAMS", 16)
        yield


@pytest.fixture(autouse=True)
def padding_may_overflow() -> Iterator[None]:
    """Rows behind a batch's last hold whatever memory held; nobody reads what becomes of them."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        yield
