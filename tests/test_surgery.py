"""A model that is changed after its conversion is followed by graph, step and average, or refused in a sentence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import swalp_fx
from swalp_fx import nodes

SPEC = "bfp4[0]"
X = torch.linspace(-2, 2, 40).view(5, 8)


def trained():
    """A model, its SWALP and its optimizer, after one step and one update of the average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lp, swalp = swalp_fx.convert(model, optimizer, f"{SPEC} rounding=nearest accumulator=float")
    step(lp, optimizer)
    swalp.update_average()
    return lp, swalp, optimizer


def step(lp, optimizer):
    optimizer.zero_grad()
    lp(X).square().sum().backward()
    optimizer.step()


def is_rounded(tensor):
    return torch.equal(swalp_fx.quantize(tensor, SPEC), tensor)


def weights_of(lp):
    """The names of what the last graph rounds as weights."""
    graph = lp.graphs[-1].graph
    return [node.args[0].name for node in graph.find_nodes(op="call_function", target=nodes.quantize_weight)]


def test_a_new_head_is_rounded_in_the_model_and_by_itself():
    lp, _, _ = trained()
    lp[2] = nn.Linear(8, 3)
    float_head = copy.deepcopy(lp[2])
    swalp_fx.restore(float_head)
    assert lp(X).shape == (5, 3) and "_2_weight" in weights_of(lp)
    assert not torch.equal(lp[2](X), float_head(X))


def test_a_step_on_the_parameters_of_the_old_head_is_refused():
    lp, _, optimizer = trained()
    lp[2] = nn.Linear(8, 3)
    before = copy.deepcopy(lp.state_dict())
    with pytest.raises(
        ValueError, match=r"parameter 2 of group 0 of SGD, of shape \(4, 8\), is not the model's; build"
    ):
        step(lp, optimizer)
    assert all(torch.equal(before[name], value) for name, value in lp.state_dict().items())


def test_a_new_head_is_stepped_by_an_optimizer_of_its_own():
    lp, swalp, _ = trained()
    lp[2] = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(lp.parameters(), lr=0.1)
    swalp.detach()
    swalp.attach(optimizer)
    step(lp, optimizer)
    assert is_rounded(lp[2].weight)


def test_an_average_does_not_mix_shapes():
    lp, swalp, _ = trained()
    lp[2] = nn.Linear(8, 3)
    with pytest.raises(
        ValueError, match=r"'2.weight', of shape \(3, 8\), is of shape \(4, 8\) in the average of 1; begin"
    ):
        swalp.update_average()
    assert swalp.n_averaged == 1


def test_a_layer_that_is_added_with_its_group_is_stepped():
    lp, _, optimizer = trained()
    lp.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": list(lp[3].parameters())})
    step(lp, optimizer)
    assert "_3_weight" in weights_of(lp) and is_rounded(lp[3].weight)


def test_of_a_pruned_weight_what_is_left_is_rounded():
    lp, _, optimizer = trained()
    prune.l1_unstructured(lp[2], "weight", 0.5)
    assert (lp(X), "_2_weight_orig" in weights_of(lp)) and int((lp[2].weight == 0).sum()) >= 16
    step(lp, optimizer)
    assert is_rounded(lp[2].weight_orig)


def test_of_a_parametrized_layer_the_derived_weight_is_rounded():
    lp, _, _ = trained()
    parametrizations.weight_norm(lp[2])
    lp(X)
    assert weights_of(lp) == ["_0_weight", "_0_bias", "_2_weight", "_2_bias"]


def test_weights_that_are_assigned_are_read():
    lp, _, optimizer = trained()
    assigned = {name: value * 2 for name, value in lp.state_dict().items()}
    expected = copy.deepcopy(lp)
    expected.load_state_dict(assigned)
    lp.load_state_dict(assigned, assign=True)
    assert torch.equal(lp(X), expected(X))
    with pytest.raises(ValueError, match="is not the model's; build the optimizer from"):
        optimizer.step()


def test_a_frozen_parameter_stays():
    lp, _, optimizer = trained()
    before = lp[0].weight.clone()
    lp[0].weight.requires_grad_(False)
    step(lp, optimizer)
    assert torch.equal(lp[0].weight, before)


def test_parameters_that_are_tied_are_rounded_once():
    lp, _, _ = trained()
    lp.append(nn.Linear(4, 4))
    lp.append(nn.Linear(4, 4))
    lp[4].weight = lp[3].weight
    lp(X)
    assert weights_of(lp).count("_3_weight") == 1 and "_4_weight" not in weights_of(lp)


def test_another_dtype_makes_another_graph():
    lp, _, _ = trained()
    assert lp.double()(X.double()).dtype == torch.float64


def test_another_activation_is_called():
    lp, _, _ = trained()
    lp[1] = nn.GELU()
    lp(X)
    assert "gelu" in lp.graphs[-1].code and "relu" not in lp.graphs[-1].code
