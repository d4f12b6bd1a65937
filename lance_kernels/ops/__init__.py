"""The operators of `torch.ops.lance`, one module a family; importing this package registers them all."""

from lance_kernels.ops.activation import activation, activation_of, derivative_bound
from lance_kernels.ops.attention import attention
from lance_kernels.ops.batch_norm import batch_norm_frozen, batch_norm_relu_frozen
from lance_kernels.ops.convolution import convolution
from lance_kernels.ops.convolution_weight_grad import convolution_weight_grad
from lance_kernels.ops.dropout import dropout
from lance_kernels.ops.frozen_convolution import frozen_convolution
from lance_kernels.ops.given_core import convolution_given_core, linear_given_core
from lance_kernels.ops.linear import linear, linear_weight_grad
from lance_kernels.ops.mask import hardtanh, hardtanh_, leaky_relu, leaky_relu_, relu, relu_
from lance_kernels.ops.mode_gram import gram_eigh, mode_gram, mode_grams_
from lance_kernels.ops.norm import batch_norm, group_norm, layer_norm, rms_norm
from lance_kernels.ops.pack_core import pack_core, unpack_core
from lance_kernels.ops.patch import patch_gram_, patch_project, patch_weight_grad
from lance_kernels.ops.patch_convolution import patch_convolution
from lance_kernels.ops.pooling import MAX_WINDOW, adaptive_avg_pool, avg_pool, max_pool
from lance_kernels.ops.quantize_rows import dequantize_rows, quantize_rows
from lance_kernels.ops.tucker import tucker_project, tucker_reconstruct

__all__ = [
    "MAX_WINDOW",
    "activation",
    "activation_of",
    "adaptive_avg_pool",
    "attention",
    "avg_pool",
    "batch_norm",
    "batch_norm_frozen",
    "batch_norm_relu_frozen",
    "convolution",
    "convolution_given_core",
    "convolution_weight_grad",
    "dequantize_rows",
    "derivative_bound",
    "dropout",
    "frozen_convolution",
    "gram_eigh",
    "group_norm",
    "hardtanh",
    "hardtanh_",
    "layer_norm",
    "leaky_relu",
    "leaky_relu_",
    "linear",
    "linear_given_core",
    "linear_weight_grad",
    "max_pool",
    "mode_gram",
    "mode_grams_",
    "pack_core",
    "patch_convolution",
    "patch_gram_",
    "patch_project",
    "patch_weight_grad",
    "quantize_rows",
    "relu",
    "relu_",
    "rms_norm",
    "tucker_project",
    "tucker_reconstruct",
    "unpack_core",
]
