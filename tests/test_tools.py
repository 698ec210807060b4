"""The command lines in tools/: data, models, schedule, and whole small runs on real digits."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
import data
import models
import overhead
import report
import steps
import swalp_fx
import train

TOOLS = Path(__file__).parent.parent / "tools"
fashion_mnist = pytest.mark.skipif(
    not data.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


class TestData:
    def test_digits(self):
        digits = data.load("digits")
        assert digits.train_images.shape == (1000, 1, 8, 8) and digits.test_images.shape == (797, 1, 8, 8)
        assert digits.train_images.dtype == torch.float32 and digits.train_labels.dtype == torch.int64
        assert (digits.classes, digits.channels, digits.image_size) == (10, 1, 8)
        torch.testing.assert_close(digits.train_images.mean().item(), 0.0, atol=1e-5, rtol=0)
        torch.testing.assert_close(digits.train_images.var(correction=0).item(), 1.0, atol=1e-5, rtol=0)
        again = data.load("digits")
        assert torch.equal(digits.train_images, again.train_images)
        assert torch.equal(digits.test_labels, again.test_labels)

    @fashion_mnist
    def test_fashion_mnist_as_debian_installs_it(self):
        fashion = data.load("fashion-mnist")
        assert fashion.train_images.shape == (60000, 1, 28, 28) and fashion.test_images.shape == (10000, 1, 28, 28)
        assert fashion.train_labels.bincount().tolist() == [6000] * 10
        assert fashion.test_labels.bincount().tolist() == [1000] * 10

    def test_gzip_idx_files_in_a_folder_of_ones_own(self, tmp_path):
        pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
        for split in ("train", "t10k"):
            write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", pixels)
            write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.array([2, 0, 1], dtype=np.uint8))
        fashion = data.load("fashion-mnist", tmp_path)
        expected = torch.from_numpy(pixels / 255).float()
        expected = (expected - expected.mean()) / expected.std(correction=0)
        torch.testing.assert_close(fashion.test_images[:, 0], expected)
        assert fashion.test_labels.tolist() == [2, 0, 1] and fashion.classes == 3

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [(b"\x00\x00\x0d\x01\x00\x00\x00\x00", "not an IDX file"), (b"\x00\x00\x08\x01\x00\x00\x00\x05ab", "holds 2")],
    )
    def test_damaged_idx_file(self, tmp_path, content, complaint):
        path = tmp_path / "images.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(data.DataError, match=complaint):
            data.read_idx(path)

    @pytest.mark.parametrize(
        ("name", "ways"),
        [
            ("fashion-mnist", ["package dataset-fashion-mnist", "FashionMNIST"]),
            ("cifar10", ["cifar-10-batches-py", "CIFAR10"]),
            ("cifar100", ["cifar-100-python", "CIFAR100"]),
        ],
    )
    def test_missing_data_set_says_both_ways_to_get_it(self, tmp_path, name, ways):
        with pytest.raises(data.DataError) as error:
            data.load(name, tmp_path)
        message = str(error.value)
        assert "\n" not in message and all(way in message for way in [*ways, "download=True", str(tmp_path)])


class TestBatches:
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    labels = torch.arange(10)

    def test_no_seed_keeps_the_order(self):
        batches = data.Batches(self.images, self.labels, 4)
        assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert len(batches) == 3

    def test_a_pass_is_a_permutation_that_the_seed_alone_decides(self):
        orders = []
        for model_seed in (1, 2):
            torch.manual_seed(model_seed)
            batches = list(data.Batches(self.images, self.labels, 4, seed=7))
            assert all(torch.equal(images.flatten().long(), labels) for images, labels in batches)
            orders.append(torch.cat([labels for _, labels in batches]).tolist())
        assert orders[0] == orders[1] != list(range(10)) and sorted(orders[0]) == list(range(10))
        other = torch.cat([labels for _, labels in data.Batches(self.images, self.labels, 4, seed=8)])
        assert other.tolist() != orders[0]

    def test_a_pass_draws_nothing_from_the_models_generator(self):
        before = torch.get_rng_state()
        list(data.Batches(torch.ones(8, 3, 6, 6), torch.zeros(8), 4, seed=0, augment=True))
        assert torch.equal(before, torch.get_rng_state())

    def test_crop_and_flip_against_each_possible_shift(self):
        images = torch.rand(64, 2, 6, 7) + 1
        out = data.crop_and_flip(images, torch.Generator().manual_seed(0))
        seen = set()
        for image, cropped in zip(images, out, strict=True):
            padded = torch.nn.functional.pad(image, (4,) * 4)
            for y in range(9):
                for x in range(9):
                    window = padded[:, y : y + 6, x : x + 7]
                    seen |= {(y, x, flip) for flip, w in enumerate((window, window.flip(2))) if torch.equal(w, cropped)}
        assert len(seen) > 40 and {flip for _, _, flip in seen} == {0, 1}
        assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
        for image, cropped in zip(images, out, strict=True):
            assert set(cropped.unique().tolist()) <= {0.0, *image.unique().tolist()}


class TestModels:
    # Counts by hand: the paper's models have 15.2 M (VGG16) and 1.7 M (PreResNet-164) parameters.
    @pytest.mark.parametrize(
        ("name", "classes", "channels", "size", "parameters"),
        [
            ("convnet", 10, 1, 28, 426_122),
            ("convnet", 10, 1, 8, 57_482),
            ("vgg16", 10, 3, 32, 15_245_130),
            ("vgg16_bn", 10, 3, 32, 15_253_578),
            ("preresnet20", 10, 3, 32, 272_282),
            ("preresnet164", 10, 3, 32, 1_703_258),
            ("preresnet164", 100, 3, 32, 1_726_388),
            ("resnet18", 10, 3, 32, 11_181_642),
            ("torchvision:mobilenet_v2", 10, 3, 32, 2_236_682),
        ],
    )
    def test_shape_and_parameters(self, name, classes, channels, size, parameters):
        model = models.build(name, classes, channels, size)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.randn(2, channels, size, size)).shape == (2, classes)
        torch.fx.symbolic_trace(model)

    def test_the_prefix_tells_torchvisions_vgg16_from_the_papers(self):
        assert type(models.build("vgg16")) is models.VGG
        assert type(models.build("torchvision:vgg16")).__module__.startswith("torchvision")

    def test_unknown_name_gets_near_names(self):
        with pytest.raises(models.ModelError, match=r"unknown model 'preresnt164'; use preresnet164 or"):
            models.build("preresnt164")

    def test_models_that_cannot_take_the_images(self):
        with pytest.raises(models.ModelError, match="28 pixels a side are too few"):
            models.build("vgg16", 10, 1, 28)
        with pytest.raises(models.ModelError, match="resnet18 takes images of 3 channels, not 1"):
            models.build("resnet18", 10, 1, 28)


def test_schedule_is_the_papers():
    settings = train.Settings("digits", "convnet", "bfp8", 300, 200, 0, 0.1, 0.01, 0.9, 5e-4, 128, 0)
    warm_up = {0: 0.1, 100: 0.1, 120: 0.1 * 0.7525, 140: 0.1 * 0.505, 180: 0.001, 199.9: 0.001}
    for epoch, rate in {**warm_up, 200: 0.01, 299: 0.01}.items():
        assert train.learning_rate(epoch, settings) == pytest.approx(rate, rel=1e-12)


def run(*words):
    return train.main(["--dataset", "digits", "--batch-size", "100", "--device", "cpu", *map(str, words)])


def alike(a, b):
    """Equal, and tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def without_times(epochs):
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]


