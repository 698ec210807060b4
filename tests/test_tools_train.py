"""tools/train.py: the schedule, whole small runs on real digits, their files, and errors."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusal import refusal

import checkpoint
import command
import data
import decoder
import models
import plot
import swalp_fx
import train
from settings import DEFAULTS, EVERYWHERE, Settings, learning_rate
from swalp_fx.passes.names import NAME

TOOLS = Path(__file__).parent.parent / "tools"


def test_schedule_is_the_papers():
    settings = Settings("digits", "convnet", "sgd", 300, 200, 0, 0.1, 0.01, 0.9, 5e-4, 128, 0)
    warm_up = {0: 0.1, 100: 0.1, 120: 0.1 * 0.7525, 140: 0.1 * 0.505, 180: 0.001, 199.9: 0.001}
    for epoch, rate in {**warm_up, 200: 0.01, 299: 0.01}.items():
        assert learning_rate(epoch, settings) == pytest.approx(rate, rel=1e-12)


def test_the_gallerys_learning_rate_rises_fiftyfold_where_averaging_begins():
    """As docs/gallery.md tells it, in steps of stdlib's defaults: 8,192 windows an epoch, in batches of 32."""
    settings = Settings(dataset="stdlib", seed=0, **{**EVERYWHERE, **DEFAULTS["stdlib"]})
    per_epoch = data.TEXT_EPOCH // settings.batch_size
    rates = {0: 2e-3, 512: 2e-3, 922: 2e-5, 1023: 2e-5, 1024: 1e-3, 1535: 1e-3}
    assert per_epoch * settings.average_from == 1024 and per_epoch * settings.epochs == 1536
    for step, rate in rates.items():
        assert learning_rate(step / per_epoch, settings) == pytest.approx(rate)


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


