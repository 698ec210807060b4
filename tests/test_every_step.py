"""Each optimizer of the table of states, stepped by the pass and by a plain loop of Algorithm 2 with the oracle's
rounding: the same bits, whichever way the pass steps it.

Optimizers of packages need these: pip install lion-pytorch schedulefree prodigyopt pytorch-optimizer
"""

import importlib
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from swalp_fx import SWALP, Recipe
from swalp_fx.reference import quantize

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

RATES = [0.1, 0.003]
DECAY = {"weight_decay": [0.0, 0.01]}
UP = {"maximize": [False, True]}
EACH = {"foreach": [None, True]}
# Name -> (where it is, options of a group and their values).
OPTIMIZERS = {
    "SGD": ("torch.optim", {"momentum": [0.0, 0.9], "dampening": [0.0, 0.3], **DECAY, **UP, **EACH}),
    "SGD, nesterov": ("torch.optim", {"momentum": [0.9, 0.5], "nesterov": [True], **DECAY, **UP}),
    "Adam": ("torch.optim", {"amsgrad": [False, True], **DECAY, **UP, **EACH}),
    "AdamW": ("torch.optim", {"amsgrad": [False, True], "betas": [(0.9, 0.999), (0.5, 0.9)], **DECAY, **UP}),
    "NAdam": ("torch.optim", {"decoupled_weight_decay": [False, True], **DECAY}),
    "RAdam": ("torch.optim", DECAY),
    "Adamax": ("torch.optim", DECAY),
    "RMSprop": ("torch.optim", {"centered": [False, True], "momentum": [0.0, 0.9], **DECAY, **UP}),
    "Adagrad": ("torch.optim", {"lr_decay": [0.0, 0.1], **DECAY}),
    "Adadelta": ("torch.optim", DECAY),
    "ASGD": ("torch.optim", {"t0": [0.0, 1e6], **DECAY}),
    "Rprop": ("torch.optim", {}),
    "Adafactor": ("torch.optim", DECAY),
    "Muon": ("torch.optim", {"nesterov": [False, True], **DECAY}),
    "Lion": ("lion_pytorch", DECAY),
    "SGDScheduleFree": ("schedulefree", {"momentum": [0.9, 0.5], **DECAY}),
    "AdamWScheduleFree": ("schedulefree", {"warmup_steps": [0, 2], **DECAY}),
    "Prodigy": ("prodigyopt", {"slice_p": [1, 3], **DECAY}),
    "AggMo": ("pytorch_optimizer", DECAY),
    "AdaBelief": ("pytorch_optimizer", DECAY),
    "SGDP": ("pytorch_optimizer", {"momentum": [0.9], **DECAY}),
    "MADGRAD": ("pytorch_optimizer", DECAY),
}
# State -> its role; any other is none's.
ROLES = {
    **dict.fromkeys(("momentum_buffer", "momentum", "exp_avg"), "M"),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_var", "grad_sum_sq"), "V"),
    **dict.fromkeys(("square_avg", "grad_avg", "sum", "acc_delta", "row_var", "col_var", "variance"), "V"),
}
FORMATS = ["float", "bfp8[0]", "bfp4", "bfp6[-1:7]", "fixed8.6", "e4m3", "bf16", "mxfp8", "int8", "nvfp4"]
SHAPES = st.lists(st.integers(1, 9), max_size=3).map(tuple)
STEPS = 3


