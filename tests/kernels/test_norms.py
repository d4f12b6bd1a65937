"""Batch norm, rows in 8 bits and max pooling: numbers under the interpreter, and what they compile to."""

from __future__ import annotations

import pytest
import torch

from lance_kernels.kernels import batch_norm, pooling, quantize_rows
from lance_kernels.ops._layout import memory_order
from tests.kernels.compiled import aligned, compiling_for
from tests.kernels.programs import interpreted


def test_kernels_agree_with_the_references_under_the_interpreter():
    assert interpreted("interpreted_norms") == "294 cases"


def test_max_pool_refuses_what_the_reference_refuses():
    window = ((3, 3), (1, 1), (0, 0), (1, 1), False)
    with pytest.raises(RuntimeError, match="too small for the window"):
        pooling.max_pool_offsets(torch.randn(1, 1, 2, 2), *window)
    grad = torch.randn(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"size is \[5, 5\], which does not pool to \[2, 2\]"):
        pooling.max_pool_grad(grad, grad.byte(), (5, 5), *window)
    with pytest.raises(RuntimeError, match="expected the same shape, and"):
        pooling.max_pool_grad(grad, grad, (4, 4), *window)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_launchers_compile_without_spills(capability):
    shape = (2, 64, 16, 16)
    vector, mask = torch.empty(64), torch.empty(2 * 64 * 256 // 8, dtype=torch.uint8)
    window = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    with compiling_for(capability) as compiled:
        for dtype in (torch.float32, torch.bfloat16):
            last = dtype == torch.bfloat16
            x = aligned(shape, dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)
            order = memory_order(x)
            batch_norm.batch_norm_relu_mask(x, vector, vector, vector, vector, 1e-5, 6.0, order)
            batch_norm.batch_norm_relu_grad(x, mask, vector, vector, 1e-5, order)
            quantize_rows.quantize_rows(x, vector, 512 if last else 2, 64, order)
            y, offsets = pooling.max_pool_offsets(x, *window)
            pooling.max_pool_grad(y, offsets, (16, 16), *window)
            quantize_rows.quantize_rows(x, None, 1, 128, memory_order(x))
            codes, steps = torch.empty(x.numel(), dtype=torch.int8), torch.empty(128)
            quantize_rows.dequantize_rows(codes, steps, 1, x, memory_order(x))
    assert len(compiled) == 2 * 11
    for kernel in compiled:
        assert kernel.usage["STACK"] == 0, kernel.name
        assert kernel.usage["LOCAL"] == 0, kernel.name


@pytest.mark.parametrize(("shape", "last"), [((8, 64, 56, 56), False), ((8, 64, 56, 56), True), ((8, 64, 7, 7), False)])
def test_batch_norm_has_few_instructions(shape, last):
    """An element costs no division of its own where eight neighbours share a channel, or are eight channels."""
    x, vector = aligned(shape, torch.bfloat16), torch.empty(64)
    x = x.to(memory_format=torch.channels_last) if last else x
    with compiling_for(90) as compiled:
        batch_norm.batch_norm_relu_mask(x, vector, vector, vector, vector, 1e-5, None, memory_order(x))
        mask = torch.empty(x.numel() // 8, dtype=torch.uint8)
        batch_norm.batch_norm_relu_grad(x, mask, vector, vector, 1e-5, memory_order(x))
    forward, grad = (kernel for kernel in compiled if kernel.name != "table_kernel")
    elements = batch_norm.BLOCK / 128
    assert forward.instructions / elements < (55 if shape[-1] == 7 else 28)
    assert grad.instructions / elements < (52 if shape[-1] == 7 else 25)


@pytest.mark.parametrize(("last", "most"), [(False, 145), (True, 80)])
def test_max_pool_grad_visits_few_windows(last, most):
    """Four windows of nine taps hold an element, without loops."""
    offsets = aligned((8, 64, 28, 28), torch.uint8)
    offsets = offsets.to(memory_format=torch.channels_last) if last else offsets
    with compiling_for(90) as compiled:
        pooling.max_pool_grad(offsets.bfloat16(), offsets, (56, 56), (3, 3), (2, 2), (1, 1), (1, 1), False)
    (kernel,) = compiled
    assert kernel.instructions / (pooling.BLOCK / 128) < most


@pytest.mark.parametrize("kernel", [(13, 13), (5, 5), (3, 3, 3), (5, 7, 7)])
def test_large_windows_compile_without_spills(kernel):
    padding, ones = [size // 2 for size in kernel], [1] * len(kernel)
    x = aligned((2, 16, *[16] * len(kernel)), torch.bfloat16)
    with compiling_for(90) as compiled:
        y, offsets = pooling.max_pool_offsets(x, kernel, ones, padding, ones, False)
        pooling.max_pool_grad(y, offsets, x.shape[2:], kernel, ones, padding, ones, False)
    assert [compilation.usage["STACK"] for compilation in compiled] == [0, 0]


def test_elementwise_passes_load_16_bytes():
    with compiling_for(90) as compiled:
        for dtype in (torch.float32, torch.bfloat16):
            x, vector = aligned((2, 64, 16, 16), dtype), torch.empty(64)
            batch_norm.batch_norm_frozen_grad(x, None, vector, 1e-5, memory_order(x))
    assert [max(kernel.load_bytes) for kernel in compiled if kernel.name == "grad_kernel"] == [16, 16]
