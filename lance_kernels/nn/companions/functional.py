"""`torch.nn.functional`'s functions in forms that hold less, with their signatures and exact gradients.

`functional_quantized` has those whose gradients are approximate.

Each falls back to PyTorch's own where nothing would be kept (no gradient asked for), where the tensor is of a kind the
operators do not take (integers, tensor subclasses, function transforms), or where PyTorch's own keeps no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lance_kernels.ops as ops
from lance_kernels.nn.companions.fusion import already_activated
from lance_kernels.ops._checks import FLOATING

Size = int | Sequence[int]


def takes(x: Any) -> bool:
    """Whether the operators take `x` and autograd would hold something for it."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and torch.is_grad_enabled()
        and x.requires_grad
        and x.dtype in FLOATING
        and x.layout == torch.strided
        and x.device.type in ("cpu", "cuda")
        and not x.is_nested
        and not torch._C._are_functorch_transforms_active()
    )


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.relu`; keeps 1 bit an element."""
    if already_activated(input, None):
        return input
    if not takes(input):
        return F.relu(input, inplace)
    return ops.relu_(input) if inplace else ops.relu(input)


def hardtanh(input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.hardtanh`; keeps 1 bit an element."""
    if not takes(input):
        return F.hardtanh(input, min_val, max_val, inplace)
    return ops.hardtanh_(input, min_val, max_val) if inplace else ops.hardtanh(input, min_val, max_val)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.relu6`; keeps 1 bit an element."""
    if already_activated(input, 6.0):
        return input
    return hardtanh(input, 0.0, 6.0, inplace)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.leaky_relu`; keeps 1 bit an element."""
    if not takes(input):
        return F.leaky_relu(input, negative_slope, inplace)
    return ops.leaky_relu_(input, negative_slope) if inplace else ops.leaky_relu(input, negative_slope)


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """As `torch.nn.functional.dropout`; keeps 1 bit an element."""
    if not training or inplace or not 0 < p < 1 or not takes(input):
        return F.dropout(input, p, training, inplace)
    return ops.dropout(input, p)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.batch_norm`; keeps per-channel vectors with running statistics and frozen affine."""
    trainable = any(vector is not None and vector.requires_grad for vector in (weight, bias))
    if training or trainable or running_mean is None or running_var is None or not takes(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ops.batch_norm_frozen(input, weight, bias, running_mean, running_var, eps)


def _numbers(value: Size | None, spatial: int, default: Size = 0) -> list[int]:
    if value is None or (not isinstance(value, int) and not len(value)):
        value = default
    if isinstance(value, int):
        return [value] * spatial
    return list(value) * spatial if len(value) == 1 else list(value)


def _cast_of_3d_pooling(spatial: int, input: torch.Tensor) -> torch.Tensor:
    """The input as autocast hands it to 3-D max and adaptive pooling: float32 on the CPU, unchanged elsewhere."""
    wide = spatial == 3 and input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return input.float() if wide and input.dtype in (torch.float16, torch.bfloat16) else input


def _max_pool(
    spatial: int,
    plain: Any,
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    kernel = _numbers(kernel_size, spatial)
    window = 1
    for size in kernel:
        window *= size
    if return_indices or window > ops.MAX_WINDOW or not takes(input) or input.dim() not in (spatial + 1, spatial + 2):
        return plain(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    steps, pads, gaps = _numbers(stride, spatial, kernel), _numbers(padding, spatial), _numbers(dilation, spatial)
    input = _cast_of_3d_pooling(spatial, input)
    if spatial > 1:
        return ops.max_pool(input, kernel, steps, pads, gaps, ceil_mode)
    return ops.max_pool(input.unsqueeze(-2), [1, *kernel], [1, *steps], [0, *pads], [1, *gaps], ceil_mode).squeeze(-2)


def max_pool1d(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.functional.max_pool1d`; keeps 1 byte an output element."""
    return _max_pool(1, F.max_pool1d, input, *args, **kwargs)


