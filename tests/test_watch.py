"""Runs that are not low precision say so: at the step, and at the average; runs that are stay silent."""

import copy
import pickle
import warnings

import pytest
import shapes
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from swalp_fx import SWALP, convert

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
FLOAT = (
    r"the gradients of SGD come from \w+ itself, in float; call the module that convert returned .*: lp\(x\), not model"
)


class Parts(nn.Module):
    """Branches on a value, so that its layers are rewritten one by one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() < 1e9 else x


def made(kind=shapes.Tied, recipe="bfp8[0]"):
    """(model, optimizer, module, swalp)"""
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Rewritten instead")
        return model, optimizer, *convert(model, optimizer, recipe=recipe)


def warnings_of(call, optimizer, steps=4, backward=lambda y: y.square().mean().backward()):
    """The warnings of a training loop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            backward(call(X))
            optimizer.step()
    return [str(each.message) for each in caught]


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def twice(call):
    return lambda x: call(x[:2]).sum() + call(x[2:]).sum()


CALLS = {
    "itself": lambda module: module,
    "distributed": DistributedDataParallel,
    "compiled": lambda module: torch.compile(module, backend="aot_eager"),
    "in a module": nn.Sequential,
    "accumulated": twice,
    "checkpointed": lambda module: lambda x: checkpoint(module, x, use_reentrant=False),
    "functional": lambda module: lambda x: torch.func.functional_call(module, dict(module.named_parameters()), (x,)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [shapes.Tied, Parts])
@pytest.mark.parametrize("call", CALLS)
def test_the_module_called_is_silent_and_the_model_called_in_its_place_warns_once(call, kind):
    model, optimizer, module, _ = made(kind)
    assert warnings_of(CALLS[call](module), optimizer) == []
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    model, optimizer, _, _ = made(kind)
    (warning,) = warnings_of(CALLS[call](model), optimizer)
    assert warning.startswith(f"the gradients of SGD come from {kind.__name__} itself, in float")
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("kind", [shapes.Tied, Parts])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_copies_made_together_watch_one_another(duplicate, kind):
    original = made(kind)
    model, optimizer, module, _ = duplicate(original)
    assert warnings_of(module, optimizer) == []
    (warning,) = warnings_of(model, optimizer)
    assert "in float" in warning
    assert warnings_of(original[2], original[1]) == []


def test_layers_called_by_hand_are_the_model():
    for call in (lambda model: lambda x: model.second(model.first(x)), lambda model: model.forward):
        model, optimizer, _, _ = made()
        assert len(warnings_of(call(model), optimizer)) == 1


def test_a_validation_between_epochs_does_not_hide_it():
    model, optimizer, module, _ = made()
    found = []
    for _ in range(2):
        found += warnings_of(model, optimizer, steps=3)
        module(X)
    assert len(found) == 1


def test_a_closure_is_watched_too():
    for number in (0, 1):
        model, optimizer, module, _ = made()
        call = (module, model)[number]

        def closure(call=call):
            call(X).square().mean().backward()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.step(closure)
        assert len(caught) == number


def by_hand(model):
    def set_gradients(_):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

    return set_gradients


def test_gradients_given_by_hand_and_steps_without_any_are_silent():
    model, optimizer, _, _ = made()
    assert warnings_of(lambda x: x, optimizer, backward=by_hand(model)) == []
    assert warnings_of(lambda x: x, optimizer, backward=lambda _: None) == []
    parameters = list(model.parameters())

    def backward(y):
        for parameter, gradient in zip(parameters, torch.autograd.grad(y.sum(), parameters), strict=True):
            parameter.grad = gradient

    assert warnings_of(lambda x: model(x), optimizer, backward=backward) == []


def test_two_optimizers_of_one_model_may_train_by_either_module():
    model = shapes.Tied()
    optimizers = [
        torch.optim.SGD(each.parameters(), lr=0.01) for each in (model.first, nn.ParameterList([model.second.bias]))
    ]
    module, _ = convert(model, optimizers[0])
    convert(model, optimizers[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            module(X).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()


def test_where_the_graph_rounds_nothing_the_model_is_as_good():
    model, optimizer, _, _ = made(recipe="float G=bfp8 M=bfp8")
    assert warnings_of(model, optimizer) == []


def test_a_pass_without_a_rewritten_module_is_silent():
    model = shapes.Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    SWALP(model, "bfp8").attach(optimizer)
    assert warnings_of(model, optimizer) == []


# The average


def averages(swalp):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swalp.update_average()
        swalp.update_average()
    return [str(each.message) for each in caught]


def test_an_average_before_any_low_precision_step_warns_once_with_the_remedy():
    model, _, _, swalp = made()
    float_ = "update_average() got float weights, since no low-precision step has been taken; "
    assert averages(convert(model).swalp) == [float_ + "call attach(optimizer) before training"]
    assert averages(swalp) == [float_ + "call it after optimizer.step()"]


def test_an_average_after_a_step_or_of_a_resumed_run_is_silent():
    _, optimizer, module, swalp = made()
    warnings_of(module, optimizer, steps=1)
    swalp.detach()
    assert averages(swalp) == []
    resumed = made()[3]
    resumed.load_state_dict(swalp.state_dict())
    assert averages(resumed) == []


def test_an_average_of_float_weights_that_the_recipe_asks_for_is_silent():
    assert averages(convert(shapes.Tied(), recipe="float A=bfp8 E=bfp8").swalp) == []


def test_the_warning_is_at_the_users_line():
    model, optimizer, _, swalp = made()
    with pytest.warns(UserWarning, match="update_average") as caught:
        swalp.update_average()
    with pytest.warns(UserWarning, match=FLOAT) as more:
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step
        for _ in range(2):
            model(X).sum().backward()
            optimizer.step()
    assert {each.filename for each in (*caught, *more)} == {__file__}