class TestTrain:
    def test_the_command_prints_one_table(self, tmp_path):
        command = [sys.executable, TOOLS / "train.py", "--epochs", "2", "--average-from", "1", "--out", "run"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        header, _, errors, seconds = done.stdout.strip().splitlines()[-4:]
        assert header.split() == ["SGD-FP", "SWA-FP", "SGD-LP", "SWALP"]
        record = json.loads((tmp_path / "run" / "results.json").read_text())
        lines = [record["lines"]["float"], record["lines"]["low"]]
        printed = [f"{line[key]:.2f}" for line in lines for key in ("sgd_error", "average_error")]
        assert errors.removeprefix("test error, %").split() == printed
        assert seconds.startswith("seconds an epoch")
        assert record["table"] in done.stdout
        assert [len(line["epochs"]) for line in lines] == [2, 2] and all(line["n_averaged"] == 1 for line in lines)
        assert record["settings"]["recipe"] == "bfp8[0]" and record["environment"]["torch"] == torch.__version__
        assert done.stderr == ""  # no progress bar where no one watches

    def test_both_lines_learn_and_low_precision_is_not_float(self, tmp_path):
        results = run("--epochs", 6, "--batch-size", 32, "--recipe", "bfp6[0]")
        assert all(line["average_error"] < 20 for line in results.values())
        assert results["float"]["epochs"][0]["loss"] != results["low"]["epochs"][0]["loss"]

    def test_a_float_recipe_equals_the_float_line(self):
        results = run("--epochs", 2, "--recipe", "float")
        assert without_times(results["float"]["epochs"]) == without_times(results["low"]["epochs"])
        assert results["float"]["average_error"] == results["low"]["average_error"]

    @pytest.mark.parametrize("every", [0, 3])
    def test_resumed_run_ends_with_the_bits_of_an_unbroken_one(self, tmp_path, every):
        settings = ["--average-from", 2, "--average-every", every, "--recipe", "bfp6[0]"]
        whole = run("--epochs", 4, *settings, "--out", tmp_path / "whole")
        run("--epochs", 3, *settings, "--out", tmp_path / "broken")
        resumed = run("--epochs", 4, *settings, "--out", tmp_path / "broken", "--resume")
        for name in ("float", "low"):
            a, b = (torch.load(tmp_path / folder / f"{name}.pt", weights_only=True) for folder in ("whole", "broken"))
            for part in ("settings", "model", "optimizer", "swalp"):
                assert alike(a[part], b[part]), part
            assert without_times(whole[name]["epochs"]) == without_times(resumed[name]["epochs"])
            assert whole[name]["average_error"] == resumed[name]["average_error"]
            assert whole[name]["n_averaged"] == resumed[name]["n_averaged"] == (2 if every == 0 else 20 // 3)

    def test_resume_refuses_another_run(self, tmp_path):
        run("--epochs", 2, "--out", tmp_path)
        with pytest.raises(SystemExit, match=r"float\.pt was made with --lr 0\.05, not 0\.2; give the same"):
            run("--epochs", 2, "--lr", 0.2, "--out", tmp_path, "--resume")

    def test_a_run_is_not_overwritten(self, tmp_path, capsys):
        run("--epochs", 2, "--out", tmp_path)
        with pytest.raises(SystemExit):
            run("--epochs", 2, "--out", tmp_path)
        assert "holds a run already" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--recipe", "bfp99"], "out of range"),
            (["--recipe", "Q=bfp8"], "there is no role 'Q'"),
            (["--model", "convnett"], "unknown model 'convnett'; use convnet"),
            (["--dataset", "mnist"], "invalid choice: 'mnist'"),
            (["--dataset", "cifar10", "--data", "/nowhere"], "cifar10 is not in /nowhere"),
            (["--epochs", "0"], "'0' is not a whole number of 1 or more"),
            (["--lr", "fast"], "'fast' is not a number"),
            (["--epochs", "4", "--average-from", "4"], "leaves none of 4 epochs to average"),
            (["--device", "warp"], "--device warp cannot be used"),
            (["--resume"], "--resume needs the --out DIR"),
        ],
    )
    def test_bad_input_is_one_line(self, words, complaint, capsys):
        with pytest.raises(SystemExit) as stop:
            train.main(words)
        message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
        assert complaint in message and "\n" not in message and message.startswith("train.py: error: ")


