"""A model that is changed after its conversion is followed by graph, step and average, or refused in a sentence."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from tables import crossed
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import swalp_fx
from swalp_fx import nodes
from swalp_fx.capture import conversion_of

SPEC = "bfp4[0]"
X = torch.linspace(-2, 2, 40).view(5, 8)


def trained(out=4, averaged=True):
    """A model, its SWALP and its optimizer, after one step and one update of the average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, out))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lp, swalp = swalp_fx.convert(model, optimizer, f"{SPEC} rounding=nearest master=float")
    step(lp, optimizer)
    if averaged:
        swalp.update_average()
    return lp, swalp, optimizer


def step(lp, optimizer):
    optimizer.zero_grad()
    lp(X).square().sum().backward()
    optimizer.step()


def is_rounded(tensor):
    return torch.equal(swalp_fx.quantize(tensor, SPEC), tensor)


def weights_of(lp):
    """The names of the weights that the last graph rounds."""
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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lp: setattr(lp, "2", nn.Linear(8, 3)), r"'2.weight', of shape \(3, 8\), is of shape \(1, 8\) in the"),
        (lambda lp: setattr(lp, "2", nn.Identity()), "the average of 1 has '2.weight', which the model has no more"),
        (lambda lp: lp.append(nn.Linear(1, 1)), r"'3.weight', of shape \(1, 1\), is not in the average of 1"),
    ],
    ids=["of a shape that broadcasts", "gone", "new"],
)
def test_an_average_of_other_parameters_is_refused_wherever_it_is_used(change, complaint):
    lp, swalp, _ = trained(out=1)
    change(lp)
    before = copy.deepcopy(lp.state_dict())
    for use in (swalp.averaged_model, swalp.averaged().__enter__, swalp.update_average):
        with pytest.raises(ValueError, match=complaint):
            use()
    assert swalp.n_averaged == 1
    assert all(torch.equal(value, before[name]) for name, value in lp.state_dict().items())


def test_a_state_is_of_the_model_as_it_is_now():
    """A run that got a new head is resumed by one that has it from before its first step on."""
    torch.manual_seed(1)
    runs = [trained(averaged=False), trained(averaged=False)]
    for lp, swalp, optimizer in runs:
        lp[2] = nn.Linear(8, 3)
        masters = swalp.state_dict()["masters"]
        assert torch.equal(masters["2.weight"], lp[2].weight)  # and not those of the head that is gone
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = list(lp.parameters())
    (lp, swalp, optimizer), (resumed, into, of_resumed) = runs
    step(lp, optimizer)
    swalp.update_average()
    into.load_state_dict(swalp.state_dict())
    resumed.load_state_dict(lp.state_dict())
    of_resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, its in ((lp, optimizer), (resumed, of_resumed)):
        step(model, its)
    assert torch.equal(lp[2].weight, resumed[2].weight)
    assert torch.equal(swalp.state_dict()["masters"]["2.weight"], into.state_dict()["masters"]["2.weight"])


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


# A change after the conversion gives the same model as the change before it


