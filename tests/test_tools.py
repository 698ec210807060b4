"""The command lines in tools/ but train.py: data, models, report, plot and benchmark."""

import ast
import gzip
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from refusal import refusal

import attention
import benchmark
import captures
import codes
import data
import loops
import models
import optimizers
import overhead
import plot
import report
import steps
import swalp_fx
import train

fashion_mnist = pytest.mark.skipif(
    not data.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_splits(folder, ending, labels):
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte{ending}", np.zeros((len(labels), 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte{ending}", np.array(labels, dtype=np.uint8))


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

    def test_idx_files_as_torchvision_unpacks_them(self, tmp_path):
        raw = tmp_path / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        write_splits(raw, "", labels=[3, 1])
        assert data.load("fashion-mnist", tmp_path).train_targets.tolist() == [3, 1]
        labels = torchvision.datasets.FashionMNIST(tmp_path, train=False).targets
        assert torch.equal(labels, data.load("fashion-mnist", tmp_path).test_targets)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (
                gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x00"),
                "is not an IDX file of bytes: it starts with 00 00",
            ),
            (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05ab"), r"holds 2 bytes, not the \(5,\) it announces"),
            (gzip.compress(b"\x00\x00\x08\x03\x00\x00"), "holds 0 bytes, not the"),
            (gzip.compress(b""), "is not an IDX file"),
            (gzip.compress(bytes(10_000))[:-20], "cannot be read"),
            (gzip.compress(os.urandom(1000))[:500] + bytes(600), "cannot be read"),
            (b"", "is not an IDX file"),
            (b"\x00\x00\x08\x01 not gzip", "cannot be read"),
        ],
        ids=map(str, range(8)),  # compressed bytes hold the time, and processes must agree on names
    )
    def test_damaged_idx_file(self, tmp_path, content, complaint):
        path = tmp_path / "images.gz"
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=f"{complaint}.*install it again"):
            data.read_idx(path)

    def test_half_a_data_set_says_what_it_lacks(self, tmp_path):
        write_splits(tmp_path, ".gz", labels=[0, 1])
        (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(data.DataError, match=rf"is not whole: {tmp_path} lacks t10k-labels-idx1-ubyte; install"):
            data.load("fashion-mnist", tmp_path)

    def test_labels_of_other_images(self, tmp_path):
        write_splits(tmp_path, ".gz", labels=[0, 1])
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(3, dtype=np.uint8))
        with pytest.raises(data.DataError, match=r"no images and their labels, but \(2, 28, 28\) and \(3,\); install"):
            data.load("fashion-mnist", tmp_path)

    def test_a_folder_for_what_needs_none(self, tmp_path):
        with pytest.raises(data.DataError, match="digits comes with scikit-learn and is not read from"):
            data.load("digits", tmp_path)

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
            ("vgg16_narrow", 10, 1, 28, 956_922),
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

    def test_vit(self):
        model = models.build("vit", 10, 1, 28)
        block = 4 * 64**2 + 2 * 4 * 64**2 + (4 + 4 + 1) * 64 + 4 * 64  # products, their biases, two norms
        assert sum(p.numel() for p in model.parameters()) == (16 + 1 + 49) * 64 + 4 * block + 2 * 64 + 65 * 10
        assert model(models.example(1, 28)).shape == (1, 10)

    def test_rotary(self):
        model = models.build("rotary")
        block = 4 * 128**2 + 3 * 128 * 341 + 2 * 128
        assert sum(p.numel() for p in model.parameters()) == 2 * 256 * 128 + 3 * block + 128
        text = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
        changed = text.clone()
        changed[:, 40:] = 0
        before, after = model(text), model(changed)
        assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before[:, 40], after[:, 40])

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

    @pytest.mark.parametrize(
        ("ending", "part"),
        [
            (".txt", "\nroles       W weight, A activation"),
            (".md", "\n- **roles**: W weight, A activation"),
            (".json", '\n  "roles": "W weight, A activation'),
            (".csv", "layer,operation,output,W,A,E,G,M,multiply_adds,values,bits\n"),
            (".html", "<dt>roles</dt><dd>W weight, A activation"),
        ],
    )
    def test_to_is_a_file_by_its_ending(self, ending, part, tmp_path, capsys):
        report.main(["convnet", "--recipe", "bfp8", "--to", str(tmp_path / f"report{ending}")])
        text = (tmp_path / f"report{ending}").read_text()
        assert part in text and "bfp8" in text and "bfp8" in capsys.readouterr().out

    def test_draw(self, tmp_path):
        report.main(["convnet", "--draw", str(tmp_path / "graph.dot")])
        assert "A ↓ bfp8[0]" in (tmp_path / "graph.dot").read_text()

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["resnet81"], "unknown model 'resnet81'; use resnet18"),
            ([""], "unknown model ''; use convnet"),
            (["convnet", "--recipe", "bfp"], "'bfp'"),
            (["convnet", "--recipe", "bfp8[5]"], "parameter 0.weight has 4 dimensions, and bfp8[5] needs 6; give it"),
            (["convnet", "--recipe", "bfp8[0] A=bfp8[3]"], "does not exist in a tensor of 2 dimensions; use -2 to 1"),
            (["convnet", "--num-classes", "0"], "--num-classes: '0' is not a whole number of 1 or more"),
            (["convnet", "--channels", "0"], "--channels: '0' is not a whole number of 1 or more"),
            (["convnet", "--input-size", "-3"], "--input-size: '-3' is not a whole number of 1 or more"),
            (["convnet", "--num-classes", "1" + 12 * "0"], "convnet cannot be made for samples of (3, 28) and 1000"),
            (["decoder", "--channels", "1"], "decoder takes text, not images; use one of convnet"),
            (["resnet18", "--channels", "1"], "resnet18 takes images of 3 channels, not 1; use one of convnet"),
            (["vgg16", "--input-size", "8"], "8 pixels a side are too few, use 32"),
            (["resnet18", "--input-size", "1" + 9 * "0"], "a sample of (3, 1000000000) cannot be made"),
            (["maxvit_t", "--input-size", "100"], "(shape '[1, 64, 3, 7, 3, 7]' is invalid for input of size 40000)"),
            (["vit_b_16", "--input-size", "100"], "100 pixels (Wrong image height! Expected 224 but got 100!); it was"),
            (["convnet", "--draw", "graph.jpg"], "cannot draw to graph.jpg: its name must end in one of"),
            (["convnet", "--draw", "/nowhere/graph.dot"], "/nowhere/graph.dot cannot be written: No such file or"),
            (
                ["convnet", "--to", "report.pdf"],
                "--to: cannot write a report to report.pdf: its name must end in one of .txt",
            ),
            (["convnet", "--to", "/nowhere/r.html"], "/nowhere/r.html cannot be written: No such file or directory"),
            (["convnet", "--frog"], "unrecognized arguments: --frog; report.py --help lists the options"),
            ([], "required: MODEL"),
        ],
    )
    def test_bad_input_is_one_line(self, words, complaint, capsys):
        line = refusal(capsys, report.main, words)
        assert line.startswith("report.py: error: ") and complaint in line

    def test_a_fault_of_the_program_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr(swalp_fx, "report", lambda *_: torch.zeros(2) + torch.zeros(3))
        with pytest.raises(RuntimeError, match="must match the size"):
            report.main(["convnet"])

    def test_a_drawing_on_a_full_disk(self, tmp_path, capsys):
        (tmp_path / "graph.dot.partial").symlink_to("/dev/full")
        (tmp_path / "graph.dot").write_text("earlier")
        line = refusal(capsys, report.main, ["convnet", "--draw", tmp_path / "graph.dot"])
        assert line.endswith("graph.dot cannot be written: No space left on device")
        assert (tmp_path / "graph.dot").read_text() == "earlier"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    words = ["--batch-size", "100", "--epochs", "3", "--recipe", "bfp8", "--recipe", "mxfp8 M=float"]
    train.main([*words, "--device", "cpu", "--out", str(out)])
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

    def test_all_lines_diverged(self, results):
        record = json.loads(results.read_text())
        for line in record["lines"].values():
            for epoch in line["epochs"]:
                epoch.update(losses=[math.nan] * len(epoch["losses"]), last=math.nan)
        assert len(plot.figure(record).axes) == 2

    def test_an_average_without_an_error_is_drawn(self, results):
        record = json.loads(results.read_text())
        record["lines"]["float"]["epochs"][-1]["average"] = 0.0
        assert plot.figure(record).axes[1].get_lines()[1].get_ydata()[-1] == 0.0

    def test_averaging_from_the_first_step(self, tmp_path):
        train.main(["--epochs", "1", "--out", str(tmp_path)])
        _, scores = plot.figure(plot.read(tmp_path / "results.json")).axes
        assert scores.patches[0].get_x() == 0

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (None, "cannot be read: No such file or directory; name a results.json of train.py"),
            (b"", "is no JSON, or cut short (Expecting value"),
            (lambda good: good[:1000], "is no JSON, or cut short"),
            (b"\x89PNG", "is no JSON, or cut short"),
            (b"{}", "is no results.json of train.py: it lacks 'metric'"),
            (b"[]", "is no results.json of train.py: list indices"),
            (lambda good: good.replace(b'"recipe"', b'"formats"'), "it lacks 'recipe'"),
            (lambda good: good.replace(b'"epochs": 3', b'"epochs": 4'), "is not as train.py writes it"),
            (lambda good: good.replace(b'"steps": 10', b'"steps": 100'), "is not as train.py writes it"),
            (lambda good: good.replace(b'"last": ', b'"last": null, "was": '), "is not as train.py writes it"),
        ],
    )
    def test_results_that_are_none(self, results, tmp_path, content, complaint, capsys):
        path = tmp_path / "results.json"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content(results.read_bytes()))
        line = refusal(capsys, plot.main, [path, "--out", tmp_path / "a.svg"])
        assert line.startswith(f"plot.py: error: {path} ") and complaint in line

    @pytest.mark.parametrize(
        ("out", "complaint"),
        [
            ("a.jpx", "its name must end in one of .avif, .eps"),
            ("a", "its name must end in one of .avif, .eps"),
            ("none/a.svg", "a.svg cannot be written: No such file or directory"),
            ("full.png", "full.png cannot be written: No space left on device"),
        ],
    )
    def test_a_figure_that_cannot_be_written(self, results, tmp_path, out, complaint, capsys):
        (tmp_path / "full.png").symlink_to("/dev/full")
        assert complaint in refusal(capsys, plot.main, [results, "--out", tmp_path / out])


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


