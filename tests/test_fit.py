"""Blocks along the contraction axis: which axis that is, in graphs and in steps, and which parameters fit no block."""

import copy
import warnings

import pytest
import torch
import torchvision
from graphs import rewritten
from torch import nn
from torch.utils.checkpoint import checkpoint

import swalp_fx
from swalp_fx import ConvertError, convert, quantize


class Both(nn.Module):
    """Convolutions and a linear layer, an activation behind each, and a reshape from four axes to two."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        return torch.relu(self.fc(x.flatten(2).mean(2)))


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def formats_of(recipe, target):
    """The formats of each node of ``target``, in order."""
    graph = rewritten(Both(), f"{recipe} rounding=nearest in_place=false quantize_logits=true", X).graph
    return [node.args[3:-1] for node in graph.nodes if node.target is target]


@pytest.mark.parametrize(
    "spec, due",
    [
        # conv, its bias, the transposed convolution, its bias, the linear layer, its bias
        ("bfp8[c:4]", ["bfp8[1:4]", "bfp8", "bfp8[0:4]", "bfp8", "bfp8[-1:4]", "bfp8"]),
        ("e4m3[4x2]", ["e4m3[0:4,1:2]", "e4m3[]", "e4m3[1:4,0:2]", "e4m3[]", "e4m3[0:4,-1:2]", "e4m3[]"]),
        ("mxfp8", ["mxfp8[1:32]", "mxfp8", "mxfp8[0:32]", "mxfp8", "mxfp8", "mxfp8"]),
        ("nvfp4", ["nvfp4[1:16]", "nvfp4", "nvfp4[0:16]", "nvfp4", "nvfp4", "nvfp4"]),
        ("mxfp4+rceil", [f"mxfp4{block}+rceil" for block in ("[1:32]", "", "[0:32]", "", "", "")]),
        ("mxfp4[-1:16]", ["mxfp4[-1:16]"] * 6),
        ("int8[0:2,1:2]", ["int8[0:2,1:2]", "int8", "int8[0:2,1:2]", "int8", "int8[0:2,1:2]", "int8"]),
        ("bfp8[1:4]", ["bfp8[1:4]", "bfp8", "bfp8[1:4]", "bfp8", "bfp8[1:4]", "bfp8"]),
        ("mxfp8[0]", ["mxfp8[0]"] * 6),
    ],
)
def test_a_parameter_has_runs_along_what_its_layer_contracts(spec, due):
    """And one that has fewer axes than the block is one block."""
    assert sorted(formats_of(f"W={spec}", swalp_fx.quantize_weight)) == sorted((format,) for format in due)


def test_an_output_has_runs_along_channels_where_convolutions_are_and_along_the_last_axis_elsewhere():
    found = formats_of("A=bfp8[c:4] E=e4m3[1x4]", swalp_fx.quantize_output)
    channels, last = ("bfp8[1:4]", "e4m3[0:1,1:4]"), ("bfp8[-1:4]", "e4m3[0:1,-1:4]")
    assert found[:4] == [channels] * 4 and found[-2:] == [last] * 2


def formats_in(graph):
    return [str(node.args[3]) for node in graph.nodes if node.target is swalp_fx.quantize_output]


class ChannelsLast(nn.Module):
    """A convolution, and operations with channels in the last place, in several spellings."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = self.fc(self.norm(x.permute(0, 2, 3, 1)))
        x = torch.relu(x.movedim(-1, 1))
        x = torch.tanh(torch.transpose(x, dim0=1, dim1=-1))
        return torch.sigmoid(x.mT)


def test_the_axis_of_channels_goes_where_they_go():
    graph = rewritten(ChannelsLast(), "A=mxfp8 rounding=nearest in_place=false quantize_logits=true", X).graph
    found = {node.args[0].name: str(node.args[3]) for node in graph.nodes if node.target is swalp_fx.quantize_output}
    assert found == {
        "conv": "mxfp8[1:32]", "relu_1": "mxfp8[1:32]", "norm": "mxfp8", "fc": "mxfp8", "relu_2": "mxfp8[1:32]",
        "tanh": "mxfp8", "sigmoid": "mxfp8[2:32]",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Conv1d(3, 4, 1), (3, 5), 0),
        (nn.Conv1d(3, 4, 1), (2, 3, 5), 1),
        (nn.ConvTranspose2d(3, 4, 1), (3, 5, 5), 0),
        (nn.Conv3d(3, 4, 1), (2, 3, 5, 5, 5), 1),
    ],
)
def test_channels_are_in_front_of_the_axes_of_space_with_a_batch_and_without(layer, shape, axis):
    graph = rewritten(
        nn.Sequential(layer, nn.Tanh()), "A=mxfp8 quantize_input=true quantize_logits=true", torch.randn(shape)
    )
    assert formats_in(graph.graph) == [f"mxfp8[{axis}:32]"] * 3


