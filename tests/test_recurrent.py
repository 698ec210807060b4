"""Recurrent layers have the bits of a version by hand: linear layers, sums, products, sigmoid and tanh."""

import copy
import functools
import itertools

import pytest
import torch
from graphs import converted, rewritten
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from swalp_fx import NotRewritten, Recipe, RecipeError, Rule, check, convert, draw, measure, report
from swalp_fx.nodes import recurrent
from swalp_fx.passes import verify
from swalp_fx.passes.captured import Scope
from swalp_fx.passes.names import parameter_subjects
from swalp_fx.passes.proof import VerifyError

FORMATS = ["bfp8[0]", "mxfp8", pytest.param("e4m3", marks=pytest.mark.slow)]
FEATURES, HIDDEN, BATCH, TIMES = 6, 5, 4, 3
generator = torch.Generator().manual_seed(1)
X = torch.randn(TIMES, BATCH, FEATURES, generator=generator)


def _lstm(cell, x, h, c):
    i, f, g, o = (cell.ih(x) + cell.hh(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if cell.hr is None else cell.hr(h)), c


def _gru(cell, x, h):
    (x_r, x_z, x_n), (h_r, h_z, h_n) = cell.ih(x).chunk(3, -1), cell.hh(h).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((1 - z) * n + z * h,)


def _rnn(activation, cell, x, h):
    return (activation(cell.ih(x) + cell.hh(h)),)


STEPS = {
    "LSTM": _lstm,
    "GRU": _gru,
    "tanh": functools.partial(_rnn, torch.tanh),
    "relu": functools.partial(_rnn, torch.relu),
}


def _step_of(layer):
    kind = type(layer).__name__.removesuffix("Cell")
    return STEPS[layer.nonlinearity if kind == "RNN" else kind]


class WrittenCell(nn.Module):
    """One step, with the weights of ``layer`` that have this ending."""

    def __init__(self, layer, suffix=""):
        super().__init__()
        self.step = _step_of(layer)
        self.ih, self.hh = (
            self._linear(layer, f"weight_{name}{suffix}", f"bias_{name}{suffix}") for name in ("ih", "hh")
        )
        self.hr = self._linear(layer, f"weight_hr{suffix}", "") if getattr(layer, "proj_size", 0) else None

    @staticmethod
    def _linear(layer, weight, bias):
        weight, bias = getattr(layer, weight), getattr(layer, bias, None)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return linear

    def forward(self, x, *states):
        return self.step(self, x, *states)


class Written(nn.Module):
    """A layer written by hand: loops over layers, directions and time."""

    def __init__(self, layer):
        super().__init__()
        self.like = [layer]
        suffixes = itertools.product(range(layer.num_layers), ("", "_reverse")[: 1 + layer.bidirectional])
        self.cells = nn.ModuleList(WrittenCell(layer, f"_l{k}{direction}") for k, direction in suffixes)

    def forward(self, x, hx=None):
        (layer,) = self.like
        directions, is_lstm = 1 + layer.bidirectional, isinstance(layer, nn.LSTM)
        x = x.transpose(0, 1) if layer.batch_first else x
        if hx is None:
            hx = tuple(
                torch.zeros(len(self.cells), x.shape[1], size, dtype=x.dtype)
                for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 1 + is_lstm]
            )
        elif not is_lstm:
            hx = (hx,)
        last = []
        for k in range(layer.num_layers):
            outputs = []
            for d in range(directions):
                states, given = tuple(each[k * directions + d] for each in hx), []
                for now in reversed(x.unbind(0)) if d else x.unbind(0):
                    states = self.cells[k * directions + d](now, *states)
                    given.append(states[0])
                outputs.append(torch.stack(given[::-1] if d else given))
                last.append(states)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer.dropout and self.training and k + 1 < layer.num_layers:
                x = torch.dropout(x, layer.dropout, True)
        x = x.transpose(0, 1) if layer.batch_first else x
        last = tuple(torch.stack(each) for each in zip(*last, strict=True))
        return x, (last if is_lstm else last[0])


class Headed(nn.Module):
    """A linear layer behind the outputs; the states are returned."""

    def __init__(self, layer, size):
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.head = layer, nn.Linear(size, 3)

    def forward(self, x, *states):
        y, last = self.layer(x, *states)
        return self.head(y), last


def _leaves(nest):
    return [nest] if isinstance(nest, torch.Tensor) else [leaf for each in nest for leaf in _leaves(each)]


