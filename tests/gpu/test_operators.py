"""The operators on a device against float64 on the CPU, run again, on other streams and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from lance_kernels import ops
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.convolution_weight_grad import _weight_grad
from tests.ops.tensors import assert_near, dense, lay_out, orthonormal

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32, FP64) if torch.cuda.is_available() else (FP32,)  # the CPU has tests of its own
SQUARE = Geometry.of([1, 1], [1, 1], [1, 1], 1)
STRIDED = Geometry.of([2, 1], [1, 2], [1, 2], 1, "reflect")

pytestmark = pytest.mark.usefixtures("full_precision")


def factors_for(shape, ranks, device):
    made = [None if rank is None else orthonormal(size, rank, FP32) for size, rank in zip(shape, ranks)]
    return [None if factor is None else factor.bfloat16().float().to(device) for factor in made]


def on_cpu(factors):
    return [None if factor is None else factor.cpu() for factor in factors]


def core_of(shape, ranks, dtype, device):
    return torch.randn([rank or size for size, rank in zip(shape, ranks)]).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((3, 70, 90), (None, 5, 17)),
        ((5, 197, 192), (None, 16, 24)),
        ((2, 257, 512), (None, 64, 128)),
        ((4, 70, 90), (None, None, 7)),
        ((4, 70, 90), (2, 33, None)),
        ((4, 64, 28, 28), (None, 16, 6, 6)),
        ((2, 96, 14, 14), (None, 64, 4, 4)),
        ((2, 5, 6, 7, 8), (None, 2, 3, 2, 3)),
        ((2, 4, 130, 150), (None, 2, 6, 16)),
    ],
)
def test_projection(device, shape, ranks, layout, dtype):
    x, factors = lay_out(torch.randn(shape).to(device, dtype), layout), factors_for(shape, ranks, device)
    core = ops.tucker_project(x, factors)
    assert core.is_contiguous()
    assert_near(core.cpu(), dense(x.cpu(), on_cpu(factors)), factor=2)
    assert torch.equal(core, ops.tucker_project(x, factors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize(
    ("shape", "ranks", "outputs"),
    [
        ((3, 50, 40), (None, 5, 17), 70),
        ((5, 197, 192), (None, 16, 24), 768),
        ((4, 300, 96), (None, 64, 17), 130),
        ((3, 50, 40), (None, None, 17), 72),
        ((3, 50, 40), (2, 5, 17), 72),
        ((2, 3, 50, 40), (None, 2, 5, None), 72),
        ((50, 40), (None, 7), 33),
    ],
)
def test_linear_gradients(device, shape, ranks, outputs, layout, dtype):
    grad = lay_out(torch.randn(*shape[:-1], outputs).to(device, dtype), layout)
    core, factors = core_of(shape, ranks, dtype, device), factors_for(shape, ranks, device)
    weight_grad, bias_grad = torch.ops.lance.linear_weight_bias_grad(grad, core, factors)
    rows = dense(core.cpu(), on_cpu(factors), transpose=False).reshape(-1, shape[-1])
    flat = grad.cpu().double().reshape(-1, outputs)
    assert_near(weight_grad.cpu(), flat.mT @ rows, factor=2, terms=len(flat))
    assert_near(bias_grad.cpu(), flat.sum(0), factor=2, terms=len(flat))
    again = torch.ops.lance.linear_weight_bias_grad(grad, core, factors)
    assert torch.equal(weight_grad, again[0])
    assert torch.equal(bias_grad, again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "ranks", "weight", "geometry"),
    [
        ((3, 10, 9, 7), (None, 5, 3, 2), (20, 10, 3, 3), SQUARE),
        ((4, 32, 28, 28), (None, 16, 6, 6), (48, 32, 3, 3), SQUARE),
        ((4, 32, 7, 7), (None, 16, 3, 3), (48, 32, 3, 3), SQUARE),
        ((3, 10, 19, 21), (None, 5, 3, 2), (20, 10, 3, 2), STRIDED),
        ((3, 10, 19, 21), (2, 5, 3, 2), (20, 5, 3, 3), SQUARE._replace(groups=2)),
        ((3, 10, 19, 21), (None, 5, 3, 2), (10, 1, 3, 3), SQUARE._replace(groups=10)),
        ((3, 10, 19, 21), (None, None, None, 2), (20, 10, 3, 3), SQUARE),
    ],
)
def test_convolution_gradients(device, shape, ranks, weight, geometry, layout, dtype):
    grad = lay_out(torch.randn(output_size(shape, weight, geometry)).to(device, dtype), layout)
    core, factors = core_of(shape, ranks, dtype, device), factors_for(shape, ranks, device)
    result = ops.convolution_weight_grad(grad, core, factors, weight, *geometry)
    wide = [None if factor is None else factor.cpu().double() for factor in factors]
    expected = _weight_grad(grad.cpu().double(), core.cpu().double(), wide, list(weight), geometry)
    assert_near(result.cpu(), expected, factor=4, terms=grad[:, 0].numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(3, 70, 90), (4, 66, 20, 22), (1, 5), (2, 3, 4, 5, 130), (64, 200, 30)])
def test_mode_grams(device, shape, layout, dtype):
    x = lay_out(torch.randn(shape).to(device, dtype), layout)
    modes = list(range(len(shape)))
    before = [torch.randn(size, size, dtype=FP64 if dtype == FP64 else FP32, device=device) for size in shape]
    grams = [gram.clone() for gram in before]
    ops.mode_grams_(grams, x, modes)
    for gram, start, mode in zip(grams, before, modes):
        unfolded = x.cpu().double().movedim(mode, 0).reshape(shape[mode], -1)
        expected = start.cpu().double() + unfolded @ unfolded.mT
        assert_near(gram.cpu(), expected, factor=10, terms=x.numel())
        added = gram - start
        assert (added - added.mT).abs().max() <= 1e-3 * gram.abs().max()
    again = [gram.clone() for gram in before]
    ops.mode_grams_(again, x, modes)
    assert all(torch.equal(one, other) for one, other in zip(grams, again))


def test_eigenvectors(device):
    gram = ops.mode_gram(torch.randn(4, 30, 20, device=device), 1)
    values, vectors = ops.gram_eigh(gram)
    assert values.device.type == vectors.device.type == device
    assert_near((vectors @ values.diag() @ vectors.mT).cpu(), gram.cpu().double(), factor=100)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_packed_cores_have_the_bytes_of_the_cpu(device, bits, dtype):
    core = (torch.randn(33, 17) * torch.rand(33, 17) ** 10).to(dtype)
    packed = ops.pack_core(core.to(device), bits)
    assert torch.equal(packed.cpu(), ops.pack_core(core, bits))
    unpacked = ops.unpack_core(packed, [33, 17], bits, dtype)
    assert torch.equal(unpacked.cpu(), ops.unpack_core(packed.cpu(), [33, 17], bits, dtype))


def calls(device):
    """Every operator with a kernel of its own, once; functions of no arguments that return tensors."""
    shape, ranks = (4, 128, 96), (None, 16, 24)
    x, factors = torch.randn(shape, device=device, dtype=BF16), factors_for(shape, ranks, device)
    core, grad = core_of(shape, ranks, BF16, device), torch.randn(4, 128, 160, device=device, dtype=BF16)
    image_shape, image_ranks = (4, 32, 28, 28), (None, 16, 6, 6)
    image_core = core_of(image_shape, image_ranks, BF16, device)
    image_factors = factors_for(image_shape, image_ranks, device)
    image_grad = torch.randn(4, 48, 28, 28, device=device, dtype=BF16)

    def grams():
        gram = torch.zeros(96, 96, device=device)
        ops.mode_grams_([gram], x, [2])
        return gram

    return {
        "project": lambda: ops.tucker_project(x, factors),
        "linear": lambda: ops.linear_weight_grad(grad, core, factors),
        "convolution": lambda: ops.convolution_weight_grad(
            image_grad, image_core, image_factors, [48, 32, 3, 3], *SQUARE
        ),
        "grams": grams,
        "pack": lambda: ops.pack_core(core, 4),
        "relu": lambda: ops.relu(x),
    }


@pytest.mark.parametrize("name", ["project", "linear", "convolution", "grams", "pack", "relu"])
def test_other_streams_and_graphs_give_the_same(device, name):
    call = calls(device)[name]
    expected = call()
    if device == "cpu":
        assert torch.equal(call(), expected)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # what ran on another stream would be read too early
        result = call()
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(result, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("name", ["project", "linear", "convolution", "grams", "pack", "relu"])
def test_the_last_device_of_several(device, name):
    last = f"cuda:{torch.cuda.device_count() - 1}" if device == "cuda" else "cpu"
    result = calls(last)[name]()
    assert result.device == torch.device(last)
    assert result.isfinite().all()
