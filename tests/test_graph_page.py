"""docs/graph.md agrees with the code: its code is generated code, its tables are the passes' own."""

import re
from pathlib import Path

import pytest
import torch
from graphs import rewritten
from marks import rewritten_again
from torch import nn

import models
import swalp_fx
from swalp_fx import ConvertError, Recipe, RecipeError, Rule, convert, nodes
from swalp_fx.passes.facts import MEANINGS
from swalp_fx.passes.tables import LAYER_PARTS, PARTS
from swalp_fx.recipe import PLACEMENTS

PAGE = (Path(__file__).parent.parent / "docs" / "graph.md").read_text()
EXAMPLE, BEFORE, AFTER, RULES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def table(header):
    """The rows, cells stripped, of the table with the first column ``header``."""
    (body,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]


def code(module):
    """The output of print_readable, without its headline."""
    return str(module.graphs).partition("\n")[2] + "\n"


def test_the_code_is_generated_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(swalp_fx, "draw", lambda module, path: None)  # Graphviz need not be here
    names: dict = {}
    exec(compile(EXAMPLE, "docs/graph.md", "exec"), names)
    assert code(names["before"]) == BEFORE
    assert code(names["after"]) == AFTER


def test_the_picture_is_of_that_block():
    picture = (Path(__file__).parent.parent / "docs" / "residual.svg").read_text()
    drawn = re.findall(r"<title>p0_(\w+)</title>", picture)
    written = re.findall(r"^    (\w+) = ", AFTER, re.MULTILINE)
    layers = [name for name in written if name != "add_"]  # which counts batches
    layers.remove("norm_bias_q")  # it stands beside norm_weight_q, in one node
    assert sorted(drawn) == sorted(["x", "output", *layers])


def test_the_parts():
    rows = table("part")
    assert [row[0] for row in rows] == [*PARTS, *MEANINGS]
    for part, examples, *placements in rows[: len(PARTS)]:
        assert set(re.findall(r"`(\w+)`", examples)) <= set(PARTS[part])
        for placement, said in zip(PLACEMENTS, placements, strict=True):
            if placement == "group":
                assert (said == "at the end") == (part in ("compute", "norm", "activation"))
            else:
                wanted = part in LAYER_PARTS if placement == "every" else part in placement.split("+")
                assert said == ("yes" if wanted else "no")


@pytest.mark.parametrize("row", table("model"), ids=lambda row: row[0])
def test_the_counts(row):
    name = re.search(r"`(.*)`", row[0])[1]
    with torch.device("meta"):
        model = models.build(name)
        made = rewritten(model, "float", models.example(*models.default_shape(name)))
    recipes = [Recipe.parse(f"bfp8 placement={placement}") for placement in PLACEMENTS]
    graphs = [rewritten_again(model, made.captured, recipe) for recipe in recipes]
    outputs = [len(graph.find_nodes(op="call_function", target=nodes.quantize_output)) for graph in graphs]
    weights = len(graphs[0].find_nodes(op="call_function", target=nodes.quantize_weight))
    assert [str(count) for count in [*outputs, weights]] == row[1:]


def test_the_rules():
    names: dict = {}
    exec(compile(RULES, "docs/graph.md", "exec"), names)
    tokens = models.example(*models.default_shape("decoder"))
    module, _ = convert(models.build("decoder"), recipe=names["recipe"], example_inputs=(tokens,))
    report = swalp_fx.report(module)
    rows = [re.split(" {2,}", line) for line in str(report).splitlines()]
    formats = {row[0]: row[2] for row in rows if len(row) > 2}
    assert formats["head"] == formats["norm"] == formats["blocks.0.norm1"] == "-"
    assert formats["tokens"] == "AE bfp4[0]"
    assert formats["blocks.2.attention.query"] == "WAEG bfp8[0]" and formats["blocks.2.mlp.0"] == "WAEG bfp4[0]"


REFUSED = [
    ("a converted model", lambda: convert(nn.Sequential(nn.Linear(2, 2))).module),
    ("`torch.compile", lambda: torch.compile(nn.Linear(2, 2))),
    ("`DataParallel`", lambda: nn.DataParallel(nn.Linear(2, 2))),
    ("TorchScript", lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(2, 2))),
    ("a lazy layer", lambda: nn.Sequential(nn.LazyLinear(2))),
    ("a rule for no layer", lambda: models.build("decoder")),
]


def test_every_refusal_has_its_line():
    for row, (given, _) in zip(table("given"), REFUSED, strict=True):
        assert row[0].startswith(given)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(("given", "make"), REFUSED, ids=[given for given, _ in REFUSED])
def test_what_is_refused(given, make):
    (answer,) = (row[1] for row in table("given") if row[0].startswith(given))
    recipe = Recipe.parse("bfp8", rules=(Rule("blocks.9", weight="float"),) if "rule" in given else ())
    with pytest.raises((ConvertError, RecipeError), match=re.escape(answer)):
        convert(make(), recipe=recipe)
