"""The networks of the tools: a convnet and transformers, small; the SWALP paper's VGG16, PreResNet; torchvision's."""

from __future__ import annotations

import difflib
import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from decoder import Decoder
from rotary import RotaryDecoder
from vit import ViT

__all__ = ["REFERENCE_PLACEMENT", "ModelError", "build", "default_shape", "example", "names"]

# Output channels of VGG16's convolutions; "pool" halves the image (Simonyan and Zisserman, table 1, column D).
VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
# The same, a quarter as wide, without the last "pool": for images of 16 pixels and more.
VGG16_NARROW = tuple(each if each == "pool" else each // 4 for each in VGG16[:-1])


class ModelError(ValueError):
    """A model that does not exist, or that cannot take the samples it is asked to take."""


def _init_convolutions(model: nn.Module) -> None:
    """He's normal initialisation by fan-out, as in the SWALP authors' VGG and PreResNet; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def convnet(num_classes: int, channels: int, image_size: int) -> nn.Sequential:
    """Three 3x3 convolutions (16, 32 and 64 channels, the last two of stride 2) and two linear layers."""
    side = math.ceil(math.ceil(image_size / 2) / 2)  # a padded 3x3 convolution of stride 2 halves, rounding up
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * side * side, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


class VGG(nn.Module):
    """VGG16 for small images, with the paper's classifier: two hidden layers, as wide as the last convolution."""

    def __init__(
        self,
        num_classes: int,
        channels: int,
        image_size: int,
        *,
        batch_norm: bool,
        widths: tuple[int | str, ...] = VGG16,
    ) -> None:
        super().__init__()
        pools = widths.count("pool")
        if image_size < 2**pools:
            raise ModelError(
                f"vgg16 halves an image {pools} times: {image_size} pixels a side are too few, use {2**pools}"
            )
        layers: list[nn.Module] = []
        for width in widths:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(channels * (image_size // 2**pools) ** 2, channels),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, num_classes),
        )
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class PreActivation(nn.Module):
    """A residual block of batch norm, ReLU and convolution, in this order (He et al., "Identity Mappings", figure 4e).

    ``kernels`` are the convolutions' sizes: (3, 3) for the basic block, (1, 3, 1) for the bottleneck. The last
    convolution of a bottleneck is 4 times as wide. The first 3x3 convolution carries the stride.
    """

    def __init__(self, channels: int, width: int, stride: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        out = width * expansion(kernels)
        widths = [channels, *[width] * (len(kernels) - 1), out]
        layers: dict[str, nn.Module] = {}
        for i, kernel in enumerate(kernels):
            step = stride if i == kernels.index(3) else 1
            layers[f"bn{i + 1}"] = nn.BatchNorm2d(widths[i])
            layers[f"relu{i + 1}"] = nn.ReLU()
            layers[f"conv{i + 1}"] = nn.Conv2d(widths[i], widths[i + 1], kernel, step, padding=kernel // 2, bias=False)
        self.branch = nn.Sequential(OrderedDict(layers))
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def expansion(kernels: tuple[int, ...]) -> int:
    """How many times wider than its inner convolutions a block's output is."""
    return 4 if len(kernels) == 3 else 1


class PreResNet(nn.Module):
    """A pre-activation ResNet of three stages of 16, 32 and 64 channels (He et al., "Identity Mappings", section 4)."""

    def __init__(self, num_classes: int, channels: int, *, depth: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        blocks = (depth - 2) // (3 * len(kernels))  # of each stage; the stem and the classifier are the other two
        width_in = 16
        self.conv = nn.Conv2d(channels, width_in, 3, padding=1, bias=False)
        stages = []
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(PreActivation(width_in, width, stride if block == 0 else 1, kernels))
                width_in = width * expansion(kernels)
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(width_in)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width_in, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.conv(x))
        x = self.pool(self.relu(self.bn(x)))
        return self.fc(torch.flatten(x, 1))


def _preresnet(depth: int, kernels: tuple[int, ...]) -> Callable[[int, int, int], nn.Module]:
    return lambda num_classes, channels, image_size: PreResNet(num_classes, channels, depth=depth, kernels=kernels)


def _vgg(batch_norm: bool, widths: tuple[int | str, ...] = VGG16) -> Callable[[int, int, int], nn.Module]:
    return functools.partial(VGG, batch_norm=batch_norm, widths=widths)


def cifar_resnet18(num_classes: int, channels: int, image_size: int) -> nn.Module:
    """torchvision's ResNet-18 with the stem for small images: 3 x 3, without pooling (He et al., 2016, section 4.2)."""
    model = _torchvision().models.resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@dataclass(frozen=True)
class Made:
    """A model's builder, and the shape of its samples: (channels, pixels a side) of an image, or (bytes,) of a text."""

    build: Callable[..., nn.Module]  # build(classes, *shape)
    shape: tuple[int, ...]
    classes: int = 10


MODELS: dict[str, Made] = {
    "convnet": Made(convnet, (3, 28)),
    "vgg16": Made(_vgg(batch_norm=False), (3, 32)),
    "vgg16_bn": Made(_vgg(batch_norm=True), (3, 32)),
    "vgg16_narrow": Made(_vgg(batch_norm=True, widths=VGG16_NARROW), (3, 32)),
    "preresnet20": Made(_preresnet(20, (3, 3)), (3, 32)),
    "preresnet164": Made(_preresnet(164, (1, 3, 1)), (3, 32)),
    "cifar_resnet18": Made(cifar_resnet18, (3, 32)),
    "vit": Made(ViT, (3, 28)),
    "decoder": Made(Decoder, (64,), classes=256),
    "rotary": Made(RotaryDecoder, (64,), classes=256),
}
# The outputs that the SWALP authors' networks round, as fields of a Recipe. VGG: the 13 convolutions and the 2
# hidden linear layers, after their ReLU. PreResNet: the stem, and each ReLU and each convolution of a block, without
# the last ReLU, the convolutions of shortcuts, and the sums.
_VGG_PLACEMENT = {"placement": "group"}
_PRERESNET_PLACEMENT = {"placement": "compute+activation", "exclude": ("relu", "*.shortcut")}
REFERENCE_PLACEMENT: dict[str, dict[str, object]] = {
    "vgg16": _VGG_PLACEMENT,
    "vgg16_bn": _VGG_PLACEMENT,
    "vgg16_narrow": _VGG_PLACEMENT,
    "preresnet20": _PRERESNET_PLACEMENT,
    "preresnet164": _PRERESNET_PLACEMENT,
}
PREFIX = "torchvision:"  # tells torchvision's vgg16 from the paper's


def names() -> list[str]:
    """Every name that ``build`` takes; torchvision's classification models with and without the prefix."""
    theirs = _torchvision_names()
    return [*MODELS, *(name for name in theirs if name not in MODELS), *(PREFIX + name for name in theirs)]


def _torchvision_names() -> list[str]:
    models = _torchvision().models
    return models.list_models(module=models)


def _torchvision() -> ModuleType:
    """torchvision, imported only for its own models: the others do without."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that is made for another torch
        own = ", ".join(name for name in MODELS if name != "cifar_resnet18")
        raise ModelError(f"torchvision cannot be imported ({error}); install it, or use one of {own}") from None
    return torchvision


def default_shape(name: str) -> tuple[int, ...]:
    """The shape of samples that the model was made for: (channels, pixels a side), or (bytes,)."""
    if name in MODELS:
        return MODELS[name].shape
    return (3, 299 if name.endswith("inception_v3") else 224)


def example(*shape: int) -> Tensor:
    """One sample, blank: [1, channels, side, side], or int64 [1, bytes].

    Raises ModelError if memory does not hold it.
    """
    try:
        return torch.zeros(1, *shape, shape[1]) if len(shape) == 2 else torch.zeros(1, *shape, dtype=torch.int64)
    except RuntimeError as error:
        raise ModelError(f"a sample of {shape} cannot be made ({error}); use a smaller one") from None


def build(name: str, num_classes: int | None = None, *shape: int) -> nn.Module:
    """A new float model, initialised from torch's default generator, for samples of ``shape``.

    Images: build("vgg16", 10, channels, side) takes [N, channels, side, side] to [N, classes].
    Text: build("decoder", 256, context) takes int64 [N, T] to [N, T, classes], T up to context.
    Raises ModelError for an unknown name, with the nearest names, for samples of the other kind, and for a model that
    memory does not hold.
    """
    _refuse_unknown(name)
    made_for = default_shape(name)
    shape = shape or made_for
    if len(shape) != len(made_for):
        kinds = ("images", "text") if len(made_for) == 2 else ("text", "images")
        raise ModelError(f"{name} takes {kinds[0]}, not {kinds[1]}; use one of {_own(images=len(shape) == 2)}")
    if name not in MODELS and shape[0] != 3:
        raise ModelError(f"{name} takes images of 3 channels, not {shape[0]}; use one of {_own(images=True)}")
    try:
        if name in MODELS:
            return MODELS[name].build(num_classes or MODELS[name].classes, *shape)
        get_model = _torchvision().models.get_model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of how googlenet will be initialised one day
            return get_model(name.removeprefix(PREFIX), weights=None, num_classes=num_classes or 10)
    except RuntimeError as error:  # of torch's allocator
        size = f"samples of {shape}" + (f" and {num_classes} classes" if num_classes else "")
        raise ModelError(f"{name} cannot be made for {size} ({error}); use smaller ones") from None


def _own(images: bool) -> str:
    return ", ".join(name for name, made in MODELS.items() if (len(made.shape) == 2) == images)


def _refuse_unknown(name: str) -> None:
    if name in MODELS:
        return
    try:
        known = names()
    except ModelError as error:
        raise ModelError(f"{name!r} is no model of these tools, and {error}") from None
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        raise ModelError(f"unknown model {name!r}; use {' or '.join(near or MODELS)}, or a torchvision name")
