"""Data sets in their usual folders, from tiny ones made here."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from benchmarks.data import DataError, load
from benchmarks.folders import read_folder

CLASSES = 4


def photograph(file: Path, value: int, size: tuple[int, int] = (40, 30)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(file)


def cifar(folder: Path, hundred: bool) -> None:
    folder.mkdir()
    files = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, file in enumerate(files):
        data = np.full((CLASSES, 3072), number, dtype=np.uint8)
        data[:, 1024] = 100 + np.arange(CLASSES)  # first pixel of the second channel
        key = b"fine_labels" if hundred else b"labels"
        (folder / file).write_bytes(pickle.dumps({b"data": data, key: list(range(CLASSES))}))
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
