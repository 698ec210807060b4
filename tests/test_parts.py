"""Fallback: what of a model can be captured is rewritten, the rest is named, and the whole computes the same."""

import copy
import pickle

import pytest
import torch
from torch import nn

from swalp_fx import ConvertError, Recipe, RecipeError, RewrittenModule, Rule, check, convert, quantize, report
from swalp_fx.passes.parts import parts_of

pytestmark = pytest.mark.filterwarnings("ignore:.*Rewritten instead")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return torch.relu(self.norm(self.layer(x)))


class Chooser(nn.Module):
    """Branches on a value; holds a block, a bare layer, one layer twice, a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.LSTM(6, 6)])
        self.again = self.layers[0]
        self.by_hand = [self.block]
        self.drop = nn.Dropout()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        x = self.block(x)
        if x.sum() > 1e6:
            return x
        x, _ = self.layers[1](self.drop(self.layers[0](x)))
        return self.again(self.by_hand[0](x)) * self.scale


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.chooser, self.last = nn.Linear(6, 6), Chooser(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.chooser(self.first(x)))


def _made(kind=Chooser):
    torch.manual_seed(0)
    return kind(), torch.randn(4, 6)


@pytest.mark.parametrize("kind", [Chooser, Inside])
def test_the_whole_computes_the_same(kind):
    model, x = _made(kind)
    assert check(model, x)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 3), nn.BatchNorm1d(6), nn.PReLU(), nn.LSTM(6, 3), nn.TransformerEncoderLayer(6, 2, 8)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_bare_layer_is_a_graph_of_one_call(layer):
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, 6)
    assert check(layer, x)
    seen.clear()
    module, _ = convert(layer, recipe="bfp4")
    module(x)
    assert seen == [1] and list(module.state_dict()) == list(layer.state_dict())


def test_a_bare_layer_computes_with_its_quantized_weights():
    layer, x = nn.Linear(6, 3), torch.randn(4, 6)
    module, _ = convert(layer, recipe="bfp4")
    expected = nn.functional.linear(x, quantize(layer.weight, "bfp4"), quantize(layer.bias, "bfp4"))
    assert torch.equal(module.eval()(x), expected)


def test_the_largest_modules_are_rewritten_in_place_of_themselves():
    model, x = _made()
    before = repr(model)
    module, _ = convert(model, recipe="bfp6")
    assert type(module) is Chooser and repr(model) == before
    assert parts_of(module).rewritten == ("block", "layers.0", "layers.1")
    assert isinstance(module.block, RewrittenModule) and module.by_hand[0] is module.block
    assert module.again is module.layers[0] and not isinstance(model.block, RewrittenModule)
    assert list(module.state_dict()) == list(model.state_dict())
    assert [*map(id, module.parameters())] == [*map(id, model.parameters())]
    assert module(x).shape == (4, 6)


def test_what_stayed_in_float_is_told_with_the_reason():
    with pytest.warns(UserWarning, match=r"cannot trace Chooser: it branches .*Rewritten instead: 3 of its submodules"):
        module, _ = convert(_made()[0])
    text = report(module, torch.randn(4, 6))
    assert "the model itself, outside of its rewritten modules: cannot trace Chooser: it branches" in text
    assert "  scale: never read by a graph" in text
    rows = [line.split()[:3] for line in text.splitlines()]
    assert ["block.layer", "Linear", "4x6"] in rows and ["layers.1", "LSTM", "4x6,"] in rows


def test_what_is_read_outside_of_the_parts_is_told():
    class Shared(Chooser):
        def forward(self, x):
            return nn.functional.linear(super().forward(x), self.block.layer.weight)

    module, _ = convert(_made(Shared)[0])
    told = [line for line in report(module, torch.randn(4, 6)).splitlines() if "reads it outside" in line]
    assert told == [
        "  scale, where mul reads it outside of the rewritten modules",
        "  block.layer.weight, where linear reads it outside of the rewritten modules",
    ]


def test_copies_and_pickles_compute_the_same():
    model, x = _made(Inside)
    module, _ = convert(model, recipe="bfp6")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x), module.eval()(x))
        assert isinstance(other.chooser.block, RewrittenModule)


def test_rules_name_the_whole_model():
    recipe = Recipe.parse("bfp8", rules=(Rule("chooser.block.layer", weight="bfp4"), Rule("*.scale", weight="float")))
    module, _ = convert(_made(Inside)[0], recipe=recipe)
    assert "'bfp4'" in module.chooser.block.code and "'bfp4'" not in module.first.code
    with pytest.raises(RecipeError, match=r"rule .block. matches nothing .*chooser\.block"):
        convert(_made(Inside)[0], recipe=Recipe.parse("bfp8", rules=(Rule("block", weight="bfp4"),)))
    again = pickle.loads(pickle.dumps(module))
    assert again.chooser.block.code == module.chooser.block.code


def test_the_optimizer_trains_what_both_share():
    model, x = _made(Inside)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, _ = convert(model, optimizer, recipe="bfp6")
    module(x).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(quantize(p.detach(), "bfp6"), p) for p in module.parameters())


def test_a_part_tells_what_it_knows_of_itself_but_does_not_compute_in_float():
    class Wide(nn.Sequential):
        width = 6

        def features(self, x):
            return self[0](x)

    module, _ = convert(Wide(nn.Linear(6, 6)))
    assert module.width == 6
    with pytest.raises(AttributeError, match="features"):
        module.features(torch.randn(4, 6))
    with pytest.raises(ConvertError, match="rewritten whole, and its layers by themselves would compute in float"):
        list(module)
    with pytest.raises(ConvertError, match="rewritten whole"):
        module[0]


def test_what_has_nothing_to_rewrite_is_refused():
    class Empty(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConvertError, match="cannot trace Empty"):
        convert(Empty())


def test_what_is_rewritten_in_parts_is_already_converted():
    module, _ = convert(_made()[0])
    with pytest.raises(ConvertError, match="block is already converted"):
        convert(module)
