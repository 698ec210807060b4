"""The README's example runs and prints the text below it; its excerpt of a graph is from that example's model."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch
import torchvision

import swalp_fx

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLE, EXCERPT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(PRINTED,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def ran():
    """The example's names, and the lines that it printed."""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(EXAMPLE, "README.md", "exec"), names)
    return names, [line.rstrip() for line in printed.getvalue().splitlines()]


def test_the_example_prints_what_stands_below_it(ran):
    names, printed = ran
    assert {line for line in PRINTED.splitlines() if line != "..."} <= set(printed)
    assert names["swalp"].n_averaged == 1
    assert names["lp"] is names["model"] and type(names["averaged"]) is torchvision.models.ResNet


def test_the_op_prints_what_stands_below_its_call():
    (call,) = re.findall(r"```pycon\n(.*?)```", README, re.DOTALL)
    names = {"torch": torch, "swalp_fx": swalp_fx}
    found = doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(call, names, "README.md", None, None))
    assert (found.failed, found.attempted) == (0, 1)


def test_the_excerpt_is_of_the_graph_that_it_prints(ran):
    _, printed = ran
    code = [line.strip() for line in printed]
    assert [line for line in code if line in EXCERPT.splitlines()] == EXCERPT.splitlines()
