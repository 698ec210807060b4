"""A weight that a step stored is read as stored, in every format and rounding; one that a user wrote is rounded."""

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint
from torch.utils.checkpoint import checkpoint as recomputed

import swalp_fx
from swalp_fx import Average, convert, fingerprints, in_float, measure, nodes, ops, parse, quantize, restore
from swalp_fx.formats import named
from swalp_fx.recipe import ROUNDINGS

TABLE = [str(format) for format in vars(named).values() if isinstance(format, swalp_fx.Format)]
TABLE += [str(format) for format in named.STEMS.values()]
# Those that change a block when they round it again, by the kinds of docs/formats.md.
AGAIN = ["bfp4[0]+twos", "bfp8+twos", "mxfp8+even", "int8[0]", "e4m3[0]", "nf4", "nvfp4", "uint8[0]", "int8[0]+asym"]
SPECS = sorted(
    {*TABLE, *AGAIN, "fixed8.6", "posit8.1", "posit8.1[0]", "int4[-1:32]", "mxfp8+ceil", "mxfp8+rceil"} - {"float"}
)
ONE = "nvfp4 A=float E=float G=float M=float"


class Reads(nn.Module):
    """Its outputs are the weights that its forward sees."""

    def __init__(self, *names, shape=(48, 40)):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(*shape[::-1], bias=False) for name in names or ("only",)})

    def forward(self):
        return [layer.weight * 1.0 for layer in self.layers.values()]


def stored(model):
    return [layer.weight.detach().clone() for layer in model.layers.values()]


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    sum((seen * factor).square().sum() for seen in model()).backward()
    optimizer.step()


def same_bits(found, due):
    return all(torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in zip(found, due, strict=True))


def made(recipe=ONE, *names, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9), dtype=torch.float32):
    model = Reads(*names).to(dtype)
    return convert(model, optimizer := optimizer(model.parameters()), recipe=recipe), optimizer


def trained(*args, steps=2, **kwargs):
    (lp, swalp), optimizer = made(*args, **kwargs)
    for _ in range(steps):
        step(lp, optimizer)
    return lp, swalp, optimizer


def is_read_as_stored(lp):
    """In training, where two forwards have two keys, and in eval mode."""
    due = stored(lp)
    return all(same_bits(lp.train(training)(), due) for training in (True, True, False))


@pytest.mark.parametrize("spec", SPECS)
def test_forwards_see_the_weights_that_a_step_stored(spec):
    """In every rounding. Then one number is written off the grid, and all of the weight is on it where it is read."""
    rules = "; ".join(f"layers.{rounding} W={spec}~{rounding}" for rounding in ROUNDINGS)
    lp, _, optimizer = trained(f"float rules=[{rules}]", *ROUNDINGS, steps=1)
    for _ in range(2):
        assert is_read_as_stored(lp)
        step(lp.train(), optimizer)
    for layer, before in zip(lp.layers.values(), stored(lp), strict=True):
        layer.weight.data[3, 5] += 2.0**-20
        assert not torch.equal(layer.weight, before)
    read = dict(zip(ROUNDINGS, lp.eval()(), strict=True))
    for rounding, layer in lp.layers.items():
        due = quantize(layer.weight.detach(), spec, "nearest" if rounding == "stochastic" else rounding)
        assert same_bits([read[rounding]], [due])


@pytest.mark.parametrize("spec", AGAIN)
def test_the_formats_that_need_it_are_known(spec):
    assert not parse(spec).keeps_rounded() and not fingerprints.keeps_rounded(spec, torch.float32)


@pytest.mark.parametrize("spec", ["bfp8[0]", "mxfp8", "mxfp4", "e4m3", "fixed8.6"])
def test_the_others_are_looked_at_as_numbers(spec):
    assert parse(spec).keeps_rounded() and fingerprints.keeps_rounded(spec, torch.bfloat16)
    lp, swalp, _ = trained(f"{spec} A=float E=float")
    assert not swalp.state_dict()["fingerprints"] and is_read_as_stored(lp)


