"""Data sets in their usual folders, from tiny ones made here."""

from __future__ import annotations

import gzip
import os
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from benchmarks.continual.projection import NullSpace
from benchmarks.continual.training import Run
from benchmarks.data import DataError, load
from benchmarks.folders import read_folder
from benchmarks.suites import continual

CLASSES = 4


def photograph(file: Path, value: int, size: tuple[int, int] = (40, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(file)


def cifar(folder: Path, hundred: bool, classes: int = CLASSES) -> None:
    folder.mkdir()
    files = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, file in enumerate(files):
        data = np.full((classes, 3072), number, dtype=np.uint8)
        data[:, 1024] = 100 + np.arange(classes)  # first pixel of the second channel
        key = b"fine_labels" if hundred else b"labels"
        (folder / file).write_bytes(pickle.dumps({b"data": data, key: list(range(classes))}))
    if hundred:
        (folder / "meta").write_bytes(pickle.dumps({}))


def pets(folder: Path) -> None:
    for name, numbers in (("trainval", (1, 2)), ("test", (3,))):
        lines = ["#Image CLASS-ID SPECIES BREED ID"]
        for label in range(CLASSES):
            for number in numbers:
                lines.append(f"breed{label}_{number} {label + 1} 1 1")
                photograph(folder / "images" / f"breed{label}_{number}.jpg", 60 * label)
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{name}.txt").write_text("\n".join(lines))


def flowers(folder: Path) -> None:
    for number in range(1, 3 * CLASSES + 1):
        photograph(folder / "jpg" / f"image_{number:05d}.jpg", 60 * ((number - 1) % CLASSES))
    savemat(folder / "imagelabels.mat", {"labels": [[(n % CLASSES) + 1 for n in range(3 * CLASSES)]]})
    groups = np.arange(1, 3 * CLASSES + 1).reshape(3, 1, CLASSES)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), groups)))


