"""A layer with something behind it, and a model beside its conversion."""

import copy
import random

import torch
from torch import nn

from swalp_fx import convert

NEAREST = "bfp4[0] rounding=nearest"
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A layer, and whatever is tried behind it."""

    def __init__(self, inner):
        super().__init__()
        self.layer, self.inner = nn.Linear(3, 3), inner

    def forward(self, x):
        return self.inner(self.layer(x))


def both(made, recipe="float rounding=nearest"):
    """(the model, a converted one), with the same numbers."""
    torch.manual_seed(0)
    model = made()
    return model, convert(copy.deepcopy(model), recipe=recipe).module


def same(*calls):
    torch.manual_seed(0)
    random.seed(0)
    first = calls[0]()
    torch.manual_seed(0)
    random.seed(0)
    return torch.equal(first, calls[1]())
