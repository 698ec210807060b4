"""``convert``: what it changes and what it leaves alone, what it computes, and what it refuses."""

import copy
import pickle
import re
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import shapes
import torch
from shapes import equal, run
from torch import distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from swalp_fx import FormatError, Recipe, RecipeError, check, draw, measure, quantize, report
from swalp_fx import ConvertError
from swalp_fx.convert import Converted, convert

kinds = pytest.mark.parametrize("kind", shapes.ALL, ids=lambda kind: kind.__name__)


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
    assert equal(run(model, inputs), run(copied, inputs))


def test_training_draws_and_evaluation_rounds_to_nearest():
    module, _ = convert(shapes.made(shapes.PreResNet)[0], recipe="bfp6[0]")
    _, inputs = shapes.made(shapes.PreResNet)
    first = run(module, inputs, seed=1)
    assert torch.equal(run(module, inputs, seed=1), first)
    assert not torch.equal(run(module, inputs, seed=2), first)
    module.eval()
    assert torch.equal(run(module, inputs, seed=1), run(module, inputs, seed=2))
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
    assert equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (lambda converted: converted(X), TypeError),
        (lambda converted: converted.train(), AttributeError),
        (lambda converted: torch.optim.SGD(converted.parameters()), AttributeError),
        (lambda converted: torch.save(converted.state_dict(), "nowhere"), AttributeError),
        (lambda converted: report(converted), ConvertError),
        (lambda converted: measure(converted, [X]), ConvertError),
        (lambda converted: draw(converted, "nowhere.dot"), ConvertError),
        (lambda converted: check(converted, X), AttributeError),
    ],
)
def test_what_convert_returns_is_to_be_unpacked(use, kind):
    converted = convert(shapes.Tied())
    with pytest.raises(kind, match=r"unpack what convert returns: lp, swalp = swalp_fx.convert\(...\)"):
        use(converted)
    module, swalp = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert module(torch.ones(2, 6)).shape == (2, 6) and swalp.n_averaged == 0


