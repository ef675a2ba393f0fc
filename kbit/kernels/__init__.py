"""Kernels for NVIDIA GPUs: k-bit weights multiplied as they are stored. Never imported where there is no such GPU."""
