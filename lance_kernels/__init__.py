"""Low-rank activation compression for PyTorch: exact forward, weight gradients from small Tucker cores."""

from lance_kernels import ops
from lance_kernels._extension import build_info

__all__ = ["build_info", "ops"]
