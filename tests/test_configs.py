"""tools/configs: each configuration, and whole commands on small files in the data sets' own formats."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from refusal import refusal

import data
import folders
import models
import ranks
import settings
import swalp_fx
import train

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
CONFIGS = Path(__file__).parent.parent / "tools" / "configs"
PAPERS = [f"{model}-cifar{n}" for model in ("vgg16", "preresnet164") for n in (10, 100)]
pytestmark = pytest.mark.usefixtures("one_thread")


def plans(name, **given):
    return {plan.name: plan for plan in settings.configured(CONFIGS / f"{name}.toml", {"seed": 0, **given})}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_every_configuration_fits_its_model(path):
    for plan in plans(path.stem).values():
        channels = 1 if plan.settings.dataset == "fashion-mnist" else 3
        model = models.build(plan.settings.model, 10, channels, {1: 28, 3: 32}[channels])
        swalp_fx.convert(model, recipe=plan.recipe)


@pytest.mark.parametrize("name", PAPERS)
def test_the_four_settings_of_the_paper(name):
    of = plans(name)
    assert list(of) == ["sgd-fp", "swa-fp", "authors", "qpytorch"]
    vgg = name.startswith("vgg16")
    expected = {  # epochs, average_from
        "sgd-fp": (200, 200) if vgg else (150, 150),
        "swa-fp": (300, 161) if vgg else (225, 126),
        "authors": (300, 200) if vgg else (225, 150),
        "qpytorch": (300, 200) if vgg else (225, 150),
    }
    for line, plan in of.items():
        found = plan.settings
        assert (found.epochs, found.average_from) == expected[line]
        assert (found.lr, found.weight_decay) == ((0.05, 5e-4) if vgg else (0.1, 3e-4))
        assert (found.batch_size, found.momentum, found.average_every) == (128, 0.9, 0)
        assert found.average_lr == (0.05 if (line, name) == ("swa-fp", "preresnet164-cifar100") else 0.01)
        assert found.lr_changes == "epoch"


@pytest.mark.parametrize("name", PAPERS)
def test_the_authors_outputs_are_rounded_where_their_networks_round_them(name):
    plan = plans(name)["authors"]
    recipe = swalp_fx.Recipe.parse(plan.recipe)
    for field, value in models.REFERENCE_PLACEMENT[plan.settings.model].items():
        assert getattr(recipe, field) == value
    assert str(recipe.master) == str(recipe.weight) == "bfp8[0]+twos" and str(recipe.activation) == "bfp8+twos"


def test_options_stand_above_the_file():
    of = plans("vgg16-cifar10", epochs=4, average_from=2)
    assert {(plan.settings.epochs, plan.settings.average_from) for plan in of.values()} == {(4, 2)}


# Data sets, as they lie on the disk


def cifar(folder, name, monkeypatch, train_images=40, test_images=20):
    """The Python archive of CIFAR-10 or CIFAR-100, unpacked: pickles of flat images and their labels, and the names.

    torchvision checks the files by checksums; here they are replaced by the written files' own.
    """
    source = getattr(torchvision.datasets, name.upper())
    root = folder / source.base_folder
    root.mkdir()
    key, classes = {"cifar10": ("labels", 10), "cifar100": ("fine_labels", 100)}[name]
    draw = np.random.default_rng(0)

    def written(file, content):
        (root / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((root / file).read_bytes()).hexdigest()]

    def batches(files, n):
        for file in files:
            pixels = draw.integers(0, 256, (n // len(files), 3072), dtype=np.uint8)
            labels = [(7 * i) % classes for i in range(len(pixels) - 1)] + [classes - 1]
            yield written(file, {"data": pixels, key: labels})

    monkeypatch.setattr(source, "train_list", list(batches([file for file, _ in source.train_list], train_images)))
    monkeypatch.setattr(source, "test_list", list(batches([file for file, _ in source.test_list], test_images)))
    file, md5 = written(source.meta["filename"], {source.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(source, "meta", {**source.meta, "filename": file, "md5": md5})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_standardised_and_augmented_as_the_authors_do(name, tmp_path, monkeypatch):
    cifar(tmp_path, name, monkeypatch)
    loaded = data.load(name, tmp_path)
    pixels = getattr(torchvision.datasets, name.upper())(tmp_path, train=True).data / 255
    due = (pixels - [0.4914, 0.4822, 0.4465]) / [0.2023, 0.1994, 0.2010]
    torch.testing.assert_close(loaded.train_inputs, torch.from_numpy(due).float().permute(0, 3, 1, 2))
    assert loaded.classes == {"cifar10": 10, "cifar100": 100}[name]
    ((plain, _),) = loaded.train(40)
    assert torch.equal(plain, loaded.train_inputs)
    ((augmented, labels),) = loaded.train(40, seed=0)
    black = torch.tensor([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])
    edges = torch.cat([augmented[:, :, [0, -1]].flatten(2), augmented[..., [0, -1]].flatten(2)], 2)
    assert 0.2 < (edges == black[:, None]).all(1).float().mean() < 0.8  # the edges that come in are black
    assert labels.unique().tolist() == loaded.train_targets.unique().tolist()


def test_a_changed_cifar_file_is_refused(tmp_path, monkeypatch):
    cifar(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=r"is not in .*, or not whole; unpack its Python archive"):
        data.load("cifar10", tmp_path)


def images(root, classes=("cat", "dog"), many=3):
    """A tiny ImageNet: a folder for each class, with images of several shapes and kinds."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(many):
                shape = [(40, 60, 3), (50, 30, 3), (24, 24)][i % 3]  # grey ones too
                image = Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
                image.save(root / split / name / f"{i}.{('jpeg', 'png')[i % 2]}")


