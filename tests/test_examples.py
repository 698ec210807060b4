"""The examples run as their first lines say, and print the promised lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name):
    result = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_average_of_low_precision_weights_is_better_than_the_last_of_them():
    pytest.importorskip("sklearn")
    errors = [float(each) for each in re.findall(r"([\d.]+) % wrong", printed("train_digits.py"))]
    assert len(errors) == 3 and errors[1] <= errors[0] and max(errors) < 12


def test_a_rule_reaches_the_probabilities_of_a_layer_of_pytorchs_own():
    lines = printed("inspect_a_transformer.py").splitlines()
    (line,) = (each for each in lines if "self_attn_attn_probabilities_q = " in each)
    assert "swalp_fx_quantize_output(self_attn_attn_probabilities, key, " in line and "'e8m7'" in line


def test_codes_stand_for_what_quantize_gives():
    lines = printed("codes_for_hardware.py").splitlines()
    assert [line.split()[0] for line in lines] == ["bfp8[0]", "mxfp4[-1:8]", "int8[0]", "e4m3"]


def test_each_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