def trained_by_two(folder, *words):
    """The output of torchrun with two ranks, of a small run on digits kept in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", TOOLS / "train.py"]
    options = ["--dataset", "digits", "--batch-size", "100", "--device", "cpu", "--out", folder, *words]
    return subprocess.run([*map(str, command + options)], capture_output=True, text=True, timeout=300)


class TestRanks:
    def test_two_train_one_network_that_one_goes_on_with(self, tmp_path):
        words = ["--recipe", "bfp8[0]", "--average-from", "1", "--epochs"]
        done = trained_by_two(tmp_path, *words, "2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test error, %") == 1 and done.stderr.count("low  epoch 2 of 2") == 1
        record = json.loads((tmp_path / "results.json").read_text())
        assert record["ranks"] == 2
        alone = run(*words, "2")
        for name in ("float", "low"):
            epochs, due = record["lines"][name]["epochs"], alone[name]["epochs"]
            assert [each["steps"] for each in epochs] == [each["steps"] for each in due]
            # Batch norm sees parts of the batches, and roundings draw other bits.
            assert epochs[0]["losses"] == pytest.approx(due[0]["losses"], rel=0.02)
        on_one = run("--out", tmp_path, "--resume", *words, "3")
        assert on_one["low"]["epochs"][:2] == record["lines"]["low"]["epochs"] and on_one["low"]["n_averaged"] == 2

    @pytest.mark.slow
    def test_one_trains_a_network_that_two_go_on_with(self, tmp_path):
        words = ["--recipe", "bfp8[0]", "--average-from", "1", "--epochs"]
        run("--out", tmp_path, *words, "2")
        done = trained_by_two(tmp_path, "--resume", *words, "3")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "results.json").read_text())["lines"]["low"]["n_averaged"] == 2

    def test_a_batch_that_leaves_a_rank_without_a_sample_is_refused_once(self, tmp_path):
        done = trained_by_two(tmp_path, "--epochs", "1", "--batch-size", "1")
        said = "train.py: error: the last batch of an epoch, of 1, has none for one of 2 ranks; use"
        assert done.returncode and done.stderr.count(said) == 1


class TestTrain:
    def test_the_command_prints_one_table(self, tmp_path):
        command = [sys.executable, TOOLS / "train.py", "--epochs", "2", "--average-from", "1", "--out", "run"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        header, below, _, *rows = done.stdout.strip().splitlines()[-5:]
        assert header.split() == ["line", "recipe", "SGD", "last", "average", "average,", "seconds"]
        assert re.split("  +", below.strip())[:2] == ["(end of warm-up)", "weights"]
        assert re.split("  +", below.strip())[2:] == ["(SWA, SWALP)", "rounded graph", "an epoch"]
        record = json.loads((tmp_path / "run" / "results.json").read_text())
        lines = [record["lines"]["float"], record["lines"]["low"]]
        for row, name, line in zip(rows, ("float", "low"), lines, strict=True):
            scores = (line[score] for score in ("warm_up", "last", "average", "rounded"))
            cells = [f"{score:.2f}" for score in scores if score is not None]
            assert row.split() == [name, line["recipe"], *cells, f"{line['median_seconds']:.2f}"]
        assert lines[0]["rounded"] is None and lines[0]["warm_up"] == lines[0]["epochs"][0]["last"]
        assert record["metric"] == "test error, %" and record["command"].endswith(" --out run")
        assert record["table"] in done.stdout
        assert [len(line["epochs"]) for line in lines] == [2, 2] and all(line["n_averaged"] == 1 for line in lines)
        assert record["lines"]["low"]["recipe"] == "bfp8[0]" and record["environment"]["torch"] == torch.__version__
        # Where no one watches, a line an epoch.
        told = [re.sub(r"[\d.]+(?= s$)", "T", line) for line in done.stderr.splitlines()]
        due = [
            (name, k, each) for name in ("float", "low") for k, each in enumerate(record["lines"][name]["epochs"], 1)
        ]
        assert told == [
            f"{name}  epoch {k} of 2  loss {each['losses'][-1]:.3f}  test error {each['last']:.2f} %  T s"
            for name, k, each in due
        ]

    def test_one_epoch_trains_and_averages_its_end(self, capsys):
        results = run("--epochs", 1)
        assert all(line["n_averaged"] == 1 and len(line["epochs"]) == 1 for line in results.values())
        assert results["float"]["average"] == results["float"]["last"]
        assert "1 set of weights averaged, one every epoch after epoch 0; the average of one set is that set" in (
            capsys.readouterr().out
        )

    def test_the_last_epoch_scored_alone_gives_the_same_table(self, tmp_path, capsys):
        words = ["--epochs", 3, "--average-from", 1, "--recipe", "bfp6[0]"]
        each, alone = run(*words), run(*words, "--score-last", "--out", tmp_path)
        lines = capsys.readouterr().err.splitlines()[-6:]
        assert ["test error" in line for line in lines] == [False, False, True] * 2
        for name, line in alone.items():
            scores = [(epoch["last"], epoch["average"]) for epoch in line["epochs"]]
            assert scores[:2] == [(None, None)] * 2 and None not in scores[2]
            assert [line[key] for key in train.SCORES] == [each[name][key] for key in train.SCORES]
        plot.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "a.svg")])
        assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")

    def test_help_has_every_default_of_every_data_set(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            train.main(["--help"])
        printed = capsys.readouterr().out
        rows = {line.split()[0]: line for line in printed.partition("defaults:")[2].splitlines() if line}
        assert rows.pop("digits").split() == list(data.DATASETS)
        assert set(rows) <= set(re.findall(r"--[a-z-]+", printed.partition("defaults:")[0]))
        settings = set(Settings.__dataclass_fields__) - {"dataset", "seed"}
        assert {row.removeprefix("--").replace("-", "_") for row in rows} == settings | {"recipe"}
        assert rows["--average-lr"].split()[1:] == ["0.05", "0.02", "0.01", "0.01", "0.01", "0.001"]

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

    def test_a_resumed_run_may_name_its_recipe_in_other_words(self, tmp_path):
        run("--epochs", 2, "--average-from", 1, "--recipe", "bfp6[0] accumulator=float", "--out", tmp_path)
        words = ["--average-from", 1, "--recipe", "bfp6[0] master=float", "--out", tmp_path, "--resume"]
        assert len(run("--epochs", 3, *words)["low"]["epochs"]) == 3

    def test_a_run_is_not_overwritten(self, tmp_path, capsys):
        run("--epochs", 1, "--out", tmp_path)
        for name in ("float.pt", "low.pt", "nothing"):
            kept = contents(tmp_path)
            capsys.readouterr()
            line = refusal(capsys, run_words, ["--epochs", 1, "--out", tmp_path])
            assert "holds a run already; add --resume" in line and contents(tmp_path) == kept
            (tmp_path / name).unlink(missing_ok=True)  # results.json is a run too

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--recipe", "bfp99"], "out of range"),
            (["--recipe", "Q=bfp8"], "there is no role 'Q'"),
            (["--recipe", "bfp8[5]"], "parameter 0.weight has 4 dimensions, and bfp8[5] needs 6; give it"),
            (["--recipe", "bfp8[0] G=bfp8[5]"], "parameter 0.weight has 4 dimensions, and bfp8[5] needs 6; give it"),
            (["--recipe", "bfp8[0] A=bfp8[5]"], "does not fit the model: block dimension 5 does not exist"),
            (["--recipe", "bfp8[0] average=bfp8[5]"], "such as Rule('0.weight', average='float')"),
            (["--model", "convnett"], "unknown model 'convnett'; use convnet"),
            (["--model", "resnet18"], "resnet18 takes images of 3 channels, not 1; use one of convnet"),
            (["--model", "vgg16"], "8 pixels a side are too few"),
            (["--model", "cifar_resnet18", "--batch-size", "333"], "a batch of 1 of images of 8 x 8 pixels"),
            (["--dataset", "mnist"], "invalid choice: 'mnist'"),
            (["--dataset", "imagenet", "--data", "/nowhere"], "imagenet is not in /nowhere ("),
            (["--line", "float"], "--line names a line of a configuration; add --config FILE"),
            (["--seeds", "0"], "'0' is not a whole number of 1 or more"),
            (["--dataset", "cifar10", "--data", "/nowhere"], "cifar10 is not in /nowhere, or not whole"),
            (["--dataset", "fashion-mnist", "--data", "/nowhere"], "is neither in /nowhere/FashionMNIST/raw nor in"),
            (["--data", "/nowhere"], "digits comes with scikit-learn and is not read from /nowhere; leave --data out"),
            (["--epochs", "0"], "'0' is not a whole number of 1 or more"),
            (["--batch-size", "0"], "'0' is not a whole number of 1 or more"),
            (["--lr", "fast"], "'fast' is not a number"),
            (["--lr", "inf"], "'inf' is not a number of 0 or more"),
            (["--weight-decay", "nan"], "'nan' is not a number of 0 or more"),
            (["--momentum", "1"], "'1' is not a number from 0 to below 1"),
            (["--seed", "-1"], "'-1' is not a whole number of 0 or more"),
            (["--seed", str(2**63)], "is not a whole number of 0 or more, below 2^63"),
            (["--epochs", "4", "--average-from", "4"], "leaves none of 4 epochs to average"),
            (["--samples", "1001"], "--samples 1001 is more than the 1000 of an epoch of digits; use fewer"),
            (["--average-every", "10000"], "--average-every 10000 is more than the 640 steps after the warm-up"),
            (["--dataset", "stdlib", "--model", "convnet"], "convnet takes images, not text; use one of decoder"),
            (["--optimizer", "lion"], "invalid choice: 'lion'"),
            (["--device", "warp"], "--device warp cannot be used"),
            (["--device", "meta"], "--device meta cannot be used: nothing is rounded there; use cpu or cuda"),
            (["--resume"], "--resume needs the --out DIR"),
            (["--resume", "--out", "/nowhere"], "/nowhere holds no run to go on with; leave --resume out"),
            (["--out", __file__], "cannot be made a folder (File exists); name another"),
            (["--out", f"{__file__}/run"], "cannot be made a folder (Not a directory); name another"),
            (["--out", "/proc/self"], "/proc/self/results.json cannot be written: "),
        ],
    )
    def test_bad_input_is_one_line(self, words, complaint, capsys):
        line = refusal(capsys, train.main, words)
        assert complaint in line and line.startswith("train.py: error: ")

    def test_a_fault_of_the_program_keeps_its_traceback(self, monkeypatch):
        monkeypatch.setattr(train.Line, "_loss", lambda *_: torch.zeros(2) + torch.zeros(3))
        with pytest.raises(RuntimeError, match="must match the size"):
            run("--epochs", 1)

    def test_fashion_mnist_needs_nothing_but_torch_and_tabulate(self, tmp_path):
        for split in ("train", "t10k"):
            write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", torch.randint(256, (60, 28, 28)))
            write_idx(tmp_path / f"{split}-labels-idx1-ubyte", torch.arange(60) % 10)
        words = ["--dataset", "fashion-mnist", "--data", str(tmp_path), "--epochs", "1"]
        blocked = "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'sklearn', 'matplotlib', 'tqdm']))"
        program = f"{blocked}; sys.path.insert(0, {str(TOOLS)!r}); import train; train.main({words!r})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "convnet on fashion-mnist, epochs 1" in done.stdout, done.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_words(words):
    return run(*words)


def write_idx(path, numbers):
    header = bytes([0, 0, 8, numbers.dim()]) + b"".join(n.to_bytes(4, "big") for n in numbers.shape)
    content = header + bytes(numbers.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run("--epochs", 2, "--out", folder)
    return contents(folder)


@pytest.fixture
def kept(two_epochs, tmp_path):
    """The folder of a run of two epochs."""
    for name, content in two_epochs.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def flipped(content):
    """One bit of a tensor's bytes is another."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def with_changed(part, change):
    def apply(content):
        state = torch.load(io.BytesIO(content), weights_only=True)
        change(state[part])
        return saved(state)

    return apply


