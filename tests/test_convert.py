"""``convert``, and the module it returns as a citizen of PyTorch."""

import copy
import io
import pickle

import pytest
import shapes
import torch
from torch import nn

from swalp_fx import FormatError, Recipe, RecipeError, quantize
from swalp_fx.capture import ConvertError
from swalp_fx.convert import Converted, convert
from swalp_fx.passes import RewrittenModule

kinds = pytest.mark.parametrize("kind", shapes.ALL, ids=lambda kind: kind.__name__)


def _run(module, inputs, seed=0):
    torch.manual_seed(seed)
    return module(*inputs)


def _equal(a, b):
    leaves = [torch.utils._pytree.tree_leaves(nest) for nest in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*leaves, strict=True))


@kinds
def test_keys_and_tensors_are_the_models(kind):
    model, _ = shapes.made(kind)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    module, _ = convert(model)
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == before
    assert list(module.state_dict()) == list(before)
    assert [*map(id, module.parameters())] == [*map(id, model.parameters())]
    assert [name for name, _ in module.named_modules()] == [name for name, _ in model.named_modules()]


@kinds
def test_the_models_own_structure_is_not_changed(kind):
    model, inputs = shapes.made(kind)
    copied = copy.deepcopy(model)
    described = repr(model)
    module, _ = convert(model)
    module.eval()
    module.train()
    assert repr(model) == described
    for module, other in zip(model.modules(), copied.modules(), strict=True):
        assert type(module) is type(other) and vars(module).keys() == vars(other).keys()
    assert _equal(_run(model, inputs), _run(copied, inputs))


@kinds
def test_copies_and_pickles_compute_the_same(kind):
    module, _ = convert(shapes.made(kind)[0], recipe="bfp6[0]")
    _, inputs = shapes.made(kind)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stored, weights_only=False)]
    for training in (False, True):
        for each in (module, *others):
            each.train(training)
        before = [copy.deepcopy(each) for each in others]
        expected = _run(copy.deepcopy(module), inputs)
        for other in before:
            assert isinstance(other, RewrittenModule)
            assert list(other.state_dict()) == list(module.state_dict())
            assert _equal(_run(other, inputs), expected)


def test_a_copy_shares_nothing_and_a_shallow_copy_all():
    module, _ = convert(shapes.Tied())
    deep, shallow = copy.deepcopy(module), copy.copy(module)
    assert {*map(id, deep.parameters())}.isdisjoint(map(id, module.parameters()))
    assert deep.first.weight is deep.second.weight
    assert [*map(id, shallow.parameters())] == [*map(id, module.parameters())]


def test_state_round_trips_with_the_float_model():
    model, _ = shapes.made(shapes.Convnet)
    module, _ = convert(shapes.Convnet())
    module.load_state_dict(model.state_dict())
    assert _equal(module.state_dict(), model.state_dict())
    shapes.Convnet().load_state_dict(module.state_dict())


def test_training_draws_and_evaluation_rounds_to_nearest():
    module, _ = convert(shapes.made(shapes.PreResNet)[0], recipe="bfp6[0]")
    _, inputs = shapes.made(shapes.PreResNet)
    first = _run(module, inputs, seed=1)
    assert torch.equal(_run(module, inputs, seed=1), first)
    assert not torch.equal(_run(module, inputs, seed=2), first)
    module.eval()
    assert torch.equal(_run(module, inputs, seed=1), _run(module, inputs, seed=2))
    nearest, _ = convert(shapes.made(shapes.PreResNet)[0], recipe="bfp6[0] rounding=nearest")
    nearest.load_state_dict(module.state_dict())
    assert torch.equal(nearest.eval()(*inputs), module(*inputs))


def test_a_layer_computes_what_algorithm_2_says():
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    x = torch.randn(2, 5)
    module, _ = convert(model, recipe="W=bfp4 A=bfp5 E=bfp6 rounding=nearest")
    first, second = (quantize(layer.weight, "bfp4").detach() for layer in (model[0], model[2]))
    hidden = quantize(torch.relu(quantize(x @ first.T, "bfp5")), "bfp5")
    error = torch.randn(2, 3)
    y = module(x)
    y.backward(error)
    assert torch.equal(y, hidden @ second.T)
    signal = quantize(quantize(error @ second, "bfp6") * (hidden > 0), "bfp6")
    assert torch.equal(model[2].weight.grad, error.T @ hidden)
    assert torch.equal(model[0].weight.grad, signal.T @ x)


def test_train_and_eval_reach_the_model():
    model = shapes.Droops()
    module, _ = convert(model)
    module.eval()
    assert not any(each.training for each in (*model.modules(), *module.modules()))
    module.train()
    assert all(each.training for each in (*model.modules(), *module.modules()))


