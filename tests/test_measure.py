"""The rounding error of each site."""

import copy
import csv
import io
import json
import math
import random
from collections import OrderedDict

import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import nn

from swalp_fx import ConvertError, convert, measure, quantize
from swalp_fx.reports import Measures, Rounded
from swalp_fx.reports.graphs import inlined


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


@pytest.mark.parametrize("spec, infinite, clipped", [("bf16", 1, 2), ("bf16+inf", 3, 0)])
def test_a_finite_float16_that_the_format_takes_beyond_is_clipped_or_infinite(spec, infinite, clipped):
    row = Rounded(spec)
    x = torch.tensor([1.0, 65504.0, -65504.0, torch.inf], dtype=torch.float16)
    row.add(x, quantize(x, spec))
    assert (row.infinite, row.clipped) == (infinite, clipped)
    assert row.noise == clipped * (65504.0 - 65280.0) ** 2


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
        measure(convert(copy.deepcopy(model), recipe=f"{spec} rounding=nearest").module, inputs)
        for spec in ("bfp8", "bfp6")
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
    graphs = [inlined(made.graph_module).graph for made in module.graphs]
    sites = {node.name for graph in graphs for node in graph.nodes if node.name.endswith("_q")}
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


def _measured(*rows):
    """Measures of outputs a, b, ... by these fields."""
    return Measures({(name, "A"): Rounded("bfp8", 10, **row) for name, row in zip("abc", rows, strict=False)})


@pytest.mark.parametrize(
    ("by", "order"),
    [("sqnr", "cba"), ("clipped", "bca"), ("zeroed", "abc"), ("nan", "cab"), ("infinite", "abc"), ("noise", "cba")],
)
def test_the_worst_are_sorted_to_the_front(by, order):
    found = _measured(
        {"signal": 1.0},
        {"signal": 100.0, "noise": 1.0, "clipped": 3},
        {"noise": 2.0, "signal": 2.0, "clipped": 1, "nan": 1},
    ).sorted(by)
    assert "".join(site for site, _ in found) == order and isinstance(found, Measures)


def test_a_share_of_the_values_counts_and_not_their_number():
    few, many = Rounded("bfp8", 10, clipped=5), Rounded("bfp8", 1000, clipped=100)
    assert list(Measures({("many", "A"): many, ("few", "A"): few}).sorted("clipped")) == [("few", "A"), ("many", "A")]


def test_what_cannot_be_sorted_by_is_refused():
    with pytest.raises(ValueError, match="cannot sort measures by 'snr'; use one of sqnr, clipped, zeroed, nan, "):
        _measured({}).sorted("snr")


def test_roles_have_letters_and_names():
    found = measure(convert(Scale([2.0]), recipe="W=bfp8 A=bfp8").module, [torch.ones(1)])
    assert found["scale", "weight"] is found["scale", "W"] and found["mul", "activation"] is found["mul", "A"]
    assert ("mul", "activation") in found and ("mul", "error") not in found and ("mul", "E") not in found
    assert found.get(("mul", "activation")) is found["mul", "A"] and found.get(("mul", "error"), 3) == 3


@pytest.mark.parametrize("key", [("muls", "A"), ("mul", "E"), "mul", ("mul",)])
def test_a_measure_that_is_not_there_is_refused_with_the_nearest_names(key):
    found = measure(convert(Scale([2.0]), recipe="W=bfp8 A=bfp8").module, [torch.ones(1)])
    with pytest.raises(
        KeyError, match=r"there is no measure of .*; use \(name, role\), the nearest names being mul, scale"
    ):
        found[key]


def test_json_and_csv_say_the_same(tmp_path):
    model = Scale([0.3, 1.0, math.nan, -math.inf])
    found = measure(convert(model, recipe="W=fixed4.0 A=bfp8 rounding=nearest").module, [torch.ones(4)])
    objects, lines = json.loads(found.to_json()), list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(objects) == len(lines) == len(found) == 2
    for (site, role), each, row, line in zip(found, found.values(), objects, lines, strict=True):
        assert list(row) == list(line)
        assert row["site"] == line["site"] == site and row["role"] == line["role"] == role
        assert row["format"] == line["format"] == each.format
        for name in ("values", "sqnr", "clipped", "zeroed", "nan", "infinite", "signal", "noise"):
            assert float(row[name]) == float(line[name]) == getattr(each, name)
    found.to_json(tmp_path / "measures.json"), found.to_csv(str(tmp_path / "measures.csv"))
    assert (tmp_path / "measures.json").read_text() == found.to_json()
    assert (tmp_path / "measures.csv").read_bytes().decode() == found.to_csv()


