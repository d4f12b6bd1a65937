"""Low-rank activation compression for PyTorch: exact forward, weight gradients from small Tucker cores."""

from lance_kernels import ops

__all__ = ["ops"]
