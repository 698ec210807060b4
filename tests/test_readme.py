"""The README's example runs and prints what stands below it; its excerpt of a graph is what convert writes."""

import re
from pathlib import Path

import pytest
import torchvision

import swalp_fx

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLE, EXCERPT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(PRINTED,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(capsys):
    names: dict = {}
    exec(compile(EXAMPLE, "README.md", "exec"), names)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert {line for line in PRINTED.splitlines() if line != "..."} <= set(printed)
    assert names["swalp"].n_averaged == 1
    assert type(names["averaged"]) is torchvision.models.ResNet


@pytest.mark.parametrize("line", EXCERPT.splitlines())
def test_the_excerpt_is_generated_code(line):
    module, _ = swalp_fx.convert(torchvision.models.resnet18(num_classes=10), recipe="bfp8[0]")
    code = [re.sub(r";.*", "", written).strip() for written in module.code.splitlines()]
    assert line in code