def test_folders_of_images(tmp_path):
    images(tmp_path)
    loaded = data.load("imagenet", tmp_path)
    assert (loaded.classes, loaded.shape, loaded.samples, loaded.tested) == (2, (3, 224), 6, 6)
    plain = [*loaded.train(4)]
    assert [tuple(x.shape) for x, _ in plain] == [(4, 3, 224, 224), (2, 3, 224, 224)] and len(loaded.train(4)) == 2
    assert torch.cat([y for _, y in plain]).tolist() == [0, 0, 0, 1, 1, 1]
    before = torch.get_rng_state()
    first, again, other = (next(iter(loaded.train(6, seed))) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert sorted(first[1].tolist()) == [0, 0, 0, 1, 1, 1]


def test_workers_give_the_same_images(tmp_path, monkeypatch):
    images(tmp_path, many=6)
    loaded = data.load("imagenet", tmp_path)
    monkeypatch.setattr(folders, "WORKERS", 2)
    several, alone = loaded.train(1, seed=3), loaded.train(6, seed=3)
    assert torch.equal(torch.cat([x for x, _ in several]), torch.cat([x for x, _ in alone]))


def test_a_rank_reads_no_image_but_its_own(tmp_path, monkeypatch):
    images(tmp_path, many=5)
    loaded = data.load("imagenet", tmp_path)
    whole = list(loaded.train(4, seed=3))
    read = []
    loader = loaded.train_images.loader
    loaded.train_images.loader = lambda path: (read.append(path), loader(path))[1]
    monkeypatch.setattr(ranks, "COUNT", 2)
    parts, shares, paths = [], [], []
    for rank in range(2):
        monkeypatch.setattr(ranks, "RANK", rank)
        read.clear()
        parts.append(list(ranks.parts(loaded.train(4, seed=3))))
        paths += read
        assert len(read) == sum(len(labels) for _, labels, _ in parts[-1]) == 5
        read.clear()
        of_rank = ranks.share(loaded.train(4, seed=3))
        shares.append(list(of_rank))
        assert len(of_rank) == len(shares[-1]) and len(read) == sum(len(labels) for _, labels in shares[-1])
    assert len(set(paths)) == 10
    for number, (inputs, labels) in enumerate(whole):
        for rank in range(2):
            part, its_labels, weight = parts[rank][number]
            assert torch.equal(part, inputs[rank::2]) and torch.equal(its_labels, labels[rank::2])
            assert weight == len(part) * 2 / len(inputs)
        assert torch.equal(shares[number % 2][number // 2][0], inputs)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda root: [path.unlink() for path in root.glob("val/cat/*")], "imagenet is not in .*Found no valid file"),
        (lambda root: (root / "val").rename(root / "test"), "imagenet is not in .*val.*pass --data DIR"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "fox"), "train and val differ in dog, fox"),
    ],
)
def test_half_an_imagenet_is_refused(tmp_path, spoil, complaint):
    images(tmp_path)
    spoil(tmp_path)
    with pytest.raises(data.DataError, match=complaint):
        data.load("imagenet", tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    images(tmp_path)
    (tmp_path / "train" / "cat" / "0.jpeg").write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"cat/0\.jpeg cannot be read .*install the data set again"):
        list(data.load("imagenet", tmp_path).train(6))