def _step(optimizer, module):
    module(torch.ones(2, 6)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("held", [True, False])
def test_a_cell_that_is_run_twice_converts_anew(held, recwarn):
    model = shapes.Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = convert(model, optimizer).swalp if held else convert(model, optimizer) and None
    module, swalp = convert(model, optimizer)
    _step(optimizer, module)
    assert swalp.state_dict()["step"] == 1 and len(optimizer._optimizer_step_pre_hooks) == 1
    assert not held or before.state_dict()["step"] == 0
    assert not recwarn.list


@pytest.mark.parametrize(
    ("recipe", "steps", "averages", "described"),
    [
        ("bfp8[0]", 2, 0, "2 steps, no average yet"),
        ("bfp8[0]", 1, 1, "1 steps, average of 1"),
        ("bfp4", 0, 0, "0 steps, no average yet"),
    ],
)
def test_converted_anew_it_says_what_the_earlier_swalp_had(recipe, steps, averages, described):
    model = shapes.Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, earlier = convert(model, optimizer, recipe="bfp8[0]")
    for _ in range(steps):
        _step(optimizer, module)
    for _ in range(averages):
        earlier.update_average()
    with pytest.warns(UserWarning) as caught:
        convert(model, optimizer, recipe=recipe)
    (warning,) = caught
    assert str(warning.message).startswith(f"SWALP(bfp8[0], attached to SGD, {described}) is detached now")
    assert warning.filename == __file__ and earlier.n_averaged == averages


def test_an_optimizer_of_another_models_swalp_is_left_alone():
    model = shapes.Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, swalp = convert(model, optimizer)
    with pytest.raises(ValueError, match=r"SGD is already attached to another SWALP; call that one's detach\(\) first"):
        convert(nn.Sequential(model), optimizer)
    with pytest.raises(FormatError):
        convert(model, optimizer, recipe="bfp99")
    _step(optimizer, module)
    assert swalp.state_dict()["step"] == 1


def test_a_module_and_its_swalp_say_what_they_are():
    model, inputs = shapes.made(shapes.PreResNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, swalp = convert(model, optimizer, recipe="bfp8[0] E=float")
    assert repr(module) == (
        "PreResNet rewritten for W=bfp8[0] A=bfp8[0] E=float G=bfp8[0] M=bfp8[0]: 18 weights, 19 outputs and 0 error "
        "signals are rounded, in train mode"
    )
    assert repr(module.eval()).endswith("in eval mode")
    assert (module.code.count("quantize_weight("), module.code.count("quantize_output(")) == (18, 19)
    first, *others = str(module).splitlines()
    assert first == repr(module) and "\n".join(others).startswith(repr(model)) and module.code in str(module)
    assert repr(swalp) == f"SWALP({swalp.recipe}, attached to SGD, 0 steps, no average yet)"
    module.train()(*inputs).sum().backward()
    optimizer.step()
    swalp.update_average()
    assert repr(swalp) == f"SWALP({swalp.recipe}, attached to SGD, 1 steps, average of 1)"
    swalp.detach()
    assert "attached to no optimizer" in repr(swalp)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def _compiled(model):
    model.compile(backend="eager")
    return model


def _bad(model, **arguments):
    return lambda: convert(model, **arguments)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (_bad(nn.Sequential(Branching())), ConvertError, r"cannot trace 0 \(Branching\): .*leaves=\[Branching\]"),
        (_bad(convert(shapes.Tied()).module), ConvertError, "the model is already converted"),
        (_bad(nn.Sequential(convert(shapes.Tied()).module)), ConvertError, "0 is already converted"),
        (_bad(lambda x: x), ConvertError, "cannot convert a function; pass a torch.nn.Module"),
        (_bad(nn.Linear), ConvertError, "cannot convert a type; pass a torch.nn.Module"),
        (_bad(nn.ModuleList([nn.Linear(2, 2)])), ConvertError, "ModuleList, .*the module that calls its layers"),
        (_bad(nn.Sequential(nn.LazyLinear(2))), ConvertError, r"parameter 0\.weight has no shape yet; run the model"),
        (_bad(_compiled(shapes.Tied())), ConvertError, "the model, which is compiled; convert first, then compile"),
        (_bad(nn.Sequential(_compiled(shapes.Tied()))), ConvertError, "0, which is compiled; convert first"),
        (_bad(torch.compile(shapes.Tied())), ConvertError, "the model, which is OptimizedModule; convert first"),
        (_bad(nn.Sequential(torch.compile(shapes.Tied()))), ConvertError, "0, which is OptimizedModule; convert first"),
        (_bad(nn.DataParallel(shapes.Tied())), ConvertError, "DataParallel; convert the module inside it, then wrap"),
        (
            _bad(nn.Sequential(nn.DataParallel(shapes.Tied()))),
            ConvertError,
            "0, which is DataParallel; convert the",
        ),
        (
            lambda: convert(nn.Sequential(torch.jit.script(nn.ReLU()))),
            ConvertError,
            "0, which is ScriptModule; convert the Python module it was made from",
        ),
        (_bad(shapes.Tied(), recipe="bfp99"), FormatError, "99"),
        (_bad(shapes.Tied(), recipe="nonsense"), FormatError, "nonsense"),
        (_bad(shapes.Tied(), recipe="bfp8 Z=bfp8"), RecipeError, "no role 'Z'"),
        (_bad(shapes.Tied(), recipe=8), RecipeError, "int"),
        (
            _bad(shapes.Tied(), optimizer="bfp8[0]"),
            TypeError,
            r"recipe is a keyword: convert\(model, optimizer, recipe='bfp8\[0\]'\)",
        ),
        (_bad(shapes.Tied(), optimizer=Recipe.parse("bfp8")), TypeError, "recipe is a keyword: .*recipe='bfp8'"),
        (
            _bad(convert(shapes.Tied())),
            ConvertError,
            "cannot convert a Converted; unpack what convert returns: lp, swalp",
        ),
        (_bad(shapes.Tied(), optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())), ValueError, "not the model's"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_bad_input_is_refused_before_anything_is_changed(call, kind, message):
    with pytest.raises(kind, match=message) as failure:
        call()
    assert "\n" not in str(failure.value)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WHOLE = "formats round whole parameters: wrap the converted module in DistributedDataParallel"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "DistributedDataParallel; convert the module inside it, then wrap the result"),
        (
            lambda model: fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu")),
            f"FullyShardedDataParallel; {WHOLE}",
        ),
        (lambda model: fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,))), f"FSDPModule; {WHOLE}"),
    ],
    ids=["DistributedDataParallel", "FullyShardedDataParallel", "fully_shard"],
)
def test_what_is_already_spread_over_processes_is_refused(wrap, message, inside):
    model = wrap(shapes.Tied())
    with pytest.raises(ConvertError, match=f"{'0' if inside else 'the model'}, which is {message}"):
        convert(nn.Sequential(model) if inside else model)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Outputs:
    logits: torch.Tensor
    name: str = "outputs"


