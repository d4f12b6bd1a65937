"""The suite `continual`: every method against a small case worked out independently."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, unfold

import lance_kernels as lance
from benchmarks import environment
from benchmarks.continual import metrics, projection
from benchmarks.continual.methods import ElasticWeights, Joint, Learner, Replay, fisher_diagonal
from benchmarks.continual.networks import MultiHead, alexnet_like, convolutional, perceptron, reduced_resnet18
from benchmarks.continual.tasks import Task, permuted, sample, split_classes, subset
from benchmarks.continual.training import Run, Setting
from benchmarks.data import Images, Split
from benchmarks.finetune import Recipe
from benchmarks.registry import Context
from benchmarks.suites import continual, continual_tables


@pytest.fixture
def images() -> Images:
    labels = torch.arange(96) % 4
    pixels = torch.rand(96, 1, 8, 8) + labels.view(-1, 1, 1, 1) / 4
    return Images("made", Split(pixels, labels), Split(pixels[:32], labels[:32]), 4)


def network(images: Images, heads: int = 2) -> MultiHead:
    return convolutional(images.train.images.shape[1:], 2, heads, (4, 6), 8)


def sgd(model: torch.nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), rate)


def test_split_classes_covers_every_image_once(images: Images) -> None:
    tasks = split_classes("made", images, 2, seed=3)
    assert [len(task.train.labels) for task in tasks] == [48, 48]
    assert all(sorted(task.train.labels.unique().tolist()) == [0, 1] for task in tasks)
    together, owners = tasks.all_at_once()
    assert owners.tolist() == [0] * 48 + [1] * 48
    assert together.images.mean().abs() < 1e-5
    with pytest.raises(ValueError, match="classes is 3; expected a divisor of 4"):
        split_classes("made", images, 3, seed=0)


def test_permutations_keep_pixels_and_the_first_keeps_their_places(images: Images) -> None:
    tasks = permuted("made", images, 3, seed=0)
    first, second = tasks[0].train.images, tasks[1].train.images
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sort(1).values, second.flatten(1).sort(1).values)
    assert torch.equal(split_classes("made", images, 4, 0)[0].train.images.sum(), first.sum())
    assert not tasks.own_heads
    assert len(subset(images, 2, 1).train.labels) == 8


def test_metrics_by_hand() -> None:
    matrix = [[90.0, 50.0, 40.0], [80.0, 70.0, 60.0], [60.0, 65.0, 75.0]]
    assert metrics.average_accuracy(matrix) == pytest.approx(200 / 3)
    assert metrics.backward_transfer(matrix) == pytest.approx((-30 - 5) / 2)
    assert metrics.forward_transfer(matrix, [50.0, 45.0, 50.0]) == pytest.approx((5 + 10) / 2)
    assert metrics.new_task_accuracy(matrix) == pytest.approx(72.5)


def test_fisher_information_of_a_softmax_regression() -> None:
    x = torch.randn(5, 1, 2, 2)
    model = perceptron(x.shape[1:], 3, 1, widths=())
    with torch.no_grad():
        p = (x.flatten(1) @ model.heads[0].weight.mT).softmax(1)
    # E_y (1[y = i] - p_i)^2 x_j^2 = p_i (1 - p_i) x_j^2
    expected = torch.einsum("ni,nj->ij", p * (1 - p), x.flatten(1).square()) / 5
    torch.testing.assert_close(fisher_diagonal(model, x)["heads.0.weight"], expected)


def test_elastic_weights_add_the_gradient_of_the_summed_penalties(images: Images) -> None:
    model = network(images)
    learner = ElasticWeights(model, sgd(model), 0, strength=7.0, samples=16)
    task = Task("t", images.train, images.test)
    loader = [(images.train.images[:16], images.train.labels[:16] % 2)]
    anchors = []
    for index in range(2):
        model.select(index)
        fisher = fisher_diagonal(model, loader[0][0])
        anchors.append((fisher, {n: p.detach().clone() for n, p in model.named_parameters()}))
        learner.end_task(index, task, loader)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
    model.select(1)
    learner.loss(*loader[0]).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    learner.after_backward()
    penalty = sum(
        3.5 * (fisher[name] * (parameter - values[name]).square()).sum()
        for fisher, values in anchors
        for name, parameter in model.named_parameters()
        if name in fisher
    )
    names, parameters = zip(*model.named_parameters())
    wanted = dict(zip(names, torch.autograd.grad(penalty, parameters, allow_unused=True)))
    for name, gradient in plain.items():
        added = wanted[name] if wanted[name] is not None else torch.zeros_like(gradient)
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient + added)
    assert learner.memory_bytes() == sum(2 * p.nbytes for p in model.parameters())


def test_replay_is_the_mean_over_both_batches(images: Images) -> None:
    model = network(images)
    learner = Replay(model, sgd(model), 0, kept=1)
    x, y = images.train.images[:4], images.train.labels[:4] % 2
    assert torch.equal(learner.loss(x, y), cross_entropy(model(x), y))
    learner.end_task(0, Task("t", Split(x[:1], y[:1]), Split(x, y)), [])
    model.select(1)
    new, old = cross_entropy(model(x), y), cross_entropy(model.heads[0](model.body(x[:1])), y[:1])
    torch.testing.assert_close(learner.loss(x, y), (new + old) / 2)
    assert learner.memory_bytes() == x[0].nbytes + 2


def test_joint_uses_every_images_own_head(images: Images) -> None:
    model = network(images)
    x, y, t = images.train.images[:2], torch.tensor([0, 1]), torch.tensor([1, 0])
    own = torch.stack([model.heads[1](model.body(x[:1]))[0], model.heads[0](model.body(x[1:]))[0]])
    torch.testing.assert_close(Joint(model, sgd(model), 0).joint_loss(x, y, t), cross_entropy(own, y))


def test_gpm_bases_are_those_of_the_representation_matrix(images: Images) -> None:
    model = network(images)
    learner = projection.GradientProjection(model, sgd(model), 0, energy=0.9)
    layer = model.body[3]
    representations = []
    for index in range(2):
        loader = sample(images.train, 16, 2, index)
        x = torch.cat([model.body[:3](images) for images, _ in loader]).detach()
        representations.append(unfold(x, 3, padding=1).transpose(0, 1).flatten(1).double().numpy())
        learner.end_task(index, Task("t", images.train, images.test), loader)
    # Saha et al., equations 5, 8 and 9, by singular values.
    left, values, _ = np.linalg.svd(representations[0], full_matrices=False)
    share = (values**2).cumsum() / (values**2).sum()
    basis = left[:, : int((share < 0.9).sum()) + 1]
    rest = representations[1] - basis @ (basis.T @ representations[1])
    left, values, _ = np.linalg.svd(rest, full_matrices=False)
    total = (representations[1] ** 2).sum()
    share = (total - (rest**2).sum() + np.concatenate([[0.0], (values**2).cumsum()])) / total
    basis = np.concatenate([basis, left[:, : int((share < 0.9).sum())]], axis=1)
    found = learner.bases["body.3"].double().numpy()
    assert found.shape == basis.shape
    np.testing.assert_allclose(found @ found.T, basis @ basis.T, atol=1e-5)
    learner.begin_task(2, [])
    model(images.train.images[:8]).sum().backward()
    gradient = layer.weight.grad.flatten(1).double().numpy().copy()
    learner.after_backward()
    projected = gradient - gradient @ basis @ basis.T
    np.testing.assert_allclose(layer.weight.grad.flatten(1).numpy(), projected, atol=1e-5)


def test_published_weight_gradient_is_that_of_the_projected_patches(images: Images) -> None:
    model = network(images)
    learner = projection.PublishedLance(model, sgd(model), 0, energy=0.9, mode_energy=0.95)
    loader = sample(images.train, 16, 2, 0)
    task = Task("t", images.train, images.test)
    x, labels = loader[0]
    learner.begin_task(0, loader)
    dense = network(images)
    dense.load_state_dict(model.state_dict())
    for one in (model, dense):
        cross_entropy(one(x), labels % 2).backward()
    torch.testing.assert_close(model.body[3].weight.grad, dense.body[3].weight.grad)
    learner.end_task(0, task, loader)
    learner.begin_task(1, loader)
    inputs = dense.body[:3](x).detach()
    output = dense.body[3](inputs).detach().requires_grad_()
    cross_entropy(dense.heads[0](dense.body[4:](output)), labels % 2).backward()
    patches = unfold(inputs, 3, padding=1)
    for mode, factor in enumerate(learner.cores["body.3"].factors):
        patches = torch.tensordot(factor @ factor.mT, patches, dims=([1], [mode])).movedim(0, mode)
    expected = torch.einsum("bol,bnl->on", output.grad.flatten(2), patches)
    model.zero_grad()
    cross_entropy(model(x), labels % 2).backward()
    torch.testing.assert_close(model.body[3].weight.grad.flatten(1), expected, rtol=1e-4, atol=1e-6)
    leak = model.body[3].weight.grad.flatten(1) @ learner.bases["body.3"]
    assert leak.norm() < 1e-5 * model.body[3].weight.grad.norm()


def test_ours_keeps_old_directions_while_it_trains(images: Images) -> None:
    tasks = split_classes("made", images, 2, 0)
    setting = Setting(tasks, partial(network, images), Recipe(1, 16, 0.1, 0.9, 0.0), 0, 2)
    run = Run(setting, "ours", partial(projection.NullSpace, energy=0.9, config=lance.LanceConfig(energy=0.99)))
    run.until_last()
    learner = run.learner.learner
    start = {name: p.layer.weight.detach().clone() for name, p in learner._protected.items()}
    kept = {name: p.basis.dense().float() for name, p in learner._protected.items()}
    run.finish(1)
    for name, weight in start.items():
        moved = (run.model.get_submodule(name).weight.detach() - weight).flatten(1)
        assert (moved @ kept[name]).norm() < 1e-6 * weight.norm()
        assert moved.norm() > 1e-3 * weight.norm()
    assert len(run.matrix) == len(run.memory) == len(run.held) == 2
    assert run.memory[-1] == learner.memory().stored
    run.learner.close()


def test_equal_seeds_give_equal_runs_and_timing_leaves_no_trace(images: Images) -> None:
    tasks = split_classes("made", images, 2, 0)
    setting = Setting(tasks, partial(network, images), Recipe(1, 16, 0.1, 0.9, 0.0), 0, 2)
    found = []
    for timed in (False, True):
        run = Run(setting, "plain", Learner)
        run.until_last()
        if timed:
            continual.step_times({"plain": run}, Context("continual", "x", environment.current(), quick=True))
        run.finish(1)
        found.append((run.matrix, run.model.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1].values(), found[1][1].values()))


@pytest.mark.parametrize(
    ("make", "size", "features"), [(alexnet_like, 32, 2048), (reduced_resnet18, 32, 640), (reduced_resnet18, 84, 1440)]
)
def test_networks_of_the_papers_have_their_sizes(make: object, size: int, features: int) -> None:
    model = make(torch.Size([3, size, size]), 5, 2).eval()
    assert model.heads[0].in_features == features
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 5)
    assert not any(layer.bias is not None for layer in model.protected_layers().values())


def test_the_case_on_digits_and_its_tables(tmp_path: Path) -> None:
    context = Context("continual", "split digits: seed 0", environment.current(), quick=True)
    rows = continual.accuracy_case("split digits", 0, context)
    found = {(row.method, row.quantity): row for row in rows}
    ours, gpm = (continual_tables.at_energy(name, 0.97) for name in (continual_tables.OURS, continual_tables.GPM))
    assert found[ours, "held bytes"].ratio_median < 0.2
    assert found[gpm, "held bytes"].ratio_median == pytest.approx(1)
    assert found[ours, "step time"].baseline == gpm
    assert len(found["plain", "average accuracy"].details["matrix"]) == 3
    text = "\n".join(table.markdown() for table in continual_tables.tables(rows))
    assert "what was to be shown" in text
    assert "one seed" in text
    continual_tables.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "matrices.png").exists()
    assert continual.accuracy_case("Split CIFAR-10", 0, context) == []