def _results(model, recipe, *inputs, modes=(True,)):
    """Outputs, and the gradients of inputs and parameters, in these modes."""
    low = converted(model, recipe if "rounding" in recipe else f"{recipe} rounding=nearest")
    found = []
    for mode in modes:
        torch.manual_seed(3)
        given = torch.utils._pytree.tree_map(lambda each: each.clone().requires_grad_(), inputs)
        outputs = _leaves(low.train(mode)(*given))
        sum(each.square().sum() for each in outputs).backward()
        gradients = {name: parameter.grad for name, parameter in low.named_parameters()}
        found.append((outputs, [each.grad for each in _leaves(given)], gradients))
        low.zero_grad()
    assert [each.broke for each in low.graphs] == [None] * len(low.graphs)
    return found


def _assert_same(layer, recipe, *inputs, modes=(True,)):
    """``layer`` and its version by hand agree bit for bit, in all outputs and gradients."""
    size = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
    models = (Headed(each, size).to(inputs[0].dtype) for each in (layer, Written(layer)))
    for by_layer, by_hand in zip(*(_results(each, recipe, *inputs, modes=modes) for each in models), strict=True):
        outputs, given, gradients = by_layer
        own_outputs, own_given, own = by_hand
        assert all(map(torch.equal, outputs + given, own_outputs + own_given))
        names = {f"layer.{name}": _written_name(layer, name) for name, _ in layer.named_parameters()}
        for name, gradient in gradients.items():
            assert torch.equal(gradient, own[names.get(name, name)]), name


def _written_name(layer, name):
    """``layer.cells.1.ih.weight``, of ``weight_ih_l0_reverse``."""
    kind, part, run = name.split("_", 2)
    number = (1 + layer.bidirectional) * int(run[1]) + run.endswith("reverse")
    return f"layer.cells.{number}.{part}.{kind}"


KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN, tanh": nn.RNN,
    "RNN, relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
ALL = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def _made(kind, **how):
    torch.manual_seed(0)
    return KINDS[kind](FEATURES, HIDDEN, **how)


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_the_bits_of_what_one_writes_by_hand(kind, recipe):
    _assert_same(_made(kind), recipe, X, modes=(True, False))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("LSTM", {"bias": False}),
        ("LSTM", {"bidirectional": True}),
        ("LSTM", {"batch_first": True}),
        ("LSTM", {"num_layers": 3, "dropout": 0.4}),
        ("LSTM", {"proj_size": 2, "num_layers": 2}),
        *((kind, ALL) for kind in KINDS),
        *((kind, ALL | {"bias": False}) for kind in ("GRU", "RNN, tanh")),
    ],
)
def test_however_the_layer_is_set_up(kind, how):
    _assert_same(_made(kind, **how), "bfp8[0]", X)


