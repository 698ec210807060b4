"""ImageNet, or any images in a folder for each class, read from the disk batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Samples
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data import DataError
from swalp_fx.random import fold_in

__all__ = ["ImageFolders", "load"]

SIDE, RESIZED = 224, 256  # pixels
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, as torchvision has them
WORKERS = 8
_END = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
PLAIN = v2.Compose([v2.Resize(RESIZED), v2.CenterCrop(SIDE), *_END])
AUGMENTED = v2.Compose([v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), *_END])


@dataclass(frozen=True)
class ImageFolders:
    """Both splits, as ``data.Dataset`` has them; images become float32 [N, 3, 224, 224] as they are read."""

    train_images: ImageFolder
    test_images: ImageFolder
    device: torch.device
    name: str = "imagenet"
    metric: str = "test error, %"
    epoch: int | None = None  # samples of an epoch, drawn anew from all; None: each once

    @property
    def classes(self) -> int:
        return len(self.train_images.classes)

    @property
    def shape(self) -> tuple[int, int]:
        return 3, SIDE

    @property
    def samples(self) -> int:
        return self.epoch or len(self.train_images)

    @property
    def tested(self) -> int:
        return len(self.test_images)

    def train(self, batch_size: int, seed: int | None = None) -> Loaded:
        """One epoch: shuffled and augmented, or plain and in order where ``seed`` is None."""
        return Loaded(self.train_images, batch_size, self.device, seed, self.samples)

    def test(self, batch_size: int = 250) -> Loaded:
        return Loaded(self.test_images, batch_size, self.device, None, self.tested)


@dataclass(frozen=True)
class Loaded:
    """Minibatches (images, labels) on the device, or a rank's. No image is read that is not yielded.

    Equal seeds give equal epochs, with any number of workers.
    """

    images: ImageFolder
    batch_size: int
    device: torch.device
    seed: int | None
    samples: int
    part: slice = field(default_factory=lambda: slice(None))  # of each batch
    share: slice = field(default_factory=lambda: slice(None))  # of the batches

    @property
    def starts(self) -> range:
        """The number of each batch's first sample in the epoch."""
        return range(0, self.samples, self.batch_size)

    def __len__(self) -> int:
        return len(self.starts[self.share])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(range(self.samples))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(self.images), generator=generator)[: self.samples].tolist()
        batches = [order[start : start + self.batch_size][self.part] for start in self.starts[self.share]]
        many = self.samples > 8 * self.batch_size  # or starting the workers takes longer than reading
        workers = min(WORKERS, os.cpu_count() or 1) if many else 0
        cuda = self.device.type == "cuda"
        seeded = _Seeded(self.images, self.seed)
        # A generator of its own: else a loader draws from the one that the model draws from.
        own = torch.Generator().manual_seed(0)
        for images, labels in DataLoader(
            seeded, batch_sampler=batches, num_workers=workers, pin_memory=cuda, generator=own
        ):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Seeded(Samples):
    """Each image augmented from random numbers that follow from the epoch's seed and its place."""

    def __init__(self, images: ImageFolder, seed: int | None) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.images.samples[index]
        try:
            image = self.images.loader(path)
        except OSError as error:  # PIL's, of no image, too
            raise DataError(f"{path} cannot be read ({error}); install the data set again") from None
        if self.seed is None:
            return PLAIN(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold_in(self.seed, index))
            return AUGMENTED(image), label


def load(root: Path, device: torch.device) -> ImageFolders:
    """From ``root/train`` and ``root/val``, as ImageNet is unpacked; raises DataError if they are not whole."""
    remedy = "unpack ImageNet there, a folder of images for each class, by torchvision.datasets.ImageNet or by hand"
    try:
        train, test = (ImageFolder(root / split) for split in ("train", "val"))
    except OSError as error:  # no folder, no class or no image
        raise DataError(f"imagenet is not in {root} ({error}); {remedy}, and pass --data DIR") from None
    if train.classes != test.classes:
        names = sorted({*train.classes} ^ {*test.classes})
        raise DataError(f"imagenet in {root} is not whole: train and val differ in {', '.join(names[:3])}; {remedy}")
    return ImageFolders(train, test, device)
