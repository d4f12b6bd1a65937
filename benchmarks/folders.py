"""Image data sets in their usual folders, for fine-tuning and for sequences of tasks.

CIFAR-10, CIFAR-100, Oxford-IIIT Pets, Flowers-102, CUB-200-2011, MiniImageNet, and those of the 5-Datasets sequence
(CIFAR-10, MNIST, SVHN, notMNIST, FashionMNIST) beside each other. A folder is told by what lies in it, so that
`--data PATH` is all a person who has the data has to say.
"""

from __future__ import annotations

import gzip
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
        size: height and width that photographs are scaled and cropped to; the others have their own.

    Raises:
        DataError: the folder is none of those known, or a file is missing or damaged.
    """
    for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        for name, marks, read in READERS:
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


def _mini_imagenet(name: str, folder: Path, size: int) -> Images:
    """A folder a class in `train`, `val` and `test`, no class in two of them: five sixths of each class are trained."""
    classes = [child for part in ("train", "val", "test") for child in _folders(folder / part)]
    train: list[Entry] = []
    test: list[Entry] = []
    for label, one in enumerate(classes):
        files = _files(one)
        kept = len(files) - len(files) // 6
        train += [(file, label) for file in files[:kept]]
        test += [(file, label) for file in files[kept:]]
    return _images(name, folder, _photographs(train, 84, f"{name} train"), _photographs(test, 84, f"{name} test"))


FIVE = ("cifar10", "mnist", "svhn", "notmnist", "fashionmnist")


def _five(name: str, folder: Path, size: int) -> Images:
    """Ten classes of each data set, one set after the other, all images (3, 32, 32)."""
    parts = [_of_five(kind, folder / kind) for kind in FIVE]
    train, test = (
        Split(
            torch.cat([_colours_of_32(part[which].images) for part in parts]),
            torch.cat([part[which].labels + 10 * place for place, part in enumerate(parts)]),
        )
        for which in (0, 1)
    )
    return _images(name, folder, train, test)


def _of_five(kind: str, folder: Path) -> tuple[Split, Split]:
    if kind == "cifar10":
        found = _cifar("CIFAR-10", folder, SIZE)
        train, test = found.train, found.test
    elif kind == "svhn":
        train, test = (_svhn(folder / f"{part}_32x32.mat") for part in ("train", "test"))
    elif kind == "notmnist":
        train, test = (_letters(folder / part) for part in ("Train", "Test"))
    else:
        train, test = (_idx(folder, part) for part in ("train", "t10k"))
    for split in (train, test):
        if not len(split.labels) or int(split.labels.min()) < 0 or int(split.labels.max()) > 9:
            raise DataError(f"{folder}: {len(split.labels)} images of a split; expected some, labels 0 to 9")
    return train, test


def _idx(folder: Path, part: str) -> Split:
    """MNIST's format: four bytes of kind and dimensions, the sizes, the values; plain or gzipped."""
    images, labels = (_idx_array(folder, f"{part}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: {part} images are {images.shape}, labels {labels.shape}; expected (N, H, W) and (N,)"
        )
    return Split(torch.tensor(images)[:, None].float() / 255, torch.tensor(labels.astype(np.int64)))


def _idx_array(folder: Path, name: str) -> np.ndarray:
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{plain}: missing or damaged ({error})") from error
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(content[4 + 4 * n : 8 + 4 * n], "big") for n in range(dimensions)]
    values = content[4 + 4 * dimensions :]
    if not shape or len(values) != np.prod(shape):
        raise DataError(f"{plain}: {len(content)} bytes, sizes {shape}; expected an idx file of bytes")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _svhn(file: Path) -> Split:
    from scipy.io import loadmat

    try:
        content = loadmat(file)
        images, labels = content["X"], content["y"].ravel().astype(np.int64) % 10  # zero is class 10
    except (OSError, KeyError, ValueError, NotImplementedError) as error:
        raise DataError(f"{file}: missing, damaged or no SVHN file ({error})") from error
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.shape[3] != len(labels):
        raise DataError(f"{file}: X is {images.shape} with {len(labels)} labels; expected (32, 32, 3, N) and N")
    return Split(torch.tensor(images).permute(3, 2, 0, 1).float() / 255, torch.tensor(labels))


def _letters(folder: Path) -> Split:
    """A folder a letter; files that are no images, of which the set has a few, are left out."""
    from PIL import Image

    images, labels = [], []
    for label, one in enumerate(_folders(folder)):
        for file in _files(one):
            try:
                with Image.open(file) as image:
                    images.append(np.array(image.convert("L").resize((28, 28))))
            except (OSError, SyntaxError, ValueError):
                continue
            labels.append(label)
    stacked = torch.tensor(np.array(images)).view(-1, 1, 28, 28)
    return Split(stacked.float() / 255, torch.tensor(labels, dtype=torch.int64))


def _colours_of_32(images: torch.Tensor) -> torch.Tensor:
    margin = (32 - images.shape[3]) // 2
    return torch.nn.functional.pad(images, [margin] * 4).expand(-1, 3, -1, -1)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: missing or not a folder ({error})") from error


def _files(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_file())


READERS: tuple[tuple[str, tuple[str, ...], Callable[[str, Path, int], Images]], ...] = (
    ("CIFAR-10", ("data_batch_1", "test_batch"), _cifar),
    ("CIFAR-100", ("train", "test", "meta"), _cifar),
    ("Oxford-IIIT Pets", ("images", "annotations/trainval.txt", "annotations/test.txt"), _pets),
    ("Flowers-102", ("jpg", "imagelabels.mat", "setid.mat"), _flowers),
    ("CUB-200-2011", ("images", "images.txt", "image_class_labels.txt", "train_test_split.txt"), _birds),
    ("MiniImageNet", ("train", "val", "test"), _mini_imagenet),
    ("5-Datasets", FIVE, _five),
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
