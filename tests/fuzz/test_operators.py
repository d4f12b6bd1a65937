"""Every operator on arguments that fit and on some that mostly do not: right or refused, never wrong, never a crash.

Each operator's arguments are drawn to fit; in two cases of three one of them is then changed. What is accepted has to
be right by PyTorch alone on the CPU, and in shape, dtype and strides on the meta device, which has to accept and refuse
the same. `HYPOTHESIS_PROFILE=fuzz` draws many more cases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map

import tests.fuzz.companion_cases
import tests.fuzz.core_cases  # noqa: F401
from tests.fuzz.drawing import CASES, Case, assert_close, misfit

OPERATORS = sorted(
    {schema.name.removeprefix("lance::") for schema in torch._C._jit_get_all_schemas() if schema.name[:7] == "lance::"}
)
REFUSED, MISSING = object(), object()
# 40 examples by default, 5,000 in `make fuzz`; there are about fifty operators.
EXAMPLES = settings(max_examples=max(8, settings.default.max_examples // 20))


def test_every_operator_is_fuzzed():
    assert set(OPERATORS) <= set(CASES)


def attempt(operator: Any, *args: Any) -> Any:
    """The result, REFUSED where a `RuntimeError` says what does not fit, or MISSING where PyTorch lacks the dtype."""
    try:
        return operator(*args)
    except NotImplementedError:
        return MISSING
    except RuntimeError:
        return REFUSED


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def tensors_of(args: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(args) if is_tensor(leaf)]


def copies(args: list[Any]) -> list[Any]:
    """The arguments again, in the same memory layouts."""

    def copy(leaf: Any) -> Any:
        if not is_tensor(leaf) or leaf.is_meta:
            return leaf
        storage = leaf.untyped_storage().clone()
        return torch.empty(0, dtype=leaf.dtype).set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())

    return tree_map(copy, args)


def on_meta(args: list[Any]) -> list[Any]:
    def abstract(leaf: Any) -> Any:
        if not is_tensor(leaf):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    return tree_map(abstract, args)


def layout(tensor: torch.Tensor, dense: bool) -> Any:
    """Shape and dtype, and those strides that reach other elements; of `dense` arguments only.

    PyTorch's own operators trace some inputs with gaps to other strides than they compute.
    """
    reaching = [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
    return tensor.shape, tensor.dtype, reaching if dense and tensor.numel() else []


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.is_meta or torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def check_gradients(case: Case, args: list[Any], result: torch.Tensor, operator: Any) -> None:
    """The same result where a gradient is wanted, and a gradient like PyTorch's own."""
    x = args[0].detach().requires_grad_()
    torch.manual_seed(0)
    y = operator(x, *args[1:])
    if case.exact and not case.random:
        assert same(y, result)
    else:
        assert_close(y, result)
    grad = torch.randn(y.shape).to(y.dtype)
    (mine,) = torch.autograd.grad(y, x, grad)
    assert mine.shape == x.shape
    assert mine.dtype == x.dtype
    if case.exact:
        expected = case.plain(x, *args[1:])
        assert_close(mine, torch.autograd.grad(expected, x, grad.to(expected.dtype))[0], factor=5)


@pytest.mark.parametrize("name", OPERATORS)
@EXAMPLES
@given(data=st.data())
def test_right_or_refused(name, data):
    case, operator = CASES[name], getattr(torch.ops.lance, name)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    args = case.draw(data.draw)
    fits = data.draw(st.sampled_from((True, False, False)))
    if not fits:
        place = data.draw(st.integers(0, len(args) - 1))
        args[place] = misfit(data.draw, args[place], str(operator.default._schema.arguments[place].type))
    working = copies(args)
    torch.manual_seed(0)
    result = attempt(operator, *working)
    if result is MISSING:
        return
    assert not fits or result is not REFUSED

    untouched = [leaf for index, arg in enumerate(working) if index != case.mutates for leaf in tensors_of(arg)]
    originals = [leaf for index, arg in enumerate(args) if index != case.mutates for leaf in tensors_of(arg)]
    assert all(same(one, other) for one, other in zip(untouched, originals, strict=True))

    devices = {tensor.device.type for tensor in tensors_of(args)}
    if devices != {"cpu"}:
        assert result is REFUSED or all(tensor.is_meta for tensor in tensors_of(result))
        return
    fake = attempt(operator, *on_meta(args))
    assert (fake is REFUSED) == (result is REFUSED) or (case.by_value and result is REFUSED)
    if result is REFUSED:
        assert all(same(one, other) for one, other in zip(tensors_of(working), tensors_of(args), strict=True))
        return
    dense = all(tensor.is_contiguous() for tensor in tensors_of(args))
    for real, traced in zip(tensors_of(result), tensors_of(fake), strict=True):
        assert layout(real, dense) == layout(traced, dense)
    torch.manual_seed(0)
    case.check(result if case.mutates is None else (result, working[case.mutates]), *args)
    if case.plain is not None:
        check_gradients(case, args, result, operator)