class TestResume:
    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--lr", 0.2], "float.pt was made with --lr 0.05, not 0.2; give the same or another --out"),
            (["--recipe", "bfp8"], "low.pt was made with --recipe bfp8[0], not bfp8; give the same or another --out"),
            (["--epochs", 1, "--average-from", 0], "float.pt was made with --epochs 2, not 1; give the same"),
        ],
    )
    def test_another_run_is_refused(self, kept, words, complaint, capsys):
        before = contents(kept)
        assert complaint in refusal(capsys, run_words, ["--epochs", 2, *words, "--out", kept, "--resume"])
        assert contents(kept) == before

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda content: b"", "is empty"),
            (lambda content: content[:100], "is damaged, or no checkpoint of train.py"),
            (lambda content: content[:-1], "is damaged, or no checkpoint of train.py"),
            (flipped, "is damaged, or no checkpoint of train.py"),
            (lambda content: b"a text\n", "is damaged, or no checkpoint of train.py"),
            (lambda content: pickle.dumps({"settings": {}}), "is damaged, or no checkpoint of train.py"),
            (lambda content: saved(torch.nn.Linear(2, 2)), "is not loaded: it holds more than tensors and numbers"),
            (lambda content: saved(torch.zeros(3)), "is no checkpoint of train.py"),
            (lambda content: saved({"model": {}}), "is no checkpoint of train.py"),
            (lambda content: saved(dict.fromkeys(checkpoint.KINDS, 1)), "is no checkpoint of train.py"),
            (with_changed("settings", lambda settings: settings.pop("lr")), "was made by another version of train.py"),
            (with_changed("model", lambda model: model.popitem()), "does not fit the model (Error(s) in loading"),
            (with_changed("optimizer", lambda state: state["param_groups"].pop()), "does not fit the model (loaded"),
            (with_changed("swalp", lambda state: state.pop("seed")), "does not fit the model (the state lacks 'seed'"),
        ],
    )
    def test_a_file_that_is_no_checkpoint_of_the_run_is_refused(self, kept, change, complaint, capsys):
        (kept / "low.pt").write_bytes(change((kept / "low.pt").read_bytes()))
        before = contents(kept)
        line = refusal(capsys, run_words, ["--epochs", 2, "--out", kept, "--resume"])
        assert line.startswith(f"train.py: error: {kept / 'low.pt'} {complaint}") and contents(kept) == before

    def test_a_file_that_cannot_be_read(self, kept, capsys):
        (kept / "low.pt").unlink()
        (kept / "low.pt").mkdir()
        line = refusal(capsys, run_words, ["--epochs", 2, "--out", kept, "--resume"])
        assert line.endswith("low.pt is a folder; name a file")


