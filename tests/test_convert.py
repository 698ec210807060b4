"""``convert``: its changes, the things it leaves alone, its results and its errors."""

import copy
import pickle
import re
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import shapes
import torch
import torch.nn.functional as F
from shapes import equal, run
from torch import distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from swalp_fx import (
    ConvertError,
    FormatError,
    NotRewritten,
    Recipe,
    RecipeError,
    check,
    draw,
    in_float,
    measure,
    nodes,
    quantize,
    report,
    restore,
)
from swalp_fx.capture import conversion_of
from swalp_fx.converting import Converted, convert

kinds = pytest.mark.parametrize("kind", shapes.ALL, ids=lambda kind: kind.__name__)


@kinds
def test_the_model_itself_is_converted_and_restored_as_it_was(kind):
    model, inputs = shapes.made(kind)
    copied = copy.deepcopy(model)
    described = repr(model)
    module, _ = convert(model)
    assert module is model and type(model) is kind and repr(model) == described
    module.eval()
    module.train()
    assert restore(model) is model
    for module, other in zip(model.modules(), copied.modules(), strict=True):
        assert type(module) is type(other) and vars(module).keys() == vars(other).keys()
    assert equal(run(model, inputs), run(copied, inputs))


def test_in_float_computes_in_float_while_it_holds():
    model, inputs = shapes.made(shapes.PreResNet)
    due = run(copy.deepcopy(model), inputs)
    module, _ = convert(model, recipe="bfp4")
    low = run(module, inputs)
    with pytest.raises(KeyError), in_float(module) as floating:
        assert floating is module and torch.equal(run(module, inputs), due)
        raise KeyError
    assert torch.equal(run(module, inputs), low) and not torch.equal(low, due)
    assert len(module.graphs) == 1
    for other in (in_float, restore):
        with pytest.raises(ConvertError, match="takes a converted module, and this Linear is none; convert it first"):
            with_it = other(nn.Linear(2, 2))
            with with_it:
                pass


def test_in_float_may_be_nested_and_shared_by_threads():
    model, inputs = shapes.made(shapes.Tied)
    module, _ = convert(model, recipe="bfp4 rounding=nearest")
    low = run(module, inputs)
    with in_float(module):
        due = run(module, inputs)
        with in_float(module):
            assert torch.equal(run(module, inputs), due)
        assert torch.equal(run(module, inputs), due)
    assert torch.equal(run(module, inputs), low)
    one, other = in_float(module), in_float(module)
    with one:
        other.__enter__()
    assert torch.equal(run(module, inputs), due)
    other.__exit__(None, None, None)
    assert torch.equal(run(module, inputs), low) and len(module.graphs) == 1


@pytest.mark.parametrize("early", [False, True])
def test_what_is_changed_while_it_is_in_float_stays(early):
    module, x = convert(nn.Sequential(nn.Linear(4, 4)), recipe="bfp4 rounding=nearest").module, torch.randn(3, 4)
    if early:
        module.forward = lambda x: x * 3
        module(x)
    with in_float(module):
        module.forward = lambda x: module[0](x) * 2
        assert torch.equal(module(x), F.linear(x, module[0].weight, module[0].bias) * 2)
        module[0] = nn.Linear(4, 4)
    weight, bias = (quantize(parameter.detach(), "bfp4") for parameter in module.parameters())
    assert torch.equal(module(x), quantize(F.linear(x, weight, bias), "bfp4") * 2)
    with in_float(module):
        del module.forward
    assert torch.equal(module(x), F.linear(x, weight, bias))
    module[0](x)
    (graph,) = [graph for graph in module.graphs if graph.path == "0"]
    assert "quantize_weight" in graph.code


def test_restored_while_it_is_in_float_it_stays_float():
    model, inputs = shapes.made(shapes.Tied)
    module, _ = convert(model, recipe="bfp4")
    with in_float(module):
        due = run(module, inputs)
        restore(module)
    assert torch.equal(run(module, inputs), due)
    convert(module, recipe="bfp4")
    with in_float(module):
        convert(module, recipe="bfp8")
    assert str(conversion_of(module).recipe) == "bfp8"


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


