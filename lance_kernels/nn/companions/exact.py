"""Drop-in modules whose gradient is exact. Each subclasses its `torch.nn` namesake and adds no state."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

import lance_kernels.ops as ops
from lance_kernels.nn.companions import functional as companion
from lance_kernels.nn.companions.calls import OutsideCompanionCalls
from lance_kernels.nn.companions.fusion import consuming_relu, note_activated


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` that keeps 1 bit an element."""

    lance_bound: ClassVar[float | None] = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with OutsideCompanionCalls():
            return companion.relu(input, self.inplace)


class Hardtanh(nn.Hardtanh):
    """`torch.nn.Hardtanh` that keeps 1 bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(nn.ReLU6):
    """`torch.nn.ReLU6` that keeps 1 bit an element."""

    lance_bound: ClassVar[float | None] = 6.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with OutsideCompanionCalls():
            return companion.relu6(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU` that keeps 1 bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.leaky_relu(input, self.negative_slope, self.inplace)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that keeps 1 bit an element."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.dropout(input, self.p, self.training, self.inplace)


class FrozenBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the batch norms of every level do in eval mode."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Batch norm of `input`, `(B, C, ...)`, with the ReLU that consumes it where the two are a pair."""
        if self.training or self.running_mean is None or self.running_var is None:
            y: torch.Tensor = super().forward(input)
            return y
        with OutsideCompanionCalls():
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            vectors = (self.weight, self.bias, self.running_mean, self.running_var, self.eps)
            frozen = companion.takes(input) and not any(p.requires_grad for p in self.parameters(recurse=False))
            paired, high = consuming_relu(self) if frozen else (False, None)
            if paired:
                y = ops.batch_norm_relu_frozen(input, *vectors, high)
                note_activated(y, high)
                return y
            return companion.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )


class BatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that keeps per-channel vectors in eval mode with frozen affine."""


class BatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that keeps per-channel vectors in eval mode with frozen affine."""


class BatchNorm3d(FrozenBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that keeps per-channel vectors in eval mode with frozen affine."""


class _MaxPool(nn.modules.pooling._MaxPoolNd):
    def lance_arguments(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """`torch.nn.MaxPool1d` that keeps 1 byte an output element."""

    def forward(self, input: torch.Tensor) -> Any:
        with OutsideCompanionCalls():
            return companion.max_pool1d(input, *self.lance_arguments())


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that keeps 1 byte an output element."""

    def forward(self, input: torch.Tensor) -> Any:
        with OutsideCompanionCalls():
            return companion.max_pool2d(input, *self.lance_arguments())


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """`torch.nn.MaxPool3d` that keeps 1 byte an output element."""

    def forward(self, input: torch.Tensor) -> Any:
        with OutsideCompanionCalls():
            return companion.max_pool3d(input, *self.lance_arguments())


class AvgPool1d(nn.AvgPool1d):
    """`torch.nn.AvgPool1d` that keeps sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` that keeps sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(nn.AvgPool3d):
    """`torch.nn.AvgPool3d` that keeps sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` that keeps sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` that keeps sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` that keeps sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.adaptive_avg_pool3d(input, self.output_size)


EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: ReLU,
    nn.Hardtanh: Hardtanh,
    nn.ReLU6: ReLU6,
    nn.LeakyReLU: LeakyReLU,
    nn.Dropout: Dropout,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.MaxPool1d: MaxPool1d,
    nn.MaxPool2d: MaxPool2d,
    nn.MaxPool3d: MaxPool3d,
    nn.AvgPool1d: AvgPool1d,
    nn.AvgPool2d: AvgPool2d,
    nn.AvgPool3d: AvgPool3d,
    nn.AdaptiveAvgPool1d: AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: AdaptiveAvgPool3d,
}