@pytest.mark.parametrize("placement", ["compute", "compute+activation", "group"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN, tanh"])
def test_whatever_the_placement(kind, placement):
    _assert_same(_made(kind), f"bfp8[0] placement={placement}", X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_every_dtype(dtype):
    _assert_same(_made("GRU").to(dtype), "bfp6[0]", X.to(dtype))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_that_are_given(kind):
    first = torch.randn(2, 1, BATCH, HIDDEN, generator=torch.Generator().manual_seed(5))
    _assert_same(_made(kind), "bfp8[0]", X, tuple(first) if kind == "LSTM" else first[0])


def test_logits_that_are_rounded():
    _assert_same(_made("LSTM"), "bfp8[0] quantize_logits=true", X)


class Alone(nn.Module):
    """It returns the output of its layer, and reads nothing of it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_what_the_model_only_returns_is_not_rounded():
    layer = _made("LSTM")
    ((outputs, _, _),) = _results(Alone(layer), "bfp4[0]", X)
    ((written, _, _),) = _results(Alone(Written(layer)), "bfp4[0]", X)
    ((rounded, _, _),) = _results(Alone(layer), "bfp4[0] quantize_logits=true", X)
    assert all(map(torch.equal, outputs, written)) and not any(map(torch.equal, outputs, rounded))
    ((by_itself, _, _),) = _results(layer, "bfp4[0]", X)  # the layer is the model
    assert all(map(torch.equal, outputs, by_itself))


CELLS = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN, tanh": nn.RNNCell,
    "RNN, relu": functools.partial(nn.RNNCell, nonlinearity="relu"),
}


class Steps(nn.Module):
    """Two steps of a cell."""

    def __init__(self, cell):
        super().__init__()
        torch.manual_seed(2)
        self.cell, self.head = cell, nn.Linear(HIDDEN, 3)

    def forward(self, x, *states):
        for now in x[:2]:
            states = (
                self.cell(now, states if len(states) > 1 else states[0]) if self.is_torchs else self.cell(now, *states)
            )
            states = states if isinstance(states, tuple) else (states,)
        return self.head(states[0]), states

    @property
    def is_torchs(self):
        return isinstance(self.cell, nn.RNNCellBase)


@pytest.mark.parametrize("how", [{}, {"bias": False}])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_has_the_bits_of_what_one_writes_by_hand(kind, how):
    torch.manual_seed(0)
    cell = CELLS[kind](FEATURES, HIDDEN, **how)
    states = torch.randn(2, BATCH, HIDDEN)[: 1 + (kind == "LSTM")]
    by_cell, by_hand = (_results(Steps(each), "bfp8[0]", X, *states) for each in (cell, WrittenCell(cell)))
    ((outputs, given, gradients),), ((own_outputs, own_given, own),) = by_cell, by_hand
    assert all(map(torch.equal, outputs + given, own_outputs + own_given))
    for name, gradient in gradients.items():
        kind, _, part = name.removeprefix("cell.").partition("_")
        assert torch.equal(gradient, own[f"cell.{part}.{kind}" if part else name]), name


# One node


def _headed(kind="LSTM", **how):
    return Headed(_made(kind, **how), HIDDEN * (1 + how.get("bidirectional", False)))


def test_a_layer_is_one_node_and_the_graph_of_its_step_is_printed_below():
    low = converted(_headed(), "bfp8[0]")
    low(X)
    text = str(low.graphs)
    outer, step = text.split("\n\n# ")
    assert outer.count("swalp_fx_recurrent(layer_l0, key, x, (") == 1 and "sigmoid" not in outer
    assert step.startswith("Headed: Headed, train mode, layer_l0\n")
    assert step.count("quantize_output") == 12 and "torch.sigmoid" in step and "quantize_weight" not in step


def test_sequences_of_any_length_run_through_one_graph():
    low = converted(_headed(bidirectional=True), "bfp8[0] rounding=nearest")
    for times in (3, 4, 5, 9, 2):
        x = torch.randn(times, BATCH, FEATURES)
        y, _ = low(x)
        y.sum().backward()
        assert y.shape[0] == times and torch.equal(y, converted(_headed(bidirectional=True), low_recipe)(x)[0])
    assert len(low.graphs) == 2  # of the first length, and of all


low_recipe = "bfp8[0] rounding=nearest"


def test_no_length_at_all_is_refused_in_the_words_of_pytorch():
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        converted(_headed(), "bfp8[0]")(X[:0])
    assert converted(_headed(), "bfp8[0]")(X[:, :0])[0].shape == (TIMES, 0, 3)


def test_an_input_without_a_batch_is_a_batch_of_one():
    low = converted(_headed(), low_recipe)
    (y, (h, c)), (batched, (batched_h, _)) = low(X[:, 0]), low(X[:, :1])
    assert torch.equal(y, batched[:, 0]) and torch.equal(h, batched_h[:, 0]) and c.shape == (1, HIDDEN)


def test_blocks_are_of_a_step_by_the_index_in_the_batch():
    low = converted(_headed(batch_first=True), low_recipe)
    x = X.transpose(0, 1).contiguous()
    larger = x.clone()
    larger[1:] *= 100
    assert torch.equal(low(x)[0][:1], low(larger)[0][:1])  # another sequence's size is no part of a block
    later = x.clone()
    later[:, 2:] *= 100
    alone = converted(Alone(_made("LSTM", batch_first=True)), low_recipe)
    assert torch.equal(alone(x)[0][:, :2], alone(later)[0][:, :2])  # nor is a later time's


class Returns(nn.Module):
    """A graph ends behind its layer, and before it if ``early``."""

    def __init__(self, layer, early=False):
        super().__init__()
        self.layer, self.early = layer, early

    def forward(self, x, *states):
        if self.early:
            torch._dynamo.graph_break()
        y, last = self.layer(x, *states)
        torch._dynamo.graph_break()
        return y, last, y.sum()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("kind", "how"), [("LSTM", {}), ("GRU", {"num_layers": 2, "bidirectional": True}), ("LSTM", {"proj_size": 2})]
)
def test_behind_a_graph_break_outputs_and_states_are_returned_as_without_one(kind, how, early):
    layer = _made(kind, **how)
    due = converted(Alone(layer), low_recipe)(X)
    low = converted(Returns(layer, early), low_recipe)
    for _ in range(2):
        y, last, total = low(X)
        assert all(map(torch.equal, _leaves((y, last)), _leaves(due)))
    rounded = converted(Alone(layer), f"{low_recipe} quantize_logits=true")(X)[0]
    assert torch.equal(total, rounded.sum()) and not torch.equal(rounded, y)  # what the model reads is rounded
    (gradient,) = torch.autograd.grad(y.square().sum(), low.layer.weight_ih_l0)
    assert gradient.any()


def test_models_of_one_class_may_have_layers_of_other_depths():
    for how in ({}, {"num_layers": 2}, {"num_layers": 3, "bidirectional": True}):
        layer = _made("LSTM", **how)
        y, last, _ = converted(Returns(layer), low_recipe)(X)
        assert all(map(torch.equal, _leaves((y, last)), _leaves(converted(Alone(layer), low_recipe)(X))))


# Random words


class Constant(nn.Module):
    """The same step again and again: nothing is recurrent, and each input is the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.RNN(4, 64, nonlinearity="relu")
        with torch.no_grad():
            self.layer.weight_hh_l0.zero_()

    def forward(self, x):
        return self.layer(x)[0] + 0


def test_each_step_draws_other_words_forward_and_backward():
    torch.manual_seed(0)
    low = converted(Constant(), "A=bfp4[0] E=bfp4[0]")
    x = torch.randn(1, 1, 4).expand(5, 1, 4).clone().requires_grad_()
    y = low(x)
    y.sin().sum().backward()
    for steps in (y, x.grad):
        assert len({tuple(each.flatten().tolist()) for each in steps}) == 5
    torch.manual_seed(0)
    plain = converted(Constant(), "A=bfp4[0] E=bfp4[0] rounding=nearest")(x)
    assert torch.equal(plain, plain[:1].expand_as(plain))


class Twice(nn.Module):
    """Two calls of one layer, with the same input."""

    def __init__(self, breaks):
        super().__init__()
        self.layer, self.breaks = _made("GRU"), breaks

    def forward(self, x):
        first, _ = self.layer(x)
        if self.breaks:
            torch._dynamo.graph_break()
        second, _ = self.layer(x)
        return first + 0, second + 0


@pytest.mark.parametrize("breaks", [False, True])
def test_two_calls_of_a_layer_draw_words_of_their_own_whatever_ran_first(breaks):
    found = []
    for before in ((), (X[:2],), (X[:2], torch.randn(7, BATCH, FEATURES))):
        low = converted(Twice(breaks), "bfp4[0]")
        for each in before:
            low.eval()(each)
            low.train()(each)
        torch.manual_seed(7)
        found.append(low(X))
    assert not torch.equal(*found[0])
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))
    assert torch.equal(*converted(Twice(breaks), low_recipe)(X))


def test_a_key_of_its_own_for_each_step():
    keys = []

    def step(key, x, h):
        keys.append(int(key))
        return (h,), (x,), (h,)

    x = torch.arange(3.0).reshape(3, 1)
    y, last = recurrent(step, torch.tensor(5), x, (torch.zeros(1),), ())
    assert keys == [5, 5 ^ 1 << 32, 5 ^ 2 << 32] and torch.equal(y, x) and torch.equal(last, torch.zeros(1))
    keys.clear()
    y, _ = recurrent(step, torch.tensor(5), x.T, (torch.zeros(1),), (), axis=1, reverse=True)
    assert keys == [5 ^ 2 << 32, 5 ^ 1 << 32, 5] and torch.equal(y, x.T)


def _drawn(low, x=X):
    low.zero_grad()
    torch.manual_seed(7)
    y, _ = low(x)
    y.square().sum().backward()
    return [y, *(parameter.grad for parameter in low.parameters())]


def test_the_same_bits_whatever_ran_first():
    first, second = (converted(_headed(num_layers=2), "bfp6[0]") for _ in range(2))
    second.eval()(X)
    second.train()(torch.randn(7, BATCH, FEATURES))
    assert all(map(torch.equal, _drawn(first), _drawn(second)))
    assert all(map(torch.equal, _drawn(copy.deepcopy(first)), _drawn(second)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        headed = _headed()
        self.layer, self.head = headed.layer, headed.head

    def forward(self, x):
        y, last = checkpoint(self.layer, x, use_reentrant=False)
        return self.head(y), last


def test_checkpoints_change_no_bit(tmp_path):
    low = converted(_headed(), "bfp6[0]")
    expected = _drawn(low)
    inside = converted(Checkpointed(), "bfp6[0]")
    assert all(map(torch.equal, expected, _drawn(inside)))
    around = lambda x: checkpoint(low, x, use_reentrant=False)  # noqa: E731
    around.zero_grad, around.parameters = low.zero_grad, low.parameters
    assert all(map(torch.equal, expected, _drawn(around)))
    assert [each.name for each in report(inside, X).layers] == [each.name for each in report(low, X).layers]
    assert measure(inside, [X]).keys() == measure(low, [X]).keys()
    draw(inside, tmp_path / "graph.dot")


# Derivatives, and code around a layer


def test_double_backward_is_that_of_what_one_writes_by_hand():
    layer = _made("GRU")
    found = []
    for each in (layer, Written(layer)):
        low, x = converted(Headed(each, HIDDEN), low_recipe), X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(low(x)[0].square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        found.append((gradient, second))
    (gradient, second), (own, own_second) = found
    assert torch.equal(gradient, own) and torch.allclose(second, own_second, rtol=1e-5, atol=1e-9) and second.any()


def test_functional_call_computes_with_the_weights_it_is_given():
    low = converted(_headed(), low_recipe)
    doubled = {name: parameter.detach() * 2 for name, parameter in low.named_parameters()}
    other = converted(_headed(), low_recipe)
    other.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(low, doubled, (X,))[0], other(X)[0])


def test_torch_compile_around_changes_no_bit():
    low = converted(_headed(), low_recipe)
    with torch._dynamo.config.patch(allow_rnn=True):  # else torch.compile refuses recurrent layers
        compiled = torch.compile(low, backend="aot_eager", fullgraph=True)
        for times in (3, 5, 6):
            x = torch.randn(times, BATCH, FEATURES)
            assert torch.equal(compiled(x)[0], low(x)[0])


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 fails where it guards what derives a layer's weight")
def test_a_weight_that_is_derived_is_rounded_as_one():
    plain, derived = _headed(), _headed()
    weight_norm(derived.layer, "weight_hh_l0")
    plain.layer.weight_hh_l0.data.copy_(derived.layer.weight_hh_l0)
    low = converted(derived, low_recipe)
    assert torch.equal(low(X)[0], converted(plain, low_recipe)(X)[0])
    low(X)[0].sum().backward()
    assert low.layer.parametrizations.weight_hh_l0.original0.grad.any()
    assert "layer.weight_hh_l0" in [each.name for each in report(low).layers]


def test_under_autocast_all_has_the_type_of_the_fused_call():
    layer = _made("LSTM")
    low = converted(Alone(layer), low_recipe)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(FEATURES, layer.hidden_size)(X)
        except RuntimeError as error:
            pytest.skip(f"PyTorch has no LSTM in bfloat16 on this processor: {error}")
        found, expected = low(X), layer(X)
    assert [each.dtype for each in _leaves(found)] == [each.dtype for each in _leaves(expected)]
    assert torch.allclose(found[0].float(), expected[0].float(), atol=0.05)


@pytest.mark.parametrize("recipe", [low_recipe, f"{low_recipe} exclude=layer"])
def test_a_packed_sequence_is_refused(recipe):
    class Packed(Alone):
        def forward(self, x):
            return self.layer(pack_padded_sequence(x, torch.tensor([3, 2, 2, 1])))[0].data + 0

    sentence = (
        "layer would compute in float, since no graph holds a PackedSequence; give it a padded tensor, or leave it"
    )
    with pytest.raises(NotRewritten, match=f"^{sentence}"):
        converted(Packed(_made("LSTM")), recipe)(X)
    packed = pack_padded_sequence(X, torch.tensor([3, 2, 2, 1]))
    with pytest.raises(NotRewritten, match=sentence):
        converted(Alone(_made("LSTM")), recipe)(packed)
    in_float = Recipe.parse(low_recipe, rules=(Rule("layer", W="float", A="float", E="float"),))
    model = Packed(_made("LSTM"))
    assert torch.equal(converted(model, in_float)(X), model(X))


# Recipes and reports


@pytest.mark.parametrize("words", ["exclude=layer", "exclude=layer.l0.*", "whole=layer"])
def test_what_is_left_out_is_the_fused_call_with_rounded_weights(words):
    model = _headed()
    low = converted(model, f"W=bfp4[0] A=bfp4[0] E=bfp4[0] rounding=nearest {words}")
    rounded = converted(model, "W=bfp4[0] rounding=nearest")
    found, expected = low(X), rounded(X)
    assert torch.equal(found[1][0], expected[1][0])
    assert "torch.lstm(" in str(low.graphs) and "called whole, only weights are rounded" in str(report(low))
    assert torch.equal(found[0], expected[0]) is (words == "exclude=layer")  # else the layer's output is rounded


def test_rules_name_places_and_kinds():
    rules = (
        Rule("layer.l0.cell", A="bfp16[0]"),
        Rule("*", kind="LSTM", A="bfp6[0]"),
        Rule("*", kind="activation", E="e5m2"),
    )
    layers = report(convert(_headed(), recipe=Recipe.parse("bfp8[0]", rules=rules), example_inputs=(X,)).module).layers
    formats = {each.name: each.formats["A"] for each in layers}
    assert formats["layer.l0.cell"] == "bfp16[0]" and formats["layer.l0.gates"] == "bfp6[0]"


def test_a_subclass_is_a_kind_of_its_own():
    class Mine(nn.LSTM):
        pass

    recipe = Recipe.parse("bfp8[0]", rules=(Rule("*", kind="Mine", A="bfp4[0]"),))
    layers = report(convert(Alone(Mine(FEATURES, HIDDEN)), recipe=recipe, example_inputs=(X,)).module).layers
    assert {each.formats["A"] for each in layers} == {"bfp4[0]"} and len(layers) == 12


def test_a_place_that_is_not_there_is_refused_before_any_call():
    converted(_headed(), "bfp8[0] exclude=layer.l0.cell_tanh")
    with pytest.raises(RecipeError, match=r"'layer.l1.gates' matches nothing in the model; the nearest names are"):
        converted(_headed(), "bfp8[0] exclude=layer.l1.gates")
    with pytest.raises(RecipeError, match="reset_gate"):
        converted(Steps(nn.GRUCell(FEATURES, HIDDEN)), "bfp8[0] exclude=cell.forget_gate")


def test_a_report_has_each_place_and_counts_every_step():
    low = converted(_headed(), "bfp8[0] quantize_input=true")
    found = report(low, X)
    counted = {each.name: each.multiply_adds for each in found.layers}
    assert counted["layer.l0.input_product"] == TIMES * BATCH * 4 * HIDDEN * FEATURES
    assert counted["layer.l0.hidden_product"] == TIMES * BATCH * 4 * HIDDEN * HIDDEN
    assert len(found.layers) == 13 and "called whole" not in str(found)
    (head,) = (each for each in found.layers if each.name == "head")
    total = sum(counted.values())
    first = BATCH * 4 * HIDDEN * HIDDEN  # the zeros that the first step reads nobody has rounded
    assert f"{(total - first) / total:.1%} on rounded operands" in str(found) and head.multiply_adds


def test_measures_count_every_step():
    found = measure(converted(_headed(), "bfp8[0]"), [(X, torch.zeros(()))], lambda y, _: y[0].square().sum())
    for role in "AE":
        assert found["layer.l0.gates", role].values == TIMES * BATCH * 4 * HIDDEN
        assert found["layer.l0.hidden", role].values == TIMES * BATCH * HIDDEN
    assert found["layer.weight_hh_l0", "W"].values == 4 * HIDDEN * HIDDEN  # once, before the first step


@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_refuses_a_fused_call_that_hides_what_is_to_be_rounded(kind):
    model = _headed(kind)
    made = rewritten(model, "float", X)
    scope, recipe = Scope(parameter_subjects(model)), Recipe.parse(low_recipe)
    with pytest.raises(VerifyError, match=r"it hides layer.l0.input_product, which is"):
        verify(made.graph, made.captured, recipe, scope, keyed=False)
    verify(made.graph, made.captured, Recipe(), scope, keyed=False)


def test_where_nothing_is_rounded_all_stays_as_it_is():
    model = _headed(num_layers=2, bidirectional=True)
    assert check(model, X)
    assert torch.equal(converted(model, "float")(X)[0], model(X)[0])
