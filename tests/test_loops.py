"""What users do between steps: new layers, added groups, warnings that are errors, loads inside averaged()."""

import copy
import warnings

import pytest
import torch
from stepping import OPTIMIZERS, net, same, setup, train, values
from torch import nn

from swalp_fx import SWALP, Average


def averaging(**changes):
    parts = setup(**changes)
    train(*parts[:2], range(2))
    parts[2].update_average()
    return parts


def test_an_average_does_not_go_on_with_a_new_layer_of_the_same_shape():
    model, optimizer, swalp = averaging()
    model[3] = nn.Linear(8, 3)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    before = {name: mean.clone() for name, mean in swalp.average.means.items()}
    with pytest.raises(ValueError, match=r"'3\.weight', of shape \(3, 8\), is not in the average of 1; begin a new"):
        swalp.update_average()
    assert all(torch.equal(before[name], mean) for name, mean in swalp.average.means.items())
    swalp.averages["of the new"] = Average()
    with pytest.raises(ValueError, match=r"'3\.weight'.* is not in the average of 1"):
        swalp.averaged_model()


@pytest.mark.parametrize("assign", [False, True])
def test_an_average_goes_on_with_weights_that_a_layer_is_given(assign):
    model, _, swalp = averaging()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(net(5).state_dict(), assign=assign)
    swalp.update_average()
    for name, p in model.named_parameters():
        assert torch.allclose(swalp.average.means[name], (first[name] + p.detach()) / 2, atol=1e-6)


@pytest.mark.parametrize("part", [None, 3])
def test_weights_are_not_loaded_inside_averaged(part):
    model, optimizer, swalp = averaging()
    before = values(model, optimizer)[0]
    before = {name: tensor.clone() for name, tensor in before.items()}
    target, source = (model, net(5)) if part is None else (model[part], net(5)[part])
    with pytest.raises(ValueError, match=r"inside `with swalp\.averaged\(\)`"), swalp.averaged():
        target.load_state_dict(source.state_dict())
    assert same(dict(model.state_dict()), before)
    with swalp.averaged():
        copied = copy.deepcopy(target)
    copied.load_state_dict(source.state_dict())
    target.load_state_dict(source.state_dict())
    assert same(dict(copied.state_dict()), dict(source.state_dict()))
    assert same(dict(target.state_dict()), dict(source.state_dict()))


def test_a_dtype_that_a_model_gets_inside_averaged_stays_with_its_own_weights():
    model, _, swalp = averaging()
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    with swalp.averaged():
        model.double()
    assert same({name: p.detach() for name, p in model.named_parameters()}, before)


@pytest.mark.filterwarnings("ignore:.*divides one moment by another:UserWarning")
def test_a_group_that_is_added_later_is_warned_of_before_the_next_step():
    model = net()
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.01)
    swalp = SWALP(model, "bfp8[0] V=bfp8[0]")
    swalp.attach(optimizer)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Warning, match="divides one moment by another"):
            train(model, optimizer, [0])
    assert swalp.state_dict()["step"] == 0
    assert same({name: p.detach() for name, p in model.named_parameters()}, before)
    train(model, optimizer, [0])  # warned of once
    assert swalp.state_dict()["step"] == 1


class Remembering(torch.optim.SGD):
    """Has a state that no table knows."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("memory", torch.ones_like(p))


def test_a_step_whose_warning_is_an_error_is_a_whole_step():
    found = []
    for action in ("ignore", "error"):
        model, optimizer, swalp = setup(lambda p: Remembering(p, lr=0.1, momentum=0.9))
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            if action == "error":
                with pytest.raises(Warning, match="memory"):
                    train(model, optimizer, [0])
            else:
                train(model, optimizer, [0])
            train(model, optimizer, [1])
        found.append(values(model, optimizer, swalp))
    assert same(*found) and found[0][2]["step"] == 2


def test_an_average_whose_format_fits_no_parameter_is_refused_before_any_is_updated():
    _, _, swalp = averaging()
    swalp.averages["wide"] = Average("bfp8[0,1,2]")
    with pytest.raises(ValueError, match=r"swalp\.averages\['wide'\] cannot be kept in .*'0\.weight' has 2"):
        swalp.update_average()
    assert swalp.n_averaged == 1


def test_an_average_without_memory_is_refused():
    with pytest.raises(ValueError, match="device='meta' has no memory to keep an average in; use 'cpu'"):
        Average(device="meta")


def test_an_average_may_be_updated_under_inference_mode():
    model, optimizer, swalp = setup(OPTIMIZERS["momentum"])
    other, its_optimizer, its_swalp = setup(OPTIMIZERS["momentum"])
    for step in range(3):
        train(model, optimizer, [step])
        train(other, its_optimizer, [step])
        with torch.inference_mode(step != 1):
            swalp.update_average()
        its_swalp.update_average()
    assert same(values(model, optimizer, swalp), values(other, its_optimizer, its_swalp))


@pytest.mark.parametrize("master", [None, "float"])
def test_a_state_loads_whatever_in_place_says(master):
    changes = {} if master is None else {"master": master}
    _, _, swalp = averaging(**changes)
    other = setup(in_place=False, **changes)[2]
    other.load_state_dict(swalp.state_dict())
    assert same(other.state_dict()["average"], swalp.state_dict()["average"])