def test_converting_changes_no_value_and_draws_nothing_but_a_seed():
    model, _ = shapes.made(shapes.Convnet)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    convert(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=0)
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
        (lambda converted: check(converted, X), ConvertError),
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
def test_a_cell_that_is_run_twice_says_how_to_convert_anew(held, recwarn):
    model = shapes.Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = convert(model, optimizer).swalp if held else convert(model, optimizer) and None
    with pytest.raises(ConvertError, match=r"the model is already converted; call swalp_fx.restore on it first"):
        convert(model, optimizer)
    module, swalp = convert(restore(model), optimizer)
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
        convert(restore(model), optimizer, recipe=recipe)
    (warning,) = caught
    assert str(warning.message).startswith(f"SWALP(bfp8[0], attached to SGD, {described}) is detached now")
    assert warning.filename == __file__ and earlier.n_averaged == averages


def test_an_optimizer_of_another_models_swalp_is_left_alone():
    model = shapes.Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, swalp = convert(model, optimizer)
    other = nn.Sequential(shapes.Tied())
    other[0].first.weight, other[0].first.bias, other[0].second.bias = model.parameters()
    other[0].second.weight = model.first.weight
    with pytest.raises(ValueError, match=r"SGD is already attached to another SWALP; call that one's detach\(\) first"):
        convert(other, optimizer)
    convert(other)  # nothing of it stayed converted
    with pytest.raises(FormatError):
        convert(restore(model), optimizer, recipe="bfp99")
    convert(model)
    _step(optimizer, module)
    assert swalp.state_dict()["step"] == 1


def test_a_module_and_its_swalp_say_what_they_are():
    model, inputs = shapes.made(shapes.PreResNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = repr(model)
    module, swalp = convert(model, optimizer, recipe="bfp8[0] E=float")
    assert repr(module) == before and str(module.graphs).startswith("no graph yet: call the module once, or give")
    module(*inputs)
    (graph,) = module.graphs
    assert (graph.code.count("quantize_weight("), graph.code.count("quantize_output(")) == (18, 19)
    lines = str(module.graphs).splitlines()
    assert lines[0] == "# PreResNet: PreResNet, train mode"
    assert lines[1].startswith("def forward(self, key, conv1_weight")
    assert [re.sub(r";  [a-z0-9_ =]+ = None$", "", line) for line in graph.code.strip().splitlines()] == lines[1:]
    assert repr(swalp) == f"SWALP({swalp.recipe}, attached to SGD, 0 steps, no average yet)"
    module(*inputs).sum().backward()
    optimizer.step()
    swalp.update_average()
    assert repr(swalp) == f"SWALP({swalp.recipe}, attached to SGD, 1 steps, average of 1)"
    swalp.detach()
    assert "attached to no optimizer" in repr(swalp)


def _compiled(model):
    model.compile(backend="eager")
    return model


def _bad(model, **arguments):
    return lambda: convert(model, **arguments)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
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
    """An object that pytrees do not know."""

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


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_model_takes_and_returns_its_layers_are_rewritten(way):
    model, x = Calling(WAYS[way][0]), WAYS[way][1]
    assert check(model, x)
    kind = type(model(x))
    module, _ = convert(model)
    assert type(module(x)) is kind
    (graph,) = module.graphs
    weights = graph.graph.find_nodes(op="call_function", target=nodes.quantize_weight)
    assert [node.args[3] for node in weights] == ["bfp8[0]"] * 2


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.Identity(), nn.Sequential(nn.Flatten(), nn.Dropout())], ids=lambda model: str(model)
)
def test_a_model_without_layers_computes_what_it_computed(model):
    module, swalp = convert(model)
    assert torch.equal(module.eval()(X), X)
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
    assert check(model, X)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, swalp = convert(model, optimizer, recipe="bfp4")
    module(X).sum().backward()
    optimizer.step()
    swalp.update_average()
    averaged = swalp.averaged_model().state_dict()
    for name in ("steps", "mask", "phase"):
        assert torch.equal(model.state_dict()[name], before[name]) and torch.equal(averaged[name], before[name])
    assert not torch.equal(model.layer.weight, before["layer.weight"])
    rows = [line.split() for line in str(report(module)).splitlines()]
    assert ["steps", "parameter", "-", "3", "64.00"] in rows


class Half(nn.Module):
    def forward(self, x):
        return x * torch.tensor(0.5) if self.training else x