class Opaque:
    """What no graph can hold: the model is rewritten in parts."""

    def __init__(self, value):
        self.value = value


class Calling(nn.Module):
    """Calls one layer in the way that it is given."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(3, 3), way

    def forward(self, x):
        return self.way(self.layer, x)


X = torch.ones(2, 3)
WAYS = {
    "returns a dict of all kinds": (lambda layer, x: {"y": layer(x), "name": "a", "size": x.shape, "none": None}, X),
    "returns a named tuple": (lambda layer, x: Pair(layer(x), x), X),
    "returns a dataclass": (lambda layer, x: Outputs(layer(x)), X),
    "returns an object": (lambda layer, x: Opaque(layer(x)), X),
    "returns a size": (lambda layer, x: layer(x).shape, X),
    "returns a string": (lambda layer, x: (layer(x), "done")[1], X),
    "returns nothing": (lambda layer, x: (layer(x), None)[1], X),
    "takes a dict": (lambda layer, x: layer(x["x"]) * x["scale"], {"x": X, "scale": 2}),
    "takes a dict and looks into it": (lambda layer, x: layer(x["x"]) if "x" in x else None, {"x": X}),
    "takes a dict and goes through it": (lambda layer, x: sum(map(layer, x.values())), {"a": X, "b": X}),
    "takes a list": (lambda layer, x: layer(x[0]) + x[1], [X, X]),
}


@pytest.mark.filterwarnings("ignore:.*Rewritten instead")
@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_model_takes_and_returns_its_layers_are_rewritten(way):
    model, x = Calling(WAYS[way][0]), WAYS[way][1]
    assert check(model, x)
    module, _ = convert(model)
    assert type(module(x)) is type(model(x))
    assert any(re.match(r"layer +Linear +W\w+ bfp8\[0\]", line) for line in report(module).splitlines())


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.Identity(), nn.Sequential(nn.Flatten(), nn.Dropout())], ids=lambda model: str(model)
)
def test_a_model_without_layers_computes_what_it_computed(model):
    module, swalp = convert(model)
    assert torch.equal(module.eval()(X), X)
    assert "outputs     0 of 0 rounded" in report(module)
    swalp.update_average()
    assert torch.equal(swalp.averaged_model()(X), X)


class Integers(nn.Module):
    """Parameters of dtypes that no format holds, beside a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False, True]), requires_grad=False)
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)

    def forward(self, x):
        return (self.layer(x) * self.steps * self.mask * self.phase).real


def test_parameters_of_other_dtypes_are_left_alone():
    model = Integers()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, swalp = convert(model, optimizer, recipe="bfp4")
    assert check(model, X)
    module(X).sum().backward()
    optimizer.step()
    swalp.update_average()
    averaged = swalp.averaged_model().state_dict()
    for name in ("steps", "mask", "phase"):
        assert torch.equal(model.state_dict()[name], before[name]) and torch.equal(averaged[name], before[name])
    assert not torch.equal(model.layer.weight, before["layer.weight"])
    rows = [line.split() for line in report(module).splitlines()]
    assert ["steps", "parameter", "-", "3"] in rows


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
