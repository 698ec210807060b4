"""The data sets of the tools, each held whole on the training device: nothing is downloaded."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "Batches", "DataError", "Dataset", "load", "read_idx"]

DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100")
# Where Debian's package dataset-fashion-mnist puts the four gzip IDX files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TRAIN = 1000  # of 1797 images; the other 797 are the test set
PADDING = 4  # pixels on each side before the random crop, as for CIFAR in the SWALP authors' code


class DataError(ValueError):
    """A data set that does not exist, is not on this machine, or whose files are damaged."""


@dataclass(frozen=True)
class Batches:
    """Minibatches ([n, C, H, W], [n]) of one pass over the images; equal seeds give equal passes.

    ``seed=None`` keeps the images' order. The order and the augmentation are drawn from a generator of their own, on
    the CPU: they depend neither on the device nor on what the model draws.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    seed: int | None = None
    augment: bool = False  # a random crop after padding, and a random horizontal flip

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            yield from zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for index in order.split(self.batch_size):
            images = self.images[index]
            yield crop_and_flip(images, generator) if self.augment else images, self.labels[index]


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [C, H, W] shifted by up to 4 pixels either way, zeros coming in, and mirrored with probability 1/2."""
    n, _, height, width = images.shape
    offset = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = torch.arange(height) + offset[0]
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width)) + offset[1]
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    sample = torch.arange(n, device=images.device)
    # The slice between index tensors moves the channels last: [n, H, W, C].
    return padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Dataset:
    """Both splits on one device: images float32 [N, C, H, W], mean 0 and variance 1 a channel; labels int64 [N]."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augment: bool

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1]

    def train(self, batch_size: int, seed: int | None = None) -> Batches:
        """One pass over the training images: shuffled and augmented, or plain and in order where ``seed`` is None."""
        return Batches(self.train_images, self.train_labels, batch_size, seed, self.augment and seed is not None)

    def test(self, batch_size: int = 1000) -> Batches:
        return Batches(self.test_images, self.test_labels, batch_size)


def load(name: str, folder: str | Path | None = None, device: str | torch.device = "cpu") -> Dataset:
    """The data set ``name``, on ``device``. ``folder`` holds it as ``torchvision.datasets`` stores it (default: data).

    Raises DataError, with the ways to get it, if it is not there.
    """
    if name == "digits":
        splits = _digits()
    elif name == "fashion-mnist":
        splits = _fashion_mnist(folder)
    elif name in ("cifar10", "cifar100"):
        splits = _cifar(name, folder)
    else:
        raise DataError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")
    (train_images, train_labels), (test_images, test_labels) = splits
    std, mean = torch.std_mean(train_images, dim=(0, 2, 3), correction=0, keepdim=True)
    return Dataset(
        name,
        ((train_images - mean) / std).to(device),
        train_labels.to(device),
        ((test_images - mean) / std).to(device),
        test_labels.to(device),
        classes=int(train_labels.max()) + 1,
        augment=name.startswith("cifar"),
    )


Split = tuple[Tensor, Tensor]  # images float32 [N, C, H, W] in [0, 1], labels int64 [N]


def _split(images: np.ndarray | Tensor, labels: np.ndarray | Tensor | list[int]) -> Split:
    """From uint8 images, [N, H, W] or channels last."""
    pixels = torch.as_tensor(images).to(torch.float32) / 255
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(labels).to(torch.int64)


def _digits() -> tuple[Split, Split]:
    """scikit-learn's bundled handwritten digits: 1797 images of 8x8 pixels, split once and for all."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return (images[train], labels[train]), (images[test], labels[test])


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzip IDX file: two zero bytes, type 8, the number of dimensions, big-endian sizes, data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex(' ')}; install it again")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path} holds {len(content) - start} bytes, not the {shape} it announces; install it again")
    return np.frombuffer(content[start:], dtype=np.uint8).reshape(shape).copy()


def _fashion_mnist(folder: str | Path | None) -> tuple[Split, Split]:
    from torchvision.datasets import FashionMNIST

    root = Path(folder or "data")
    try:
        train, test = (FashionMNIST(root, train=train) for train in (True, False))
    except RuntimeError:
        # Torchvision has not unpacked it there: the gzip files themselves, in the folder given or in Debian's.
        source = root if folder else DEBIAN_FASHION_MNIST
        files = [
            (source / f"{split}-images-idx3-ubyte.gz", source / f"{split}-labels-idx1-ubyte.gz")
            for split in ("train", "t10k")
        ]
        if not all(path.is_file() for pair in files for path in pair):
            raise DataError(
                f"fashion-mnist is neither in {root} nor in {source}; install Debian's package dataset-fashion-mnist,"
                f" or run {_torchvision_command('FashionMNIST', root)} and pass --data {root}"
            ) from None
        train_split, test_split = (_split(read_idx(images), read_idx(labels)) for images, labels in files)
        return train_split, test_split
    return _split(train.data, train.targets), _split(test.data, test.targets)


def _cifar(name: str, folder: str | Path | None) -> tuple[Split, Split]:
    import torchvision

    root = Path(folder or "data")
    source = getattr(torchvision.datasets, name.upper())
    try:
        train, test = (source(root, train=train) for train in (True, False))
    except RuntimeError:
        raise DataError(
            f"{name} is not in {root}; unpack its Python archive as {root / source.base_folder},"
            f" or run {_torchvision_command(name.upper(), root)}, and pass --data {root}"
        ) from None
    return _split(train.data, train.targets), _split(test.data, test.targets)


def _torchvision_command(dataset: str, root: Path) -> str:
    """What downloads a data set; the tools themselves never do."""
    return f"""python -c "from torchvision.datasets import {dataset} as d; d('{root}', download=True)\""""
