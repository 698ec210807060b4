"""A converted model is freed with its last reference, graphs and all."""

import gc
import weakref

import torch
from torch import nn

import swalp_fx


def test_a_converted_model_that_has_run_is_freed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    lp, swalp = swalp_fx.convert(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lp(torch.ones(3, 8)).sum().backward()
    held = [weakref.ref(each) for each in (model, model[0].weight, model.graphs[0].graph_module)]
    del model, lp, swalp
    gc.collect()
    assert [each() for each in held] == [None, None, None]
