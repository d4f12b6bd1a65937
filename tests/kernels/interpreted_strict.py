"""Shows that the strict interpreter catches what it says it does; a program that a test starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.strict import cut_off, strict


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def copy_kernel(x, y, count, BLOCK: tl.constexpr, OTHER: tl.constexpr, EXTRA: tl.constexpr, STEP: tl.constexpr):
    index = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    inside = index < count + EXTRA
    loaded = tl.load(x + index, mask=inside, other=0.0) if OTHER else tl.load(x + index, mask=inside)
    tl.store(y + index, loaded, mask=index < count)


@triton.jit
def double_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    loaded = tl.load(x + index)
    tl.store(y + index, loaded + loaded)


@triton.jit
def order_kernel(clock, order):
    now = tl.load(clock)
    tl.store(order + tl.program_id(0), now)
    tl.store(clock, now + 1)


@triton.jit
def narrow_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index).to(tl.bfloat16))


@triton.jit
def widen_kernel(x, y, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index).to(tl.float32))


def product(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    c = torch.empty(a.shape[0], b.shape[1])
    dot_kernel[(1,)](a, b, c, M=a.shape[0], K=a.shape[1], N=b.shape[1], PRECISION=precision)
    return c


def refused(what: str, launch: Callable[[], object]) -> None:
    with pytest.raises(InterpreterError, match=what):
        launch()


def check_dots() -> None:
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    wide = a.bfloat16().double() @ b.bfloat16().double()
    torch.testing.assert_close(product(a.bfloat16(), b.bfloat16()).double(), wide, atol=1e-5, rtol=1e-5)
    short = torch.from_numpy(cut_off(a.numpy())).double() @ torch.from_numpy(cut_off(b.numpy())).double()
    torch.testing.assert_close(product(a, b, "tf32").double(), short, atol=1e-5, rtol=1e-5)
    exact = a.double() @ b.double()
    assert (short - exact).abs().max() > 1e-4
    # Cut off, a sum of positive products is too small; rounded, it would not be.
    above = product(a.abs(), b.abs(), "tf32").double() / (a.abs().double() @ b.abs().double()) - 1
    assert -1.5e-3 < above.max() < -3e-4
    torch.testing.assert_close(product(a, b, "tf32x3").double(), exact, atol=1e-5, rtol=1e-5)
    refused("sides of at least 16", lambda: product(torch.randn(16, 8), torch.randn(8, 16)))


def check_memory() -> None:
    x, y = torch.randn(100), torch.empty(100)

    def copy(other: bool = True, extra: int = 0, step: int = 64) -> None:
        copy_kernel[(2,)](x, y, 100, BLOCK=64, OTHER=other, EXTRA=extra, STEP=step)

    copy()
    assert torch.equal(x, y)
    refused("without `other`", lambda: copy(other=False))
    refused("outside its arguments", lambda: copy(extra=1))
    refused("two programs store", lambda: copy(step=32))
    refused("bfloat16 values", lambda: double_kernel[(1,)](x[:16].bfloat16(), torch.empty(16).bfloat16(), BLOCK=16))
    assert torch.empty(5).isnan().all()


def check_order() -> None:
    clock, order = torch.zeros(1, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)
    order_kernel[(50,)](clock, order)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))


def check_counts() -> None:
    x, y = torch.randn(100), torch.empty(100)
    with strict(counted=("x",)) as launches:
        copy_kernel[(2,)](x, y, 100, BLOCK=64, OTHER=True, EXTRA=0, STEP=64)
        assert (launches[-1].loads("x") == 1).all()
        copy_kernel[(3,)](x, y, 100, BLOCK=64, OTHER=True, EXTRA=0, STEP=32)
        assert launches[-1].loads("x").sum() == 64 + 64 + 36


def check_conversions() -> None:
    x, y = torch.randn(64), torch.empty(64, dtype=torch.bfloat16)
    narrow_kernel[(1,)](x, y, BLOCK=64)
    assert torch.equal(y, x.bfloat16())
    smallest = torch.arange(-32, 32).short().view(torch.bfloat16)
    widen_kernel[(1,)](smallest, x, BLOCK=64)
    assert torch.equal(x.view(torch.int32), smallest.float().view(torch.int32))


def main() -> None:
    torch.manual_seed(0)
    checks = (check_dots, check_memory, check_order, check_conversions)
    with strict(counted=("y",)):
        for check in checks:
            check()
    check_counts()
    print(f"{len(checks) + 1} checks")


if __name__ == "__main__":
    main()
