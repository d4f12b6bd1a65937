"""Drop-in layers: subclasses of their `torch.nn` namesakes that hold less for the backward pass."""

from lance_kernels.nn.convolution import Conv1d, Conv2d, Conv3d
from lance_kernels.nn.linear import Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear"]
