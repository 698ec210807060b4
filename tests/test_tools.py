"""The command lines in tools/: data, models, schedule, and whole small runs on real digits."""

import ast
import dataclasses
import functools
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark
import data
import decoder
import models
import overhead
import plot
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
        assert digits.train_inputs.shape == (1000, 1, 8, 8) and digits.test_inputs.shape == (797, 1, 8, 8)
        assert digits.train_inputs.dtype == torch.float32 and digits.train_targets.dtype == torch.int64
        assert (digits.classes, *digits.shape) == (10, 1, 8)
        torch.testing.assert_close(digits.train_inputs.mean().item(), 0.0, atol=1e-5, rtol=0)
        torch.testing.assert_close(digits.train_inputs.var(correction=0).item(), 1.0, atol=1e-5, rtol=0)
        again = data.load("digits")
        assert torch.equal(digits.train_inputs, again.train_inputs)
        assert torch.equal(digits.test_targets, again.test_targets)

    @fashion_mnist
    def test_fashion_mnist_as_debian_installs_it(self):
        fashion = data.load("fashion-mnist")
        assert fashion.train_inputs.shape == (60000, 1, 28, 28) and fashion.test_inputs.shape == (10000, 1, 28, 28)
        assert fashion.train_targets.bincount().tolist() == [6000] * 10
        assert fashion.test_targets.bincount().tolist() == [1000] * 10

    def test_gzip_idx_files_in_a_folder_of_ones_own(self, tmp_path):
        pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
        for split in ("train", "t10k"):
            write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", pixels)
            write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.array([2, 0, 1], dtype=np.uint8))
        fashion = data.load("fashion-mnist", tmp_path)
        expected = torch.from_numpy(pixels / 255).float()
        expected = (expected - expected.mean()) / expected.std(correction=0)
        torch.testing.assert_close(fashion.test_inputs[:, 0], expected)
        assert fashion.test_targets.tolist() == [2, 0, 1] and fashion.classes == 3

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


class TestText:
    def test_the_standard_library_split_by_file(self):
        text = data.load("stdlib")
        assert text.shape == (64,) and text.classes == 256 and text.train_inputs.dtype == torch.int64
        for inputs, targets in ((text.train_inputs, text.train_targets), (text.test_inputs, text.test_targets)):
            assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])  # one byte ahead, across windows too
        decoded = [bytes(each.flatten().to(torch.uint8)) for each in (text.train_inputs, text.test_inputs)]
        for name in ("ast.py", "random.py", "typing.py"):
            source = (Path(ast.__file__).parent / name).read_bytes()
            assert [source in each for each in decoded].count(True) == 1
        assert torch.equal(text.train_inputs, data.load("stdlib").train_inputs)
        assert 0.02 < len(text.test_inputs) / len(text.train_inputs) < 0.2

    def test_an_epoch_is_a_fresh_draw_of_its_windows(self):
        inputs = torch.arange(20).view(10, 2)
        epochs = [torch.cat([x for x, _ in data.Batches(inputs, inputs, 4, seed, samples=6)]) for seed in (1, 1, 2)]
        assert [len(each) for each in epochs] == [6, 6, 6] and len(data.Batches(inputs, inputs, 4, samples=6)) == 2
        assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
        assert len({tuple(row) for row in epochs[0].tolist()}) == 6
        assert torch.equal(torch.cat([x for x, _ in data.Batches(inputs, inputs, 4, samples=6)]), inputs[:6])

    def test_a_folder_without_sources(self, tmp_path):
        with pytest.raises(data.DataError, match=r"holds too few Python sources; pass --data the folder of"):
            data.load("stdlib", tmp_path)


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
            ("cifar_resnet18", 10, 1, 32, 11_172_810),
            ("resnet18", 10, 3, 32, 11_181_642),
            ("torchvision:mobilenet_v2", 10, 3, 32, 2_236_682),
        ],
    )
    def test_shape_and_parameters(self, name, classes, channels, size, parameters):
        model = models.build(name, classes, channels, size)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.randn(2, channels, size, size)).shape == (2, classes)
        torch.fx.symbolic_trace(model)

    def test_decoder(self):
        model = models.build("decoder")
        blocks = 3 * (12 * 128**2 + 13 * 128)  # weights, and the biases and norms
        assert sum(p.numel() for p in model.parameters()) == (256 + 64) * 128 + blocks + 2 * 128
        assert model.head.weight is model.tokens.weight
        assert model(models.example(64)).shape == (1, 64, 256)
        text = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
        changed = text.clone()
        changed[:, 40:] = 0
        before, after = model(text), model(changed)
        assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before[:, 40], after[:, 40])
        torch.testing.assert_close(model(text[:, :40]), before[:, :40])

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
        with pytest.raises(models.ModelError, match="vgg16 takes images, not text; use one of decoder"):
            models.build("vgg16", 256, 64)
        with pytest.raises(models.ModelError, match="decoder takes text, not images; use one of convnet, vgg16"):
            models.build("decoder", 10, 1, 28)