def test_json_has_no_bare_infinity():
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (row,) = json.loads(_measured({"signal": 1.0}).to_json(), parse_constant=refuse)
    assert row["sqnr"] == "inf" and float(row["sqnr"]) == math.inf


@pytest.mark.parametrize("spec", ["bfp8[0]", "mxfp6_e3m2"])
def test_the_table_fits_a_hundred_columns(spec):
    model = nn.Sequential()
    for depth in range(4):
        model = nn.Sequential(OrderedDict({"a_module_with_a_long_name": model, f"layer_{depth}": nn.Linear(6, 6)}))
    module, _ = convert(model, recipe=f"{spec} quantize_input=true")
    found = measure(module, [(torch.tensor([[math.inf] * 6, [math.nan] * 6]), None)], lambda out, _: out.sum())
    first, *lines = str(found).splitlines()
    assert first.split()[-2:] == ["NaN", "infinite"]
    assert max(map(len, [first, *lines])) <= 100


def test_a_model_in_pieces():
    """One that no graph can hold whole: it branches on a value, and its layers are called from Python."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = shapes.Tied(), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() < math.inf else x

    module, _ = convert(Loop(), recipe="bfp8[0] quantize_logits=true")
    found = measure(module, [torch.ones(2, 6)])
    assert {("first.first.weight", "W"), ("first.tanh", "A"), ("second", "A")} <= found.keys()


@pytest.mark.parametrize("kind", [shapes.Checkpointed, shapes.CheckpointedReentrant])
def test_what_backward_computes_again_counts_once(kind):
    model, (x,) = shapes.made(kind)
    plain = nn.Sequential(*copy.deepcopy(model).blocks)
    found, expected = (
        measure(convert(each, recipe="bfp8[0] rounding=nearest").module, [(x, None)], lambda out, _: out.sum())
        for each in (model.eval(), plain.eval())
    )
    assert found["blocks.0.0.weight", "W"] == expected["0.0.weight", "W"]
    for role in "AE":
        assert found["blocks.0.0", role] == expected["0.0", role]


def test_nothing_is_changed_and_no_graph_made_anew():
    class Counts(shapes.Counted):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
            return super().forward(nn.functional.dropout(x))

    module, _ = convert(Counts())
    x, loss = torch.randn(4, 6), lambda out, _: out.square().sum()
    for _ in range(3):  # the count of calls becomes a number that graphs are given
        loss(module(x), None).backward()
    before, graphs = {name: value.clone() for name, value in module.state_dict().items()}, len(module.graphs)
    gradients = [parameter.grad for parameter in module.parameters()]
    values = [gradient.clone() for gradient in gradients]
    states = random.getstate(), torch.get_rng_state()
    measure(module, [(x, None)] * 2, loss)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert module.training and module.calls == 3 and len(module.graphs) == graphs
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for parameter, gradient, value in zip(module.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient and torch.equal(gradient, value)


def test_a_model_that_a_wrapper_holds():
    module, _ = convert(nn.Linear(4, 2))
    assert measure(nn.Sequential(module), [torch.ones(1, 4)]) == measure(module, [torch.ones(1, 4)])
    with pytest.raises(ConvertError, match="measure takes one converted model, and this Sequential holds 2"):
        measure(nn.Sequential(module, convert(nn.Linear(2, 2)).module), [torch.ones(1, 4)])


def test_bad_input():
    with pytest.raises(ConvertError, match="measure takes the module that convert returns, not a Tied"):
        measure(shapes.Tied(), [])
    module, _ = convert(shapes.Tied())
    with pytest.raises(TypeError, match=r"a loss needs batches of \(inputs, targets\), not a Tensor"):
        measure(module, [torch.ones(2, 6)], F.mse_loss)
    with pytest.raises(TypeError, match=r"would take the rows of a tensor for them; put it in a list: \[x\]"):
        measure(module, torch.ones(2, 6))


def test_what_gives_samples_or_nothing_is_refused():
    module, _ = convert(nn.Linear(4, 2))
    x = torch.randn(6, 4)
    with pytest.raises(TypeError, match="a TensorDataset gives samples; put it in a DataLoader"):
        measure(module, torch.utils.data.TensorDataset(x))
    with pytest.raises(ValueError, match="measure got no batch"):
        measure(module, iter(()))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=3)
    assert measure(module, loader)["weight", "W"].values == 2 * 8
