"""One operation between two layers, and what a converted model does to the numbers that it gives."""

import copy
from typing import NamedTuple

import torch
from graphs import converted
from marks import rounded
from torch import nn
from torch.utils import _pytree as pytree

from swalp_fx import quantize

FORMAT = "e4m3"  # each number by itself: one off the grid is seen, whatever is beside it
RECIPE = f"A={FORMAT} E={FORMAT} rounding=nearest"


class Outcome(NamedTuple):
    makes: bool  # whether it gives a number that it is not given, other than zero, infinities and NaN
    is_left: bool  # whether a later layer reads a number that is off the grid
    rounded: bool  # whether what it gives is rounded, once more or for the first time
    broke: bool  # whether it runs in Python, between two graphs


class First(nn.Module):
    """A product that keeps each number, so that what it gives is a layer's output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        return (x.reshape(-1, 1) @ self.weight.to(x.dtype)).reshape(x.shape)


class Last(nn.Module):
    """A layer that keeps each number. The model only returns it: it is as it was read."""

    def forward(self, x):
        return x * 1.0


class Between(nn.Module):
    """``function(*args, **kwargs)``, the dense floating tensors among these being outputs of layers."""

    def __init__(self, function, args, kwargs):
        super().__init__()
        self.first, self.function, self.last = First(), function, Last()
        leaves, self.structure = pytree.tree_flatten((args, kwargs))
        self.given = [each.detach() for each in leaves if is_dense(each)]
        self.others = [None if is_dense(each) else each for each in leaves]
        self.places = [i for i, each in enumerate(leaves) if is_dense(each)]

    def forward(self, *tensors):
        leaves = list(self.others)
        for i, each in zip(self.places, tensors, strict=True):
            leaves[i] = self.first(each)
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        given = pytree.tree_leaves(self.function(*args, **kwargs))
        parts = [torch.view_as_real(each.resolve_conj()) if is_complex(each) else each for each in given]
        return [self.last(each) for each in parts if is_dense(each)]


def is_complex(value):
    return isinstance(value, torch.Tensor) and value.is_complex()


def is_dense(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided


def outcome(function, args, kwargs):
    """What becomes of one call, forward and, where it has a derivative, backward; None if it takes or gives no number,
    or raises in float."""
    model = Between(function, args, kwargs)
    given = [quantize(each, FORMAT) for each in model.given]
    derives = not raises(model, given, True)
    if not given or (not derives and raises(model, given, False)):
        return None
    expected = run(model, given, derives)
    if not sum(each.numel() for each in expected):
        return None
    made = run(model, model.given, derives)  # a number on the grid may meet another by chance
    low = converted(model, RECIPE)
    found = run(low, given, derives)
    assert [each.shape for each in found] == [each.shape for each in expected]
    places = [place for graph in low.graphs for place in rounded(graph.graph)]
    return Outcome(
        makes=not all(is_of(each, model.given) for each in made),
        is_left=not all(is_on_grid(each) for each in found),
        rounded=any(not place.startswith(("first", "last")) for place in places),
        broke=any(graph.broke for graph in low.graphs),
    )


def raises(model, given, derives):
    try:
        run(model, given, derives)
        run(model, model.given, derives)
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
        return True
    return False


def run(model, given, derives):
    """What ``model`` makes of copies of these, after a backward."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(derives):
        found = model(*copy.deepcopy(given))
    tracked = [each for each in found if each.requires_grad and each.numel()]
    if tracked:
        torch.autograd.backward(tracked, [torch.ones_like(each) for each in tracked])
    return [each.detach() for each in found]


def is_of(x, given):
    """Whether each number of ``x`` is one of those, or zero, or stands for no number."""
    known = torch.cat([torch.zeros(1), *(each.flatten() for each in given)])
    return bool(torch.isin(x[x.isfinite()], known.to(x.dtype)).all())


def is_on_grid(x):
    return torch.equal(quantize(x, FORMAT).nan_to_num(), x.nan_to_num())
