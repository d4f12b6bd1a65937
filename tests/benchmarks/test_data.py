"""Data files: the two formats, and what is said about a missing, damaged or foreign file."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import DataError, digits, load

CLASSES, TRAIN, TEST = 6, 24, 12


def jpeg_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        files = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), dtype=np.uint8).copy()
        arrays[f"{split}_ends"] = np.cumsum([len(file) for file in files])
        arrays[f"{split}_labels"] = (np.arange(count) % CLASSES).astype(np.uint8)
    return arrays


def image_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        f"{split}_{part}": value
        for split, count in (("train", TRAIN), ("test", TEST))
        for part, value in (
            ("images", generator.integers(0, 256, (count, 12, 12), dtype=np.uint8)),
            ("labels", (np.arange(count) % CLASSES).astype(np.uint8)),
        )
    }


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    path = tmp_path / "jpegs.npz"
    np.savez(path, **jpeg_arrays())
    return path


def test_digits_are_upscaled_and_split() -> None:
    images = digits()
    assert images.train.images.shape[1:] == (1, 16, 16)
    assert len(images.train.labels) + len(images.test.labels) == 1797
    assert images.classes == 10
    assert 0 <= float(images.train.images.min()) <= float(images.train.images.max()) <= 1


def test_halves_share_no_class_and_are_scaled_alike() -> None:
    first, second = digits().halves()
    assert first.classes == second.classes == 5
    assert set(first.train.labels.tolist()) == set(second.test.labels.tolist()) == set(range(5))
    assert len(first.train.labels) + len(second.train.labels) == len(digits().train.labels)
    torch.testing.assert_close(first.train.images.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(first.train.images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_jpegs_are_read(jpegs: Path) -> None:
    images = load(jpegs)
    assert (images.name, images.classes) == ("CIFAR-10", CLASSES)
    assert images.train.images.shape == (TRAIN, 3, 16, 16)
    assert images.test.labels.tolist() == [index % CLASSES for index in range(TEST)]


def test_arrays_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "arrays.npz", **image_arrays())
    images = load(tmp_path / "arrays.npz")
    assert (images.name, images.classes) == ("MNIST", CLASSES)
    expected = torch.tensor(image_arrays()["train_images"])[:, None] / 255
    torch.testing.assert_close(images.train.images, expected)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        load(tmp_path / "none.npz")
    with pytest.raises(DataError, match="no known data set"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 2000])
def test_truncated_file(jpegs: Path, kept: int) -> None:
    jpegs.write_bytes(jpegs.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"jpegs\.npz: damaged or not an npz file"):
        load(jpegs)


def test_overwritten_bytes_inside_the_file(jpegs: Path) -> None:
    content = bytearray(jpegs.read_bytes())
    content[3000:3100] = b"\0" * 100
    jpegs.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"jpegs\.npz: "):
        load(jpegs)


def test_other_kinds_of_file(tmp_path: Path) -> None:
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load(tmp_path / "single.npy")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(DataError, match=r"text\.npz: damaged or not an npz file"):
        load(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", **{**jpeg_arrays(), "train_labels": np.array([{}], dtype=object)})
    with pytest.raises(DataError, match=r"objects\.npz: damaged or not an npz file"):
        load(tmp_path / "objects.npz")


def test_wrong_keys(tmp_path: Path) -> None:
    np.savez(tmp_path / "keys.npz", pictures=np.zeros(3))
    with pytest.raises(DataError, match=r"keys\.npz: has the keys \['pictures'\]"):
        load(tmp_path / "keys.npz")


def damaged_jpeg(arrays: dict[str, np.ndarray]) -> None:
    start = arrays["train_ends"][1]
    arrays["train_bytes"][start : start + 40] = 0


def short_jpeg(arrays: dict[str, np.ndarray]) -> None:
    arrays["train_ends"][3] -= 200


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_jpeg, "train image 2 is not a readable JPEG"),
        (short_jpeg, "train image 3 is not a readable JPEG"),
        (lambda arrays: arrays.update(test_ends=arrays["test_ends"][::-1]), "test_ends does not divide"),
        (lambda arrays: arrays.update(test_ends=arrays["test_ends"][:-1]), "test_ends does not divide"),
        (lambda arrays: arrays.update(train_labels=arrays["train_labels"][:-1]), "24 train images, 23 labels"),
        (lambda arrays: arrays.update(train_labels=np.zeros(TRAIN)), "train_labels is float64"),
        (
            lambda arrays: arrays.update(train_bytes=arrays["train_bytes"].astype(np.int32)),
            "train_bytes and train_ends",
        ),
        (lambda arrays: arrays.update(train_labels=np.zeros(TRAIN, dtype=np.uint8)), "1 training classes"),
    ],
)
def test_damaged_content(tmp_path: Path, damage: object, message: str) -> None:
    arrays = jpeg_arrays()
    damage(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=rf"bad\.npz: .*{message}"):
        load(tmp_path / "bad.npz")


def test_arrays_of_a_wrong_shape(tmp_path: Path) -> None:
    arrays = image_arrays()
    np.savez(tmp_path / "bad.npz", **{**arrays, "train_images": arrays["train_images"][0]})
    with pytest.raises(DataError, match="expected uint8 of"):
        load(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", **{**arrays, "test_images": arrays["test_images"][:, :5]})
    with pytest.raises(DataError, match="training images are"):
        load(tmp_path / "bad.npz")
