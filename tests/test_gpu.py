"""tools/gpu.py: stages in processes of their own, each under its time limit, with its results kept."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import gpu

STAGES = {stage.name: stage for stage in gpu.STAGES}


def test_all_stages_but_the_build_fit_in_ten_minutes():
    assert sum(stage.seconds for stage in gpu.STAGES if stage.name != "build") <= 600


def test_every_file_with_tests_for_a_gpu_is_in_a_stage():
    folder = Path(__file__).parent
    needs_one = re.compile(r"mark\.gpu\b|^from devices import", re.MULTILINE)
    files = {f"tests/{path.name}" for path in folder.glob("test_*.py") if needs_one.search(path.read_text())}
    assert files == {each for stage in gpu.STAGES for each in stage.tests}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_a_stage_says_so(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as stop:
        gpu.main(["build", "smoke", "--json", str(path)])
    assert not stop.value.code
    found = json.loads(path.read_text())["stages"]
    assert {name: each["outcome"] for name, each in found.items()} == {"build": "passed", "smoke": "no GPU"}
    assert {row["module"] for row in found["build"]["rows"]} >= {"_C.abi3.so"}
    assert "smoke      no GPU" in capsys.readouterr().out


def test_a_stage_is_stopped_at_its_limit():
    found = gpu.run_stage(dataclasses.replace(STAGES["build"], seconds=0.01))
    assert found["outcome"] == "stopped after 0.01 s" and found["rows"] == []


def test_a_stage_that_fails_is_told_with_what_it_printed(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(gpu, "__file__", "no_such_script.py")
    found = gpu.run_stage(STAGES["smoke"])
    assert found["outcome"] == "failed" and "no_such_script.py" in found["output"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bandwith"], "there is no stage 'bandwith'; there are build, smoke"),
        (["--json", "no/such/folder/gpu.json"], "is no file in a folder that exists"),
        (["--json", "."], "is no file in a folder that exists"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
