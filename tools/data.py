"""The data sets of the tools, each held whole on the training device: nothing is downloaded."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from folders import ImageFolders

__all__ = ["DATASETS", "METRICS", "Batches", "DataError", "Dataset", "load", "read_idx"]

DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagenet", "stdlib")
# Where Debian's package dataset-fashion-mnist puts the four gzip IDX files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TRAIN = 1000  # of 1797 images; the other 797 are the test set
CONTEXT = 64  # bytes of text that a language model reads at a time
TEXT_EPOCH = 8192  # windows of text in an epoch, half a million bytes: evaluations come that often
HELD_OUT = 20  # one in so many source files is for validation
PADDING = 4  # pixels on each side before the random crop, as for CIFAR in the SWALP authors' code


# Mean and deviation of CIFAR's channels, for both of its data sets, as in the SWALP authors' code.
CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class DataError(ValueError):
    """A data set that does not exist, is not on this machine, or has damaged files."""


@dataclass(frozen=True)
class Batches:
    """Minibatches (inputs [n, ...], targets [n, ...]) of one epoch, or a rank's; equal seeds give equal epochs.

    ``seed=None`` keeps the samples' order. A generator of its own, on the CPU, draws the order and the augmentation:
    neither the device nor the model's draws change them.
    """

    inputs: Tensor
    targets: Tensor
    batch_size: int
    seed: int | None = None
    augment: bool = False  # of images: a random crop after padding, and a random horizontal flip
    black: Tensor | None = None  # [C], the value of the padding; None: 0
    samples: int | None = None  # in the epoch, drawn anew from all; None: each sample once
    part: slice = field(default_factory=lambda: slice(None))  # of each batch
    share: slice = field(default_factory=lambda: slice(None))  # of the batches

    @property
    def starts(self) -> range:
        """The number of each batch's first sample in the epoch."""
        return range(0, self.samples or len(self.targets), self.batch_size)

    def __len__(self) -> int:
        return len(self.starts[self.share])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in islice(self._whole(), self.share.start, self.share.stop, self.share.step):
            yield inputs[self.part], targets[self.part]

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            chosen = slice(self.samples)
            batches = (each[chosen].split(self.batch_size) for each in (self.inputs, self.targets))
            yield from zip(*batches, strict=True)
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.targets), generator=generator)[: self.samples].to(self.targets.device)
        for index in order.split(self.batch_size):
            inputs = self.inputs[index]
            yield crop_and_flip(inputs, generator, self.black) if self.augment else inputs, self.targets[index]


def crop_and_flip(images: Tensor, generator: torch.Generator, black: Tensor | None = None) -> Tensor:
    """Each image [C, H, W] shifted by up to 4 pixels either way, and mirrored with probability 1/2.

    black: [C], the value that comes in at the edges; None: 0.
    """
    n, _, height, width = images.shape
    offset = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = torch.arange(height) + offset[0]
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width)) + offset[1]
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (PADDING,) * 4)
    if black is not None:
        inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=images.device), (PADDING,) * 4)
        padded = torch.where(inside, padded, black[:, None, None])
    sample = torch.arange(n, device=images.device)
    # The slice between index tensors moves the channels last: [n, H, W, C].
    return padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    return 100.0 * (outputs.argmax(-1) != labels).sum()


def _surprise(outputs: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), tokens.flatten(), reduction="sum")


# A data set's score of a model: name and unit -> its sum over some targets, from the model's outputs.
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "test error, %": _wrong,
    "validation loss, nats a byte": _surprise,
}