class Times(nn.Module):
    """A convolution of [times, batch, channels]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 8, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return torch.conv_tbc(x, self.weight, self.bias).tanh()


def test_a_convolution_of_times_has_channels_on_the_last_axis():
    recipe = "A=mxfp8 quantize_input=true quantize_logits=true placement=compute"
    assert formats_in(rewritten(Times(), recipe, torch.randn(6, 3, 8)).graph) == ["mxfp8"] * 2


class Patches(nn.Module):
    """A vision transformer's patches, which a linear layer reads; one of two ways to make them tokens."""

    def __init__(self, flattened):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 40, 2, 2), nn.LayerNorm(40), nn.Linear(40, 5)
        self.flattened = flattened

    def forward(self, x):
        y = self.conv(x)
        tokens = y.flatten(2).transpose(1, 2) if self.flattened else y.permute(0, 2, 3, 1).flatten(1, 2)
        return self.linear(self.norm(tokens + 1))


def test_patches_that_become_tokens_have_runs_along_their_channels():
    x = torch.randn(2, 3, 18, 18)
    torch.manual_seed(0)
    made = Patches(True)
    other = Patches(False)
    other.load_state_dict(made.state_dict())
    found = [convert(each, recipe="mxfp8 rounding=nearest").module(x) for each in (made, other)]
    assert torch.equal(*found)
    graph = rewritten(Patches(True), "mxfp8", x).graph
    (norm,) = [node for node in graph.nodes if node.name == "norm_q"]
    assert norm.args[3] == "mxfp8"


def test_by_hand_the_runs_of_a_named_format_are_along_the_last_axis():
    x = torch.randn(4, 40, 3, 5)
    assert torch.equal(quantize(x, "mxfp8"), quantize(x.reshape(-1, 5), "mxfp8").view_as(x))
    assert not torch.equal(quantize(x, "mxfp8"), quantize(x, "mxfp8[1:32]"))


@pytest.mark.parametrize("spec", ["bfp8[c:4]", "e4m3[4x2]", "mxfp8", "nf4"])
def test_a_step_rounds_as_the_graph_does(spec):
    torch.manual_seed(0)
    model = Both()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lp, _ = convert(model, optimizer, f"W={spec} G={spec} M={spec} rounding=nearest")
    lp(X).square().mean().backward()
    optimizer.step()
    axes = {"conv.weight": 1, "up.weight": 0, "fc.weight": 1}
    for name, parameter in lp.named_parameters():
        format = swalp_fx.parse(spec).of_tensor(parameter.dim(), axes.get(name, 1))
        assert not torch.equal(parameter, before.get_parameter(name))
        if spec.startswith(("bfp", "mxfp")):
            assert torch.equal(quantize(parameter, format), parameter)
        else:
            torch.testing.assert_close(quantize(parameter, format), parameter, rtol=2.0**-20, atol=0)


def test_a_parameter_that_a_block_does_not_fit_is_named_before_anything_is_changed():
    model = Both()
    with pytest.raises(ConvertError, match=r"parameter fc.weight has 2 dimensions, and bfp8\[3\] needs 4") as error:
        convert(model, None, "W=bfp8[3]")
    assert "Rule('fc.weight', W='float')" in str(error.value)
    assert torch.equal(model(X), model(X))
    rule = swalp_fx.Rule("fc.weight", W="float")
    convert(model, None, swalp_fx.Recipe.parse("W=bfp8[3]", rules=(rule,)))


def test_a_bias_in_runs_along_the_second_axis_is_one_block():
    made = rewritten(nn.Linear(64, 64), "mxfp8[1:32]", torch.randn(2, 64))
    found = {node.name: node.args[3] for node in made.graph.nodes if "quantize_weight" in str(node.target)}
    assert found == {"weight_q": "mxfp8[1:32]", "bias_q": "mxfp8[]"}


