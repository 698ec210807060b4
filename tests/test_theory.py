"""The paper's claims, at the sizes that show their direction in seconds; and the commands that measure them in full."""

import itertools
import json

import numpy as np
import pytest
import torch

import data
import drawing
import logistic
import quadratic
import stacked
import theory

pytestmark = pytest.mark.usefixtures("one_thread")  # as the commands are


# The direction of each claim


def test_theorem_1_the_average_nears_the_optimum_as_one_over_t():
    record = quadratic.run(quadratic.Settings(steps=2500, copies=8))
    assert record["slopes"]["SWALP"] < -0.85 and record["slopes"]["SWA-FP"] < -0.85
    assert record["final"]["SWALP"] < record["final"]["SGD-LP"] / 10


@pytest.fixture(scope="module")
def chains():
    return logistic.run(logistic.Settings(chains=16, fractional_bits=(2, 3, 4, 5), warmup=500, steps=1000))


def test_theorem_2_the_limit_is_quadratic_in_the_step_of_the_weights(chains):
    slopes = logistic.slopes(chains, "gradient", 2, 5)
    assert slopes["SWALP limit"] > 1.7
    assert slopes["SGD-LP"] < 1.3


def test_theorem_2_more_steps_bring_one_chain_nearer_to_the_limit(chains):
    for what in ("distance", "gradient"):
        lines = ["SGD-LP", "SWALP at T/4", "SWALP at T/2", "SWALP at T", "SWALP limit"]
        assert list(chains[what]) == lines
        for far, near in itertools.pairwise(lines):
            assert np.all(np.array(chains[what][near]) < chains[what][far])


def test_averaging_gives_back_what_four_bits_lose():
    errors = stacked.summary(stacked.scores("bfp4[0]", stacked.Training(), data.load("digits"), lambda: None))["mean"]
    assert errors["gain"] > 1.5
    assert errors["average"] < errors["warm-up"]


# Their measures


def test_the_optimum_of_the_regression_has_no_gradient():
    inputs, targets, optimum = quadratic.problem(quadratic.Settings(dimensions=8, samples=64))
    assert (inputs.T @ (inputs @ optimum - targets)).abs().max() < 1e-10


@pytest.fixture(scope="module")
def digits():
    return logistic.problem(logistic.Settings())


def test_the_optimum_of_the_logistic_regression_has_no_gradient(digits):
    assert digits.squared_gradient(digits.optimum) < 1e-16
    assert digits.squared_gradient(digits.optimum + 0.1) > 1e-4


def test_the_gradient_is_autograds(digits):
    weights = torch.randn(3, *digits.optimum.shape, dtype=torch.float64, requires_grad=True)
    loss = sum(
        torch.nn.functional.cross_entropy(digits.inputs @ each.T, digits.labels) + digits.l2 / 2 * each.square().sum()
        for each in weights
    )
    torch.testing.assert_close(digits.gradient(weights), *torch.autograd.grad(loss, weights))


def test_the_limit_is_estimated_without_bias():
    """Over many draws of a few chains; their variance is a hundred times the square to be found."""
    draws = 3.0 * torch.randn(20_000, 8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3

    def squared(point):
        return point.square().sum(-1)

    estimates = np.array([logistic._limit(squared, chains) for chains in draws])
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - 0.3**2) < 3 * error < 0.1


def test_a_slope_of_an_estimate_that_is_not_positive_is_none():
    record = {"bits": [2, 3, 4], "distance": {"SGD-LP": [4, 2, 1], "SWALP at T": [16, 4, 1], "SWALP limit": [4, 1, -1]}}
    assert logistic.slopes(record, "distance", 2, 4) == {
        "SGD-LP": pytest.approx(1),
        "SWALP": pytest.approx(2),
        "SWALP limit": None,
    }


# The commands


SMALL = {
    "quadratic": (quadratic, {"dimensions": 8, "samples": 64, "steps": 700, "warmup": 10}),
    "logistic": (logistic, {"chains": 2, "steps": 8, "warmup": 2}),
}


