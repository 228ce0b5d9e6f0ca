"""Triton kernels for NVIDIA GPUs, and the backend that serves with them."""