class TestReport:
    def test_every_layer_and_its_formats(self, capsys):
        report.main(["convnet", "--recipe", "bfp8[0] E=e5m2"])
        out = capsys.readouterr().out
        names = [name for name, module in models.build("convnet").named_modules() if list(module.parameters(False))]
        assert names and all(any(line.startswith(name) for line in out.splitlines()) for name in names)
        assert "bfp8[0]" in out and "e5m2" in out

    def test_graph_is_the_rewritten_code(self, capsys):
        report.main(["preresnet20", "--recipe", "bfp8", "--graph"])
        out = capsys.readouterr().out
        assert "def forward" in out and "quantize" in out

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["resnet81"], "unknown model 'resnet81'; use"),
            (["convnet", "--recipe", "bfp"], "unknown format spec 'bfp'"),
        ],
    )
    def test_bad_input_is_one_line(self, words, complaint):
        with pytest.raises(SystemExit, match=f"^report.py: error: .*{complaint}") as stop:
            report.main(words)
        assert "\n" not in stop.value.code


# ---- benchmark.py --------------------------------------------------------------------------------


def test_benchmark_times_every_format_beside_a_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SECONDS", 0.001)
    monkeypatch.setattr(benchmark, "peers", lambda x: {"a clone": x.clone})
    threads = torch.get_num_threads()
    benchmark.main(["op", "--elements", "4K", "--threads", "1", "--json", str(tmp_path / "b.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["command"].startswith("python tools/benchmark.py op --elements 4K")
    assert result.keys() == {"command", "machine", "threads", "torch", "date", "rows"} and result["threads"] == 1
    keys = {"what", "rounding", "elements", "ms", "G elements/s", "GB/s", "ratio to copy"}
    assert all(row.keys() == keys for row in result["rows"])
    measured = {(row["what"], row["rounding"]) for row in result["rows"]}
    assert {(spec, rounding) for spec in benchmark.SPECS for rounding in benchmark.ROUNDINGS} < measured
    assert all(row["elements"] == 4096 and row["ms"] > 0 and row["ratio to copy"] > 0 for row in result["rows"])
    assert "ratio to copy" in capsys.readouterr().out


def test_benchmark_times_no_op_that_is_wrong(monkeypatch):
    monkeypatch.setattr(benchmark.reference, "quantize", lambda x, *args, **kwargs: x)
    with pytest.raises(SystemExit, match=r"fixed8\.6, nearest: the op differs from the oracle"):
        benchmark.main(["op", "--elements", "1K"])


@pytest.mark.parametrize("size", ["1000", "12T", "0"])
def test_benchmark_refuses_a_size_it_cannot_lay_out(size, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["op", "--elements", size])
    assert f"'{size}' is not a multiple of 1024 elements; use 1M or 64M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--json", "/nowhere/b.json"], "--json /nowhere/b.json is no file in a folder that exists"),
        (["--json", "/"], "--json / is no file in a folder that exists"),
        (["--threads", "0"], "--threads 0: use 1 or more"),
        (["--device", "warp"], "invalid choice: 'warp'"),
    ],
)
def test_benchmark_refuses_bad_input_before_it_measures(words, complaint, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit):
        benchmark.main(["op", *words])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("benchmark.py: error: ") and complaint in message


