"""Image data sets in their usual folders: CIFAR-10, CIFAR-100, Oxford-IIIT Pets, Flowers-102 and CUB-200-2011.

A folder is told by what lies in it, so that `--data PATH` is all a person who has the data has to say.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.data import DataError, Images, Split

SIZE = 128
Entry = tuple[Path, int]


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and arrays, and runs nothing else that a file may ask for."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which no CIFAR file does")
        return super().find_class(module, name)


def read_folder(path: Path, size: int = SIZE) -> Images:
    """Reads a data set from its folder, or from the folder that holds it.

    Args:
        path: the folder.
        size: height and width that photographs are scaled and cropped to; CIFAR keeps its own.

    Raises:
        DataError: the folder is none of the five, or a file is missing or damaged.
    """
    for name, marks, read in READERS:
        for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
            if all((folder / mark).exists() for mark in marks):
                return read(name, folder, size)
    expected = "; ".join(f"{name}: {', '.join(marks)}" for name, marks, _ in READERS)
    raise DataError(f"{path}: no known data set; expected a folder with the files of one of {expected}")


def _cifar(name: str, folder: Path, size: int) -> Images:
    ten = name == "CIFAR-10"
    trained = [f"data_batch_{index}" for index in range(1, 6)] if ten else ["train"]
    tested = ["test_batch"] if ten else ["test"]
    key = b"labels" if ten else b"fine_labels"
    train, test = (_cifar_split([folder / file for file in files], key) for files in (trained, tested))
    return _images(name, folder, train, test)


def _cifar_split(files: Sequence[Path], key: bytes) -> Split:
    rows, labels = [], []
    for file in files:
        try:
            content = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
            data, found = np.asarray(content[b"data"]), list(content[key])
        except (OSError, pickle.UnpicklingError, KeyError, TypeError, EOFError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: missing, damaged or no CIFAR file ({error})") from error
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or len(data) != len(found):
            raise DataError(
                f"{file}: data is {data.dtype} of shape {data.shape} with {len(found)} labels; expected uint8 of "
                "(N, 3072) and N labels"
            )
        rows.append(data)
        labels += found
    images = torch.tensor(np.concatenate(rows)).view(-1, 3, 32, 32).float() / 255
    return Split(images, torch.tensor(labels))


def _pets(name: str, folder: Path, size: int) -> Images:
    def split(file: str) -> Split:
        lines = [line.split() for line in _lines(folder / "annotations" / file) if not line.startswith("#")]
        return _photographs(
            [(folder / "images" / f"{line[0]}.jpg", int(line[1]) - 1) for line in lines], size, f"{name} {file}"
        )

    return _images(name, folder, split("trainval.txt"), split("test.txt"))


def _flowers(name: str, folder: Path, size: int) -> Images:
    from scipy.io import loadmat

    try:
        labels = loadmat(folder / "imagelabels.mat")["labels"].ravel().astype(int) - 1
        chosen = {key: loadmat(folder / "setid.mat")[key].ravel().astype(int) for key in ("trnid", "valid", "tstid")}
    except (OSError, KeyError, ValueError, NotImplementedError) as error:
        raise DataError(f"{folder}: imagelabels.mat or setid.mat is missing or damaged ({error})") from error

    def split(*keys: str) -> Split:
        numbers = [number for key in keys for number in chosen[key]]
        if numbers and max(numbers) > len(labels):
            raise DataError(f"{folder}: setid.mat names image {max(numbers)}; imagelabels.mat has {len(labels)}")
        entries = [(folder / "jpg" / f"image_{number:05d}.jpg", int(labels[number - 1])) for number in numbers]
        return _photographs(entries, size, f"{name} {keys[0]}")

    return _images(name, folder, split("trnid", "valid"), split("tstid"))


def _birds(name: str, folder: Path, size: int) -> Images:
    def column(file: str) -> dict[str, str]:
        return dict(line.split() for line in _lines(folder / file))

    paths, labels, trained = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    try:
        entries = {key: (folder / "images" / paths[key], int(labels[key]) - 1) for key in paths}
        train, test = (
            _photographs([entry for key, entry in entries.items() if trained[key] == flag], size, f"{name} {what}")
            for flag, what in (("1", "train"), ("0", "test"))
        )
    except KeyError as error:
        raise DataError(f"{folder}: image {error} has no class or no split") from error
    return _images(name, folder, train, test)


READERS: tuple[tuple[str, tuple[str, ...], Callable[[str, Path, int], Images]], ...] = (
    ("CIFAR-10", ("data_batch_1", "test_batch"), _cifar),
    ("CIFAR-100", ("train", "test", "meta"), _cifar),
    ("Oxford-IIIT Pets", ("images", "annotations/trainval.txt", "annotations/test.txt"), _pets),
    ("Flowers-102", ("jpg", "imagelabels.mat", "setid.mat"), _flowers),
    ("CUB-200-2011", ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt"), _birds),
)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not readable ({error})") from error


def _photographs(entries: Sequence[Entry], size: int, title: str) -> Split:
    """Images whose shorter side is scaled to `size`, cut square about the middle."""
    from PIL import Image, ImageOps

    found = torch.empty(len(entries), 3, size, size)
    for index, (file, _) in enumerate(tqdm(entries, desc=f"read {title}", unit="image", leave=False)):
        try:
            with Image.open(file) as image:
                square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{file}: missing or not a readable image ({error})") from error
        found[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    return Split(found, torch.tensor([label for _, label in entries], dtype=torch.int64))


def _images(name: str, folder: Path, train: Split, test: Split) -> Images:
    if not len(train.labels) or not len(test.labels):
        raise DataError(f"{folder}: {len(train.labels)} training and {len(test.labels)} test images; expected some")
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    if classes < 4 or int(min(train.labels.min(), test.labels.min())) < 0:
        raise DataError(f"{folder}: labels give {classes} classes; expected at least 4, none below the first")
    return Images(name, train, test, classes)