def test_schedule_is_the_papers():
    settings = train.Settings("digits", "convnet", "sgd", 300, 200, 0, 0.1, 0.01, 0.9, 5e-4, 128, 0)
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
        printed = [f"{line[key]:.2f}" for line in lines for key in ("last", "average")]
        assert record["metric"] == "test error, %" and record["command"].endswith(" --out run")
        assert errors.removeprefix("test error, %").split() == printed
        assert seconds.startswith("seconds an epoch")
        assert record["table"] in done.stdout
        assert [len(line["epochs"]) for line in lines] == [2, 2] and all(line["n_averaged"] == 1 for line in lines)
        assert record["lines"]["low"]["recipe"] == "bfp8[0]" and record["environment"]["torch"] == torch.__version__
        assert done.stderr == ""  # no progress bar where no one watches

    def test_both_lines_learn_and_low_precision_is_not_float(self, tmp_path):
        results = run("--epochs", 6, "--batch-size", 32, "--recipe", "bfp6[0]")
        assert all(line["average"] < 20 for line in results.values())
        assert results["float"]["epochs"][0]["losses"] != results["low"]["epochs"][0]["losses"]

    def test_a_float_recipe_equals_the_float_line(self):
        results = run("--epochs", 2, "--recipe", "float")
        assert without_times(results["float"]["epochs"]) == without_times(results["low"]["epochs"])
        assert results["float"]["average"] == results["low"]["average"]

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
            assert whole[name]["average"] == resumed[name]["average"]
            assert whole[name]["n_averaged"] == resumed[name]["n_averaged"] == (2 if every == 0 else 20 // 3)

    def test_a_resumed_run_takes_on_another_recipe(self, tmp_path):
        first = run("--epochs", 2, "--recipe", "bfp6[0]", "--out", tmp_path)
        both = run("--epochs", 2, "--recipe", "bfp6[0]", "--recipe", "mxfp8", "--out", tmp_path, "--resume")
        assert both.keys() == {"float", "low", "low2"} and both["low2"]["recipe"] == "mxfp8"
        assert {name: both[name] for name in first} == first

    def test_resume_refuses_another_run(self, tmp_path):
        run("--epochs", 2, "--out", tmp_path)
        with pytest.raises(SystemExit, match=r"float\.pt was made with --lr 0\.05, not 0\.2; give the same"):
            run("--epochs", 2, "--lr", 0.2, "--out", tmp_path, "--resume")
        with pytest.raises(SystemExit, match=r"low\.pt was made with --recipe bfp8\[0\], not bfp8; give the same"):
            run("--epochs", 2, "--recipe", "bfp8", "--out", tmp_path, "--resume")

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
            (["--average-every", "10000"], "--average-every 10000 is more than the 640 steps after the warm-up"),
            (["--dataset", "stdlib", "--model", "convnet"], "convnet takes images, not text; use one of decoder"),
            (["--optimizer", "lion"], "invalid choice: 'lion'"),
            (["--device", "warp"], "--device warp cannot be used"),
            (["--resume"], "--resume needs the --out DIR"),
        ],
    )
    def test_bad_input_is_one_line(self, words, complaint, capsys):
        with pytest.raises(SystemExit) as stop:
            train.main(words)
        message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
        assert complaint in message and "\n" not in message and message.startswith("train.py: error: ")