# Whole commands


def command(config, folder, *words):
    options = ["--data", folder, "--device", "cpu", "--epochs", 2, "--average-from", 1, "--batch-size", 10]
    return train.main([*map(str, ["--config", CONFIGS / f"{config}.toml", *options, *words])])


@pytest.mark.parametrize("name", ["cifar10", pytest.param("cifar100", marks=pytest.mark.slow)])
def test_vgg16_on_cifar_in_all_four_settings(name, tmp_path, monkeypatch, capsys):
    cifar(tmp_path, name, monkeypatch)
    narrow = models.Made(models._vgg(batch_norm=False, widths=models.VGG16_NARROW), (3, 32))
    monkeypatch.setitem(models.MODELS, "vgg16", narrow)
    results = command(f"vgg16-{name}", tmp_path, "--out", tmp_path / "run")
    assert list(results) == ["sgd-fp", "swa-fp", "authors", "qpytorch"]
    assert [result["rounded"] is None for result in results.values()] == [True, True, False, False]
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["table"] + "\n" == capsys.readouterr().out
    again = command(f"vgg16-{name}", tmp_path, "--out", tmp_path / "run", "--resume")
    assert json.dumps(again) == json.dumps(results)


def test_preresnet_scores_its_warm_up_with_statistics_of_the_training_set(tmp_path, monkeypatch):
    cifar(tmp_path, "cifar10", monkeypatch)
    small = models.Made(models._preresnet(11, (1, 3, 1)), (3, 32))  # a block a stage
    monkeypatch.setitem(models.MODELS, "preresnet164", small)
    scored = []
    score = train.Line.score
    monkeypatch.setattr(train.Line, "score", lambda line, module: scored.append(module) or score(line, module))
    command("preresnet164-cifar10", tmp_path, "--line", "authors")
    last, warm_up, *_ = scored
    loaded = data.load("cifar10", tmp_path)
    assert torch.equal(last.conv.weight, warm_up.conv.weight) is False  # training went on with one of them
    norm = warm_up.get_submodule("stages.0.0.branch.bn1")
    scored_with = norm.running_mean.clone()
    warm_up.eval()
    norm.train().momentum = 1.0  # after a call the statistics are that call's own
    with torch.no_grad():
        warm_up(loaded.train_inputs)
    torch.testing.assert_close(norm.running_mean, scored_with, rtol=1e-4, atol=1e-5)


def test_resnet18_on_folders_of_images(tmp_path):
    images(tmp_path, many=2)
    results = command("resnet18-imagenet", tmp_path, "--average-every", 1, "--line", "row", "--lr", 0.01)
    assert list(results) == ["row"] and results["row"]["n_averaged"] == 1


def test_seeds_have_a_mean_and_a_deviation(tmp_path, capsys):
    words = ["--device", "cpu", "--epochs", "2", "--batch-size", "100", "--seeds", "2", "--seed", "3"]
    results = train.main([*words, "--out", str(tmp_path)])
    assert list(results) == ["float", "float-seed4", "low", "low-seed4"]
    alone = train.main([*words[:6], "--seed", "4"])
    assert alone["float"]["last"] == results["float-seed4"]["last"]
    out = capsys.readouterr().out
    a, b = (results[name]["average"] for name in ("low", "low-seed4"))
    assert f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}" in out and "seeds 3 to 4" in out
    assert train.main([*words, "--out", str(tmp_path), "--resume"]) == results


