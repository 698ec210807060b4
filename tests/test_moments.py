"""Which optimizers bear which formats of second moments: the facts that decide it, and that attaching says so."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from swalp_fx import SWALP, Recipe, Rule, convert, parse
from swalp_fx.optimizer.moments import ends_in

optim = torch.optim


class Descendant(optim.AdamW):
    """Of a user."""


# By the family of the optimizer, in the order of moments.py.
SAFE = {
    "Adam": ("float", "bf16", "e8m1", "e7m0", "mxfp8_e5m2"),
    "Adamax": ("float", "bf16", "fp16", "e5m2", "mxfp8", "bfp16[0]"),
    "centered": ("float", "bf16", "e8m4", "e7m7"),
}
BLOCKS = ("bfp8", "bfp8[0]", "int8[0]", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4")
ENDING = {
    "Adam": (*BLOCKS, "bfp12[0]", "bfp24", "int16", "mxfp8", "fp16", "e4m3", "e5m2", "e6m8", "fixed24.23"),
    "Adamax": (*BLOCKS, "bfp13[0]", "e4m3", "fixed16.15"),
    "centered": (*BLOCKS, "bfp24[0]", "mxfp8_e5m2", "fp16", "e8m3", "e6m9", "fixed24.23"),
}
KINDS = {
    "Adam": [
        *((each, {}) for each in (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, Descendant)),
        (optim.Adam, {"amsgrad": True}),
    ],
    "Adamax": [(optim.Adamax, {})],
    "centered": [(optim.RMSprop, {"centered": True})],
}
OTHERS = [optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Adafactor, optim.ASGD, optim.Rprop]


WITHOUT_SQUARES = (optim.SGD, optim.ASGD, optim.Rprop)


def states_in(spec, kind):
    """Means of gradients in ``spec``, and second moments where the optimizer has some."""
    squares = {} if issubclass(kind, WITHOUT_SQUARES) else {"V": parse(spec)}
    return Recipe(E=parse(spec), M=parse(spec), **squares)  # E: so M is as others are, and need not be there


def caught(make, recipe, model=None):
    """The warnings of attaching."""
    model = nn.Linear(4, 2) if model is None else model
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        SWALP(model, Recipe.parse(recipe)).attach(make(model.parameters()))
    return [str(each.message) for each in found]


@pytest.mark.parametrize("family", KINDS)
def test_attaching_warns_of_a_format_that_may_end_the_optimizer_and_of_no_other(family):
    for kind, options in KINDS[family]:
        for spec in (*SAFE[family], *ENDING[family]):
            found = caught(lambda p, kind=kind, options=options: kind(p, lr=0.1, **options), f"bfp8[0] V={spec}")
            assert len(found) == (spec in ENDING[family]), (kind.__name__, spec)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("spec", ["bfp8[0]", "e4m3", "mxfp4", "fixed8.6", "int8"])
def test_optimizers_that_divide_no_moment_by_another_bear_any_format(kind, spec):
    assert caught(lambda p: kind(p, lr=0.1), states_in(spec, kind)) == []


def test_the_warning_names_the_format_the_parameters_and_the_remedy():
    assert caught(optim.AdamW, "bfp8[0]") == []
    assert caught(optim.AdamW, "bfp8[0] V=bfp8[0]") == [
        "AdamW divides one moment by another, and may diverge with the exp_avg_sq of 'weight' and 1 more in bfp8[0]; "
        "keep it in float: V=float"
    ]


def test_what_counts_is_what_the_optimizer_trains_in_which_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    local = {"0.weight": Recipe(V="bfp8"), "0.bias": Recipe(V="bfp8")}

    def attached(groups, kind):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            SWALP(model, Recipe(), lambda: local).attach(kind(groups))
        return [str(each.message) for each in found]

    (warning,) = attached(model.parameters(), optim.Adam)
    assert "the exp_avg_sq of '0.weight' in bfp8;" in warning
    assert attached(model[1].parameters(), optim.Adam) == []
    groups = [{"params": [model[0].weight]}, {"params": [model[1].weight], "centered": True}]
    assert attached(groups, optim.RMSprop) == []
    groups[0]["centered"] = True
    assert len(attached(groups, optim.RMSprop)) == 1


def test_convert_warns_at_the_users_line_and_a_rule_may_be_the_remedy():
    model = nn.Linear(4, 2)
    with pytest.warns(UserWarning, match="Adam divides one moment by another") as found:
        convert(model, optim.Adam(model.parameters()), recipe="bfp8[0] V=bfp8[0]")
    assert [each.filename for each in found] == [__file__]
    model = nn.Linear(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(
            model, optim.Adam(model.parameters()), recipe=Recipe.parse("bfp8", V="bfp8", rules=(Rule("*", V="float"),))
        )


def test_a_group_without_the_option_is_not_centered():
    model = nn.Linear(4, 2)
    optimizer = optim.RMSprop(model.parameters())
    assert not ends_in(optimizer, optimizer.param_groups[0], Recipe(V="bfp8"))


def final_loss(make, spec):
    """The loss after 60 steps of a perceptron; its inputs, and so its gradients, span 20 octaves."""
    torch.manual_seed(0)
    x = torch.randn(256, 20) * 2.0 ** -torch.arange(20)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = make(model.parameters())
    SWALP(model, states_in(spec, type(optimizer))).attach(optimizer)
    for step in range(60):
        rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.filterwarnings("ignore:.*divides one moment by another")
@pytest.mark.parametrize(
    ("make", "safe", "ending"),
    [
        (lambda p: optim.Adam(p, lr=0.01), ["float", "bf16", "mxfp8_e5m2"], ["bfp8[0]", "fp16"]),
        (lambda p: optim.NAdam(p, lr=0.01), ["float", "bf16", "mxfp8_e5m2"], ["bfp8[0]", "fp16"]),
        (lambda p: optim.RMSprop(p, lr=0.01, centered=True), ["float", "bf16"], ["bfp8[0]", "mxfp8_e5m2"]),
        (lambda p: optim.RMSprop(p, lr=0.01), ["float", "bfp8[0]"], []),
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), ["float", "bfp8[0]"], []),
    ],
    ids=["Adam", "NAdam", "centered", "RMSprop", "SGD"],
)
def test_it_is_so(make, safe, ending):
    losses = {spec: final_loss(make, spec) for spec in (*safe, *ending)}
    assert {spec for spec, loss in losses.items() if loss < 0.6} == set(safe), losses  # ln 2 is where it begins


def worst_on_digits(make, spec):
    """The worst of 10 seeds: the mean loss of the last 10 of 60 steps of a perceptron on handwritten digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    losses = []
    for seed in range(10):
        torch.manual_seed(seed)
        rows = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = make(model.parameters())
        SWALP(model, states_in(spec, type(optimizer))).attach(optimizer)
        last = []
        for _ in range(60):
            batch = torch.randint(len(x), (64,), generator=rows)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            last = [*last[-9:], loss.item()]
        mean = sum(last) / len(last)
        losses.append(math.inf if math.isnan(mean) else mean)
    return max(losses)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*divides one moment by another")
@pytest.mark.parametrize(
    ("make", "safe", "ending"),
    [
        (lambda p: optim.Adam(p, lr=0.01), ["float", "e7m0", "mxfp8_e5m2"], ["bfp24", "mxfp8", "e6m7"]),
        (lambda p: optim.Adamax(p, lr=0.02), ["float", "e5m2", "mxfp8[]"], ["bfp13[0]", "fixed16.15"]),
        (lambda p: optim.RMSprop(p, lr=0.001, centered=True), ["float", "e8m4", "e7m7"], ["mxfp8_e5m2", "e8m3"]),
    ],
    ids=["Adam", "Adamax", "centered"],
)
def test_the_spans_are_as_measured(make, safe, ending):
    losses = {spec: worst_on_digits(make, spec) for spec in (*safe, *ending)}
    assert {spec for spec, loss in losses.items() if loss < math.log(10)} == set(safe), losses  # where it begins