class TestDecoder:
    """A language model small enough for a test: one layer, and a thousand windows of the standard library."""

    @pytest.fixture
    def tiny(self, monkeypatch):
        small = functools.partial(decoder.Decoder, width=32, heads=2, layers=1)
        monkeypatch.setitem(models.MODELS, "decoder", models.Made(small, (64,), classes=256))
        stdlib = data.load("stdlib")
        few = {name: getattr(stdlib, name)[:1024] for name in ("train_inputs", "train_targets")}
        few |= {name: getattr(stdlib, name)[:256] for name in ("test_inputs", "test_targets")}
        monkeypatch.setattr(data, "load", lambda *_: dataclasses.replace(stdlib, **few, epoch=512))

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_it_learns_in_low_precision_and_resumes_to_the_bit(self, tiny, tmp_path, optimizer):
        words = ["--dataset", "stdlib", "--optimizer", optimizer, "--average-from", 1, "--recipe", "bfp8[0] M=float"]
        words += ["--lr", 0.003 if optimizer == "adamw" else 0.1, "--device", "cpu"]
        whole = train.main([*map(str, words), "--epochs", "3"])
        train.main([*map(str, words), "--epochs", "2", "--out", str(tmp_path)])
        resumed = train.main([*map(str, words), "--epochs", "3", "--out", str(tmp_path), "--resume"])
        for name, line in whole.items():
            assert without_times(line["epochs"]) == without_times(resumed[name]["epochs"])
            assert [each["steps"] for each in line["epochs"]] == [16] * 3 and line["n_averaged"] == 2
            assert line["average"] < 4 < line["epochs"][0]["losses"][0] < 5.6  # uniform: log 256 = 5.55
        assert whole["float"]["last"] != whole["low"]["last"]

    def test_the_table_is_in_nats_a_byte(self, tiny, capsys):
        train.main(["--dataset", "stdlib", "--epochs", "2", "--recipe", "mxfp8", "--recipe", "bfp8", "--device", "cpu"])
        printed = capsys.readouterr().out
        assert printed.count("AdamW-FP") == printed.count("validation loss, nats a byte") == 2
        assert "recipe mxfp8, seed 0; 1 weights averaged" in printed and "recipe bfp8, seed 0" in printed

    def test_the_rewritten_decoder_is_bit_equal_in_both_modes(self):
        torch.manual_seed(0)
        found = swalp_fx.check(models.build("decoder"), torch.randint(256, (2, 64)))
        assert found and found.compared > 100, found

    def test_one_weight_node_serves_the_embedding_and_the_head(self):
        graph = swalp_fx.convert(models.build("decoder")).module.graph
        quantized = graph.find_nodes(op="call_function", target=swalp_fx.quantize_weight)
        assert len(quantized) == len(list(models.build("decoder").parameters()))
        (tied,) = (node for node in quantized if node.args[0].target == "tokens.weight")
        assert [user.args[0].target for user in tied.users] == ["tokens", "head"]


class TestReport:
    def test_every_layer_and_its_formats(self, capsys):
        report.main(["convnet", "--recipe", "bfp8[0] E=e5m2"])
        out = capsys.readouterr().out
        names = [name for name, module in models.build("convnet").named_modules() if list(module.parameters(False))]
        assert names and all(any(line.startswith(name) for line in out.splitlines()) for name in names)
        assert "bfp8[0]" in out and "e5m2" in out

    def test_a_model_of_text(self, capsys):
        report.main(["decoder", "--input-size", "16"])
        assert "1x16x256" in capsys.readouterr().out

    def test_graph_is_the_rewritten_code(self, capsys):
        report.main(["preresnet20", "--recipe", "bfp8", "--graph"])
        out = capsys.readouterr().out
        assert "def forward" in out and "quantize" in out

    def test_draw(self, tmp_path):
        report.main(["convnet", "--draw", str(tmp_path / "graph.dot")])
        assert "A ↓ bfp8[0]" in (tmp_path / "graph.dot").read_text()

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["resnet81"], "unknown model 'resnet81'; use"),
            (["convnet", "--recipe", "bfp"], "unknown format spec 'bfp'"),
            (["decoder", "--channels", "1"], "decoder takes text, not images"),
            (["convnet", "--draw", "graph.jpg"], "its name must end in one of"),
            (["convnet", "--draw", "/nowhere/graph.dot"], "No such file or directory"),
        ],
    )
    def test_bad_input_is_one_line(self, words, complaint):
        with pytest.raises(SystemExit, match=f"^report.py: error: .*{complaint}") as stop:
            report.main(words)
        assert "\n" not in stop.value.code


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run("--epochs", 3, "--recipe", "bfp8", "--recipe", "mxfp8 M=float", "--out", out)
    return out / "results.json"