def test_an_epoch_of_fewer_samples_draws_them_anew():
    results = train.main(["--device", "cpu", "--epochs", "2", "--samples", "64", "--average-every", "1"])
    assert [epoch["steps"] for epoch in results["low"]["epochs"]] == [2, 2] and results["low"]["n_averaged"] == 2


@pytest.mark.parametrize("changes", ["step", "epoch"])
def test_the_learning_rate_changes_each_step_or_each_epoch(changes, monkeypatch):
    rates = []
    loss = train.Line._loss
    note = lambda line, *batch: rates.append(line.optimizer.param_groups[0]["lr"]) or loss(line, *batch)  # noqa: E731
    monkeypatch.setattr(train.Line, "_loss", note)
    words = ["--epochs", "5", "--average-from", "4", "--batch-size", "500", "--recipe", "float"]
    train.main([*words, "--lr-changes", changes, "--lr", "1", "--average-lr", "0.1", "--device", "cpu"])
    of_float = rates[2:12]  # after the two trials
    per_step = [1, 1, 1, 1, 1, 1 - 0.99 * 0.125 / 0.4, 1 - 0.99 * 0.25 / 0.4, 1 - 0.99 * 0.375 / 0.4, 0.1, 0.1]
    per_epoch = [1, 1, 1, 1, 1, 1, *[1 - 0.99 * 0.25 / 0.4] * 2, 0.1, 0.1]
    assert of_float == pytest.approx({"step": per_step, "epoch": per_epoch}[changes])


# Refusals


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('dataset = "digits"\nepoch = 3\n[a]\nrecipe = "float"', "there is no setting 'epoch'; use epochs"),
        ('dataset = "digits"\n[a]\nrecip = "float"', "[a] there is no setting 'recip'; use recipe"),
        ('dataset = "digits"\n[a]\ndataset = "cifar10"', "[a] there is no setting 'dataset'"),
        ('dataset = "digts"\n[a]\nrecipe = "float"', "dataset is 'digts'; use digits"),
        ('model = "convnet"\n[a]\nrecipe = "float"', "dataset is None; use digits or"),
        ('dataset = "digits"', "has no line to train; add a table, such as [float]"),
        ('dataset = "digits"\n[a]\nlr = 0.1', "[a] has no recipe; add one"),
        ('dataset = "digits"\n[a]\nrecipe = "bpf8"', "unknown format spec 'bpf8'"),
        ('dataset = "digits"\nmodel = "convnett"\n[a]\nrecipe = "float"', "unknown model 'convnett'; use convnet"),
        ('dataset = "digits"\nepochs = "3"\n[a]\nrecipe = "float"', "epochs is '3'; it takes a whole number of 1 or"),
        ('dataset = "digits"\nepochs = 0\n[a]\nrecipe = "float"', "epochs is 0; it takes a whole number of 1 or more"),
        ('dataset = "digits"\nlr = -1\n[a]\nrecipe = "float"', "lr is -1; it takes a number of 0 or more"),
        ('dataset = "digits"\nlr-changes = "day"\n[a]\nrecipe = "float"', "lr-changes is 'day'; use step or epoch"),
        ('dataset = "digits"\nepochs = 3\n[a]\nrecipe = "float"', "[a] ends before its warm-up of 10 epochs does"),
        ("epochs 3", "is no TOML ("),
    ],
)
def test_a_configuration_with_a_fault(text, complaint, tmp_path, capsys):
    (tmp_path / "a.toml").write_text(text)
    line = refusal(capsys, train.main, ["--config", tmp_path / "a.toml"])
    assert line.startswith("train.py: error: ") and complaint in line


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--config", "/nowhere.toml"],
            "/nowhere.toml cannot be read: No such file or directory; name a file of",
        ),
        (["--config", CONFIGS / "vgg16-cifar10.toml", "--line", "author"], "has no line 'author'; use authors"),
        (["--config", CONFIGS / "vgg16-cifar10.toml", "--recipe", "bfp8"], "--recipe does not go with --config"),
        (["--config", CONFIGS / "vgg16-cifar10.toml", "--data", "/nowhere"], "cifar10 is not in /nowhere"),
    ],
)
def test_a_configuration_that_does_not_fit_the_command(words, complaint, capsys):
    assert complaint in refusal(capsys, train.main, words)
