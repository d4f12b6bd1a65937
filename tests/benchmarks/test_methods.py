"""Every method against a small case worked out another way: a closed form or a dense computation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.grad import conv2d_weight

import lance_kernels as lance
from benchmarks import methods
from benchmarks.finetune import loss_of
from benchmarks.methods.filtering import GradientFilter
from benchmarks.methods.kept import keep_less, kept_layers
from benchmarks.methods.measure import eigh_flops, factor_bytes, qr_flops
from benchmarks.methods.perplexity import choose_ranks, least_error
from benchmarks.methods.tucker import Fixed, Hosvd, SubspaceIteration
from lance_kernels.ops.pack_core import packed_bytes

CONVOLUTIONS = {
    "3x3": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
    "same": lambda: nn.Conv2d(4, 5, 3, padding="same"),
    "1x1": lambda: nn.Conv2d(4, 5, 1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "dilated": lambda: nn.Conv2d(4, 5, 3, padding=2, dilation=2),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


NAMES = ["0", "2"]


def batches(count: int = 3, size: int = 6) -> list[methods.Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def projected(x: torch.Tensor, factors: list[torch.Tensor]) -> torch.Tensor:
    """`x` times `U U^T` in every mode."""
    for mode, factor in enumerate(factors):
        x = torch.tensordot(factor @ factor.mT, x, dims=([1], [mode])).movedim(0, mode)
    return x


def svd_factors(x: torch.Tensor, energy: float) -> list[torch.Tensor]:
    factors = []
    for mode in range(x.dim()):
        left, values, _ = torch.linalg.svd(x.movedim(mode, 0).flatten(1), full_matrices=False)
        kept = (values**2).cumsum(0) / (values**2).sum()
        factors.append(left[:, : int((kept < energy).sum()) + 1])
    return factors


def random_factors(size: torch.Size, rank: int) -> list[torch.Tensor]:
    return [torch.linalg.qr(torch.randn(extent, min(extent, rank), dtype=torch.float64))[0] for extent in size]


def dense_weight_grad(layer: nn.Module, x_hat: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return grad.flatten(0, -2).mT @ x_hat.flatten(0, -2)
    padding = layer.dilation[0] * (layer.kernel_size[0] // 2)
    return conv2d_weight(x_hat, layer.weight.shape, grad, layer.stride, padding, layer.dilation, layer.groups)


def gradients_of(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(layer(x), [x, *layer.parameters()], grad))


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "linear", "linear 2-D"])
@pytest.mark.parametrize("compression", ["fixed", "hosvd"])
def test_gradients_are_the_dense_ones_of_the_approximate_input(kind: str, compression: str) -> None:
    torch.manual_seed(0)
    layer = (CONVOLUTIONS[kind]() if kind in CONVOLUTIONS else nn.Linear(7, 5)).double()
    size = {"linear": (3, 6, 7), "linear 2-D": (6, 7)}.get(kind, (3, 4, 8, 8))
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    exact = gradients_of(layer, x, grad)
    factors = random_factors(x.shape, 3) if compression == "fixed" else svd_factors(x.detach(), 0.7)
    model = nn.ModuleList([layer])
    keep_less(model, ["0"], lambda name, module: Fixed(factors) if compression == "fixed" else Hosvd(0.7))
    torch.testing.assert_close(layer(x), y)
    found = gradients_of(layer, x, grad)
    expected = dense_weight_grad(layer, projected(x.detach(), factors), grad)
    torch.testing.assert_close(found[1], expected)
    for index in (0, *range(2, len(exact))):
        torch.testing.assert_close(found[index], exact[index])


def test_subspace_iteration_is_one_step_of_the_power_method_and_converges() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 0.5 ** torch.arange(6, dtype=torch.float64)
    x = torch.randn(6, 40, dtype=torch.float64, generator=generator) * scales[:, None]
    iteration = SubspaceIteration([2, 2], seed=3)
    start = torch.randn(6, 2, generator=torch.Generator().manual_seed(3)).double()
    first = iteration.factors_of(x)[0]
    one_step = torch.linalg.qr(x @ x.mT @ start)[0]
    torch.testing.assert_close(first @ first.mT, one_step @ one_step.mT)
    for _ in range(60):
        last = iteration.factors_of(x)[0]
    leading = torch.linalg.svd(x)[0][:, :2]
    torch.testing.assert_close(last @ last.mT, leading @ leading.mT)


def test_asi_gradient_is_the_dense_one_of_its_projection() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 5, 3, padding=1).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 6, 6, dtype=torch.float64)
    iteration = SubspaceIteration([2, 2, 3, 3])
    keep_less(nn.ModuleList([layer]), ["0"], lambda name, module: iteration)
    found = gradients_of(layer, x, grad)[1]
    expected = dense_weight_grad(layer, projected(x.detach(), iteration.last), grad)
    torch.testing.assert_close(found, expected)


def test_gradient_filtering_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weight = layer.weight.detach()
    expected, expected_x = torch.zeros_like(weight), torch.zeros_like(x)
    for image, row, column in itertools.product(range(2), range(2), range(2)):
        mean = grad[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
        patch = x.detach()[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        for out, tap_row, tap_column in itertools.product(range(3), range(3), range(3)):
            expected[out, :, tap_row, tap_column] += mean[out] * patch.sum((1, 2)) / 4
        for pixel_row, pixel_column in itertools.product(range(4), range(4)):
            value = torch.stack([(weight[:, c].sum((1, 2)) * mean).sum() / 4 for c in range(2)])
            expected_x[image, :, 4 * row + pixel_row, 4 * column + pixel_column] = value
    keep_less(nn.ModuleList([layer]), ["0"], lambda name, module: GradientFilter(2))
    found = gradients_of(layer, x, grad)
    torch.testing.assert_close(found[0], expected_x)
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[2], grad.sum((0, 2, 3)))


def test_gradient_filtering_is_exact_for_a_1x1_convolution_of_constant_patches() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 1).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64).repeat_interleave(2, 2).repeat_interleave(2, 3).requires_grad_()
    grad = torch.randn(2, 3, 3, 3, dtype=torch.float64).repeat_interleave(2, 2).repeat_interleave(2, 3)
    exact = gradients_of(layer, x, grad)
    keep_less(nn.ModuleList([layer]), ["0"], lambda name, module: GradientFilter(2))
    for found, expected in zip(gradients_of(layer, x, grad), exact):
        torch.testing.assert_close(found, expected)


def test_gradient_filtering_refuses_what_it_does_not_cover() -> None:
    model = nn.ModuleList([nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 3, 5)])
    keep_less(model, ["0", "1"], lambda name, module: GradientFilter(2))
    with pytest.raises(TypeError, match="one group"):
        model[0](torch.randn(1, 2, 8, 8))
    with pytest.raises(ValueError, match="padding that keeps the size"):
        model[1](torch.randn(1, 2, 8, 8)).sum().backward()


def test_other_layers_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="1 is ReLU"):
        keep_less(network(), ["1"], lambda name, module: Hosvd(0.5))


def test_what_is_kept_in_4_bits_is_counted_and_close() -> None:
    (images, labels), *_ = loader = batches()
    for make in (methods.hosvd, methods.published, methods.asi):
        wide, narrow = (make(0.9, bits).apply(network(), NAMES, loader) for bits in (None, 8))
        pairs = [methods.gradients(model, NAMES, (images, labels)) for model in (wide, narrow)]
        if make is not methods.asi:  # its factors move on with every call
            for one, other in zip(*pairs):
                assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999
    model = methods.gradient_filtering(2, 4).apply(network(), NAMES, loader)
    sums = [(6, 3, 4, 4), (6, 8, 2, 2)]
    assert methods.counted_bytes(model, NAMES, loader[0]) == sum(packed_bytes(size, 4) for size in sums)
    assert all(layer.seconds > 0 for layer in kept_layers(model).values())


METHODS = [
    methods.plain(),
    methods.checkpointed(),
    methods.published(0.8),
    methods.published(0.8, 4),
    methods.ours(energy=0.8),
    methods.ours(energy=0.8, core_bits=None, companions="none"),
    methods.ours(budget_bytes=2000),
    methods.hosvd(0.8),
    methods.hosvd(budget_bytes=6000),
    methods.asi(0.8, 4),
    methods.asi(budget_bytes=6000),
    methods.gradient_filtering(4),
    methods.lora(2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name} {method.details}")
def test_forward_is_exact_and_everything_trained_gets_a_gradient(method: methods.Method) -> None:
    plain, loader = network(), batches()
    model = method.apply(plain, NAMES, loader)
    images, labels = loader[0]
    torch.testing.assert_close(model(images), plain(images))
    cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.get_submodule("5").weight.requires_grad
    assert all(p.grad is None for p in plain.parameters())
    budget = method.details.get("budget_bytes")
    if budget is not None:
        assert methods.counted_bytes(model, NAMES, loader[0]) <= budget
    held, peak = methods.held_and_peak(model, loader[0])
    assert held > 0
    assert peak > 0


def test_compressing_holds_less_and_factors_are_told_apart() -> None:
    loader = batches()
    # Without activations, which keep their output whatever the convolutions do.
    plain = nn.Sequential(*(module for module in network() if not isinstance(module, nn.ReLU)))
    names = ["0", "1"]
    dense = lance.held_bytes(plain, loader[0][0], loss_of(loader[0][1]))
    for method in (methods.published(0.5), methods.hosvd(0.5), methods.asi(0.5), methods.ours(energy=0.5)):
        model = method.apply(plain, names, loader)
        assert methods.counted_bytes(model, names, loader[0]) < methods.dense_bytes(plain, names, loader[0])
        assert lance.held_bytes(model, loader[0][0], loss_of(loader[0][1])) < dense
    assert factor_bytes(methods.hosvd(0.5).apply(plain, names, loader)) == 0
    assert factor_bytes(methods.published(0.5).apply(plain, names, loader)) > 0


def test_published_keeps_the_energy_of_calibration_in_every_mode() -> None:
    loader = batches(count=1)
    model = methods.published(0.8).apply(network(), NAMES, loader)
    # One batch of calibration makes the fixed factors those of that batch's HOSVD.
    expected = svd_factors(loader[0][0], 0.8)
    for found, factor in zip(model[0].compression.factors, expected):
        torch.testing.assert_close(found @ found.mT, factor @ factor.mT, rtol=1e-3, atol=1e-4)


def test_errors_of_the_plain_model_are_none() -> None:
    cosines, relative = methods.errors(network(), network(), NAMES, batches())
    assert cosines == pytest.approx(dict.fromkeys(NAMES, 1.0))
    assert relative == pytest.approx(dict.fromkeys(NAMES, 0.0))


def test_lora_gradient_in_closed_form() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    batch = torch.randn(7, 6), torch.randint(4, (7,))
    model = methods.lora(2).apply(plain, ["0"], [batch])
    cross_entropy(model(batch[0]), batch[1]).backward()
    (dense,) = methods.gradients(plain, ["0"], batch)
    adapted = model[0]
    assert not adapted.base_layer.weight.requires_grad
    # y = W x + B A x with B = 0 at first, so that dB = dW A^T and dA = 0.
    torch.testing.assert_close(
        adapted.lora_B["default"].weight.grad, dense @ adapted.lora_A["default"].weight.detach().mT
    )
    assert not adapted.lora_A["default"].weight.grad.any()


def test_least_error_is_the_best_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    options = [
        [
            (int(torch.randint(1, 30, (), generator=generator)), float(torch.rand((), generator=generator)), [layer, i])
            for i in range(5)
        ]
        for layer in range(4)
    ]
    fitting = [choice for choice in itertools.product(*options) if sum(option[0] for option in choice) <= 50]
    best = min(fitting, key=lambda choice: sum(option[1] for option in choice))
    assert least_error(options, 50) == [option[2] for option in best]
    with pytest.raises(ValueError, match="budget is 1 bytes"):
        least_error(options, 1)


def test_ranks_by_perplexity_fit_their_budget() -> None:
    images, labels = batches()[0]
    ranks = choose_ranks(network(), NAMES, images, labels, 4000, 0)
    sizes = {"0": (6, 3, 8, 8), "2": (6, 8, 8, 8)}
    total = 0
    for name, chosen in ranks.items():
        core = torch.Size(chosen).numel()
        total += 4 * (core + sum(size * rank for size, rank in zip(sizes[name], chosen)))
    assert total <= 4000


def test_flops_count_decompositions() -> None:
    loader = batches()
    plain, model = network(), methods.hosvd(0.5).apply(network(), NAMES, loader)
    more = methods.flops(model, loader[0])["forward"] - methods.flops(plain, loader[0])["forward"]
    sizes = [(6, 3, 8, 8), (6, 8, 8, 8)]
    grams = sum(2 * extent * torch.Size(size).numel() for size in sizes for extent in size)
    eigen = sum(9 * extent**3 for size in sizes for extent in size)
    assert more > grams // 2 + eigen
    assert eigh_flops((5, 5)) == 9 * 125
    assert qr_flops((10, 4)) == 4 * 10 * 16 - 4 * 64 // 3