@dataclass(frozen=True)
class Dataset:
    """Both splits on one device.

    Of images: inputs float32 [N, C, H, W], mean 0 and variance 1 a channel; targets int64 [N], their labels.
    Of text: inputs int64 [N, T], bytes; targets int64 [N, T], the byte that follows each.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    metric: str = "test error, %"
    augment: bool = False
    black: Tensor | None = None  # [C], the value of a black pixel; None: 0
    epoch: int | None = None  # samples of an epoch, where that is not all of them

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, as a model's builder takes it: (channels, pixels a side), or (bytes,)."""
        return tuple(self.train_inputs.shape[1:3])

    @property
    def device(self) -> torch.device:
        return self.train_inputs.device

    @property
    def tested(self) -> int:
        """Targets of the test samples."""
        return self.test_targets.numel()

    @property
    def samples(self) -> int:
        """Of an epoch."""
        return self.epoch or len(self.train_targets)

    def train(self, batch_size: int, seed: int | None = None) -> Batches:
        """One epoch of the training samples: shuffled and augmented, or plain and in order where ``seed`` is None."""
        augment = self.augment and seed is not None
        return Batches(self.train_inputs, self.train_targets, batch_size, seed, augment, self.black, self.epoch)

    def test(self, batch_size: int | None = None) -> Batches:
        # As many as keep a model's activations small beside its training's: text is long, its vocabulary wide.
        return Batches(self.test_inputs, self.test_targets, batch_size or (1000 if len(self.shape) == 2 else 64))


Source = Union[Dataset, "ImageFolders"]  # the training data of a line


def load(name: str, folder: str | Path | None = None, device: str | torch.device = "cpu") -> Source:
    """The data set ``name``, on ``device``. ``folder`` holds it as ``torchvision.datasets`` stores it (default: data).

    Raises DataError, with the ways to get it, if it is not there, not whole, or damaged.
    """
    if name == "stdlib":
        return _stdlib(Path(folder or os.path.dirname(os.__file__)), device)
    if name == "imagenet":
        return _imagenet(Path(folder or "data"), torch.device(device))
    if name == "digits":
        splits = _digits(folder)
    elif name == "fashion-mnist":
        splits = _fashion_mnist(folder)
    elif name in ("cifar10", "cifar100"):
        splits = _cifar(name, folder)
    else:
        raise DataError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")
    (train_images, train_labels), (test_images, test_labels) = splits
    std, mean = torch.std_mean(train_images, dim=(0, 2, 3), correction=0, keepdim=True)
    cifar = name.startswith("cifar")
    if cifar:
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in CIFAR)
    return Dataset(
        name,
        ((train_images - mean) / std).to(device),
        train_labels.to(device),
        ((test_images - mean) / std).to(device),
        test_labels.to(device),
        classes=int(train_labels.max()) + 1,
        augment=cifar,
        black=(-mean / std).flatten().to(device) if cifar else None,
    )


def _stdlib(folder: Path, device: str | torch.device) -> Dataset:
    """The modules at the top of ``folder``, Python's own library, as bytes; one file in 20 is held out, by its name."""
    # Leave out modules in which a build describes its own machine: they differ elsewhere.
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    held_out = [path for path in files if zlib.crc32(path.name.encode()) % HELD_OUT == 0]
    splits = [_windows([path for path in files if path not in held_out]), _windows(held_out)]
    if not all(len(targets) for _, targets in splits):
        raise DataError(f"{folder} holds too few Python sources; pass --data the folder of a Python's standard library")
    (train_inputs, train_targets), (test_inputs, test_targets) = splits
    return Dataset(
        "stdlib",
        train_inputs.to(device),
        train_targets.to(device),
        test_inputs.to(device),
        test_targets.to(device),
        classes=256,
        metric="validation loss, nats a byte",
        epoch=min(TEXT_EPOCH, len(train_targets)),
    )


def _windows(files: list[Path]) -> tuple[Tensor, Tensor]:
    """The files' bytes, one file after the other, cut into windows; targets are one byte ahead."""
    try:
        content = b"".join(path.read_bytes() for path in files)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; pass --data another folder") from None
    text = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
    n = (len(text) - 1) // CONTEXT
    tokens = text.to(torch.int64)
    return tokens[: n * CONTEXT].view(n, CONTEXT), tokens[1 : n * CONTEXT + 1].view(n, CONTEXT)