class Heads(nn.Module):
    """Branches on its training flag, and on a block's, which may differ."""

    def __init__(self):
        super().__init__()
        self.block, self.head, self.auxiliary = Half(), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = self.block(x)
        return self.head(x), self.auxiliary(x * torch.tensor(2.0)) if self.training else None


def test_a_branch_on_a_training_flag_follows_the_flag():
    model, x = Heads(), torch.randn(4, 6)
    expected = copy.deepcopy(model)
    module, _ = convert(model, recipe="float W=bfp8 A=bfp8")
    for parameter in expected.parameters():
        parameter.data = quantize(parameter.data, "bfp8")
    others = module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for flags in ((True, True), (False, False), (True, False), (False, True)):
        expected.train(flags[0]).block.train(flags[1])
        for other in others:
            other.train(flags[0]).block.train(flags[1])
            assert other(x)[0].sub(expected(x)[0]).abs().max() < 0.1
            assert (other(x)[1] is None) is not flags[0]


def test_a_refused_optimizer_is_left_alone():
    model, other = shapes.Tied(), torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError):
        convert(model, other)
    assert not other._optimizer_step_pre_hooks
    convert(model)


# example_inputs


def test_with_example_inputs_there_are_graphs_at_once_and_nothing_else_is_changed():
    model, inputs = shapes.made(shapes.Convnet)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    lp, _ = convert(model, example_inputs=tuple(inputs), seed=0)
    assert len(lp.graphs) == 1 and equal(model.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    lp(*inputs)
    assert len(lp.graphs) == 1
    named, _ = convert(shapes.OptionalInput(), example_inputs={"x": torch.ones(4, 6), "invert": True})
    assert "neg" in named.graphs[0].code


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        self.calls += 1
        if x.shape[1] != 3:
            raise KeyError("three, please")
        return self.layer(x)


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ((torch.ones(2, 4),), KeyError, "three, please"),
        ((), TypeError, "missing 1 required positional argument: 'x'"),
        ({"y": X}, TypeError, "unexpected keyword argument 'y'"),
        ((torch.ones(2, 3, dtype=torch.int64),), RuntimeError, "dtype"),
    ],
)
def test_where_example_inputs_raise_so_does_convert_and_nothing_stays_converted(inputs, kind, message):
    model = Choosing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        convert(model, optimizer, example_inputs=inputs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert model.calls == 0 and not optimizer._optimizer_step_pre_hooks
    lp, _ = convert(model, optimizer, example_inputs=(X,))
    assert lp.calls == 0


def test_a_models_own_error_is_its_own_before_and_after_a_graph():
    lp, _ = convert(Choosing())
    for _ in range(2):
        with pytest.raises(KeyError, match="three, please"):
            lp(torch.ones(2, 4))
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            lp()
        assert lp(X).shape == (2, 3)
    assert lp.graphs[-1].calls >= 1


class Forbidden(nn.Module):
    """No graph holds any of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    @torch.compiler.disable
    def forward(self, x):
        return x @ self.weight


def test_a_forward_that_no_graph_holds_is_named():
    lp, _ = convert(Forbidden())
    line = Forbidden.forward.__wrapped__.__code__.co_firstlineno if hasattr(Forbidden.forward, "__wrapped__") else ""
    message = rf"Forbidden computed in float, since no graph holds anything of its forward \(.*test_convert.py:{line}"
    with pytest.raises(NotRewritten, match=message):
        lp(X)


class Storing(nn.Module):
    """Returns at its second call the result of its first."""

    def __init__(self):
        super().__init__()
        self.layer, self.stored = nn.Linear(3, 3), {}

    def forward(self, x):
        if "y" not in self.stored:
            self.stored["y"] = self.layer(x)
        return self.stored["y"]


def test_what_was_computed_before_may_be_given_again():
    lp, _ = convert(Storing())
    assert lp(X) is lp(X)


def test_a_resumed_run_of_a_converted_model_needs_torchs_random_state_too():
    def converted():
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return *convert(model, optimizer, recipe="bfp4[0]"), optimizer

    def trained(parts, steps):
        lp, _, optimizer = parts
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            lp(x).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    first = converted()
    trained(first, range(3))
    states, random = copy.deepcopy([part.state_dict() for part in first]), torch.get_rng_state()
    trained(first, range(3, 6))

    torch.manual_seed(1)
    second = converted()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    trained(second, range(3, 6))
    assert all(map(torch.equal, second[0].parameters(), first[0].parameters()))