def test_benchmark_times_codes_beside_floats(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SECONDS", 0.001)
    benchmark.main(["codes", "--elements", "4K", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {(row["what"], row["rounding"]) for row in rows} == set(itertools.product(codes.SPECS, codes.ROUNDINGS))
    assert all(row["elements"] == 4096 and row["encode ms"] > 0 and row["quantize ms"] > 0 for row in rows)
    assert "ratio to quantize" in capsys.readouterr().out


def test_benchmark_times_no_codes_that_are_wrong(monkeypatch):
    monkeypatch.setattr(codes, "decode", lambda codes: torch.zeros(codes.shape))
    with pytest.raises(SystemExit, match=r"fixed8\.6, nearest: codes are of other numbers"):
        benchmark.main(["codes", "--elements", "4K"])


@pytest.mark.parametrize("size", ["1000", "12T", "0"])
def test_benchmark_refuses_a_size_it_cannot_lay_out(size, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["op", "--elements", size])
    assert f"'{size}' is not a multiple of 1024 elements; use 1M or 64M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--json", "/nowhere/b.json"], "/nowhere/b.json cannot be written: there is no folder /nowhere; make it"),
        (["--json", "/"], "/ is a folder; name a file"),
        (["--json", "/proc/b.json"], "/proc/b.json cannot be written: "),
        (["--threads", "0"], "--threads: '0' is not a whole number of 1 to 1024"),
        (["--threads", "99999999999999999999"], "is not a whole number of 1 to 1024"),
        (["--elements", "999999G"], "--elements 1,073,740,750,258,176: memory does not hold so many"),
        (["--device", "warp"], "invalid choice: 'warp'"),
    ],
)
def test_benchmark_refuses_bad_input_before_it_measures(words, complaint, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it measured"))
    message = refusal(capsys, benchmark.main, ["op", *words])
    assert message.startswith("benchmark.py: error: ") and complaint in message


def test_benchmark_prints_what_a_full_disk_does_not_take(tmp_path, monkeypatch, capsys):
    for name in ("measure", "measure_layouts"):
        monkeypatch.setattr(benchmark, name, lambda *_: [{"what": "e4m3", "ms": 1.5}])
    (tmp_path / "b.json").write_text("earlier")
    (tmp_path / "b.json.partial").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["op", "--json", str(tmp_path / "b.json")])
    out, err = capsys.readouterr()
    assert err.endswith("b.json cannot be written: No space left on device\n") and err.count("\n") == 1
    assert "1.500" in out and (tmp_path / "b.json").read_text() == "earlier"