class TestFullDisk:
    """The partial file of a write is on /dev/full."""

    def test_a_checkpoint(self, kept, capsys):
        before = contents(kept)
        (kept / "low.pt.partial").symlink_to("/dev/full")
        words = ["--epochs", 3, "--average-from", 1, "--out", kept, "--resume"]
        line = refusal(capsys, run_words, words)
        assert f"{kept / 'low.pt'} cannot be written: No space left on device; mend that, then go on with: " in line
        assert contents(kept) == {**before, "float.pt": (kept / "float.pt").read_bytes()}
        assert run(*words)["low"]["n_averaged"] == 2

    def test_the_first_checkpoint(self, tmp_path, capsys):
        (tmp_path / "float.pt.partial").symlink_to("/dev/full")
        line = refusal(capsys, run_words, ["--epochs", 1, "--out", tmp_path])
        assert line.endswith(f"mend that, then start again: nothing is kept in {tmp_path} yet")

    def test_the_results(self, kept, capsys):
        before = contents(kept)
        (kept / "results.json.partial").symlink_to("/dev/full")
        with pytest.raises(SystemExit, match="2"):
            run("--epochs", 2, "--out", kept, "--resume")
        out, err = capsys.readouterr()
        assert "SWALP" in out and "results.json cannot be written: No space left on device; mend that" in err
        assert contents(kept) == before


