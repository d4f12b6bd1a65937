"""What the companions' tests share: special values, bitwise comparison, gradients, and what autograd holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tests.ops import cases

SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0, 1e-30, -1e-30)
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}

Function = Callable[..., torch.Tensor]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`cases.lay_out`; a scalar has one layout."""
    return cases.lay_out(x, layout) if x.dim() else x


def with_special(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Random values, a third of them special."""
    x = (torch.randn(tuple(shape)) * 4).to(dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), tuple(shape))]
    return torch.where(torch.rand(tuple(shape)) < 1 / 3, special, x)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equal shape, dtype and bits, signed zeros told apart; any NaN equals any other."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    missing = expected.isnan()
    assert torch.equal(actual.isnan(), missing)
    bits = INTEGER[actual.dtype]
    same = (actual.contiguous().view(bits) == expected.contiguous().view(bits)) | missing
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ: {actual[~same][:5]} {expected[~same][:5]}"


def forward_backward(
    function: Function, inputs: Sequence[torch.Tensor], grad: torch.Tensor | None = None, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result and the inputs' gradients for one incoming gradient."""
    leaves = [leaf.detach().requires_grad_() for leaf in inputs]
    torch.manual_seed(seed)
    y = function(*leaves)
    grad = torch.ones_like(y) if grad is None else grad
    return y.detach(), list(torch.autograd.grad(y, leaves, grad))


def held_bytes(function: Callable[[], torch.Tensor], ignored: Sequence[torch.Tensor] = ()) -> int:
    """Bytes of the storages that autograd holds for a result, but for those of the `ignored` tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    total = sum(storage.nbytes() for storage in storages.values())
    del y
    return total


def assert_compiles(function: Function, inputs: Sequence[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Asserts that `torch.compile(fullgraph=True)` gives the same values and gradients."""
    torch.compiler.reset()
    grad = torch.randn_like(function(*inputs))
    expected, gradients = forward_backward(function, inputs, grad)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, found = forward_backward(compiled, inputs, grad)
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(found, gradients):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
