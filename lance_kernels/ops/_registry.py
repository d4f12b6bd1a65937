"""The `lance` operator library: the one place through which operators are registered.

A family file (`tucker.py`, `linear.py`, ...) writes schema, reference, fake, autograd and FLOP formula of its
operators and hands them to `define`. The reference is registered for every backend; a compiled library or a Triton
kernel overrides it for its own dispatch key.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from lance_kernels.ops._checks import check

LIBRARY = torch.library.Library("lance", "DEF")

Kernel = Callable[..., Any]


def define(
    schema: str,
    *,
    reference: Kernel,
    fake: Kernel,
    autograd: Kernel | None = None,
    autocast: Kernel | None = None,
    flops: Kernel | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """Registers one operator of the `lance` namespace.

    Args:
        schema: the operator's schema, as in `tucker_project(Tensor x, Tensor?[] factors) -> Tensor`.
        reference: plain PyTorch implementation; serves every backend that has no kernel of its own.
        fake: shapes, dtypes and strides of the outputs, for tracing.
        autograd: kernel of the `Autograd` key; it calls the operator again under `below_autograd()`.
        autocast: kernel of the `AutocastCPU` and `AutocastCUDA` keys; it calls the operator again under
            `without_autocast()`.
        flops: floating point operations from the shapes of the arguments, as `torch.utils.flop_counter` wants them.
        tags: tags beside `pt2_compliant_tag`, such as `nondeterministic_seeded`; `flexible_layout` for operators that
            take any strides and give contiguous results, which a compiler need not copy arguments for.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, _on_one_device(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lance::{name}", _on_one_device(name, fake), lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
    if autocast is not None:
        for key in ("AutocastCPU", "AutocastCUDA"):
            LIBRARY.impl(name, autocast, key)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.lance, name))(flops)


def register_triton(name: str, file: str | None = None) -> None:
    """Registers `lance_kernels.kernels.<file>.<name>` for CUDA; Triton is imported when it is first called.

    Without Triton, CUDA tensors take the reference.

    Args:
        name: the operator's name in the `lance` namespace, and the launcher's; its first argument is a tensor.
        file: the kernel file's name, by default the operator's.
    """
    if importlib.util.find_spec("triton") is None:
        return

    @functools.cache
    def launcher() -> Kernel:
        found: Kernel = getattr(importlib.import_module(f"lance_kernels.kernels.{file or name}"), name)
        return found

    def kernel(first: torch.Tensor, *args: Any) -> Any:
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device(first.device.index):
            return launcher()(first, *args)

    LIBRARY.impl(name, _on_one_device(name, kernel), "CUDA")


def _on_one_device(name: str, kernel: Kernel) -> Kernel:
    """The kernel, refusing tensors of several devices: the dispatcher chose it by one of them."""
    operator = f"lance::{name}"
    names = [argument.name for argument in torch._C._jit_get_schemas_for_operator(operator)[0].arguments]

    def refuse(*args: Any, **kwargs: Any) -> None:
        first: tuple[str, torch.device] | None = None
        for argument, value in (*zip(names, args), *kwargs.items()):
            many = isinstance(value, (list, tuple))
            for index, tensor in enumerate(value if many else (value,)):
                if not isinstance(tensor, torch.Tensor):
                    continue
                place = f"{argument}[{index}]" if many else argument
                first = first or (place, tensor.device)
                if tensor.device != first[1]:
                    raise RuntimeError(
                        f"{operator}: {place} is on {tensor.device}; expected {first[1]}, where {first[0]} is"
                    )

    @functools.wraps(kernel)
    def on_one_device(*args: Any, **kwargs: Any) -> Any:
        tensors = tensors_of((*args, *kwargs.values()))
        if any(tensor.device != tensors[0].device for tensor in tensors):
            refuse(*args, **kwargs)
        return kernel(*args, **kwargs)

    return on_one_device


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, which PyTorch leaves untyped."""
    return function.apply(*args)


def below_autograd() -> Any:
    """Context in which operators dispatch below the `Autograd` keys."""
    return torch._C._AutoDispatchBelowAutograd()


def without_autocast() -> Any:
    """Context in which operators dispatch below the `Autocast` keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    return torch._C._ExcludeDispatchKeyGuard(keys)