def test_a_hook_on_the_module_is_not_the_models():
    model, inputs = shapes.made(shapes.Convnet)
    module, _ = convert(model)
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    model(*inputs)
    assert seen == []
    module(*inputs)
    assert seen == [1]


def test_constants_of_the_trace_move_with_the_module_and_add_no_key():
    module, _ = convert(shapes.Branchy())
    assert module._tensor_constant0.device.type == "cpu"
    assert module.to("meta")._tensor_constant0.device.type == "meta"
    assert "_tensor_constant0" not in module.state_dict()


@pytest.mark.parametrize("kind", [shapes.Convnet, shapes.Tied, shapes.Direct], ids=lambda kind: kind.__name__)
def test_it_compiles_whole(kind):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe="bfp6[0] rounding=nearest")
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = module(*inputs)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    found = compiled(*inputs)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(a.grad, b) for a, b in zip(module.parameters(), gradients, strict=True))


def test_checkpointing_redraws_the_same_bits():
    from torch.utils.checkpoint import checkpoint

    model, inputs = shapes.made(shapes.Tied)
    module, _ = convert(model, recipe="bfp4[0]")
    gradients = []
    for run in (lambda x: module(x), lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        torch.manual_seed(0)
        run(*inputs).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    assert _equal(*gradients)


def test_the_optimizer_takes_low_precision_steps():
    model, inputs = shapes.made(shapes.PreResNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    converted = convert(model, optimizer, recipe="bfp6")
    assert isinstance(converted, Converted)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        converted.module(*inputs).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(quantize(parameter.data, "bfp6"), parameter) for parameter in model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.dim() > 1)


def test_converting_changes_no_value_and_draws_no_number():
    model, _ = shapes.made(shapes.Convnet)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    convert(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert _equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def _bad(model, **arguments):
    return lambda: convert(model, **arguments)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (_bad(nn.Sequential(Branching())), ConvertError, r"cannot trace 0 \(Branching\): .*leaves=\[Branching\]"),
        (_bad(convert(shapes.Tied()).module), ConvertError, "the model is already converted"),
        (_bad(nn.Sequential(convert(shapes.Tied()).module)), ConvertError, "0 is already converted"),
        (_bad(shapes.Tied(), recipe="bfp99"), FormatError, "99"),
        (_bad(shapes.Tied(), recipe="nonsense"), FormatError, "nonsense"),
        (_bad(shapes.Tied(), recipe="bfp8 Z=bfp8"), RecipeError, "no role 'Z'"),
        (_bad(shapes.Tied(), recipe=8), RecipeError, "int"),
        (_bad(shapes.Tied(), optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())), ValueError, "not the model's"),
    ],
)
def test_bad_input_is_refused_before_anything_is_changed(call, kind, message):
    with pytest.raises(kind, match=message) as failure:
        call()
    assert "\n" not in str(failure.value)


class Heads(nn.Module):
    """Branches on its training flag, and on a block's, which may differ."""

    def __init__(self):
        super().__init__()
        self.block, self.head, self.auxiliary = Half(), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = self.block(x)
        return self.head(x), self.auxiliary(x * torch.tensor(2.0)) if self.training else None


class Half(nn.Module):
    def forward(self, x):
        return x * torch.tensor(0.5) if self.training else x


def test_a_branch_on_a_training_flag_follows_the_flag():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(4, 6)
    module, _ = convert(model, recipe="float W=bfp8 A=bfp8")
    expected = copy.deepcopy(model)
    for parameter in expected.parameters():
        parameter.data = quantize(parameter.data, "bfp8")
    for flags in ((True, True), (False, False), (True, False), (False, True)):
        for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
            other.train(flags[0]).block.train(flags[1])
            expected.train(flags[0]).block.train(flags[1])
            assert other(x)[0].sub(expected(x)[0]).abs().max() < 0.1
            assert (other(x)[1] is None) is not flags[0]


def test_constants_of_every_branch_move_with_the_module():
    module, _ = convert(Heads())
    module.to("meta").eval()
    assert module._tensor_constant0.device.type == "meta"


def test_a_refused_optimizer_is_left_alone():
    model, other = shapes.Tied(), torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError):
        convert(model, other)
    assert not other._optimizer_step_pre_hooks
    convert(model)


def test_a_leaf_of_the_user_is_called_whole_and_survives_a_pickle():
    model = nn.Sequential(nn.Linear(3, 3), Branching())
    module, _ = convert(model, recipe=Recipe.parse("bfp8"), leaves=[Branching])
    x = torch.randn(2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(module)).eval()(x), module.eval()(x))
