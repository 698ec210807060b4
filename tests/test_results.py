"""tools/results.py and tools/bits.py: the figures of the pages, run again and written into them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from refusal import refusal

import bits
import files
import results
import train

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", results.FIGURES)
def test_every_page_has_a_place_for_its_table_and_its_pictures(name):
    figure = results.FIGURES[name]
    page = (ROOT / figure.page).read_text()
    assert results.placed(page, name, "a table").count("a table") == 1
    for picture in figure.pictures or ((f"{name}.svg",) if figure.drawn else ()):
        assert figure.caption or re.search(rf"!\[.+\]\({re.escape(picture)}\)", page)
    assert (ROOT / shlex.split(figure.command)[0]).is_file()


def test_every_place_in_a_page_has_a_figure():
    for page in ("README.md", "docs/results.md", "docs/gallery.md"):
        names = re.findall(r"<!-- results: (\S+) -->", (ROOT / page).read_text())
        assert names and all(results.FIGURES[name].page == page for name in names)


TEXT = """a caption

           SGD      last
recipe    (end)  weights
------  -------  -------
float      1.00     2.00
bfp8               30.00

a sentence"""


def test_a_printed_table_becomes_markdown():
    assert results.markdown(TEXT) == (
        "a caption\n\n"
        "| recipe | SGD (end) | last weights |\n"
        "| --- | ---: | ---: |\n"
        "| float | 1.00 | 2.00 |\n"
        "| bfp8 |  | 30.00 |\n\n"
        "a sentence"
    )


def test_a_page_without_its_place_is_named():
    with pytest.raises(files.FileError, match="the page of ordering lacks <!-- results: ordering -->"):
        results.placed("a page\n", "ordering", "a table")


@pytest.fixture
def tree(tmp_path):
    """A tree with the tools and one page, and the folder of its runs."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\n\n<!-- results: small -->\n<!-- end of small -->\n\nprose\n")
    return tmp_path


def test_a_figure_is_run_once_and_gone_on_with(tree, monkeypatch, capfd):
    command = "tools/train.py --epochs 2 --batch-size 100 --device cpu"
    small = results.Figure(command, "docs/a.md", drawn="tools/plot.py {results} --out {out}", caption="Loss")
    monkeypatch.setitem(results.FIGURES, "small", small)
    runs = tree / "runs"
    results.refresh("small", tree, runs)
    record = json.loads((runs / "small" / "results.json").read_text())
    page = (tree / "docs" / "a.md").read_text()
    low = record["lines"]["low"]
    scores = " | ".join(f"{low[score]:.2f}" for score in ("warm_up", "last", "average", "rounded"))
    assert f"| low | bfp8[0] | {scores} | " in page
    assert f"*`python {command}`; " in page and "![Loss](small.svg)\n\n" in page
    assert page.startswith("# A\n\n") and page.endswith("\n\nprose\n")
    assert (tree / "docs" / "small.svg").read_bytes().startswith(b"<?xml")

    (tree / "docs" / "a.md").write_text(page.replace("bfp8[0]", "old"))
    results.refresh("small", tree, runs)  # not run again: a run there is refused without --resume
    assert (tree / "docs" / "a.md").read_text() == page
    (runs / "small" / "results.json").unlink()  # as one that was stopped
    results.refresh("small", tree, runs)
    assert re.sub(r"\d\.\d\d \|$", "", (tree / "docs" / "a.md").read_text(), flags=re.M) == re.sub(
        r"\d\.\d\d \|$", "", page, flags=re.M
    )


def test_a_command_that_fails_ends_the_rest(tree, monkeypatch):
    monkeypatch.setitem(results.FIGURES, "small", results.Figure("tools/train.py --epochs 0", "docs/a.md"))
    with pytest.raises(SystemExit, match="2"):
        results.refresh("small", tree, tree / "runs")


def test_an_unknown_figure_is_answered_with_the_nearest(capsys):
    line = refusal(capsys, results.main, ["ordring"])
    assert line == "results.py: error: there is no figure 'ordring'; use ordering"


# The figure of error against bits


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.toml").write_text(
        'dataset = "digits"\nepochs = 2\naverage-from = 1\nbatch-size = 200\n'
        + "".join(f'[convnet-{name}]\nrecipe = "{recipe}"\n' for name, recipe in NAMES.items())
    )
    train.main(["--config", str(folder / "a.toml"), "--seeds", "2", "--device", "cpu", "--out", str(folder / "run")])
    return folder / "run" / "results.json"


NAMES = {"float": "float", "8-row": "bfp8[0]", "4-row": "bfp4[0]", "8-tensor": "bfp8"}


def test_error_against_bits(record, tmp_path):
    read = json.loads(record.read_text())
    (axes,) = bits.figure(read).axes
    assert axes.get_title(loc="left") == "convnet"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "4"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["SGD-FP", "SWA-FP"] and "SWALP, by tensor" in labels
    lines = {line.get_label(): line for line in axes.get_lines()}
    mean = sum(read["lines"][name]["average"] for name in ("convnet-float", "convnet-float-seed1")) / 2
    assert lines["SWA-FP"].get_ydata()[0] == pytest.approx(mean)
    bits.main([str(record), "--out", str(tmp_path / "a.svg")])
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")


def test_lines_of_other_names_are_refused(record, tmp_path, capsys):
    (tmp_path / "results.json").write_text(record.read_text().replace("convnet-float", "base"))
    line = refusal(capsys, bits.main, [tmp_path / "results.json", "--out", tmp_path / "a.svg"])
    assert "line 'base' is not called MODEL-float or MODEL-BITS-LAYOUT" in line


def test_a_figure_of_another_kind_is_refused(record, tmp_path, capsys):
    line = refusal(capsys, bits.main, [record, "--out", tmp_path / "a.foo"])
    assert "a.foo: its name must end in one of" in line