def autocast_arguments(*tensors: torch.Tensor | None) -> list[Any]:
    """Casts an autocast region's arguments to its dtype, as PyTorch's own products do; float64 stays.

    Args:
        tensors: tensors of one device, the first not None.
    """
    first = tensors[0]
    assert first is not None
    dtype = torch.get_autocast_dtype(first.device.type)
    keep = (torch.float64, dtype)
    return [t if t is None or not t.is_floating_point() or t.dtype in keep else t.to(dtype) for t in tensors]


def writable(output: torch.Tensor) -> torch.Tensor:
    """An autograd Function's output that may be changed in place, which autograd refuses where it is a view."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def once_differentiable(name: str) -> Callable[[Kernel], Kernel]:
    """Decorates an `autograd.Function`'s backward: a second backward pass through it raises.

    PyTorch's decorator of this name lets a second derivative vanish when the incoming gradient is a constant; here,
    under `create_graph=True`, every gradient carries the node that raises. It hangs on the incoming gradient and on
    the leaves behind the operator's inputs, since a pass that is asked for some leaves only skips what leads to none.

    Args:
        name: the operator's name in the `lance` namespace.
    """

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, sources: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(grad.view_as(grad) for grad in tensors[sources:])

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            raise RuntimeError(
                f"lance::{name} is differentiable once: what it keeps of its input is compressed and has no second "
                "derivative; use lance_kernels.exact(model) for double backward"
            )

    def decorate(backward: Kernel) -> Kernel:
        @functools.wraps(backward)
        def once(ctx: Any, *grad_outputs: Any) -> Any:
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            if not torch.is_grad_enabled():
                return grads
            # The first serves where the leaves are not known, as under torch.func.
            sources = [torch.empty(0, requires_grad=True), *_leaves(ctx), *_tensors(grad_outputs)]
            guarded = iter(apply(Refuse, len(sources), *sources, *_tensors(grads)))
            return tuple(None if grad is None else next(guarded) for grad in grads)

        return once

    return decorate


def tensors_of(args: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments, those in its lists too."""
    tensors = []
    for value in args:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], int):
            tensors += _tensors(value)
    return tensors


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def _leaves(node: Any) -> list[torch.Tensor]:
    """The leaves that a node of the graph leads to."""
    found, seen, open_nodes = [], {node}, [node]
    while open_nodes:
        for following, _ in open_nodes.pop().next_functions:
            if following is None or following in seen:
                continue
            seen.add(following)
            open_nodes.append(following)
            if hasattr(following, "variable"):
                found.append(following.variable)
    return found


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass has to be recorded for any of the tensors.

    Raises:
        RuntimeError: one of them has a tangent: below autograd it would get lost.
    """
    if forward_ad._current_level >= 0:
        check(
            all(forward_ad.unpack_dual(tensor).tangent is None for tensor in _tensors(tensors)),
            "lance: no operator has a forward-mode derivative; use lance_kernels.exact(model) for it",
        )
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def written(*tensors: torch.Tensor) -> None:
    """Tells autograd that an operator wrote to the tensors, so that it does not take them for what it saved."""
    torch.autograd.graph.increment_version(tensor for tensor in tensors if not tensor.is_inference())


def not_differentiable(name: str) -> Kernel:
    """Autograd kernel of an operator that has no derivative: a backward pass that reaches its outputs raises.

    Args:
        name: the operator's name in the `lance` namespace.
    """

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, args: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
            with below_autograd():
                return getattr(torch.ops.lance, name)(*args)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            raise RuntimeError(f"lance::{name} has no derivative; detach its inputs or call it under torch.no_grad()")

    def kernel(*args: Any) -> Any:
        tensors = tensors_of(args)
        if needs_grad(*tensors):
            return apply(Refuse, args, *tensors)
        with below_autograd():
            return getattr(torch.ops.lance, name)(*args)

    return kernel
