"""Runs the companions' kernels under Triton's interpreter against the references; a program that a test starts."""

from __future__ import annotations

import itertools

import torch

from lance_kernels.kernels import activation, mask
from lance_kernels.ops.activation import KINDS, codes_reference, derivative_bound, grad_reference
from lance_kernels.ops.dropout import dropout_grad_reference
from lance_kernels.ops.mask import (
    masked_grad_reference,
    masked_reference,
    pack_mask_reference,
    unpack_mask_reference,
)
from tests.kernels.strict import strict
from tests.ops.companion_cases import assert_same_bits, with_special

SHAPES = [(1,), (7,), (8,), (3, 5, 7), (0, 4), (2, 3, 40, 41)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BOUNDS = ((None, None, None), (0.0, 6.0, None), (-1.0, 1.0, None), (None, None, 0.1))


def check_mask(shape: tuple[int, ...], dtype: torch.dtype, bounds: tuple[float | None, ...]) -> None:
    x, grad = with_special(shape, dtype), with_special(shape, dtype)
    order = list(reversed(range(len(shape))))
    y, bits = mask.masked_activation(x, *bounds, order)
    expected, expected_bits = masked_reference(x, *bounds, order)
    assert_same_bits(y, expected)
    assert torch.equal(bits, expected_bits)
    found = mask.masked_activation_grad(grad, bits, bounds[2], order)
    assert_same_bits(found, masked_grad_reference(grad, bits, bounds[2], order))
    in_place = x.clone()
    assert torch.equal(mask.masked_activation_(in_place, *bounds, order), bits)
    assert_same_bits(in_place, expected)


def check_bits(shape: tuple[int, ...], reverse: bool) -> None:
    order = list(reversed(range(len(shape)))) if reverse else list(range(len(shape)))
    bits = torch.rand(shape) < 0.4
    packed = mask.pack_mask(bits, order)
    assert torch.equal(packed, pack_mask_reference(bits, order))
    found, expected = mask.unpack_mask(packed, bits, order), unpack_mask_reference(packed, bits, order)
    assert torch.equal(found, bits)
    assert found.stride() == expected.stride()
    for dtype, p in itertools.product(DTYPES, (0.0, 0.1, 0.5)):
        grad = with_special(shape, dtype)
        # ATen's kernels for CUDA multiply in float32, and round the product alone.
        wide = grad if dtype == torch.float64 else grad.float()
        expected_grad = dropout_grad_reference(wide, packed, p, order).to(dtype)
        assert_same_bits(mask.dropout_grad(grad, packed, p, order), expected_grad)


def check_codes(shape: tuple[int, ...], dtype: torch.dtype, kind: str, bits: int) -> None:
    x, grad = with_special(shape, dtype), torch.randn(shape).to(dtype)
    order = list(range(len(shape)))
    codes = activation.activation_codes(x, kind, bits, order)
    expected = codes_reference(x, kind, bits, order)
    if bits == 8:
        # Another way to compute the derivative may round the other way between two codes.
        assert ((codes.int() - expected.int()).abs() <= 1).all()
        assert (codes != expected).sum() <= max(2, codes.numel() // 100)
    found = activation.activation_grad(grad, codes, kind, bits, order)
    assert_same_bits(found, grad_reference(grad, codes, kind, bits, order))
    reference = grad_reference(torch.ones_like(grad), expected, kind, bits, order)
    own = grad_reference(torch.ones_like(grad), codes, kind, bits, order)
    assert torch.equal(own.isnan(), reference.isnan())
    assert ((own - reference).nan_to_num().abs() <= 2.1 * derivative_bound(kind, bits) + 0.01).all()


def main() -> None:
    torch.manual_seed(0)
    cases = 0
    for shape, dtype, bounds in itertools.product(SHAPES, DTYPES, BOUNDS):
        check_mask(shape, dtype, bounds)
        cases += 1
    for shape, reverse in itertools.product((*SHAPES, ()), (False, True)):
        check_bits(shape, reverse)
        cases += 1
    for shape, dtype, kind, bits in itertools.product(SHAPES[1::2] + SHAPES[4:5], DTYPES, KINDS, (8, 4)):
        check_codes(shape, dtype, kind, bits)
        cases += 1
    print(f"{cases} cases")


if __name__ == "__main__":
    with strict():
        main()
