"""Runs the projection and the weight gradients under the strict interpreter; a program that a test starts.

With a number as its argument it draws as many random cases of each instead.
"""

from __future__ import annotations

import math
import mmap
import random
import sys
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels import convolution_weight_grad, linear, tucker
from lance_kernels.kernels._common import MAX_REREADS, WORKSPACE_BYTES, WORKSPACE_SHARE, nearest, nearest_tf32
from lance_kernels.kernels._reduction import MAX_EXPANDED_SPLITS, reduce_and_expand, sum_kernel, sum_parts
from lance_kernels.kernels.convolution_weight_grad import convolution_weight_grads
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.convolution_weight_grad import _weight_grad
from tests.kernels.strict import Launch, strict
from tests.ops.tensors import assert_near, dense, lay_out, orthonormal

Ranks = Sequence["int | None"]
COUNTED = ("x", "first", "second", "grad", "factor", "rows", "columns", "core", "parts", "bias_parts", "total", "bias")
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which older mmap modules do not name
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@triton.jit
def nearest_kernel(x, y, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(y + index, nearest(tl.load(x + index), PRECISION))


def factors_for(shape: Sequence[int], ranks: Ranks, dtype: torch.dtype = FP32) -> list[torch.Tensor | None]:
    return [None if rank is None else orthonormal(size, rank, dtype) for size, rank in zip(shape, ranks)]


def rounded(factors: list[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Factors as a bfloat16 or float16 product reads them, so that only the kernel's own roundings are left."""
    return [None if factor is None else factor.to(dtype).float() for factor in factors]


def assert_read_once(launch: Launch, argument: str, elements: int) -> None:
    """Each of so many elements was loaded exactly once."""
    counts = launch.loads(argument)
    assert counts.max() == 1
    assert counts.sum() == elements


def assert_added_up(launches: list[Launch]) -> None:
    """Where a launch of its own adds parts up, it reads each once, and no other launch reads them again."""
    for launch in launches:
        if launch.kernel == "sum_kernel":
            assert_read_once(launch, "parts", launch.regions["parts"].span)


def assert_workspace(launch: Launch, argument: str, streamed: torch.Tensor) -> None:
    bound = max(WORKSPACE_BYTES, WORKSPACE_SHARE * streamed.numel() * streamed.element_size())
    region = launch.regions[argument]
    assert region.span * region.size <= bound


def project(shape: Sequence[int], ranks: Ranks, dtype: torch.dtype, layout: str = "contiguous") -> list[Launch]:
    x, factors = lay_out(torch.randn(*shape).to(dtype), layout), rounded(factors_for(shape, ranks), dtype)
    with strict(counted=COUNTED) as launches:
        core = tucker.tucker_project(x, factors)
    assert core.is_contiguous()
    assert core.dtype == dtype
    assert_near(core, dense(x, factors), factor=2)
    if launches:
        assert [launch.kernel for launch in launches] in (["project_kernel"], ["project_kernel", "sum_kernel"])
        assert_read_once(launches[0], "x", x.numel())
        assert_added_up(launches)
    return launches


def linear_grads(
    shape: Sequence[int], ranks: Ranks, outputs: int, dtype: torch.dtype, layout: str = "contiguous"
) -> list[Launch]:
    grad = lay_out(torch.randn(*shape[:-1], outputs).to(dtype), layout)
    factors = rounded(factors_for(shape, ranks), dtype)
    core = torch.randn([rank or size for size, rank in zip(shape, ranks)]).to(dtype)
    with strict(counted=COUNTED) as launches:
        weight_grad, bias_grad = linear.linear_weight_bias_grad(grad, core, factors)
        alone = linear.linear_weight_grad(grad, core, factors)
    wide = dense(core, factors, transpose=False)
    terms = grad.numel() // outputs
    expected = torch.tensordot(grad.double().reshape(-1, outputs), wide.reshape(-1, shape[-1]), dims=([0], [0]))
    assert_near(weight_grad, expected, factor=2, terms=terms)
    assert_near(bias_grad, grad.double().reshape(-1, outputs).sum(0), factor=2, terms=terms)
    if launches:
        assert torch.equal(weight_grad, alone)
        assert_read_once(launches[0], "grad", grad.numel())
        assert_workspace(launches[0], "parts", grad)
        assert_added_up(launches)
    return launches


def convolution_grad(
    shape: Sequence[int],
    ranks: Ranks,
    weight: Sequence[int],
    geometry: Geometry,
    dtype: torch.dtype,
    layout: str = "contiguous",
    way: str | None = "shifted",
) -> list[Launch]:
    """One way, whatever the cost model says, or the cheapest."""
    factors = rounded(factors_for(shape, ranks), dtype)
    grad = lay_out(torch.randn(output_size(shape, weight, geometry)).to(dtype), layout)
    core = torch.randn([rank or size for size, rank in zip(shape, ranks)]).to(dtype)
    with strict(counted=COUNTED) as launches:
        product, bias_grad = convolution_weight_grads(grad, core, factors, weight, geometry, True, way)
    wide = [None if factor is None else factor.double() for factor in factors]
    expected = _weight_grad(grad.double(), core.double(), wide, list(weight), geometry)
    assert_near(product, expected, factor=3, terms=grad[:, 0].numel())
    assert_near(bias_grad, grad.double().sum([0, *range(2, grad.dim())]), factor=2, terms=grad[:, 0].numel())
    if way == "shifted":
        assert_read_once(launches[0], "grad", grad.numel())
        assert_workspace(launches[0], "parts", grad)
        assert_added_up(launches)
    return launches


def plain(kernel: Sequence[int], **changes: object) -> Geometry:
    """Stride 1 and half the kernel as padding."""
    ones = [1] * len(kernel)
    numbers = {"stride": ones, "padding": [size // 2 for size in kernel], "dilation": ones, "groups": 1, **changes}
    return Geometry.of(**numbers)


def check_projection() -> None:
    project((3, 70, 90), (None, 5, 17), BF16)
    project((3, 70, 90), (None, 1, 3), FP32)
    project((2, 33, 40), (None, 33, 7), FP16, "sliced")
    project((3, 70, 90), (None, 5, None), BF16)
    project((70, 90), (None, 7), FP16)
    project((2, 3, 20, 36), (2, 2, 5, 7), FP32)
    project((2, 24, 14, 14), (None, 7, 3, 3), BF16)
    project((2, 24, 14, 14), (None, 7, 3, 3), BF16, "channels_last")
    project((2, 24, 10, 6), (1, 7, None, 3), FP16, "transposed")
    project((2, 9, 40), (None, 3, 5), BF16)
    project((1, 5, 6, 7, 8), (None, 2, 3, 2, 3), FP32, "channels_last")
    project((1, 4, 130, 150), (None, 2, 6, 16), FP32)
    assert not project((2, 5, 3), (None, 2, 2), torch.float64)
    assert not project((2, 0, 3), (None, None, 2), FP32)


def check_sums() -> None:
    """Every number of splits on either side of what is taken at once, odd sizes, and every size of a block."""
    for splits, shape in (
        *((splits, (3, 77)) for splits in (1, 2, 3, 5, 31, 32, 33, 70)),
        (3, (270 * 128 + 1,)),
        (2, (5, 61, 257)),
        (5, (280 * 1024 - 3,)),
        (2, (1,)),
    ):
        parts, bias_parts = torch.randn(splits, *shape), torch.randn(splits, 301)
        for dtype, bias_dtype in ((FP32, BF16), (BF16, None), (FP16, FP32)):
            results = []
            for seed in (1, 2):
                with strict(counted=COUNTED, seed=seed) as launches:
                    total, bias = sum_parts(parts, dtype, bias_parts, bias_dtype)
                    alone, none = sum_parts(parts, dtype)
                results.append((total, bias))
                assert none is None
                assert torch.equal(alone, total)
                assert_read_once(launches[0], "parts", parts.numel())
                assert_read_once(launches[0], "bias_parts", bias_parts.numel())
            assert total.dtype == dtype
            assert bias.dtype == (bias_dtype or dtype)
            assert_near(total, parts.double().sum(0))
            assert_near(bias, bias_parts.double().sum(0))
            assert all(torch.equal(left, right) for left, right in zip(*results))


def check_expansion() -> None:
    """Few parts are added up where they are expanded, more before."""
    for splits in (1, 2, 3, 9):
        for dtype in (BF16, FP32):
            parts, feature = torch.randn(splits, 37, 16), rounded([orthonormal(50, 11, FP32)], BF16)[0]
            bias_parts = torch.randn(splits, 37)
            parts[..., 11:] = 0
            with strict(counted=COUNTED) as launches:
                weight_grad, bias_grad = reduce_and_expand(parts, feature, dtype, bias_parts)
            names = ["reduce_kernel"] if splits <= MAX_EXPANDED_SPLITS else ["sum_kernel", "reduce_kernel"]
            assert [launch.kernel for launch in launches] == names
            assert_added_up(launches)
            assert_near(weight_grad, parts.double().sum(0)[:, :11] @ feature.double().mT)
            assert_near(bias_grad, bias_parts.double().sum(0))


def check_rereads() -> None:
    """The table's shapes, cut down where neither the tile nor the share of re-reads changes."""
    for shape, ranks in (
        ((1, 1024, 4096), (None, 64, 128)),
        ((1, 256, 56, 56), (None, 32, 8, 8)),
        ((1, 1024, 14, 14), (None, 64, 4, 4)),
    ):
        launch = project(shape, ranks, BF16)[0]
        assert (launch.loads("first").sum() + launch.loads("second").sum()) / math.prod(shape) <= MAX_REREADS
        assert_workspace(launch, "core", torch.empty(shape, dtype=BF16))
    launch = linear_grads((1, 1024, 256), (None, 64, 128), 512, BF16)[0]
    assert launch.loads("factor").sum() / (1024 * 512) <= 0.5
    launch = convolution_grad((2, 32, 28, 28), (None, 32, 6, 6), (16, 32, 3, 3), plain((3, 3)), BF16)[0]
    assert (launch.loads("rows").sum() + launch.loads("columns").sum()) / (2 * 16 * 28 * 28) <= 0.5


def check_linear() -> None:
    linear_grads((3, 50, 40), (None, 5, 17), 70, BF16)
    linear_grads((3, 50, 40), (None, 17, 5), 70, FP32)
    linear_grads((3, 50, 40), (None, None, 17), 72, FP16)
    linear_grads((3, 50, 40), (2, 5, 1), 33, BF16, "transposed")
    linear_grads((2, 3, 20, 40), (None, 2, 5, None), 16, BF16)
    linear_grads((50, 40), (None, 17), 72, BF16, "sliced")
    linear_grads((40,), (7,), 20, FP32)
    assert not linear_grads((3, 5, 6), (None, 2, 3), 4, torch.float64)


def check_convolution() -> None:
    square = plain((3, 3))
    convolution_grad((3, 10, 9, 7), (None, 5, 3, 2), (20, 10, 3, 3), square, BF16)
    strided = plain((3, 2), stride=[2, 1], padding=[1, 2], dilation=[1, 2], padding_mode="reflect")
    convolution_grad((3, 10, 19, 21), (None, 5, 3, 2), (20, 10, 3, 2), strided, FP32, "channels_last")
    convolution_grad((2, 10, 40, 70), (None, 5, 6, 6), (18, 10, 3, 3), square, BF16, "channels_last")
    convolution_grad((2, 10, 36, 20), (None, 5, 1, 7), (18, 10, 1, 5), plain((1, 5)), FP16)
    convolution_grad((2, 3, 12, 13), (None, 2, 2, 1), (6, 3, 7, 7), plain((7, 7)), BF16)
    for way in ("projected", "patches"):
        for layout in ("contiguous", "channels_last", "sliced", "expanded"):
            convolution_grad((5, 10, 8, 8), (None, 5, 3, 2), (24, 10, 3, 3), square, BF16, layout, way)
        convolution_grad((3, 10, 19, 21), (None, 5, 3, 2), (20, 10, 3, 2), strided, FP16, "contiguous", way)
        convolution_grad((7, 40, 7, 7), (None, 33, 3, 3), (40, 40, 1, 1), plain((1, 1)), BF16, "contiguous", way)
        # A view of what one output leaves has strides of its own.
        convolution_grad((2, 10, 8, 8), (None, 5, 3, 2), (1, 10, 3, 3), square, BF16, "contiguous", way)
    launches = convolution_grad((3, 10, 24, 24), (2, 5, 2, 2), (6, 5, 3, 3), square._replace(groups=2), BF16, way=None)
    assert len(launches) == 1
    wide = plain((7, 7))
    assert not convolution_grad((2, 10, 12, 12), (None, 3, 10, 10), (8, 10, 7, 7), wide, FP32, way=None)
    assert not convolution_grad((2, 10, 9), (None, 3, 4), (8, 10, 3), plain((3,)), BF16, way=None)
    assert not convolution_grad((2, 10, 9, 9), (None, 3, None, 4), (8, 10, 3, 3), square, FP16, way=None)
    assert not convolution_grad(
        (2, 10, 9, 9), (None, 3, 3, 4), (10, 1, 3, 3), square._replace(groups=10), FP16, way=None
    )


def check_nearest() -> None:
    """TF32 to nearest, on the host and in a kernel; infinities and every NaN stay what they are."""
    special = torch.tensor([0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F7FFFFF, 0, 1, 0x3F801000], dtype=torch.int32)
    x = torch.cat([special.view(FP32), torch.randn(1024 - len(special))])
    for precision, expected in (("tf32", nearest_tf32(x)), ("tf32x3", x)):
        y = torch.empty_like(x)
        with strict():
            nearest_kernel[(1,)](x, y, COUNT=1024, PRECISION=precision)
        assert torch.equal(y.view(torch.int32), expected.view(torch.int32))
    y = nearest_tf32(x)
    kinds = [math.inf, -math.inf, math.nan, math.nan, math.inf, 0.0, 0.0]
    assert torch.equal(y[:7].nan_to_num(nan=5.0), torch.tensor(kinds).nan_to_num(nan=5.0))
    assert (y.view(torch.int32)[[*range(2), *range(4, 1024)]] % 2**13 == 0).all()
    # Ten bits of mantissa and an implicit one: half of the last is 2^-11 of the power of two below.
    assert ((y - x)[8:].abs() <= 2**-11 * 2 ** x[8:].abs().log2().floor()).all()
    narrow, out = x.to(BF16), torch.empty(1024, dtype=BF16)
    with strict():
        nearest_kernel[(1,)](narrow, out, COUNT=1024, PRECISION="tf32")
    assert torch.equal(out.view(torch.int16), narrow.view(torch.int16))


def check_precision() -> None:
    """Float32 products follow PyTorch's setting."""
    x, factors = torch.randn(2, 64, 96), factors_for((2, 64, 96), (None, 16, 16))
    errors = {}
    for allowed in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = allowed
        with strict():
            core = tucker.tucker_project(x, factors)
        errors[allowed] = (core.double() - dense(x, factors)).norm() / dense(x, factors).norm()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert errors["ieee"] < 1e-6 < 1e-4 < errors["tf32"] < 2e-3


def errors_over_unfused() -> dict[str, tuple[float, float]]:
    """Errors of bfloat16 results against float64, over those of unfused PyTorch with float32 intermediates.

    With each is by how much the result is too large throughout.
    """

    def ratio(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
        error, other = result.double() - exact, exact.float().to(BF16).double() - exact
        return float(error.norm() / other.norm()), float((error * exact).sum() / exact.square().sum())

    ratios = {}
    for shape, ranks, outputs in (((2, 256, 512), (None, 32, 64), 160), ((4, 128, 256), (None, 32, 48), 1200)):
        x, factors = torch.randn(shape).to(BF16), factors_for(shape, ranks)
        grad = torch.randn(*shape[:-1], outputs).to(BF16)
        with strict():
            core = tucker.tucker_project(x, factors)
            weight_grad = linear.linear_weight_grad(grad, core, factors)
        ratios[f"projection {shape}"] = ratio(core, dense(x, factors))
        exact = torch.einsum("bno,bnd->od", grad.double(), dense(core, factors, transpose=False))
        ratios[f"linear {shape}"] = ratio(weight_grad, exact)
    for shape, ranks, layout in (
        ((2, 48, 28, 28), (None, 32, 6, 6), "contiguous"),
        ((2, 96, 32, 40), (None, 64, 7, 7), "channels_last"),
    ):
        x, factors = lay_out(torch.randn(shape).to(BF16), layout), factors_for(shape, ranks)
        grad, weight = torch.randn(shape[0], 64, *shape[2:]).to(BF16), (64, shape[1], 3, 3)
        with strict():
            core = tucker.tucker_project(x, factors)
            parts = convolution_weight_grad.shifted_sums(grad, core, factors[2:], weight, plain((3, 3)))
            weight_grad, _ = reduce_and_expand(parts, factors[1], BF16, taps=(3, 3))
        ratios[f"projection {shape}"] = ratio(core, dense(x, factors))
        wide = [None if factor is None else factor.double() for factor in factors]
        exact = _weight_grad(grad.double(), core.double(), wide, list(weight), plain((3, 3)))
        ratios[f"convolution {shape}"] = ratio(weight_grad, exact)
    return ratios


def check_accuracy() -> None:
    torch.manual_seed(1)
    for name, (ratio, excess) in errors_over_unfused().items():
        assert ratio <= 1.5, (name, ratio)
        assert abs(excess) <= 3e-4, (name, excess)


def check_same_bits() -> None:
    """Whatever the order of programs."""
    x, factors = torch.randn(2, 300, 70).to(BF16), factors_for((2, 300, 70), (None, 20, 9))
    grad = torch.randn(2, 300, 90).to(BF16)
    results = []
    for seed in (1, 2):
        with strict(seed=seed):
            core = tucker.tucker_project(x, factors)
            results.append((core, *linear.linear_weight_bias_grad(grad, core, factors)))
    assert all(torch.equal(left, right) for left, right in zip(*results))


def check_far_offsets() -> None:
    """Elements more than 2^31 apart, in memory that only the touched pages of exist."""
    far = 2**31 + 64
    memory = mmap.mmap(-1, 2 * (far + 2**14), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    pages = torch.frombuffer(memory, dtype=BF16)
    factors = rounded(factors_for((2, 40, 64), (None, 5, 9)), BF16)
    for strides in ((far, 64, 1), (64 * 40, 64, 1)):
        x = pages[: far + 2**14].as_strided((2, 40, 64), strides, 0 if strides[0] == far else far)
        x.copy_(torch.randn(2, 40, 64))
        with strict():
            core = tucker.tucker_project(x, factors)
            weight_grad = linear.linear_weight_grad(x, core, factors)
        assert_near(core, dense(x, factors), factor=2)
        expected = torch.einsum("bno,bnd->od", x.double(), dense(core, factors, transpose=False))
        assert_near(weight_grad, expected, factor=2, terms=80)
        images = x.view(2, 40, 8, 8)
        spatial = rounded(factors_for((2, 40, 8, 8), (None, 5, 3, 3)), BF16)
        kept = torch.randn(2, 5, 3, 3).to(BF16)
        with strict():
            parts = convolution_weight_grad.shifted_sums(images, kept, spatial[2:], (40, 40, 3, 3), plain((3, 3)))
            thin = convolution_weight_grad.added_up(parts, (3, 3), 5)
        wide = [None, None, *(factor.double() for factor in spatial[2:])]
        exact = _weight_grad(images.double(), kept.double(), wide, [40, 5, 3, 3], plain((3, 3)))
        assert_near(thin, exact, factor=500, terms=80)
    x, factor = torch.randn(256, 16).to(BF16), torch.randn(16, 16).to(BF16)
    step = 2**24  # between two rows of the core: from one block of a tile to the other it is 2^31
    core = torch.frombuffer(
        mmap.mmap(-1, 2 * 256 * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE), dtype=BF16
    )
    with strict():
        tucker.project_kernel[(1,)](
            *(x, factor, factor, core, 1, 256, 16, 1, 0, 0, 16, 1, 0, 0, 0, step, 1, 16, 1),
            STREAM_UNIT=1,
            TOTAL_UNIT=1,
            STREAM_CONTIGUOUS=False,
            TOTAL_CONTIGUOUS=True,
            ALIGN=1,
            R=16,
            Q=16,
            STREAM=128,
            SUM=16,
            TWO_SIDED=False,
            BLOCKS=2,
            PRECISION="ieee",
        )
    rows = core.as_strided((256, 16), (step, 1))
    assert_near(rows, x.double() @ factor.double(), factor=2)
    memory = mmap.mmap(-1, 4 * (far + 128), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    parts, total = torch.frombuffer(memory, dtype=FP32), torch.empty(128)
    with torch.no_grad():
        parts[:128], parts[far:] = torch.randn(128), torch.randn(128)
    with strict():
        sum_kernel[(1,)](parts, total, parts, total, far, 0, 2, BIAS=False, BLOCK=128, LANES=2)
    assert torch.equal(total, parts[:128] + parts[far:])


CHECKS = (
    check_projection,
    check_linear,
    check_convolution,
    check_sums,
    check_expansion,
    check_rereads,
    check_nearest,
    check_precision,
    check_accuracy,
    check_same_bits,
    check_far_offsets,
)


def draw(rng: random.Random) -> None:
    """One random case of each kernel."""
    dtype = rng.choice((BF16, FP16, FP32))
    shape = [rng.randint(1, 4), *(rng.randint(1, 40) for _ in range(rng.randint(1, 3)))]
    ranks = [None if rng.random() < 0.4 else rng.randint(1, min(size, 30)) for size in shape]
    layout = rng.choice(("contiguous", "sliced", "transposed", "channels_last"))
    project(shape, ranks, dtype, layout)
    linear_grads(shape, ranks, rng.randint(1, 90), dtype, layout)
    spatial = [rng.randint(13, 40), rng.randint(13, 40)]  # as wide as the widest kernel
    channels, outputs, kernel = rng.randint(1, 12), rng.randint(1, 20), [rng.randint(1, 7), rng.randint(1, 7)]
    ranks = [None, rng.randint(1, channels), *(rng.randint(1, min(size, 7)) for size in spatial)]
    geometry = Geometry.of(
        [rng.randint(1, 2), rng.randint(1, 2)],
        [rng.randint(0, 2), rng.randint(0, 2)],
        [rng.randint(1, 2), rng.randint(1, 2)],
        1,
        rng.choice(("zeros", "reflect", "replicate", "circular")),
    )
    images = (rng.randint(1, 3), channels, *spatial)
    weight = (outputs, channels, *kernel)
    convolution_grad(images, ranks, weight, geometry, dtype, layout)
    for way in ("projected", "patches"):
        convolution_grad(images, ranks, weight, geometry, rng.choice((BF16, FP16)), layout, way)


def main(examples: int) -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    rng = random.Random(0)
    for _ in range(examples):
        draw(rng)
    for check in () if examples else CHECKS:
        check()
    print(f"{examples or len(CHECKS)} checks")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
