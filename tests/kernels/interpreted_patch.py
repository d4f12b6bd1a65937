"""Runs the patches' kernel under Triton's interpreter against the reference; a program that a test starts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from lance_kernels.kernels import patch
from lance_kernels.ops.patch import _gram_reference
from tests.kernels.strict import strict

CASES = [
    ((2, 3, 7), [3], [2], [1], [1], 1, "zeros"),
    ((3, 4, 6, 5), [3, 2], [1, 2], [1, 0], [1, 1], 2, "zeros"),
    ((2, 8, 5, 6), [3, 3], [1, 1], [1, 1, 2, 0], [1, 2], 1, "reflect"),
    ((1, 6, 4, 5, 3), [2, 3, 1], [1, 1, 2], [1, 1, 0], [1, 1, 1], 3, "circular"),
    ((2, 9, 4, 4), [1, 1], [1, 1], [0, 0], [1, 1], 1, "zeros"),
    ((3, 20, 9, 8), [3, 3], [1, 1], [1, 1], [1, 1], 1, "zeros"),  # several tiles and parts of the columns
    ((0, 2, 5, 5), [3, 3], [1, 1], [0, 0], [1, 1], 1, "zeros"),
]


def check(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    size, kernel, stride, padding, dilation, groups, mode = case
    wide = torch.randn(size[0], size[1] + 1, *size[2:]).to(dtype)
    x = wide[:, 1:].transpose(-1, -2).contiguous().transpose(-1, -2) if len(size) > 3 else wide[:, 1:]
    rows = size[1] // groups * torch.Size(kernel).numel()
    before = torch.randn(groups, rows, rows, dtype=torch.float64)
    gram = before.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
    patch.patch_gram_(gram, x, kernel, stride, padding, dilation, groups, mode)
    expected = before.clone()
    _gram_reference(expected, x.double(), kernel, stride, padding, dilation, groups, mode)
    error = (gram.double() - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, (size, kernel, dtype, float(error))


def main() -> None:
    torch.manual_seed(0)
    for case in CASES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            for narrow in (patch.NARROW, 0):
                with mock.patch.object(patch, "NARROW", narrow):
                    check(case, dtype)
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    with strict():
        main()