def test_benchmark_of_an_optimizer_times_each_beside_the_plain_one(tmp_path, monkeypatch, capsys):
    for name, value in {"SECONDS": 0.001, "TURNS": 1, "MODEL": "preresnet20", "TINY": (5, 64)}.items():
        monkeypatch.setattr(optimizers, name, value)
    benchmark.main(["optimizer", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == len(optimizers.CASES) + 1
    assert {row["parameters"] for row in rows} == {"preresnet20", "5 of 64"}
    assert all(row["ratio to plain"] == pytest.approx(row["ms"] / row["plain ms"]) for row in rows)
    by_master = {row["recipe"]: row for row in rows if row["optimizer"] == "AdamW" and row["parameters"] != "5 of 64"}
    weights = 4 * sum(p.numel() for p in models.build("preresnet20").parameters()) / 2**20
    plain, masters = by_master["bfp8[0]"]["peak MiB"], by_master["bfp8[0] master=float"]["peak MiB"]
    assert 4 * weights < plain < plain + weights * 0.99 < masters < plain + 3 * weights
    assert "ratio of peaks" in capsys.readouterr().out


def test_benchmark_times_no_step_that_is_wrong(monkeypatch):
    monkeypatch.setitem(optimizers.OPTIMIZERS, "AdamW", lambda p: torch.optim.SGD(p, lr=torch.rand(()).item()))
    monkeypatch.setattr(optimizers, "TINY", (5, 64))
    monkeypatch.setattr(optimizers, "MODEL", "preresnet20")
    with pytest.raises(SystemExit, match=r"AdamW: a step that rounds nothing differs from the plain one"):
        benchmark.main(["optimizer"])


def test_benchmark_of_the_graph_times_each_node_forward_and_backward(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "SECONDS", 0.001)
    monkeypatch.setattr(overhead, "CHAIN", 3)
    monkeypatch.setattr(overhead, "WHOLE", ["preresnet20"])
    benchmark.main(["graph", "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert result.keys() == {"command", "machine", "threads", "torch", "date", "nodes"}
    *chains, whole = result["nodes"]
    assert {"torch.clone", "quantize_weight", "quantize_output", "quantize_output, in place"} < {
        row["what"] for row in chains
    }
    assert all(row["nodes"] == 3 and row["forward us"] > 0 and row["backward us"] > 0 for row in chains)
    assert whole["what"] == "preresnet20, less the float model" and whole["nodes"] == 130
    assert whole["forward us"] < 1000  # without the first call, which traces
    assert "backward us" in capsys.readouterr().out


def test_benchmark_of_the_graph_times_no_wrong_node(monkeypatch):
    monkeypatch.setattr(swalp_fx, "quantize_output", lambda x, *how, in_place="": x * (2 if in_place else 1))
    with pytest.raises(SystemExit, match="float, nearest: in place the numbers differ"):
        benchmark.main(["graph"])


def test_benchmark_of_attention_stands_beside_the_fused_product(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "SHAPE", (1, 2, 16, 4))
    monkeypatch.setattr(attention, "TURNS", 1)
    benchmark.main(["attention", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["full"] * 4 + ["causal"] * 4
    for fused, *others in (rows[:4], rows[4:]):
        assert fused["computed"] == "fused, in float" and fused["ratio to fused"] == 1
        for row in others:
            assert row["ratio of forwards"] == pytest.approx(row["forward ms"] / fused["forward ms"])
            assert row["ratio to fused"] == pytest.approx(row["with backward ms"] / fused["with backward ms"])
    assert "by hand, in float" in capsys.readouterr().out


def test_benchmark_of_attention_rounds_what_it_says_and_times_no_wrong_product(monkeypatch):
    monkeypatch.setattr(attention, "SHAPE", (1, 2, 16, 4))
    given = [torch.randn(attention.SHAPE) for _ in range(3)]
    fused, by_hand, rounded, whole = (attention.forward(each, given) for each in attention.contenders(True).values())
    assert torch.allclose(fused, by_hand, atol=1e-5) and not torch.equal(whole, rounded)
    for each in (rounded, whole):
        assert torch.equal(swalp_fx.quantize(each, attention.FORMAT), each) and not torch.equal(each, fused)
    monkeypatch.setattr(attention.ByHand, "forward", lambda self, query, key, value: value)
    with pytest.raises(SystemExit, match="differs from that by hand"):
        benchmark.main(["attention"])


def test_benchmark_of_the_capture_stands_beside_torch_compile(tmp_path, monkeypatch, capsys):
    changes = {"MODELS": ["convnet"], "FIRST": 1, "LATER": 1, "SIZES": 4, "LENGTHS": 4, "GENERATED": 4}
    for name, value in changes.items():
        monkeypatch.setattr(captures, name, value)
    benchmark.main(["capture", "--json", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    (calls,) = result["calls"]
    assert calls["ratio"] == pytest.approx(calls["first call s"] / calls["of torch.compile s"])
    assert 0 < calls["later call us"] < 1e6 * calls["first call s"]
    # One size, then any other; a text of one byte; and of a cache, the prompt, one byte, and any other.
    assert [(row["calls"], row["graphs"]) for row in result["graphs"]] == [(4, 2), (4, 3), (4, 3)]
    assert swalp_fx.capture.local.watch is None
    assert "first call s" in capsys.readouterr().out


def test_what_generates_with_a_cache_gives_what_it_gives_without():
    model = captures.Caching(8)
    text = captures.generate(model, "cpu")
    assert text.shape == (1, 4 + captures.GENERATED)
    assert torch.equal(model(text[:, 3:4], model(text[:, :3])[1])[0][0, -1].argmax(), text[0, 4])
    assert torch.equal(model(text[:, :4])[0][0, -1].argmax(), text[0, 4])


def test_benchmark_of_recurrent_layers_stands_beside_the_fused_calls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "SECONDS", 0.001)
    for name in ("TIMES", "BATCH", "HIDDEN", "TURNS"):
        monkeypatch.setattr(loops, name, 4)
    benchmark.main(["recurrent", "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == ["LSTM", "LSTM", "GRU", "GRU", "RNN", "RNN"]
    assert [row["call"] for row in rows[:2]] == ["float, fused", "swalp_fx bfp8[0]"]
    assert all(row["forward ms"] > 0 and row["backward ms"] > 0 and row["ratio to float"] > 0 for row in rows)
    assert "ratio to float" in capsys.readouterr().out


def test_benchmark_of_recurrent_layers_times_no_wrong_loop(monkeypatch):
    monkeypatch.setattr(loops, "NEAR", "bfp4[0] rounding=nearest")
    with pytest.raises(SystemExit, match="LSTM: the loop gives other numbers, so the speed says nothing"):
        benchmark.main(["recurrent"])


@pytest.mark.parametrize("model", ["preresnet20", "rotary", "vit"])
def test_benchmark_of_a_step_stands_beside_the_float_step(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    monkeypatch.setattr(steps, "BATCH", 2)
    benchmark.main(["step", "--models", model, "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {model}
    assert [row["step"] for row in rows][:3] == ["float", "identity formats", "swalp_fx bfp8[0]"]
    for row in rows:
        assert row["ms"] == pytest.approx(row["forward ms"] + row["backward ms"] + row["update ms"])
        assert row["ratio to float"] == pytest.approx(row["ms"] / rows[0]["ms"])
    assert "ratio to float" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["preresnet20", "rotary", "vit"])
def test_benchmark_of_a_step_trains_what_it_times(name, monkeypatch):
    monkeypatch.setattr(steps, "BATCH", 4)
    model, inputs, targets = steps.made(name)
    in_float, _, contender, *_ = steps.contenders_of(name, model)
    before = [parameter.detach().clone() for parameter in contender.model.parameters()]
    for each in (in_float, contender):
        each.step(benchmark.Clock("cpu").once, inputs, targets)
    assert len(contender.seconds) == 1 and all(seconds > 0 for seconds in contender.seconds[0])
    weights = list(contender.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True) if a.dim() > 1)
    assert all(torch.equal(swalp_fx.quantize(weight, steps.RECIPE), weight) for weight in weights)
    assert not any(map(torch.equal, weights, in_float.model.parameters()))


def test_benchmark_of_a_step_times_no_wrong_graph(monkeypatch):
    monkeypatch.setattr(swalp_fx, "check", lambda *_: swalp_fx.Check(1, ("train output 0: differs",)))
    with pytest.raises(SystemExit, match=r"preresnet20: 1 of 1 tensors differ.*; so the speed says nothing"):
        benchmark.main(["step", "--models", "preresnet20"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["graph", "--elements", "1M"], "--elements is an option of op and codes, not of graph"),
        (["capture", "--models", "vgg16"], "--models is an option of step, not of capture"),
        (["op", "--models", "vgg16"], "--models is an option of step, not of op"),
        (["step", "--models", "vgg61"], "unknown model 'vgg61'; use vgg19 or vgg16"),
        (["step", "--models", "convnet", "maxvit_t"], "maxvit_t cannot take a batch of 32 of images of 32 x 32 pixels"),
    ],
)
def test_benchmark_refuses_what_it_cannot_measure(words, complaint, monkeypatch, capsys):
    for module in (benchmark, captures, overhead, steps):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("it measured"))
    assert refusal(capsys, benchmark.main, words).startswith(f"benchmark.py: error: {complaint}")
