"""What fuzzed operators are given: tensors of any layout, arguments that fit, and one of them made not to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import lay_out

Draw = Callable[[st.SearchStrategy[Any]], Any]

# A few roundings of the accumulation and one of the result, over the largest value.
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OTHER_DTYPES = (*DTYPES, torch.int64, torch.bool, torch.uint8, torch.int8, torch.complex64)
STRINGS = ("zeros", "reflect", "circular", "gelu", "tanh", "nonsense", "")


@dataclass
class Case:
    """How one operator is fuzzed.

    Attributes:
        draw: draws arguments that fit.
        check: `check(result, *args)` asserts that a result is right; it may raise anything where the arguments do not
            fit, which the operator should have refused.
        plain: the same function by PyTorch alone, if there is one, whose first argument has a gradient.
        exact: whether that gradient is the operator's too, but for rounding.
        mutates: position of the argument written to, if there is one; `check` gets `(result, argument)`.
        by_value: whether values are refused too, of which tracing knows nothing.
        random: whether the operator draws random numbers.
    """

    draw: Callable[[Draw], list[Any]]
    check: Callable[..., None]
    plain: Callable[..., torch.Tensor] | None = None
    exact: bool = True
    mutates: int | None = None
    by_value: bool = False
    random: bool = False


CASES: dict[str, Case] = {}


def fuzzes(name: str, check: Callable[..., None] | None = None, **settings: Any) -> Callable[[Any], Any]:
    """Decorates the function that draws an operator's arguments; without `check`, values are those of `plain`."""

    def register(draw: Any) -> Any:
        plain = settings.get("plain")
        CASES[name] = Case(draw, check or (lambda result, *args: assert_close(result, plain(*args))), **settings)
        return draw

    return register


def assert_close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Asserts equal shapes and values, NaN and infinities included, but for a few roundings."""
    assert actual.shape == expected.shape
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    rounding = factor * CLOSE[actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rounding, atol=rounding * largest + 1e-30, equal_nan=True
    )


def shape(draw: Draw, least: int = 0, most: int = 4, smallest: int = 0) -> list[int]:
    """A shape of `least` to `most` dimensions; now and then one of them is empty."""
    return draw(st.lists(st.sampled_from((smallest, 1, 2, 3, 4, 5, 8)), min_size=least, max_size=most))


def values(draw: Draw, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Random values of one dtype in any memory layout."""
    return lay_out(torch.randn(tuple(size)).to(dtype), draw(st.sampled_from(LAYOUTS)))


def floating(draw: Draw) -> torch.dtype:
    return draw(st.sampled_from(DTYPES))


def maybe(draw: Draw, tensor: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    return tensor() if draw(st.booleans()) else None


def order_of(draw: Draw, x: torch.Tensor) -> list[int]:
    return draw(st.permutations(range(x.dim())))


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def _reshaped(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    size = list(x.shape)
    if size and draw(st.booleans()):
        size[draw(st.integers(0, len(size) - 1))] = draw(st.integers(0, 9))
    elif size and draw(st.booleans()):
        size.pop(draw(st.integers(0, len(size) - 1)))
    else:
        size.insert(draw(st.integers(0, len(size))), draw(st.integers(0, 3)))
    fresh = torch.randn(size) if x.dtype.is_floating_point else torch.randint(0, 2, size)
    return fresh.to(x.dtype)


def misfit(draw: Draw, value: Any, kind: str) -> Any:
    """A value that mostly does not fit in the place of `value`, an argument of this kind in the operator's schema."""
    if isinstance(value, torch.Tensor):
        how = draw(st.sampled_from(("dtype", "shape", "shape", "device", "layout")))
        if how == "dtype":
            return value.nan_to_num().to(draw(st.sampled_from(OTHER_DTYPES)))
        if how == "layout":
            return lay_out(value, draw(st.sampled_from(LAYOUTS[3:] + LAYOUTS[:2])))
        return value.to("meta") if how == "device" else _reshaped(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.integers(-4, 12) | st.sampled_from((255, 257, 2**31, 2**40, -(2**40))))
    if isinstance(value, float):
        return draw(st.sampled_from((0.0, 1.0, -1.0, 0.5, 7.5, float("nan"), float("inf"))))
    if isinstance(value, str):
        return draw(st.sampled_from(STRINGS))
    if isinstance(value, torch.dtype):
        return draw(st.sampled_from(OTHER_DTYPES))
    if value is None:
        replaced = {"Optional[float]": 0.5, "Optional[int]": 3}
        return replaced[kind] if kind in replaced else torch.randn(shape(draw))
    return _misfit_list(draw, value)


def _misfit_list(draw: Draw, value: list[Any]) -> list[Any]:
    changed = list(value)
    how = draw(st.sampled_from(("change", "change", "drop", "add")))
    if how == "add" or not changed:
        like = changed[0] if changed else None
        number = like is None or isinstance(like, int)
        return [*changed, draw(st.integers(-1, 4)) if number and not _has_tensors(changed) else like]
    place = draw(st.integers(0, len(changed) - 1))
    if how == "drop":
        del changed[place]
    elif changed[place] is not None:
        # Sizes near the right ones: memory is not what is tested.
        entry = changed[place]
        changed[place] = draw(st.integers(-3, 12)) if isinstance(entry, int) else misfit(draw, entry, "")
    return changed


def _has_tensors(entries: list[Any]) -> bool:
    return any(entry is None or isinstance(entry, torch.Tensor) for entry in entries)
