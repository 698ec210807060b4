"""The studies: that a stack of runs is those runs, and that each command writes what it says."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import ordering
import stacked
import study
import swalp_fx

SEEDS = 3


@pytest.fixture(autouse=True)
def threads():
    """The commands run on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    if single != "nvfp4":  # whose second scale is the whole tensor's
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
        module, _ = swalp_fx.convert(model, optimizer, recipe=recipe)
        for _ in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(module(x).flatten(0, -2), y.flatten(), reduction="sum") / samples).backward()
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
    runs.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
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


# The commands


@pytest.fixture
def small(monkeypatch):
    make = ordering.Settings
    monkeypatch.setattr(ordering, "Settings", lambda: make(seeds=2, epochs=2, average_from=1, bits=(8, 2)))


def test_ordering_writes_its_table_and_its_figure(small, tmp_path, capsys):
    record = study.main(["ordering", "--seed", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(record)) | {"table": written["table"]}
    assert capsys.readouterr().out == written["table"] + "\n"
    recipes = [line["recipe"] for line in record["lines"]]
    assert recipes[:3] == ["float", "bfp8", "bfp2"] and recipes[-1] == "bfp2[0] A=bfp2 E=bfp2"
    for line in record["lines"]:
        errors = line["errors"]
        assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 100 for values in errors.values())
        gains = [mean - average for mean, average in zip(errors["mean"], errors["average"], strict=True)]
        assert line["mean"]["gain"] == pytest.approx(sum(gains) / 2) and line["won"] == sum(g > 0 for g in gains)
    assert {"ordering.svg", "ordering.png"} < {path.name for path in tmp_path.iterdir()}


def test_a_format_that_training_does_not_survive_is_said_in_the_table(small):
    lines = {line.split("  ")[0]: line for line in ordering.table(study.main(["ordering"])).splitlines()}
    assert "does not train" in lines["bfp2[0]"] and "does not train" not in lines["bfp8[0]"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["odering"], "invalid choice: 'odering'"),
        (["ordering", "--out", "/dev/null/x"], "Not a directory: '/dev/null/x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith("study.py") and complaint in message
