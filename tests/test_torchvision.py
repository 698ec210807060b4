"""Every model of torchvision is rewritten: in one graph, or, for detection, in several with Python between them.

A few run by default; all of them in minutes: ``pytest -m "" tests/test_torchvision.py``.
"""

from fnmatch import fnmatchcase

import pytest
import torch
import torchvision.models as zoo
from torch import nn
from torch.overrides import TorchFunctionMode

from swalp_fx import check, convert

# How many there are, and must be rewritten, in torchvision 0.29.
COUNTS = {
    zoo: 80,
    zoo.segmentation: 6,
    zoo.video: 9,
    zoo.detection: 12,
    zoo.optical_flow: 2,
}
IN_ONE = [name for group in (zoo, zoo.segmentation, zoo.video) for name in zoo.list_models(module=group)]
IN_SEVERAL = [name for group in (zoo.detection, zoo.optical_flow) for name in zoo.list_models(module=group)]

# Names -> the size of the smallest input that the model takes; of the rows that serve, the last.
SMALLEST = {
    "*": (2, 3, 1, 1),
    "alexnet": (2, 3, 63, 63),
    "convnext*": (2, 3, 32, 32),
    "densenet*": (2, 3, 32, 32),
    "googlenet": (2, 3, 16, 16),
    "inception_v3": (2, 3, 299, 299),  # its auxiliary head takes no less
    "maxvit_t": (2, 3, 224, 224),  # no other size
    "mc3_18": (2, 3, 2, 16, 16),
    "mvit*": (1, 3, 16, 224, 224),  # no other size
    "r2plus1d_18": (2, 3, 2, 16, 16),
    "r3d_18": (2, 3, 2, 16, 16),
    "s3d": (2, 3, 14, 224, 224),
    "squeezenet*": (2, 3, 32, 32),
    "swin*": (2, 3, 16, 16),
    "swin3d*": (2, 3, 2, 16, 16),
    "vgg*": (2, 3, 32, 32),
    "vit*": (1, 3, 224, 224),  # no other size
}


def _smallest(name):
    return [size for key, size in SMALLEST.items() if fnmatchcase(name, key)][-1]


class _MetaWeights(TorchFunctionMode):
    """Weights without memory, and all else as it is: some models read the numbers that they count layers with."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.empty, torch.zeros, torch.ones):
            kwargs = (kwargs or {}) | {"device": "meta"}
        return function(*args, **(kwargs or {}))


def _settings(name):
    settings = {"weights": None}
    if name in {*zoo.list_models(module=zoo.segmentation), *zoo.list_models(module=zoo.detection)}:
        settings["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False
    return settings


def _on_meta(name):
    with _MetaWeights():
        model = zoo.get_model(name, **_settings(name))
    return model.to("meta")


QUICK = ("alexnet", "resnet18", "squeezenet1_0")  # to trace


@pytest.mark.parametrize("group", COUNTS, ids=lambda group: group.__name__)
def test_no_model_is_lost(group):
    names = zoo.list_models(module=group)
    assert len(names) >= COUNTS[group]
    assert set(names) <= {*IN_ONE, *IN_SEVERAL}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in IN_ONE]
)
def test_it_is_rewritten_in_one_graph(name):
    model = _on_meta(name)
    x = torch.empty(_smallest(name), device="meta")
    expected, found = [], []
    expected += torch.utils._pytree.tree_leaves(model(x))
    module, _ = convert(model)
    found += torch.utils._pytree.tree_leaves(module(x))
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]
    assert [each.broke for each in module.graphs] == [None]


# The numeric check: name -> the size of its input, large enough that no layer is left with padding alone.
FAST = {
    "resnet18": (2, 3, 32, 32),
    "squeezenet1_0": (2, 3, 32, 32),
    "vgg16_bn": (2, 3, 32, 32),
}
SLOW = {
    "lraspp_mobilenet_v3_large": (2, 3, 32, 32),
    "mc3_18": (2, 3, 4, 32, 32),
    "mobilenet_v3_small": (2, 3, 32, 32),
    "resnet50": (2, 3, 32, 32),
    "swin_t": (2, 3, 32, 32),
    "vgg16": (2, 3, 32, 32),
    "alexnet": (2, 3, 64, 64),
    "convnext_tiny": (2, 3, 32, 32),
    "deeplabv3_mobilenet_v3_large": (2, 3, 32, 32),
    "densenet121": (2, 3, 32, 32),
    "efficientnet_b0": (2, 3, 32, 32),
    "efficientnet_v2_s": (2, 3, 32, 32),
    "fcn_resnet50": (2, 3, 32, 32),
    "googlenet": (2, 3, 32, 32),
    "inception_v3": (2, 3, 75, 75),
    "maxvit_t": (1, 3, 224, 224),
    "mnasnet0_5": (2, 3, 32, 32),
    "mobilenet_v2": (2, 3, 32, 32),
    "mvit_v2_s": (1, 3, 16, 224, 224),
    "r2plus1d_18": (2, 3, 4, 32, 32),
    "regnet_x_400mf": (2, 3, 32, 32),
    "regnet_y_400mf": (2, 3, 32, 32),
    "resnext50_32x4d": (2, 3, 32, 32),
    "s3d": (1, 3, 14, 224, 224),
    "shufflenet_v2_x0_5": (2, 3, 32, 32),
    "swin3d_t": (2, 3, 4, 32, 32),
    "swin_v2_t": (2, 3, 32, 32),
    "vit_b_32": (1, 3, 224, 224),
}


def _with_weights(name):
    settings = _settings(name)
    if name in ("googlenet", "inception_v3"):
        settings["aux_logits"] = False  # heads that only train mode runs, by a branch that one graph cannot hold
    if not name.startswith(("alexnet", "vgg")):
        return zoo.get_model(name, **settings)
    with torch.device("meta"):  # a classifier of 50 to 120 million weights, for one of 200 thousand
        model = zoo.get_model(name, **settings)
    features = model.classifier[1 if name == "alexnet" else 0].in_features
    model.classifier = nn.Sequential(nn.Linear(features, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@pytest.fixture
def deterministic():
    """The gradient of an index adds up as its threads come to it: mvit_v2_s would differ from itself."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("name", "size"), [*FAST.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())]
)
def test_it_computes_what_the_model_computes(name, size):
    assert check(_with_weights(name), torch.randn(size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", {"min_size": 64, "max_size": 64}),
        ("fcos_resnet50_fpn", {"min_size": 64, "max_size": 64}),
        ("retinanet_resnet50_fpn_v2", {"min_size": 64, "max_size": 64}),
        ("ssdlite320_mobilenet_v3_large", {}),
    ],
)
def test_detection_computes_what_the_model_computes(name, settings):
    model = zoo.get_model(name, num_classes=3, **_settings(name), **settings)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
    # Two images: batch norm wants more than one value a channel where the image has shrunk to a pixel.
    inputs = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets * 2
    assert check(model, *inputs)
    module, _ = convert(model, recipe="bfp8")
    assert all(torch.isfinite(loss) for loss in module(*inputs).values())


@pytest.mark.slow
def test_optical_flow_computes_what_the_model_computes():
    first, second = torch.rand(2, 1, 3, 128, 128)
    assert check(zoo.optical_flow.raft_small(), first, second)