class Adapted(nn.Module):
    """A layer, and beside it a thin one, as LoRA has it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(8, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x)) * 0.5


class Scaled(nn.Sequential):
    """Reads a parameter, a layer and a buffer that it may be given."""

    def forward(self, x):
        y = super().forward(x)
        y = y if getattr(self, "scale", None) is None else y * self.scale
        y = y if getattr(self, "shift", None) is None else y + self.shift
        return y if getattr(self, "extra", None) is None else self.extra(y)


def _wrap(model):
    model[2] = Adapted(model[2])


def _unwrap(model):
    _wrap(model)
    model(X)
    model[2] = model[2].layer


def _delete(model):
    del model[1]


def _register(model):
    model.register_parameter("scale", nn.Parameter(torch.tensor([0.3, 0.7, 1.1, -0.4])))
    model.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3, 0.4]))
    model.add_module("extra", nn.Linear(4, 4))


def _unregister(model):
    _register(model)
    model(X)
    del model.scale, model.shift, model.extra


def _replace(model):
    model[0].weight = nn.Parameter(torch.randn(8, 8))


def _assign(model):
    model.load_state_dict({name: value * 3 for name, value in model.state_dict().items()}, assign=True)


def _tie(model):
    model.insert(1, nn.Linear(8, 8))
    model(X)
    model[1].weight = model[0].weight


def _untie(model):
    _tie(model)
    model(X)
    model[1].weight = nn.Parameter(torch.randn(8, 8))


def _prune(model):
    prune.l1_unstructured(model[0], "weight", 0.4)
    prune.random_structured(model[2], "weight", 0.5, dim=0)


def _pruned_for_good(model):
    _prune(model)
    model(X)
    prune.remove(model[0], "weight")


def _parametrize(model):
    parametrizations.orthogonal(model[0])


def _parametrized_and_left(model):
    parametrizations.weight_norm(model[0])
    model(X)
    parametrize.remove_parametrizations(model[0], "weight")


def _dtype(model):
    model.to(torch.bfloat16).float()


def _empty(model):
    state = copy.deepcopy(model.state_dict())
    model.to("meta")
    model.to_empty(device="cpu").load_state_dict(state)


def _fuse(model):
    model[0], model[1] = nn.Sequential(model[0], model[1]), nn.Identity()


DONE = [
    _wrap, _unwrap, _delete, _register, _unregister, _replace, _assign, _tie, _untie, _prune, _pruned_for_good,
    _parametrize, _parametrized_and_left, _dtype, _empty, _fuse, nn.Module.share_memory, nn.Module.requires_grad_,
    lambda model: model[0].requires_grad_(False), lambda model: model.apply(nn.Module.eval),
]  # fmt: skip


@pytest.mark.parametrize(
    ("done", "mode"), crossed(DONE, [True, False]), ids=lambda each: getattr(each, "__name__", each)
)
def test_it_computes_as_if_it_had_been_done_before(done, mode):
    def made():
        torch.manual_seed(0)
        return Scaled(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).train(mode)

    before, after = made(), made()
    torch.manual_seed(1)
    done(before)
    swalp_fx.convert(before, recipe=f"{SPEC} rounding=nearest")
    swalp_fx.convert(after, recipe=f"{SPEC} rounding=nearest")
    after(X)
    torch.manual_seed(1)
    done(after)
    y, due = after(X), before(X)
    read = [re.findall(r"quantize_weight\((\w+)", graph.code) for graph in (*before.graphs, *after.graphs)]
    assert torch.equal(y, due) and read[0] in read[1:]
    assert [conversion_of(each).root is after for each in after.modules()] == [True] * len([*after.modules()])
    if due.requires_grad:
        due.square().sum().backward()
        y.square().sum().backward()
        for (name, one), (other, two) in zip(before.named_parameters(), after.named_parameters(), strict=True):
            assert name == other and (one.grad is two.grad is None or torch.equal(one.grad, two.grad))


# Modules that are taken out


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x))


def converted(recipe=f"{SPEC} rounding=nearest", kind=Net):
    torch.manual_seed(0)
    return swalp_fx.convert(kind(), recipe=recipe).module


def low(linear, x, weight=SPEC):
    return F.linear(x, *(swalp_fx.quantize(parameter.detach(), weight) for parameter in linear.parameters()))


def _set_to_none(lp):
    lp.head = None


def _deleted(lp):
    del lp.head


def _replaced(lp):
    lp.head = nn.Identity()


@pytest.mark.parametrize("called", [(), (X[0],), (X,)], ids=["", "with another size", "called"])
@pytest.mark.parametrize("take", [_set_to_none, _deleted, _replaced])
def test_what_is_taken_out_computes_in_the_recipe_that_it_had(take, called):
    lp = converted()
    head = lp.head
    for each in called:
        head(each), lp(each)
    take(lp)
    lp.other = nn.Linear(8, 8)
    assert torch.equal(head(X), low(head, X))
    head.double()
    assert torch.equal(head(X.double()), low(head, X.double()))
    assert swalp_fx.restore(head) is head and torch.equal(
        head(X.double()), F.linear(X.double(), head.weight, head.bias)
    )


def test_what_is_taken_out_keeps_the_rules_for_its_name():
    lp = converted(swalp_fx.Recipe.parse(f"{SPEC} rounding=nearest", rules=(swalp_fx.Rule("body.2", weight="float"),)))
    expected, body = lp.body(X), lp.body
    lp.body = nn.Identity()
    assert torch.equal(body(X), expected)
    assert weights_of(body) == ["_0_weight", "_0_bias"] and not str(swalp_fx.report(body)).count("body")


def test_what_is_put_back_is_part_of_the_model_again():
    lp = converted()
    expected, head = lp(X), lp.head
    lp.head = nn.Identity()
    head(X)
    lp.head = head
    assert torch.equal(lp(X), expected) and "head_weight" in weights_of(lp)
    assert conversion_of(head).root is lp and not hasattr(head, "graphs")


def test_a_copy_of_a_layer_may_be_put_beside_it():
    lp = converted()
    lp.body.append(copy.deepcopy(lp.body[2]))
    lp(X)
    assert "body_3_weight" in weights_of(lp) and len(lp.graphs) == 1


def test_children_may_be_swapped():
    lp = converted()
    lp(X)
    lp.body[0], lp.body[2] = lp.body[2], lp.body[0]
    hidden = swalp_fx.quantize(torch.relu(swalp_fx.quantize(low(lp.body[0], X), SPEC)), SPEC)
    assert torch.equal(lp(X), low(lp.head, swalp_fx.quantize(low(lp.body[2], hidden), SPEC)))


def test_swapped_parameters_have_the_rules_of_their_new_places():
    rule = swalp_fx.Rule("body.0", weight="float")
    lp = converted(swalp_fx.Recipe.parse(f"{SPEC} rounding=nearest", rules=(rule,)))
    lp(X)
    lp.body[0].weight, lp.body[2].weight = lp.body[2].weight, lp.body[0].weight
    lp.eval()(X)
    assert weights_of(lp) == ["body_2_weight", "body_2_bias", "head_weight", "head_bias"]


# Modules that are put in without __setattr__


def _inserted(lp):
    lp.body.insert(0, nn.Linear(8, 8))


def _swapped(lp):
    lp.body._modules["0"] = nn.Linear(8, 8)
    lp.body._modules["1"] = nn.Tanh()


@pytest.mark.parametrize("put", [_inserted, _swapped])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_put_in_past_setattr_is_rewritten_by_the_next_call(put, called, compiled):
    lp = converted()
    call = torch.compile(lambda x: lp(x) * 1, backend="eager", fullgraph=True) if compiled else lp
    if called:
        call(X)
    put(lp)
    y, x, read = call(X), X, weights_of(lp)
    for i, layer in enumerate(lp.body):
        x = swalp_fx.quantize(low(layer, x) if isinstance(layer, nn.Linear) else layer(x).detach(), SPEC)
        assert f"body_{i}_weight" in read or not isinstance(layer, nn.Linear)
    assert torch.equal(y, low(lp.head, x))


@pytest.mark.parametrize(
    "layers",
    [nn.Sequential(nn.Linear(8, 8)), nn.ModuleList([nn.Linear(8, 8)])],
    ids=lambda layers: type(layers).__name__,
)
def test_an_inserted_layer_is_rewritten_at_once(layers):
    lp, _ = swalp_fx.convert(nn.Sequential(layers), recipe=SPEC)
    lp.eval()[0].insert(0, nn.Linear(8, 8).eval())
    assert torch.equal(lp[0][0](X), low(lp[0][0], X))


@pytest.mark.parametrize("call", [swalp_fx.restore, swalp_fx.in_float])
def test_a_part_alone_is_not_made_float(call):
    lp = converted()
    with pytest.raises(
        swalp_fx.ConvertError, match="takes a whole converted model, and this Linear is head of one; give"
    ):
        call(lp.head)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_weight_that_an_old_norm_derives_is_refused_until_the_norm_is_removed(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    lp = swalp_fx.convert(model, recipe="bfp4[0] rounding=nearest").module
    x = torch.randn(3, 4)
    lp(x)
    getattr(nn.utils, name)(lp[0])
    message = f"0: torch.nn.utils.{name} derives its weight in a hook, .*remove_{name} first"
    for call in (lp, lp[0], lp):
        with pytest.raises(swalp_fx.ConvertError, match=message):
            call(x)
    getattr(nn.utils, f"remove_{name}")(lp[0])
    again = swalp_fx.restore(copy.deepcopy(lp))
    assert torch.equal(lp(x), swalp_fx.convert(again, recipe="bfp4[0] rounding=nearest").module(x))
