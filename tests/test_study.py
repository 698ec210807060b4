"""The studies: a stack of runs gives the same as single runs, and each command writes its files."""

import contextlib
import functools
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import averages
import data
import ordering
import roles
import stacked
import study
import swalp_fx

SEEDS = 3

pytestmark = pytest.mark.usefixtures("one_thread")  # as the commands are


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


# A stack


@pytest.mark.parametrize(
    ("single", "stack"),
    [
        ("float", "float"),
        ("fixed8.6", "fixed8.6"),
        ("e4m3", "e4m3"),
        ("bfp8", "bfp8[0]"),
        ("bfp8[0]", "bfp8[0,1]"),
        ("bfp8[0,1]+twos", "bfp8[0,1,2]+twos"),
        ("int8[-1]", "int8[0,-1]"),
        ("bfp8[-1:16]", "bfp8[-1:16]"),
        ("bfp8[0:16]", "bfp8[1:16]"),
        ("mxfp4", "mxfp4"),
        ("mxfp8[]", "mxfp8[0]"),
        ("nvfp4", "nvfp4"),
    ],
)
def test_a_scale_is_shared_within_one_seed(single, stack):
    assert str(stacked.stacked(swalp_fx.parse(single))) == stack
    x = torch.randn(SEEDS, 6, 40)
    if single != "nvfp4":  # its second scale is the whole tensor's
        each = torch.stack([swalp_fx.quantize(one, single) for one in x])
        assert torch.equal(swalp_fx.quantize(x, stack), each)


def layers(seed, width, classes):
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, classes))


@pytest.mark.parametrize("text", ["bfp4[0]", "bfp6", "bfp4[0] A=bfp4 E=bfp5", "fixed8.4", "mxfp8"])
def test_a_stack_of_runs_is_those_runs_bit_for_bit(text, monkeypatch):
    """Inputs too are rounded, to nearest, on scales that are powers of two: sums of few bits, the same in any order."""
    text += " rounding=nearest quantize_input=true momentum=float"
    monkeypatch.setattr(stacked, "HIDDEN", (16,))
    width, classes, samples = 12, 4, 8
    torch.manual_seed(0)
    stack = stacked.network(SEEDS, width, classes)
    singles = [layers(seed, width, classes) for seed in range(SEEDS)]
    for seed, single in enumerate(singles):
        for name, parameter in single.named_parameters():
            parameter.data.copy_(stack.get_parameter(name)[seed].view(parameter.shape))
    inputs, targets = torch.randn(SEEDS, samples, width), torch.randint(classes, (SEEDS, samples))

    def steps(model, recipe, x, y):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        swalp_fx.convert(model, optimizer, recipe=recipe)
        for _ in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum") / samples).backward()
            optimizer.step()

    steps(stack, stacked.recipe(text), inputs, targets)
    for seed, single in enumerate(singles):
        steps(single, text, inputs[seed], targets[seed])
        for name, parameter in single.named_parameters():
            assert torch.equal(stack.get_parameter(name)[seed].view(parameter.shape), parameter), name


def test_each_seed_has_weights_and_an_order_of_its_own(digits):
    runs = stacked.Runs("bfp8[0]", stacked.Training(seeds=SEEDS), digits)
    start = runs.model[0].weight.detach().clone()
    assert len({row.sum().item() for row in start}) == SEEDS
    seen = []
    runs.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    runs.train_epoch(lambda: None)
    assert len(seen) == 32 and not torch.equal(seen[0][0], seen[0][1])
    epoch = torch.cat(seen, 1)
    for inputs in epoch:  # every seed sees every image once
        assert torch.equal(inputs.sum(1).sort().values, digits.train_inputs.flatten(1).sum(1).sort().values)
    assert torch.equal(stacked.Runs("float", stacked.Training(seeds=SEEDS), digits).model[0].weight, start)


def test_the_scores_are_of_the_times_they_are_named_for(digits, monkeypatch):
    monkeypatch.setattr(stacked, "errors", lambda module, *_: torch.full((2,), 1.0) * next(numbers))
    numbers = iter(range(10))
    found = stacked.scores("float", stacked.Training(seeds=2, epochs=5, average_from=2), digits, lambda: None)
    assert {name: values.tolist() for name, values in found.items()} == {
        "warm-up": [1, 1],
        "last": [4, 4],
        "mean": [3, 3],
        "average": [5, 5],
    }


# The role that breaks first


def column(error, standard_error=0.1):
    return {"mean": {"mean": error}, "standard error": {"mean": standard_error}}


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, None),
        ({"A": column(4.0), "E": column(5.0)}, "E"),
        ({"all": column(90.0)}, None),  # no role by itself
        ({"W": column(3.4)}, None),  # sure, and less than half a point
        ({"W": column(5.0, 0.8)}, None),  # more, and not sure
    ],
)
def test_the_role_that_breaks_first_costs_the_most_and_surely(changes, first):
    columns = {role: column(3.0) for role in roles.COLUMNS} | changes
    assert roles.breaks_first(columns, column(3.0)) == first


