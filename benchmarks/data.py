"""Images for the fine-tuning benchmarks: scikit-learn's digits, or an npz file of CIFAR-10 JPEGs or MNIST arrays."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm import tqdm

JPEG_KEYS = tuple(f"{split}_{part}" for split in ("train", "test") for part in ("bytes", "ends", "labels"))
ARRAY_KEYS = tuple(f"{split}_{part}" for split in ("train", "test") for part in ("images", "labels"))


Decoder = Callable[[Path, str, dict[str, np.ndarray], str], torch.Tensor]


class DataError(Exception):
    """A data file is missing, damaged or of another format; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Split:
    """Images and labels.

    Attributes:
        images: `(N, C, H, W)`, float32 in 0 to 1.
        labels: `(N,)`, int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def of_classes(self, classes: range) -> Split:
        """The images of consecutive classes, relabelled from zero."""
        chosen = (self.labels >= classes.start) & (self.labels < classes.stop)
        return Split(self.images[chosen], self.labels[chosen] - classes.start)


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        name: its name in tables.
        train: training split.
        test: test split.
        classes: number of classes.
    """

    name: str
    train: Split
    test: Split
    classes: int

    def to(self, device: str) -> Images:
        """The same on another device."""
        train, test = (Split(part.images.to(device), part.labels.to(device)) for part in (self.train, self.test))
        return Images(self.name, train, test, self.classes)

    def halves(self) -> tuple[Images, Images]:
        """The first half of the classes and the rest, scaled by mean and deviation of the first's training images."""
        first, second = range(self.classes // 2), range(self.classes // 2, self.classes)
        reference = self.train.of_classes(first).images
        mean = reference.mean((0, 2, 3), keepdim=True)
        deviation = reference.std((0, 2, 3), keepdim=True).clamp_min(1e-6)

        def scaled(split: Split, classes: range) -> Split:
            part = split.of_classes(classes)
            return Split((part.images - mean) / deviation, part.labels)

        one, two = (
            Images(self.name, scaled(self.train, half), scaled(self.test, half), len(half)) for half in (first, second)
        )
        return one, two


def load(path: Path | None) -> Images:
    """Reads a data set.

    Args:
        path: an npz file, CIFAR-10 as JPEG bytes or MNIST as arrays, told apart by its keys; or a folder that
            `benchmarks.folders` knows; None for scikit-learn's digits.

    Raises:
        DataError: the file cannot be used.
    """
    if path is not None and path.is_dir():
        from benchmarks.folders import read_folder

        return read_folder(path)
    return digits() if path is None else read_archive(path)


def digits() -> Images:
    """Scikit-learn's 1,797 digits, upscaled from 8x8 to 16x16, a quarter of each class for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = interpolate(
        torch.tensor(data.images, dtype=torch.float32)[:, None] / 16,
        scale_factor=2,
        mode="bilinear",
        align_corners=False,
    )
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=data.target, random_state=0)
    return Images("digits", Split(images[train], labels[train]), Split(images[test], labels[test]), 10)


def read_archive(path: Path) -> Images:
    """Reads an npz file of JPEG images or of image arrays.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: holds a single array; expected an npz file")
        with archive:
            keys = set(archive.files)
            if keys.issuperset(JPEG_KEYS):
                arrays = {key: archive[key] for key in JPEG_KEYS}
                name, decode = "CIFAR-10", _decode_jpegs
            elif keys.issuperset(ARRAY_KEYS):
                arrays = {key: archive[key] for key in ARRAY_KEYS}
                name, decode = "MNIST", _scale_arrays
            else:
                raise DataError(
                    f"{path}: has the keys {sorted(keys)}; expected {sorted(JPEG_KEYS)} or {sorted(ARRAY_KEYS)}"
                )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DataError(f"{path}: damaged or not an npz file ({error})") from error
    train, test = (_split(path, name, arrays, split, decode) for split in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{path}: training images are {tuple(train.images.shape[1:])}, test images {tuple(test.images.shape[1:])}"
        )
    classes = int(train.labels.max()) + 1
    if classes < 4 or int(test.labels.max()) >= classes:
        raise DataError(
            f"{path}: has {classes} training classes and test labels up to {int(test.labels.max())}; expected at least "
            "4 classes, the same in both splits"
        )
    return Images(name, train, test, classes)


def _split(path: Path, name: str, arrays: dict[str, np.ndarray], split: str, decode: Decoder) -> Split:
    labels = arrays[f"{split}_labels"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) == 0:
        raise DataError(
            f"{path}: {split}_labels is {labels.dtype} of shape {labels.shape}; expected integers, one an image"
        )
    images = decode(path, name, arrays, split)
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} {split} images, {len(labels)} labels")
    return Split(images, torch.tensor(labels.astype(np.int64)))


def _scale_arrays(path: Path, name: str, arrays: dict[str, np.ndarray], split: str) -> torch.Tensor:
    images = arrays[f"{split}_images"]
    if images.ndim != 3 or images.dtype != np.uint8:
        raise DataError(
            f"{path}: {split}_images is {images.dtype} of shape {images.shape}; expected uint8 of (N, H, W)"
        )
    return torch.tensor(images)[:, None].float() / 255


def _decode_jpegs(path: Path, name: str, arrays: dict[str, np.ndarray], split: str) -> torch.Tensor:
    from PIL import Image

    content, ends = arrays[f"{split}_bytes"], arrays[f"{split}_ends"]
    if content.dtype != np.uint8 or content.ndim != 1 or ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer):
        raise DataError(
            f"{path}: {split}_bytes and {split}_ends are {content.dtype} of shape {content.shape} and {ends.dtype} of "
            f"shape {ends.shape}; expected uint8 and integers, both flat"
        )
    if len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != len(content):
        raise DataError(f"{path}: {split}_ends does not divide the {len(content)} bytes of {split}_bytes into images")
    images, start = [], 0
    for index, end in enumerate(tqdm(ends.tolist(), desc=f"decode {name} {split}", unit="image", leave=False)):
        try:
            with Image.open(io.BytesIO(content[start:end].tobytes()), formats=["JPEG"]) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: {split} image {index} is not a readable JPEG ({error})") from error
        if images[-1].shape != images[0].shape:
            raise DataError(f"{path}: {split} image {index} is {images[-1].shape}, the first is {images[0].shape}")
        start = end
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float().contiguous() / 255