Split = tuple[Tensor, Tensor]  # images float32 [N, C, H, W] in [0, 1], labels int64 [N]


def _split(images: Tensor, labels: Tensor) -> Split:
    """From uint8 images, [N, H, W] or channels last."""
    pixels = images.to(torch.float32) / 255
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, labels.to(torch.int64)


def _digits(folder: str | Path | None) -> tuple[Split, Split]:
    """scikit-learn's bundled handwritten digits: 1797 images of 8x8 pixels, split once and for all."""
    if folder is not None:
        raise DataError(f"digits comes with scikit-learn and is not read from {folder}; leave --data out")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"digits comes with scikit-learn ({error}); pip install scikit-learn") from None

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return (images[train], labels[train]), (images[test], labels[test])


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor of an IDX file, gzip or not.

    It is two zero bytes, type 8, the number of dimensions, their sizes as big-endian int32, and the data. Raises
    DataError for any other file.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
        raise DataError(f"{path} cannot be read ({error}); install it again") from None
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise DataError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex(' ')}; install it again")
    start = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} holds {max(0, len(content) - start)} bytes, not the {shape} it announces; install it again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


IDX_FILES = tuple(
    f"{split}-{what}" for split in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")
)


def _fashion_mnist(folder: str | Path | None) -> tuple[Split, Split]:
    """From the four IDX files, each gzip or not: in ``folder``, or where torchvision or Debian puts them."""
    root = Path(folder or "data")
    sources = [root / "FashionMNIST" / "raw", root if folder else DEBIAN_FASHION_MNIST]
    found = {source: [_idx_file(source, name) for name in IDX_FILES] for source in sources}
    source = max(found, key=lambda each: sum(path is not None for path in found[each]))
    paths = [path for path in found[source] if path is not None]
    if not paths:
        raise DataError(
            f"fashion-mnist is neither in {sources[0]} nor in {sources[1]}; install Debian's package"
            f" dataset-fashion-mnist, or run {_torchvision_command('FashionMNIST', root)} and pass --data {root}"
        )
    if missing := [name for name, path in zip(IDX_FILES, found[source], strict=True) if path is None]:
        raise DataError(f"fashion-mnist is not whole: {source} lacks {' and '.join(missing)}; install it again")
    splits = []
    for images, labels in zip(paths[::2], paths[1::2], strict=True):
        pixels, classes = read_idx(images), read_idx(labels)
        if pixels.dim() != 3 or classes.shape != pixels.shape[:1] or not len(classes):
            shapes = f"{tuple(pixels.shape)} and {tuple(classes.shape)}"
            raise DataError(f"{images} and {labels} are no images and their labels, but {shapes}; install them again")
        splits.append(_split(pixels, classes))
    return splits[0], splits[1]


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _cifar(name: str, folder: str | Path | None) -> tuple[Split, Split]:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that is made for another torch
        raise DataError(f"{name} is read by torchvision ({error}); install it, or use another data set") from None
    root = Path(folder or "data")
    source = getattr(torchvision.datasets, name.upper())
    try:
        train, test = (source(root, train=train) for train in (True, False))
    except (RuntimeError, OSError):  # RuntimeError: a file is missing, or its checksum differs
        raise DataError(
            f"{name} is not in {root}, or not whole; unpack its Python archive as {root / source.base_folder},"
            f" or run {_torchvision_command(name.upper(), root)}, and pass --data {root}"
        ) from None
    train_split, test_split = (_split(torch.from_numpy(s.data), torch.tensor(s.targets)) for s in (train, test))
    return train_split, test_split


def _imagenet(root: Path, device: torch.device) -> ImageFolders:
    try:
        import folders
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is made for another torch
        raise DataError(f"imagenet is read by torchvision ({error}); install it, or use another data set") from None
    return folders.load(root, device)


def _torchvision_command(dataset: str, root: Path) -> str:
    """The command that downloads a data set; the tools themselves never do."""
    return f"""python -c "from torchvision.datasets import {dataset} as d; d('{root}', download=True)\""""
