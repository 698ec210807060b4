"""Whatever a module can be: rewritten right, in both modes and under every placement, or refused by name."""

import copy
import re

import pytest
import shapes
import torch
import torch.nn.utils.prune
from tables import crossed
from torch import nn
from torch.nn.utils import parametrizations

from swalp_fx import ConvertError, Recipe, Rule, check, convert, quantize
from swalp_fx.passes import recipes_of_parameters

named = {"ids": lambda kind: kind.__name__}


def _layer(row):
    make, given, arity = row
    torch.manual_seed(0)
    return make(), torch.randn(given) if isinstance(given, tuple) else given, arity


# Their layers are others of the table.
BIG = ("Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerDecoderLayer")


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow) if type(row[0]()).__name__ in BIG else row for row in shapes.LAYERS],
    ids=lambda row: type(row[0]()).__name__,
)
def test_every_layer_with_parameters(row):
    layer, x, arity = _layer(row)
    assert check(shapes.Around(layer, arity), x)


@pytest.mark.parametrize(
    "row",
    [row if i % 8 == 0 else pytest.param(row, marks=pytest.mark.slow) for i, row in enumerate(shapes.LAYERS)],
    ids=lambda row: type(row[0]()).__name__,
)
def test_every_layer_by_itself(row):
    layer, x, arity = _layer(row)
    assert check(layer, *[x] * arity)


@pytest.mark.parametrize("kind", (*shapes.MORE, *shapes.PYTHON), **named)
def test_every_shape(kind):
    model, inputs = shapes.made(kind)
    found = check(model, *inputs)
    assert found and found.compared, found


PLACEMENTS = ("every", "compute", "compute+activation", "group")


@pytest.mark.parametrize(("kind", "placement"), crossed(shapes.MORE, PLACEMENTS))
def test_every_shape_is_one_graph_which_the_verifier_proves(kind, placement):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe=Recipe.parse("bfp8", placement=placement, quantize_logits=True))
    outputs = torch.utils._pytree.tree_leaves(module(*inputs))
    assert all(torch.isfinite(y).all() for y in outputs if isinstance(y, torch.Tensor))
    assert [each.broke for each in module.graphs] == [None]


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_what_derives_its_weight_in_a_hook_is_refused(norm):
    model = nn.Sequential(getattr(nn.utils, norm)(nn.Linear(3, 3)))
    with pytest.raises(ConvertError, match=rf"0: torch.nn.utils.{norm} .*use torch.nn.utils.parametrizations.{norm}"):
        convert(model)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_writes_into_its_weight_is_refused(kind):
    with pytest.raises(ConvertError, match=f"0: max_norm makes {kind.__name__} write into its weight.*max_norm=None"):
        convert(nn.Sequential(kind(5, 3, max_norm=1.0)))
    convert(nn.Sequential(kind(5, 3, max_norm=1.0)), recipe="bfp8 W=float")


@pytest.mark.parametrize("arguments, keywords", [((), {"max_norm": 1.0}), ((None, 1.0), {})])
def test_a_function_that_writes_into_a_weight_is_refused(arguments, keywords):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return nn.functional.embedding(x, self.table, *arguments, **keywords)

    module, _ = convert(Functional())
    with pytest.raises(ConvertError, match="the model writes into its parameter table"):
        module(torch.tensor([1, 2]))


# Modes


def test_an_error_in_a_block_leaves_no_mode_on():
    for kind in (shapes.AutocastBlock, shapes.NoGradBlock, shapes.InferenceBlock):
        module, _ = convert(kind())
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shapes"):
                module(torch.randn(4, 5))
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert module(torch.randn(4, 6)).requires_grad


def test_a_block_restores_the_mode_that_the_model_is_called_in():
    module, _ = convert(shapes.NoGradBlock())
    with torch.no_grad():
        assert not module(torch.randn(4, 6)).requires_grad
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert module(torch.randn(4, 6)).is_inference()


def test_a_weight_takes_its_gradient_wherever_it_is_first_read():
    model, inputs = shapes.made(shapes.NoGradBlock)
    module, _ = convert(model)
    module(*inputs).sum().backward()
    assert model.first.weight.grad is not None


COMPILED = (shapes.NoGradBlock, shapes.Rebound, shapes.UserFunctions)
COMPILED_SLOWLY = (shapes.AutocastBlock, shapes.Normed, shapes.Heads)


@pytest.mark.parametrize(
    "kind", [*COMPILED, *(pytest.param(kind, marks=pytest.mark.slow) for kind in COMPILED_SLOWLY)], **named
)
def test_it_compiles_whole(kind):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe="bfp8 rounding=nearest")
    eager = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        module.train(training)
        eager.train(training)
        found, expected = (
            [*torch.utils._pytree.tree_leaves(call(*inputs)), *owner.buffers()]
            for call, owner in ((compiled, module), (eager, eager))
        )
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


# Buffers


def test_the_update_of_a_buffer_is_not_rounded():
    rounded = {}
    for kind in (shapes.Rebound, shapes.Carried):
        model, inputs = shapes.made(kind)
        module, _ = convert(model, recipe="bfp4 rounding=nearest")
        module(*inputs)
        module(*inputs)
        for name, buffer in module.named_buffers():
            rounded[name] = torch.equal(quantize(buffer.float(), "bfp4"), buffer)
    assert rounded == {"mean": False, "calls": True, "hidden": True}  # a hidden state is an activation


def test_a_buffer_that_is_set_is_the_models():
    model, inputs = shapes.made(shapes.Rebound)
    module, _ = convert(model)
    module(*inputs)
    assert model.calls == 1 and torch.equal(module.state_dict()["mean"], model.mean) and model.mean.any()
    copied = copy.deepcopy(module)
    copied(*inputs)
    assert model.calls == 1 and copied.calls == 2


# Derived weights


def test_a_pruned_weight_is_rounded_before_its_mask():
    layer, x = nn.utils.prune.random_unstructured(nn.Linear(6, 3, bias=False), "weight", 0.5), torch.randn(4, 6)
    module, _ = convert(layer, recipe="bfp4")
    weight = quantize(layer.weight_orig, "bfp4") * layer.weight_mask
    assert torch.equal(module.eval()(x), nn.functional.linear(x, weight))


def test_what_a_layer_computes_with_is_rounded_and_what_it_is_derived_from_is_not():
    torch.manual_seed(0)
    layer, x = parametrizations.weight_norm(nn.Linear(6, 3, bias=False)), torch.randn(4, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    module, _ = convert(layer, optimizer, recipe="W=bfp4")
    assert torch.equal(module.eval()(x), x @ quantize(layer.weight, "bfp4").T)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    module.train()(x).sum().backward()
    optimizer.step()
    for parameter, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * parameter.grad)


def test_rules_name_a_derived_weight_by_its_layer():
    for rule in (Rule("spectral.weight", weight="bfp4"), Rule("*", kind="Linear", weight="bfp4")):
        model, inputs = shapes.made(shapes.Normed)
        module, _ = convert(model, recipe=Recipe.parse("bfp8", rules=(rule,)), example_inputs=tuple(inputs))
        (graph,) = module.graphs
        assert re.search(r"spectral\w*weight\w*_q = .*'bfp4'", graph.code), graph.code
    recipes = recipes_of_parameters(shapes.Normed(), Recipe.parse("bfp8"))
    floats = {name for name, recipe in recipes.items() if str(recipe.weight) == "float"}
    assert floats == {name for name in recipes if ".parametrizations." in name}