class TestStopped:
    def test_ctrl_c_says_how_to_go_on(self, tmp_path, monkeypatch, capsys):
        words = ["--epochs", 3, "--average-from", 1, "--out", tmp_path]
        whole = run("--epochs", 3, "--average-from", 1)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            epoch = iter(range(5))
            train_epoch = train.Line.train_epoch

            def interrupted(line, on_step, **options):
                if next(epoch) == 4:  # the second of low
                    raise KeyboardInterrupt
                train_epoch(line, on_step, **options)

            patch.setattr(train.Line, "train_epoch", interrupted)
            with pytest.raises(SystemExit, match="130"):
                run(*words)
        *_, line = capsys.readouterr().err.splitlines()
        stopped, _, command = line.partition("; go on with: ")
        assert stopped == "train.py: stopped after epoch 1 of line low" and command.endswith(" --resume")
        resumed = train.main(shlex.split(command)[2:])
        assert [without_times(resumed[name]["epochs"]) == without_times(whole[name]["epochs"]) for name in whole]

    @pytest.mark.parametrize("out", [True, False])
    def test_ctrl_c_where_nothing_is_kept(self, tmp_path, out, monkeypatch, capsys):
        def interrupted(*_, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(train.Line, "train_epoch", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run("--epochs", 3, *(["--out", tmp_path] if out else []))
        told = (
            f"start again: nothing is kept in {tmp_path} yet"
            if out
            else "start again, with --out DIR to keep each epoch"
        )
        assert capsys.readouterr().err == f"train.py: stopped after epoch 0 of line float; {told}\n"

    def test_an_interrupt_that_pytorchs_guards_have_swallowed_stops_at_the_next_step(self, monkeypatch, capsys):
        monkeypatch.setattr(command, "_interrupts", [signal.SIGINT])
        with pytest.raises(SystemExit) as stopped:
            train.main(["--epochs", "1"])
        assert stopped.value.code == 130
        assert capsys.readouterr().err.startswith("train.py: stopped after epoch 0 of line float; start again")

    def test_a_process_on_a_terminal(self, tmp_path):
        """Its bar fits 80 columns, and Ctrl-C ends it with status 130 and without a traceback."""
        ours, theirs = pty.openpty()
        command = [sys.executable, TOOLS / "train.py", "--epochs", "10000", "--out", tmp_path]
        # A shell may have told its background jobs to ignore Ctrl-C.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, preexec_fn=listen) as process:
            os.close(theirs)
            shown = b""
            while b"epoch 3 of" not in shown:
                shown += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # its end, on Linux
                while more := os.read(ours, 4096):
                    shown += more
        os.close(ours)
        *bars, last = shown.decode().replace("\r\n", "\n").rstrip("\n").rpartition("\n")[::2]
        bars = bars[0].split("\r")[1:]
        assert process.returncode == 130 and "Traceback" not in shown.decode()
        assert re.fullmatch(r"train\.py: stopped after epoch \d+ of line float; go on with: python .* --resume", last)
        assert all(len(bar) == 79 for bar in bars)
        assert re.match(
            r"float epoch 3 of 10000 \[\.+\]  loss \d\.\d+  test error \d+\.\d\d %  \d+:[\d:]+ left", bars[-1]
        )


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

    @pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
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
        assert "decoder on stdlib, epochs 2, seed 0; 1 set of weights averaged" in printed
        assert "validation loss, nats a byte" in printed and "AdamW" in printed and "SGD" not in printed
        assert [line.split()[:2] for line in printed.splitlines()[-3:]] == [
            ["float", "float"],
            ["low", "mxfp8"],
            ["low2", "bfp8"],
        ]

    @pytest.mark.parametrize("name", ["decoder", "rotary"])
    def test_the_rewritten_decoder_is_bit_equal_in_both_modes(self, name):
        torch.manual_seed(0)
        found = swalp_fx.check(models.build(name), torch.randint(256, (2, 64)))
        assert found and found.compared > 100, found

    def test_one_weight_node_serves_the_embedding_and_the_head(self):
        example = torch.randint(256, (2, 64))
        model, _ = swalp_fx.convert(models.build("decoder"), example_inputs=(example,))
        (made,) = model.graphs
        quantized = made.graph.find_nodes(op="call_function", target=swalp_fx.quantize_weight)
        assert len(quantized) == len(list(model.parameters()))
        (tied,) = (node for node in quantized if node.args[0].meta[NAME] == "tokens.weight")
        assert [user.meta[NAME] for user in tied.users] == ["tokens", "head"]