def test_before_a_step_weights_are_rounded_where_they_are_read():
    (lp, _), _ = made(f"{ONE} W=nvfp4~nearest")
    assert same_bits(lp(), [quantize(each, "nvfp4") for each in stored(lp)])


OPTIMIZERS = {
    "one pass": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "for each": lambda ps: torch.optim.SGD(ps, lr=0.05, foreach=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, eps=1e-4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", ["", " master=float", " master=bf16~stochastic"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_masters_and_in_every_dtype(optimizer, master, dtype):
    lp, _, optimizer = trained(ONE + master, optimizer=OPTIMIZERS[optimizer], dtype=dtype)
    assert is_read_as_stored(lp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["bfp12[0]", "bfp16", "nf4~down", "posit8.1~up"])
def test_in_a_half_dtype_that_is_narrower_than_the_format(spec, dtype):
    lp, _, _ = trained(f"W={spec} master=float", dtype=dtype)
    assert is_read_as_stored(lp)


def test_weights_that_are_put_out_of_place():
    """By an optimizer that sets ``data``, and by a model that is moved."""

    class Assigns(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data = p.data - group["lr"] * p.grad

    lp, _, _ = trained(optimizer=lambda ps: Assigns(ps, lr=0.05))
    assert is_read_as_stored(lp)
    for layer in lp.layers.values():
        layer.weight.data = layer.weight.data.t().contiguous().t()  # other memory, other strides, the same numbers
    assert is_read_as_stored(lp)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    lp, x = Tied(), torch.randn(4, 32)
    optimizer = torch.optim.SGD(lp.parameters(), lr=0.05)
    lp, _ = convert(lp, optimizer, recipe="W=nvfp4")
    lp(x).square().sum().backward()
    optimizer.step()
    due = F.linear(F.linear(x, lp.first.weight, lp.first.bias), lp.second.weight, lp.second.bias)
    assert torch.equal(lp(x), due) and torch.equal(lp(x), due)


def test_writes_of_the_same_numbers_change_nothing():
    """As a broadcast among equal ranks does, and a model that is given its own state."""
    lp, _, _ = trained()
    for parameter in lp.parameters():
        parameter.data.copy_(parameter.detach().clone())
    assert is_read_as_stored(lp)
    lp.load_state_dict(copy.deepcopy(lp.state_dict()))
    assert is_read_as_stored(lp)
    lp.load_state_dict(copy.deepcopy(lp.state_dict()), assign=True)
    assert is_read_as_stored(lp)


@pytest.mark.parametrize("write", ["data", "load_state_dict", "no_grad", "assign"])
def test_what_a_user_writes_is_rounded(write):
    lp, _, _ = trained()
    layer, new = lp.layers["only"], torch.randn(48, 40)
    if write == "data":
        layer.weight.data.copy_(new)
    elif write == "load_state_dict":
        lp.load_state_dict({"layers.only.weight": new})
    elif write == "no_grad":
        with torch.no_grad():
            layer.weight.copy_(new)
    else:
        layer.weight = nn.Parameter(new)
    assert same_bits(lp.eval()(), [quantize(new, "nvfp4")])


# ---- copies, states, averages --------------------------------------------------------------------


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda lp: pickle.loads(pickle.dumps(lp)),
    "in a list": lambda lp: copy.deepcopy([lp.layers["only"], lp])[1],
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_sees_its_weights_when_the_model_has_gone_on(way):
    lp, _, optimizer = trained()
    copied = COPIES[way](lp)
    step(lp, optimizer)
    assert is_read_as_stored(copied) and is_read_as_stored(lp)
    del lp, optimizer
    gc.collect()
    assert is_read_as_stored(copied)


def test_a_copy_of_the_optimizer_pass_goes_on():
    lp, swalp, optimizer = trained()
    other, _, its_optimizer = copy.deepcopy((lp, swalp, optimizer))
    step(lp, optimizer)
    assert is_read_as_stored(other)
    step(other, its_optimizer)
    assert is_read_as_stored(other) and is_read_as_stored(lp)


def is_known(numbers):
    gc.collect()
    return any(number in fingerprints._KNOWN for number in numbers.values())


def test_what_no_parameter_holds_is_forgotten():
    lp, swalp, optimizer = trained()
    before, numbers = stored(lp), swalp.state_dict()["fingerprints"]
    assert is_known(numbers)
    step(lp, optimizer)
    lp.load_state_dict({"layers.only.weight": before[0]})
    assert not is_known(numbers) and same_bits(lp.eval()(), [quantize(before[0], "nvfp4")])
    numbers = swalp.state_dict()["fingerprints"]
    assert is_known(numbers)
    del lp, swalp, optimizer
    assert not is_known(numbers)


def saved(*parts):
    memory = io.BytesIO()
    torch.save([copy.deepcopy(part.state_dict()) for part in parts], memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("master", ["", " master=float"])
def test_a_resumed_run_sees_the_same_weights(order, master):
    states = saved(*trained(ONE + master))
    assert not is_known(states[1]["fingerprints"])
    (lp, swalp), optimizer = made(ONE + master)
    for i in order:
        (lp, swalp, optimizer)[i].load_state_dict(states[i])
    assert same_bits(stored(lp), states[0].values()) and is_read_as_stored(lp)
    assert swalp.state_dict()["fingerprints"] == states[1]["fingerprints"]


def test_torchs_distributed_checkpoints_hold_the_fingerprints(tmp_path):
    """They fill what a fresh state has, by name."""
    lp, swalp, optimizer = trained()
    due = swalp.state_dict()["fingerprints"]
    checkpoint.save({"model": lp.state_dict(), "swalp": swalp.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    del lp, swalp, optimizer
    (lp, swalp), _ = made()
    states = {"model": lp.state_dict(), "swalp": swalp.state_dict()}
    assert [*states["swalp"]["fingerprints"].values()] == [0]
    checkpoint.load(states, checkpoint_id=tmp_path, no_dist=True)
    swalp.load_state_dict(states["swalp"])
    assert swalp.state_dict()["fingerprints"] == due and is_read_as_stored(lp)


def test_a_state_of_version_4_is_read():
    """Its weights are rounded where they are read, as its own run did."""
    lp, swalp, optimizer = trained()
    states = saved(lp, swalp, optimizer)
    states[1] = {key: value for key, value in states[1].items() if key not in ("fingerprints", "waiting")}
    states[1]["version"] = 4
    numbers = swalp.state_dict()["fingerprints"]
    del lp, swalp, optimizer
    assert not is_known(numbers)
    (lp, swalp), optimizer = made()
    for part, state in zip((lp, swalp, optimizer), states, strict=True):
        part.load_state_dict(state)
    assert same_bits(lp.eval()(), [quantize(each, "nvfp4") for each in stored(lp)])
    step(lp.train(), optimizer)
    assert is_read_as_stored(lp)


@pytest.mark.parametrize(
    ("fingerprints", "message"),
    [
        ({"layers.only.weight": 1.5}, "the state's fingerprints must map names to whole numbers"),
        ({"head": 1}, "the state's fingerprints have 'head', which this model does not"),
    ],
)
def test_fingerprints_that_do_not_fit_are_refused(fingerprints, message):
    _, swalp, _ = trained()
    with pytest.raises(ValueError, match=message):
        swalp.load_state_dict(swalp.state_dict() | {"fingerprints": fingerprints})


def test_a_packed_checkpoint():
    torch.manual_seed(19)  # weights that no model of another test has
    lp, swalp, optimizer = trained()
    packed, due = swalp.packed_state_dict(lp), stored(lp)
    step(lp, optimizer)
    states = saved(swalp)
    swalp.load_packed_state_dict(lp, packed)
    assert same_bits(stored(lp), due)
    swalp.load_state_dict(states[0])  # of another step: it does not know these
    assert same_bits(lp.eval()(), [quantize(each, "nvfp4") for each in due])


@pytest.mark.parametrize("format", ["float", "nvfp4"])
def test_an_average_is_rounded_once(format):
    """A float mean where it is read; a mean in the weights' format when it is written."""
    lp, swalp, optimizer = trained()
    for _ in range(3):
        swalp.update_average()
        step(lp, optimizer)
    own = stored(lp)
    due = [quantize(swalp.average.mean()["layers.only.weight"], "nvfp4")]
    with swalp.averaged(format=format):
        assert same_bits(lp.eval()(), due) and same_bits(lp(), due)
    assert same_bits(stored(lp), own) and is_read_as_stored(lp)
    averaged = swalp.averaged_model(format=format, low_precision=True).eval()
    assert same_bits(averaged(), due)


def test_an_average_that_is_kept_in_the_weights_format_is_read_as_it_is():
    lp, swalp, optimizer = trained()
    swalp.averages["low"] = Average("nvfp4")
    for _ in range(2):
        swalp.update_average()
        step(lp, optimizer)
    averaged = swalp.averaged_model(average="low", low_precision=True)
    assert same_bits(averaged(), swalp.averages["low"].mean().values())


# ---- ways to run a forward -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nvfp4", "bfp4[0]+twos", "int8[0]~down"])
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model_sees_them(training, spec):
    lp, _, optimizer = trained(f"W={spec}")
    lp.train(training)
    compiled = torch.compile(lp, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert same_bits(compiled(), stored(lp)) and same_bits(compiled(), stored(lp))
        with torch.no_grad():
            assert same_bits(compiled(), stored(lp))
        step(lp, optimizer)
    lp.layers["only"].weight.data[0, 0] += 2.0**-20
    if not training:
        assert same_bits(compiled(), [quantize(each, *spec.split("~")) for each in stored(lp)])


def test_inductors_code_sees_them():
    lp, _, optimizer = trained()
    compiled = torch.compile(lp)
    for _ in range(2):
        assert same_bits(compiled(), stored(lp))
        step(lp, optimizer)


def test_a_compiled_step():
    (lp, _), optimizer = made()
    compiled = torch.compile(lambda: step(lp, optimizer), backend="aot_eager")
    for _ in range(3):
        compiled()
        assert is_read_as_stored(lp.train())


def test_a_functional_call_of_the_same_numbers_and_of_others():
    lp, _, _ = trained()
    clones = {name: p.detach().clone() for name, p in lp.named_parameters()}
    assert same_bits(torch.func.functional_call(lp, clones, ()), stored(lp))
    clones["layers.only.weight"] += 2.0**-20
    read = torch.func.functional_call(lp.eval(), clones, ())
    assert same_bits(read, [quantize(each, "nvfp4") for each in clones.values()])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_sees_them_twice(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
            self.checkpoints = False

        def forward(self, x):
            return recomputed(self.block, x, use_reentrant=reentrant) if self.checkpoints else self.block(x)

    lp, x = Checkpointed(), torch.randn(4, 32, requires_grad=True)
    optimizer = torch.optim.SGD(lp.parameters(), lr=0.05)
    lp, _ = convert(lp, optimizer, recipe="W=nvfp4")
    lp(x).square().sum().backward()
    optimizer.step()
    found = []
    for lp.checkpoints in (False, True):
        optimizer.zero_grad()
        y = lp(x)
        y.square().sum().backward()
        found.append((y, *(p.grad for p in lp.parameters())))
    with in_float(lp):
        due = lp(x)
    assert same_bits([y for y, *_ in found], [due, due])
    assert same_bits(found[0], found[1])


def test_every_kind_of_weight_is_exact_where_it_is_read():
    """Slices of one parameter, a loop's weights, a convolution's, an embedding's. A derived weight is rounded."""

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.lstm = nn.LSTM(32, 32, batch_first=True)
            self.conv = nn.Conv1d(32, 32, 3)
            self.norm = nn.LayerNorm(32)
            self.derived = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))

        def forward(self, x):
            y = self.table(x)
            y = self.norm(self.attention(y, y, y)[0])
            y = self.conv(self.lstm(y)[0].mT).mT
            return self.derived(y)

    model, x = Kinds(), torch.randint(50, (2, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lp, _ = convert(model, optimizer, recipe="W=nvfp4")
    for _ in range(2):
        lp(x).square().sum().backward()
        optimizer.step()
    weights = {name: each for (name, role), each in measure(lp, [x]).items() if role == "W"}
    assert {"table.weight", "attention.in_proj_weight", "lstm.weight_hh_l0", "conv.weight"} <= weights.keys()
    noisy = [name for name, each in weights.items() if each.noise]
    assert noisy == ["derived.weight"]


def test_in_float_and_restored_and_in_another_format():
    lp, _, _ = trained()
    with in_float(lp):
        assert same_bits(lp(), stored(lp))
    assert is_read_as_stored(lp)
    before = stored(lp)
    restore(lp)
    lp, _ = convert(lp, recipe="W=nvfp4[-1:8]")
    assert same_bits(lp.eval()(), [quantize(each, "nvfp4[-1:8]") for each in before])


def test_a_transform_of_torch_func():
    lp, _, _ = trained()
    weight, tangent = lp.layers["only"].weight.detach(), torch.randn(48, 40)
    read = lambda x: nodes.quantize_weight(x, torch.tensor(3), 7, "nvfp4", "stochastic")  # noqa: E731
    y, dy = torch.func.jvp(read, (weight,), (tangent,))
    assert same_bits([y, dy], [weight, tangent])
    assert torch.equal(torch.func.grad(lambda x: (read(x) * tangent).sum())(weight), tangent)
    both = torch.stack([weight, weight + 2.0**-20])
    read_both = torch.func.vmap(lambda x: nodes.quantize_weight(x, None, 7, "nvfp4", "nearest"))(both)
    assert same_bits(read_both, [weight, quantize(both[1], "nvfp4")])


# ---- the number ----------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_by_the_compiled_function_and_by_torchs_operations():
    x = torch.randn(40001)
    views = [
        x,
        x[1:],
        x[3:10],
        x[:1],
        x[:0],
        x[2],
        x[:40000].view(200, 200).t(),
        x.double(),
        x.half()[:7],
        x.bfloat16(),
    ]
    for each in views:
        assert int(fingerprints._number_on_device(each, "nvfp4")) == fingerprints._number(each, "nvfp4")


def test_every_bit_and_its_place_counts():
    x = torch.zeros(33)
    numbers = {fingerprints._number(x, "nvfp4")}
    for i in range(33):
        for bit in range(32):
            y = x.clone()
            y.view(torch.int32)[i] ^= 2**bit if bit < 31 else -(2**31)
            numbers.add(fingerprints._number(y, "nvfp4"))
    numbers.add(fingerprints._number(x, "nvfp4[-1:8]"))
    numbers.add(fingerprints._number(x.view(3, 11), "nvfp4"))
    numbers.add(fingerprints._number(x.view(torch.int32).view(torch.float32).to(torch.bfloat16), "nvfp4"))
    assert len(numbers) == 1 + 33 * 32 + 3


def test_a_fingerprint_does_not_depend_on_threads(one_thread):
    x = torch.randn(2**20 + 3)
    due = ops.fingerprint(x)
    torch.set_num_threads(2)
    assert ops.fingerprint(x) == due