def test_benchmark_of_the_graph_times_each_node_forward_and_backward(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "SECONDS", 0.001)
    monkeypatch.setattr(overhead, "CHAIN", 3)
    monkeypatch.setattr(overhead, "WHOLE", ["preresnet20"])
    monkeypatch.setattr(overhead, "CONVERTED", ["preresnet20"])
    benchmark.main(["graph", "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert result.keys() == {"command", "machine", "threads", "torch", "date", "nodes", "convert"}
    *chains, whole = result["nodes"]
    assert {"torch.clone", "quantize_weight", "quantize_output", "quantize_output, in place"} < {
        row["what"] for row in chains
    }
    assert all(row["nodes"] == 3 and row["forward us"] > 0 and row["backward us"] > 0 for row in chains)
    assert whole["what"] == "preresnet20, less the float model" and whole["nodes"] == 130
    (converted,) = result["convert"]
    assert converted["convert"] == "preresnet20" and converted["nodes"] > 0 and converted["seconds"] > 0
    assert "backward us" in capsys.readouterr().out


def test_benchmark_of_the_graph_times_no_wrong_node(monkeypatch):
    monkeypatch.setattr(swalp_fx, "quantize_output", lambda x, *how, in_place="": x * (2 if in_place else 1))
    with pytest.raises(SystemExit, match="float, nearest: in place the numbers differ"):
        benchmark.main(["graph"])


def test_benchmark_of_a_step_stands_beside_the_float_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    benchmark.main(["step", "--models", "preresnet20", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["step"] for row in rows][:2] == ["float", "swalp_fx bfp8[0]"]
    for row in rows:
        assert row["ms"] == pytest.approx(row["forward ms"] + row["backward ms"] + row["update ms"])
        assert row["ratio to float"] == pytest.approx(row["ms"] / rows[0]["ms"])
    assert "ratio to float" in capsys.readouterr().out


def test_benchmark_of_a_step_trains_what_it_times():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    contender = steps.in_low_precision(models.build("preresnet20"))
    before = [parameter.detach().clone() for parameter in contender.model.parameters()]
    contender.step(benchmark.Clock("cpu").once, images, labels)
    assert len(contender.seconds) == 1 and all(seconds > 0 for seconds in contender.seconds[0])
    weights = list(contender.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True) if a.dim() > 1)
    assert all(torch.equal(swalp_fx.quantize(weight, steps.RECIPE), weight) for weight in weights)


def test_benchmark_of_a_step_times_no_wrong_graph(monkeypatch):
    monkeypatch.setattr(swalp_fx, "check", lambda *_: swalp_fx.Check(1, ("train output 0: differs",)))
    with pytest.raises(SystemExit, match=r"preresnet20: 1 of 1 tensors differ.*; so the speed says nothing"):
        benchmark.main(["step", "--models", "preresnet20"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["graph", "--elements", "1M"], "--elements is an option of op, not of graph"),
        (["op", "--models", "vgg16"], "--models is an option of step, not of op"),
        (["step", "--models", "vgg61"], "--models: there is no model 'vgg61'"),
    ],
)
def test_benchmark_ignores_no_option(words, complaint, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert capsys.readouterr().err.splitlines()[-1] == f"benchmark.py: error: {complaint}"