def max_pool2d(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.functional.max_pool2d`; keeps 1 byte an output element."""
    return _max_pool(2, F.max_pool2d, input, *args, **kwargs)


def max_pool3d(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `torch.nn.functional.max_pool3d`; keeps 1 byte an output element."""
    return _max_pool(3, F.max_pool3d, input, *args, **kwargs)


def avg_pool1d(
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """As `torch.nn.functional.avg_pool1d`; keeps sizes."""
    kernel = _numbers(kernel_size, 1)
    steps, pads = _numbers(stride, 1, kernel), _numbers(padding, 1)
    if not takes(input) or input.dim() not in (2, 3):
        return F.avg_pool1d(input, kernel, steps, pads, ceil_mode, count_include_pad)
    return ops.avg_pool(
        input.unsqueeze(-2), [1, *kernel], [1, *steps], [0, *pads], ceil_mode, count_include_pad
    ).squeeze(-2)


def _avg_pool(
    spatial: int,
    plain: Any,
    input: torch.Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    kernel = _numbers(kernel_size, spatial)
    steps, pads = _numbers(stride, spatial, kernel), _numbers(padding, spatial)
    if not takes(input) or input.dim() not in (spatial + 1, spatial + 2):
        y: torch.Tensor = plain(input, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
        return y
    return ops.avg_pool(input, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)


def avg_pool2d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.avg_pool2d`; keeps sizes."""
    return _avg_pool(2, F.avg_pool2d, input, *args, **kwargs)


def avg_pool3d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.avg_pool3d`; keeps sizes."""
    return _avg_pool(3, F.avg_pool3d, input, *args, **kwargs)


def _adaptive_avg_pool(spatial: int, plain: Any, input: torch.Tensor, output_size: Any) -> torch.Tensor:
    sizes: list[Any] = (
        [output_size] * spatial if output_size is None or isinstance(output_size, int) else list(output_size)
    )
    # PyTorch takes a plain mean for output size one, which keeps sizes only.
    if all(size == 1 for size in sizes) or not takes(input) or input.dim() not in (spatial + 1, spatial + 2):
        y: torch.Tensor = plain(input, output_size)
        return y
    sizes = [whole if size is None else size for size, whole in zip(sizes, input.shape[-spatial:])]
    input = _cast_of_3d_pooling(spatial, input)
    if spatial > 1:
        return ops.adaptive_avg_pool(input, sizes)
    return ops.adaptive_avg_pool(input.unsqueeze(-2), [1, *sizes]).squeeze(-2)


def adaptive_avg_pool1d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """As `torch.nn.functional.adaptive_avg_pool1d`; keeps sizes."""
    return _adaptive_avg_pool(1, F.adaptive_avg_pool1d, input, output_size)


def adaptive_avg_pool2d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """As `torch.nn.functional.adaptive_avg_pool2d`; keeps sizes."""
    return _adaptive_avg_pool(2, F.adaptive_avg_pool2d, input, output_size)


def adaptive_avg_pool3d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """As `torch.nn.functional.adaptive_avg_pool3d`; keeps sizes."""
    return _adaptive_avg_pool(3, F.adaptive_avg_pool3d, input, output_size)


def _convolution(
    spatial: int,
    plain: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> torch.Tensor:
    batched = input.dim() == spatial + 2
    frozen = not weight.requires_grad and (padding == "valid" or not isinstance(padding, str))
    if not frozen or not batched or not takes(input):
        y: torch.Tensor = plain(input, weight, bias, stride, padding, dilation, groups)
        return y
    pads = [0] * spatial if isinstance(padding, str) else _numbers(padding, spatial)
    return ops.frozen_convolution(
        input, weight, bias, _numbers(stride, spatial), pads, _numbers(dilation, spatial), False, [0] * spatial, groups
    )


def conv1d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.conv1d`; with a frozen weight keeps nothing of its input."""
    return _convolution(1, F.conv1d, input, *args, **kwargs)


def conv2d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.conv2d`; with a frozen weight keeps nothing of its input."""
    return _convolution(2, F.conv2d, input, *args, **kwargs)


def conv3d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.conv3d`; with a frozen weight keeps nothing of its input."""
    return _convolution(3, F.conv3d, input, *args, **kwargs)


def _transposed(
    spatial: int,
    plain: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> torch.Tensor:
    if weight.requires_grad or input.dim() != spatial + 2 or not takes(input):
        y: torch.Tensor = plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return y
    steps, pads, gaps, extra = (_numbers(value, spatial) for value in (stride, padding, dilation, output_padding))
    return ops.frozen_convolution(input, weight, bias, steps, pads, gaps, True, extra, groups)


def conv_transpose1d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.conv_transpose1d`; with a frozen weight keeps nothing of its input."""
    return _transposed(1, F.conv_transpose1d, input, *args, **kwargs)


def conv_transpose2d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.conv_transpose2d`; with a frozen weight keeps nothing of its input."""
    return _transposed(2, F.conv_transpose2d, input, *args, **kwargs)


def conv_transpose3d(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `torch.nn.functional.conv_transpose3d`; with a frozen weight keeps nothing of its input."""
    return _transposed(3, F.conv_transpose3d, input, *args, **kwargs)