@pytest.mark.parametrize("role", ["G", "M", "V", "master", "average"])
def test_so_is_one_that_the_block_of_another_role_does_not_fit(role):
    with pytest.raises(
        ConvertError, match=r"parameter fc.weight has 2 dimensions, and bfp8\[3\] needs 4; give"
    ) as error:
        convert(Both(), None, f"W=float {role}=bfp8[3]")
    assert f"{role}='float'" in str(error.value) or f"give {role} another format" in str(error.value)


def test_by_hand_an_axis_has_to_be_named():
    x = torch.randn(4, 8)
    with pytest.raises(
        swalp_fx.FormatError, match=r"\[c:4\] is along an axis that a tensor does not know; name it: \[-1:4\]"
    ):
        quantize(x, "bfp8[c:4]")
    with pytest.raises(RuntimeError, match="the block has 2 axes, and x 1; use a tensor with more"):
        quantize(x[0], "e4m3[4x2]")
    assert torch.equal(quantize(x, "e4m3[4x2]"), quantize(x, "e4m3[0:4,1:2]"))


# ---- axes shorter than a run ---------------------------------------------------------------------


def warned(model, recipe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(model, None, recipe)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("role", ["W", "G", "M", "V"])
def test_runs_longer_than_an_axis_are_warned_of_in_each_role_of_a_parameter(role):
    (message,) = warned(nn.Conv2d(8, 4, 1, bias=False), f"{role}=bfp4[-1:128]")
    assert message.startswith("weight in bfp4[-1:128]: 12.0 bits an element, not 4.0625,")


def test_runs_on_a_kernel_are_warned_of_with_their_real_bits_and_the_remedy():
    with torch.device("meta"):
        resnet50, alike = torchvision.models.resnet50(), torchvision.models.resnet50()
    first, others = warned(resnet50, "W=int4[-1:128]")
    assert first == (
        "conv1.weight in int4[-1:128]: 8.6 bits an element, not 4.25, since an axis is shorter than a run and each "
        "run has a scale; give a rule, such as Rule('conv1.weight', W='int4[0]')"
    )
    assert others == (
        "layer*.*.conv*.weight (48), layer*.0.downsample.0.weight (4) in int4[-1:128]: 25.7 bits an element, not 4.25, "
        "since an axis is shorter than a run and each run has a scale; use int4[c:128]"
    )
    rules = tuple(swalp_fx.Rule(f"layer1.{i}.conv2", W="int4[0]") for i in range(3))
    first = swalp_fx.Rule("conv1.weight", W="int4[0]")
    assert warned(alike, swalp_fx.Recipe.parse("W=int4[c:128]", rules=(first, *rules))) == []


@pytest.mark.parametrize("spec", ["mxfp8", "nvfp4[-1:4]", "bfp8[0]", "e4m3[128x128]", "int4[-1:128]~up", "fixed8.6"])
def test_rows_that_are_shorter_than_a_run_are_one_scale_each_and_no_fault(spec):
    assert warned(nn.Sequential(nn.Linear(12, 5), nn.LayerNorm(5)), spec) == []


def test_channels_that_are_fewer_than_a_run_are_warned_of():
    (depthwise,) = warned(nn.Conv2d(8, 8, 3, groups=8), "bfp8[0] W=float G=mxfp8 M=mxfp8")
    assert depthwise.startswith("weight in mxfp8: 16.0 bits an element, not 8.25, since")
    assert depthwise.endswith("such as Rule('weight', G='mxfp8[0]', M='mxfp8[0]')")


class Bare(nn.Module):
    """A convolution without a layer: nothing says of its weight which axis is contracted."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.weight)


class BareCheckpointed(Bare):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Bare, BareCheckpointed])
@pytest.mark.parametrize("spec, along", [("mxfp8", "mxfp8[1:32]"), ("int4[c:2]", "int4[1:2]")])
def test_a_convolutions_weight_that_no_convolution_holds(spec, along, kind):
    text = f"weight is the weight of a conv2d, which contracts its axis 1, .* name the axis: rules=[weight W={along}]"
    with pytest.warns(UserWarning, match=text.replace("[", r"\[")):
        rewritten(kind(), f"W={spec}", X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewritten(kind(), f"W={spec} rules=[weight W={along}]", X)
        rewritten(Bare(), "W=bfp8[0]", X)
        rewritten(Both(), f"W={spec}", X)
