"""The operators of `torch.ops.lance`, one module a family; importing this package registers them all."""

from lance_kernels.ops.convolution import convolution
from lance_kernels.ops.convolution_weight_grad import convolution_weight_grad
from lance_kernels.ops.linear import linear, linear_weight_grad
from lance_kernels.ops.mode_gram import gram_eigh, mode_gram, mode_grams_
from lance_kernels.ops.pack_core import pack_core, unpack_core
from lance_kernels.ops.tucker import tucker_project, tucker_reconstruct

__all__ = [
    "convolution",
    "convolution_weight_grad",
    "gram_eigh",
    "linear",
    "linear_weight_grad",
    "mode_gram",
    "mode_grams_",
    "pack_core",
    "tucker_project",
    "tucker_reconstruct",
    "unpack_core",
]