# The averages of one trajectory


@pytest.mark.parametrize("bits", [4, 8])
def test_the_step_of_a_row(bits):
    x = torch.randn(SEEDS, 5, 40)
    codes = swalp_fx.quantize(x, averages.format_of(bits)) / averages.step_of(x, bits)
    assert torch.equal(codes, codes.round())
    largest = codes.abs().amax(-1)
    assert (largest >= 2 ** (bits - 2)).all() and (largest < 2 ** (bits - 1)).all()


def test_every_average_takes_part_as_often_as_it_says():
    settings = averages.Settings(bits=(8, 4), every=(1, 3), watched=8)
    several, alone = averages.Averages(settings), swalp_fx.Average(averages.format_of(4))
    for step in range(1, 8):
        parameters = {"w": torch.randn(SEEDS, 5, 40, generator=torch.Generator().manual_seed(step))}
        several.update(parameters)
        if step % 3 == 0:
            alone.update(parameters)
    assert torch.equal(several.rounded["nearest", 3, 4].means["w"], alone.means["w"])
    assert {key[1]: average.n_averaged for key, average in several.rounded.items()} == {1: 7, 3: 2}
    found = [(mode, every, bits) for mode, every, bits, *_ in several.read()]
    assert len(found) == len(set(found)) == 3 * 2 * 3
    assert several.distance["updates"] == [6, 7]
    assert all(0 < each < 1 for each in several.distance["read"])


# The commands


TINY = {"seeds": 2, "epochs": 2, "average_from": 1, "batch_size": 250}
SMALL = {
    "ordering": (ordering, {"bits": (8, 4)}, ["ordering"]),
    "formats": (roles, {}, ["formats"]),
    "averaging": (averages, {"bits": (8, 4), "every": (1, 2), "batch_size": 50}, ["averaging", "stall"]),
}
WORDS = {"ordering": [], "formats": ["--format", "mxfp8", "--format", "bfp4"], "averaging": []}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Study -> (record, folder, its output), of a few steps."""
    found = {}
    for name, (module, changes, _) in SMALL.items():
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(module, "Settings", functools.partial(module.Settings, **(TINY | changes)))
            record = study.main([name, *WORDS[name], "--seed", "1", "--out", str(folder)])
        found[name] = record, folder, printed.getvalue()
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_study_writes_its_record_its_table_and_its_figures(name, runs):
    record, folder, printed = runs[name]
    written = json.loads((folder / "results.json").read_text())
    assert written == json.loads(json.dumps(record)) | {"table": written["table"]}
    assert written["command"].startswith(f"python tools/study.py {name} ")
    assert printed == written["table"] + "\n"
    drawn = {f"{figure}.{kind}" for figure in SMALL[name][2] for kind in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == {"results.json", *drawn}


def test_the_record_of_the_ordering(runs):
    record = runs["ordering"][0]
    recipes = [line["recipe"] for line in record["lines"]]
    assert recipes[:3] == ["float", "bfp8", "bfp4"] and recipes[-1] == "bfp4[0] A=bfp4 E=bfp4"
    for line in record["lines"]:
        errors = line["errors"]
        assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 100 for values in errors.values())
        gains = [mean - average for mean, average in zip(errors["mean"], errors["average"], strict=True)]
        assert line["mean"]["gain"] == pytest.approx(sum(gains) / 2) and line["won"] == sum(g > 0 for g in gains)


def test_the_record_of_the_formats(runs):
    record = runs["formats"][0]
    assert list(record["formats"]) == ["mxfp8", "bfp4"] == list(record["breaks first"])
    assert all(list(columns) == ["all", "W", "A", "E", "G", "M"] for columns in record["formats"].values())


def test_the_record_of_the_averaging(runs):
    record = runs["averaging"][0]
    assert record["bits"] == [None, 8, 4] and list(record["errors"]) == ["read", "stochastic", "nearest"]
    for errors in record["errors"].values():
        assert {every: len(values) for every, values in errors.items()} == {"1": 3, "2": 3}
    # Averages in float are the same, whatever others do.
    assert len({errors["2"][0] for errors in record["errors"].values()}) == 1


def test_a_format_that_training_does_not_survive_is_said_in_the_table(monkeypatch, capsys):
    few = {"seeds": 2, "epochs": 2, "average_from": 1, "bits": (2,)}
    monkeypatch.setattr(ordering, "Settings", functools.partial(ordering.Settings, **few))
    study.main(["ordering"])
    lost = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "does not train" in line]
    assert lost == ["bfp2", "bfp2[0]", "bfp2[0] A=bfp2 E=bfp2"]  # and not float


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["odering"], "invalid choice: 'odering'"),
        (["formats", "--format", "e4m3", "--format", "bpf8"], "unknown format spec 'bpf8'"),
        (["ordering", "--format", "bfp8"], "unrecognized arguments: --format"),
        (["ordering", "--out", "/dev/null/x"], "/dev/null/x cannot be made a folder (Not a directory); name another"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith("study.py") and complaint in message