@pytest.fixture
def small(monkeypatch):
    for module, changes in SMALL.values():
        monkeypatch.setattr(module, "Settings", lambda m=module.Settings, c=changes: m(**c))


@pytest.mark.parametrize("name", SMALL)
def test_a_command_writes_its_record_and_its_figure(name, small, tmp_path, capsys):
    record = theory.main([name, "--seed", "3", "--out", str(tmp_path / "a")])
    written = json.loads((tmp_path / "a" / "results.json").read_text())
    assert written == json.loads(json.dumps(record)) | {"table": written["table"]}
    assert written["command"] == f"python tools/theory.py {name} --seed 3 --out {tmp_path / 'a'}"
    assert written["settings"]["seed"] == 3 and written["environment"]["date"]
    assert capsys.readouterr().out == written["table"] + "\n"
    assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    theory.main([name, "--seed", "3", "--out", str(tmp_path / "b")])
    drawn = [(tmp_path / folder / f"{name}.svg").read_bytes() for folder in "ab"]
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"<?xml")


def test_the_record_of_the_quadratic(small):
    record = theory.main(["quadratic"])
    assert list(record["final"]) == ["SGD-FP", "SWA-FP", "SGD-LP", "SWALP"] == list(record["distance"])
    assert list(record["slopes"]) == ["SWA-FP", "SWALP"] and record["floor"] > 0
    assert record["averaged"][-1] == 700
    assert all(values[-1] == record["final"][line] for line, values in record["distance"].items())


def test_the_record_of_the_logistic(small):
    record = theory.main(["logistic"])
    assert record["bits"] == [2, 3, 4, 5, 6, 7, 8] and record["fitted"] == [2, 6]
    assert list(record["slopes"]) == ["SGD-LP", "SWALP", "SWALP limit"]


def test_another_seed_is_another_run(small):
    runs = [theory.main(["quadratic", *words])["final"] for words in ([], ["--seed", "0"], ["--seed", "1"])]
    assert runs[0] == runs[1] != runs[2]


def test_full_is_longer(monkeypatch):
    ran = []
    monkeypatch.setattr(quadratic, "run", lambda settings: ran.append(settings) or {})
    monkeypatch.setattr(quadratic, "table", lambda record: "")
    theory.main(["quadratic"])
    theory.main(["quadratic", "--full", "--seed", "2"])
    assert ran[0].steps < ran[1].steps and (ran[0].seed, ran[1].seed) == (0, 2)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "the following arguments are required"),
        (["cubic"], "invalid choice: 'cubic'"),
        (["quadratic", "--seed", "-1"], "'-1' is not a whole number of 0 or more, below 2^63"),
        (["quadratic", "--seed", "one"], "'one' is not a whole number"),
        (["quadratic", "--dataset", "digits"], "unrecognized arguments: --dataset"),
        (["quadratic", "--out", "/dev/null"], "/dev/null cannot be made a folder (File exists); name another"),
        (["logistic", "--dataset", "cifar10"], "invalid choice: 'cifar10'"),
        (["logistic", "--data", "images"], "digits come with scikit-learn, and --data has no say"),
        (["logistic", "--dataset", "fashion-mnist", "--data", "/nowhere"], "dataset-fashion-mnist, or run python -c"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        theory.main(words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith("theory.py") and complaint in message


@pytest.mark.skipif(not data.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_larger_images_are_pooled_and_scaled_as_digits_are(monkeypatch):
    monkeypatch.setattr(logistic, "LARGEST", 1000)
    fashion = logistic.problem(logistic.Settings(dataset="fashion-mnist"))
    assert fashion.inputs.shape == (1000, 14 * 14 + 1) and fashion.optimum.shape == (10, 197)
    torch.testing.assert_close(fashion.inputs.square().sum(1).mean().item(), logistic.SCALE + 1)
    assert fashion.squared_gradient(fashion.optimum) < 1e-16


# Labels of a figure


def test_labels_are_moved_apart_as_little_as_they_must_be():
    moved = drawing._spread({"a": 0.0, "b": 4.0, "c": 50.0, "d": 5.0}, 10.0)
    assert moved == {"a": -7.0, "b": 3.0, "d": 13.0, "c": 50.0}