@st.composite
def cases(draw, name):
    """What a run is made of: (parameters, options of each group, formats of roles, gradients of each step)."""
    module, options = OPTIMIZERS[name]
    matrices = st.tuples(st.integers(1, 9), st.integers(1, 9))
    shapes = draw(st.lists(matrices if name == "Muon" else SHAPES, min_size=1, max_size=3))
    drawn = {"lr": RATES, **options} if module != "prodigyopt" else options
    groups = [
        {option: draw(st.sampled_from(values)) for option, values in drawn.items()}
        for _ in range(draw(st.integers(1, min(2, len(shapes)))))
    ]
    one = draw(st.none() | st.sampled_from(FORMATS))  # for all roles, which one pass needs
    formats = {role: one or draw(st.sampled_from(FORMATS)) for role in "WGMV"}
    formats["master"] = draw(st.sampled_from([None, "float", "fixed16.12"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = 2.0 ** draw(st.integers(-12, 3))

    def numbers():
        return [torch.randn(shape, generator=generator).mul_(scale).to(dtype) for shape in shapes]

    parameters = [p.div(scale) for p in numbers()]
    missing = draw(st.sets(st.tuples(st.integers(0, STEPS - 1), st.integers(0, len(shapes) - 1)), max_size=2))
    gradients = [
        [None if (step, i) in missing else gradient for i, gradient in enumerate(numbers())] for step in range(STEPS)
    ]
    return parameters, groups, formats, gradients


def made(name, parameters, groups):
    """The optimizer, its parameters dealt out to the groups."""
    module, _ = OPTIMIZERS[name]
    kind = getattr(importlib.import_module(module), name.partition(",")[0])
    optimizer = kind([{"params": parameters[i :: len(groups)], **group} for i, group in enumerate(groups)])
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def tensors(state):
    """(name, tensor) of each tensor of a parameter's state; AggMo has a dict of them."""
    for name, value in state.items():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


class Loop:
    """Algorithm 2, on an optimizer that nobody else has touched."""

    def __init__(self, name, parameters, groups, formats):
        self.has_masters, self.formats = formats["master"] is not None, formats
        self.weights = [p.clone() for p in parameters]
        self.stepped = [nn.Parameter(p.float() if self.has_masters else p.clone()) for p in parameters]
        self.optimizer = made(name, self.stepped, groups)

    @torch.no_grad()
    def step(self, gradients):
        self.gradients = [None if g is None else quantize(g, self.formats["G"]) for g in gradients]
        for p, gradient in zip(self.stepped, self.gradients, strict=True):
            p.grad = None if gradient is None else gradient.to(p.dtype)
        self.optimizer.step()
        for i, p in enumerate(self.stepped):
            if p.grad is None:
                continue
            if self.has_masters:
                p.copy_(quantize(p, self.formats["master"]))
                self.weights[i] = quantize(p, self.formats["W"]).to(self.weights[i].dtype)
            else:
                p.copy_(quantize(p, self.formats["W"]))
                self.weights[i] = p.detach()
            for name, tensor in tensors(self.optimizer.state[p]):
                if name in ROLES:
                    tensor.copy_(quantize(tensor, self.formats[ROLES[name]]))


def equal(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def roles_of(name, parameters, groups, gradients):
    """The roles of the states that a plain step makes: a recipe may not name others."""
    parameters = [nn.Parameter(p.clone()) for p in parameters]
    optimizer = made(name, parameters, groups)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {ROLES[state] for p in parameters for state, _ in tensors(optimizer.state[p]) if state in ROLES}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_step_to_nearest_is_algorithm_2_of_the_oracle(name, data):
    pytest.importorskip(OPTIMIZERS[name][0])
    parameters, groups, formats, gradients = data.draw(cases(name))
    loop = Loop(name, parameters, groups, formats)
    named = roles_of(name, parameters, groups, gradients) | {"W", "G"}
    recipe = {role: format for role, format in formats.items() if role in named or role == "master"}
    model = nn.ParameterList(p.clone() for p in parameters)
    optimizer = made(name, list(model), groups)
    swalp = SWALP(model, Recipe(**recipe, rounding="nearest"))
    swalp.attach(optimizer)
    for step, of_step in enumerate(gradients):
        for p, gradient in zip(model, of_step, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        loop.step(of_step)
        masters = swalp.state_dict()["masters"]
        for i, (p, other) in enumerate(zip(model, loop.stepped, strict=True)):
            assert equal(p.detach(), loop.weights[i]), (step, i, "weight")
            assert not masters or equal(masters[str(i)], other.detach()), (step, i, "master")
            assert p.grad is None or equal(p.grad, loop.gradients[i]), (step, i, "gradient")
            if all(each[i] is None for each in gradients[: step + 1]):
                continue  # Adagrad has a state before the first step, in the parameter's dtype
            pairs = itertools.zip_longest(tensors(optimizer.state[p]), tensors(loop.optimizer.state[other]))
            for (state, tensor), (name_of_other, due) in pairs:
                assert state == name_of_other and equal(tensor, due), (step, i, state)
