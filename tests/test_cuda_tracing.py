"""Operators on CUDA tensors that are not there: shapes, devices and graphs, traced on any machine."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lance_kernels import ops


@pytest.fixture
def mode():
    with FakeTensorMode() as fake:
        yield fake


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, device="cuda", dtype=dtype)


def is_on_gpu(tensor, *shape):
    return tensor.device.type == "cuda" and tensor.shape == shape


def test_linear(mode):
    x, weight, bias = on_gpu(4, 16, 32), on_gpu(8, 32), on_gpu(8)
    factors = [None, on_gpu(16, 3), on_gpu(32, 5)]
    y, core = ops.linear(x, weight, bias, factors)
    assert is_on_gpu(y, 4, 16, 8)
    assert is_on_gpu(core, 4, 3, 5)
    assert is_on_gpu(ops.linear_weight_grad(y, core, factors), 8, 32)
    weight_grad, bias_grad = torch.ops.lance.linear_weight_bias_grad(y, core, factors)
    assert is_on_gpu(weight_grad, 8, 32)
    assert is_on_gpu(bias_grad, 8)


def test_convolution(mode):
    x, weight = on_gpu(2, 8, 9, 9, dtype=torch.bfloat16), on_gpu(4, 8, 3, 3, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    factors = [None, on_gpu(8, 2), on_gpu(9, 2), on_gpu(9, 3)]
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    y, packed = ops.convolution(x, weight, None, *geometry, factors, 4)
    assert is_on_gpu(y, 2, 4, 9, 9)
    assert y.stride() == torch.convolution(x, weight, None, *geometry[:3], False, [0, 0], 1).stride()
    core = ops.unpack_core(packed, [2, 2, 2, 3], 4, torch.bfloat16)
    assert is_on_gpu(ops.convolution_weight_grad(y, core, factors, [4, 8, 3, 3], *geometry), 4, 8, 3, 3)


def test_calibration_stays_on_the_device(mode):
    grams = [on_gpu(8, 8), on_gpu(9, 9)]
    ops.mode_grams_(grams, on_gpu(2, 8, 9), [1, 2])
    values, vectors = ops.gram_eigh(grams[0])
    assert is_on_gpu(values, 8)
    assert is_on_gpu(vectors, 8, 8)


def test_a_graph_shows_the_product_and_keeps_the_rest_apart(mode):
    def step(x, weight, token, feature):
        factors = [None, token, feature]
        y, core = ops.linear(x, weight, None, factors)
        return y.relu(), ops.linear_weight_grad(y, core, factors)

    graph = make_fx(step)(on_gpu(4, 16, 32), on_gpu(8, 32), on_gpu(16, 3), on_gpu(32, 5))
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "aten.mm.default" in called
    assert called.count("lance.tucker_project.default") == 1
    assert called.count("lance.linear_weight_grad.default") == 1
    assert "lance.linear.default" not in called


@torch.no_grad()
def test_dynamo_traces_a_layer_in_one_graph(mode):
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    factors, weight = [None, on_gpu(16, 3), on_gpu(32, 5)], on_gpu(8, 32)
    compiled = torch.compile(lambda x: ops.linear(x, weight, None, factors)[0].relu(), backend=backend, fullgraph=True)
    assert is_on_gpu(compiled(on_gpu(4, 16, 32)), 4, 16, 8)
    assert len(seen) == 1
    assert any("lance.linear" in target for target in seen[0])