def birds(folder: Path) -> None:
    names = [f"{label:03d}.Bird/{kind}{label}.jpg" for label in range(CLASSES) for kind in "ab"]
    for index, name in enumerate(names):
        photograph(folder / "images" / name, 60 * (index // 2))
    columns = {
        "images.txt": names,
        "image_class_labels.txt": [index // 2 + 1 for index in range(len(names))],
        "train_test_split.txt": [1 - index % 2 for index in range(len(names))],
    }
    for file, values in columns.items():
        (folder / file).write_text("".join(f"{index + 1} {value}\n" for index, value in enumerate(values)))


PHOTOGRAPHS = {"Oxford-IIIT Pets": (pets, 2), "Flowers-102": (flowers, 2), "CUB-200-2011": (birds, 1)}


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar(tmp_path: Path, hundred: bool) -> None:
    cifar(tmp_path / "cifar", hundred)
    images = load(tmp_path)  # the folder that holds the data set's
    assert images.name == ("CIFAR-100" if hundred else "CIFAR-10")
    assert images.train.images.shape == ((1 if hundred else 5) * CLASSES, 3, 32, 32)
    assert images.test.labels.tolist() == list(range(CLASSES))
    assert images.train.images[2, 1, 0, 0].item() == pytest.approx(102 / 255)
    assert images.test.images[0, 0, 5, 5].item() == pytest.approx((1 if hundred else 5) / 255)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(tmp_path: Path, name: str) -> None:
    make, trained = PHOTOGRAPHS[name]
    make(tmp_path / "data")
    images = read_folder(tmp_path / "data", size=16)
    assert images.name == name
    assert images.classes == CLASSES
    assert images.train.images.shape == (trained * CLASSES, 3, 16, 16)
    assert images.test.images.shape == (CLASSES, 3, 16, 16)
    for split in (images.train, images.test):
        red = split.images[:, 0].mean((1, 2)) * 255
        assert torch.allclose(red, 60.0 * split.labels, atol=4)  # JPEG rounds
    first, second = images.halves()
    assert (first.classes, second.classes) == (2, 2)


def mini_imagenet(folder: Path, classes: int = CLASSES) -> None:
    for label in range(classes):
        part = ("train", "val", "test", "test")[label % 4]
        for number in range(6):
            photograph(folder / part / f"n{label:04d}" / f"{number}.jpg", 250 * label // classes)


def idx(file: Path, values: np.ndarray, packed: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    content = bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()
    target = file.with_name(f"{file.name}.gz") if packed else file
    target.write_bytes(gzip.compress(content) if packed else content)


def five(folder: Path) -> None:
    folder.mkdir()
    cifar(folder / "cifar10", False, classes=10)
    labels = np.arange(10)
    for kind in ("mnist", "fashionmnist"):
        for part in ("train", "t10k"):
            idx(folder / kind / f"{part}-images-idx3-ubyte", np.full((10, 28, 28), 50) + labels[:, None, None], True)
            idx(folder / kind / f"{part}-labels-idx1-ubyte", labels, False)
    (folder / "svhn").mkdir()
    for part in ("train", "test"):
        images = np.zeros((32, 32, 3, 10), dtype=np.uint8) + labels.astype(np.uint8)
        savemat(folder / "svhn" / f"{part}_32x32.mat", {"X": images, "y": np.where(labels == 0, 10, labels)[:, None]})
        part = part.capitalize()
        for letter in "ABCDEFGHIJ":
            photograph(folder / "notmnist" / part / letter / "one.png", 90, (28, 28))
        (folder / "notmnist" / part / "A" / "broken.png").write_bytes(b"no image")


def test_mini_imagenet_splits_every_class(tmp_path: Path) -> None:
    mini_imagenet(tmp_path / "mini")
    images = load(tmp_path)
    assert images.name == "MiniImageNet"
    assert images.train.images.shape == (5 * CLASSES, 3, 84, 84)
    assert images.test.labels.tolist() == [0, 1, 2, 3]  # of train, val, test, test
    red = images.test.images[:, 0].mean((1, 2)) * 255
    assert torch.allclose(red, torch.tensor([0.0, 62.0, 125.0, 187.0]), atol=4)


def test_five_data_sets_in_a_row(tmp_path: Path) -> None:
    five(tmp_path / "five")
    images = load(tmp_path / "five")
    assert (images.name, images.classes) == ("5-Datasets", 50)
    assert images.test.images.shape == (50, 3, 32, 32)
    assert images.test.labels.tolist() == list(range(50))
    assert len(images.train.labels) == 5 * 10 + 4 * 10  # CIFAR-10 has five batches
    mnist, svhn, letters = images.test.images[13], images.test.images[27], images.test.images[30]
    assert mnist[:, 16, 16].tolist() == pytest.approx([53 / 255] * 3)
    assert mnist[:, :2].abs().max() == 0
    assert svhn[0, 0, 0].item() == pytest.approx(7 / 255)
    assert letters[0, 16, 16].item() == pytest.approx(letters[1, 16, 16].item())
    (tmp_path / "five" / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x0b1234")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: 12 bytes, sizes \[11\]; expected an idx file"):
        load(tmp_path / "five")


@pytest.mark.parametrize("name", ["Split CIFAR-100", "Split MiniImageNet", "5-Datasets"])
def test_sequences_of_the_papers_train_on_their_folders(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    if name == "5-Datasets":
        five(folder)
    elif name == "Split MiniImageNet":
        mini_imagenet(folder, classes=20)
    else:
        cifar(folder, True, classes=20)
    experiment, images = continual.EXPERIMENTS[name], load(folder)
    experiment = replace(experiment, network=partial(experiment.network, width=4))
    assert images.name == experiment.data
    setting = continual.setting_of(experiment, images, 0, quick=True)
    assert setting.tasks.classes == (5 if name == "Split MiniImageNet" else 10)
    run = Run(setting, "ours", partial(NullSpace, energy=0.9, config=experiment.config))
    run.begin(0)
    start = [p.detach().clone() for p in run.model.parameters()]
    run.finish(0)
    run.begin(1)
    assert any(not torch.equal(now, then) for now, then in zip(run.model.parameters(), start))
    assert run.memory[0] > 0
    run.learner.close()


def test_unknown_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no known data set; expected .* CUB-200-2011: images, images.txt"):
        read_folder(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar", False)
    (tmp_path / "cifar" / "data_batch_3").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="data_batch_3: missing, damaged or no CIFAR file"):
        read_folder(tmp_path)
    pets(tmp_path / "pets")
    (tmp_path / "pets" / "images" / "breed1_2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"breed1_2.jpg: missing or not a readable image"):
        read_folder(tmp_path / "pets", size=16)


class Harmful:
    """Its pickle calls `os.mkdir` when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar", True)
    (tmp_path / "cifar" / "train").write_bytes(pickle.dumps(Harmful(tmp_path / "made")))
    with pytest.raises(DataError, match="mkdir, which no CIFAR file does"):
        read_folder(tmp_path)
    assert not (tmp_path / "made").exists()
