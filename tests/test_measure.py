"""What rounding did to each site."""

import math

import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import nn

from swalp_fx import ConvertError, convert, measure


class Scale(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return (x * self.scale).relu()


def test_a_parameter_by_hand():
    model = Scale([0.3, 7.6, -9.0, 0.0, 2.0, math.nan, math.inf, -math.inf])
    found = measure(convert(model, recipe="W=fixed4.0 rounding=nearest").module, [torch.ones(8)])
    assert list(found) == [("scale", "W")]
    row = found["scale", "W"]
    assert (row.format, row.values, row.clipped, row.zeroed, row.nan, row.infinite) == ("fixed4.0", 8, 2, 1, 1, 2)
    assert row.signal == pytest.approx(0.3**2 + 7.6**2 + 81 + 4) and row.noise == pytest.approx(0.3**2 + 0.6**2 + 1)
    assert row.sqnr == pytest.approx(10 * math.log10(row.signal / row.noise))


def test_an_output_and_its_error_signal_by_hand():
    module, _ = convert(Scale([2.0, 2.0, 2.0]), recipe="A=fixed4.0 E=fixed4.2 rounding=nearest")
    x, factors = torch.tensor([1.6, 0.1, 9.0]), torch.tensor([0.6, 3.0, 0.1])
    found = measure(module, [(x, factors)] * 2, lambda out, factors: (out * factors).sum())
    assert list(found) == [("mul", "A"), ("mul", "E")]
    activation, error = found.values()
    assert (activation.values, activation.clipped, activation.zeroed) == (6, 2, 2)  # 3.2, 0.2, 18 -> 3, 0, 7
    assert activation.noise == pytest.approx(2 * (0.2**2 + 0.2**2 + 11**2))
    # 0.6, 0, 0.1 -> 0.5, 0, 0: the second is behind a ReLU that got a zero
    assert (error.values, error.clipped, error.zeroed) == (6, 0, 2)
    assert error.noise == pytest.approx(2 * (0.1**2 + 0.1**2))


def test_the_random_bits_are_those_of_the_forward():
    class Sigmoid(Scale):
        def forward(self, x):
            return torch.sigmoid(x * self.scale)

    module, _ = convert(Sigmoid([1.0] * 64), recipe="E=bfp4")
    x = torch.rand(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(1)
    module(x).square().sum().backward()
    (exact,) = torch.autograd.grad(x.sigmoid().square().sum(), x)
    torch.manual_seed(1)
    found = measure(module, [(x.detach(), None)], lambda out, _: out.square().sum())
    assert found["mul", "E"].noise == pytest.approx((x.grad - exact).double().square().sum().item(), rel=1e-6)


def test_a_bit_is_worth_six_decibels():
    model, inputs = shapes.made(shapes.PreResNet)
    eight, six = (
        measure(convert(model, recipe=f"{spec} rounding=nearest").module, inputs) for spec in ("bfp8", "bfp6")
    )
    assert eight.keys() == six.keys()
    for key in eight:
        if key[0].endswith(("conv1", "conv2")):
            assert eight[key].sqnr - six[key].sqnr == pytest.approx(12, abs=2), key


@pytest.mark.parametrize("kind", shapes.ALL)
def test_every_site_of_every_shape(kind):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe="bfp8[0]")
    found = measure(module, inputs)
    sites = {node.name for node in module.graph.nodes if node.name.endswith("_q")}
    assert len(found) == len(sites) and {role for _, role in found} <= {"W", "A"}
    assert all(each.values and each.sqnr > 20 and not each.nan for each in found.values())


def test_sites_have_the_models_names():
    model, (x,) = shapes.made(shapes.PreResNet)
    found = measure(convert(model).module, [(x, torch.zeros(2, dtype=torch.int64))], F.cross_entropy)
    outputs = [site for site, role in found if role == "A"]
    assert outputs[:7] == [
        "conv1",
        *(f"blocks.0.{name}" for name in ("bn1", "relu@1", "conv1", "bn2", "relu@2", "conv2")),
    ]
    assert "blocks.0.iadd" in outputs and ("fc.weight", "W") in found and ("fc", "A") not in found
    assert [site for site, role in found if role == "E"] == outputs
    first, *lines = str(found).splitlines()
    assert first.split()[:4] == ["site", "role", "format", "values"] and len(lines) == 1 + len(found)


def test_a_model_in_parts():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = shapes.Tied(), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() < math.inf else x

    with pytest.warns(UserWarning, match="cannot trace Loop"):
        module, _ = convert(Loop())
    assert {("first.first.weight", "W"), ("first.tanh", "A"), ("second", "A")} <= measure(
        module, [torch.ones(2, 6)]
    ).keys()


def test_neither_the_module_nor_the_random_state_changes():
    model, (x,) = shapes.made(shapes.Convnet)
    module, _ = convert(model)
    before, state = {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()
    measure(module, [(x, torch.zeros(2, dtype=torch.int64))], F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state) and module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_bad_input():
    with pytest.raises(ConvertError, match="measure takes the module that convert returns, not a Tied"):
        measure(shapes.Tied(), [])
    module, _ = convert(shapes.Tied())
    with pytest.raises(TypeError, match=r"a loss needs batches of \(inputs, targets\), not a Tensor"):
        measure(module, [torch.ones(2, 6)], F.mse_loss)