class TestPlot:
    def test_every_line_is_drawn_and_named(self, results, tmp_path):
        record = json.loads(results.read_text())
        losses, scores = plot.figure(record).axes
        assert [text.get_text() for text in losses.get_legend().get_texts()] == ["float", "bfp8", "mxfp8 M=float"]
        assert losses.get_ylabel() == "training loss, nats" and scores.get_ylabel() == "test error, %"
        assert losses.get_xlabel() == "step (batches of 100)"
        for line, drawn in zip(record["lines"].values(), losses.get_lines(), strict=True):
            assert drawn.get_ydata().tolist() == [loss for epoch in line["epochs"] for loss in epoch["losses"]]
        steps, averages = scores.get_lines()[1].get_data()
        assert list(steps) == [20, 30] and averages[-1] == record["lines"]["float"]["average"]

    def test_equal_results_give_equal_files(self, results, tmp_path):
        for name in ("a.svg", "b.svg"):
            plot.main([str(results), "--out", str(tmp_path / name)])
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

    def test_a_line_that_diverged(self, results):
        record = json.loads(results.read_text())
        for epoch in record["lines"]["low"]["epochs"]:
            epoch.update(losses=[math.nan] * len(epoch["losses"]), last=math.nan, average=math.nan)
        assert len(plot.figure(record).axes) == 2

    @pytest.mark.parametrize(
        ("content", "out", "complaint"),
        [
            (None, "a.svg", "No such file or directory"),
            ("{", "a.svg", "Expecting property name"),
            ("{}", "a.svg", "is no results.json of train.py: it lacks 'settings'"),
            ("good", "a.jpx", "Format 'jpx' is not supported"),
        ],
    )
    def test_bad_input_is_one_line(self, results, tmp_path, content, out, complaint):
        path = results if content == "good" else tmp_path / "results.json"
        if content and content != "good":
            path.write_text(content)
        with pytest.raises(SystemExit, match=r"^plot\.py: error: ") as stop:
            plot.main([str(path), "--out", str(tmp_path / out)])
        assert complaint in stop.value.code and "\n" not in stop.value.code


# ---- benchmark.py --------------------------------------------------------------------------------


def test_benchmark_times_every_format_beside_a_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SECONDS", 0.001)
    monkeypatch.setattr(benchmark, "peers", lambda x: {"a clone": x.clone})
    threads = torch.get_num_threads()
    benchmark.main(["op", "--elements", "4K", "--threads", "1", "--json", str(tmp_path / "b.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["command"].startswith("python tools/benchmark.py op --elements 4K")
    assert result.keys() == {"command", "machine", "threads", "torch", "date", "rows", "layouts"}
    assert result["threads"] == 1
    keys = {"what", "rounding", "elements", "ms", "G elements/s", "GB/s", "ratio to copy"}
    assert all(row.keys() == keys for row in result["rows"])
    measured = {(row["what"], row["rounding"]) for row in result["rows"]}
    assert {(spec, rounding) for spec in benchmark.SPECS for rounding in benchmark.ROUNDINGS} < measured
    assert all(row["elements"] == 4096 and row["ms"] > 0 and row["ratio to copy"] > 0 for row in result["rows"])
    assert "ratio to copy" in capsys.readouterr().out
    kinds = {(row["what"], row["rounding"], row["layout"]) for row in result["layouts"]}
    assert len(kinds) == len(result["layouts"]) == 4 * 2 * 6
    assert all(row["ms"] > 0 and row["ratio to contiguous"] > 0 for row in result["layouts"])


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
