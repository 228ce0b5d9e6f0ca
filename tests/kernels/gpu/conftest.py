"""Kernels run in Triton's interpreter, whatever the machine has."""

from tests.kernels.gpu.interpreter import patch

patch()
