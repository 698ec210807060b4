"""What is handed out: every dependency declared."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

import swalp_fx

ROOT = Path(__file__).parents[1]
FIRST_STEPS = ROOT / "tests" / "first_steps.py"


def run(*command, cwd, **environment):
    """The command's output; fails with all that it printed."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared():
    """The installed distributions that swalp_fx requires, and those that they require."""
    found, names = {}, ["swalp_fx"]
    while names:
        name = canonical(names.pop())
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # required of another platform
            continue
        if name not in found:
            found[name] = distribution
            names += [re.match(r"[\w.-]+", each)[0] for each in distribution.requires or () if "extra ==" not in each]
    return [distribution for name, distribution in found.items() if name != canonical("swalp_fx")]


@pytest.fixture
def environment(tmp_path):
    """(python, site-packages) of an environment that holds what swalp_fx declares, as links, and nothing else."""
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    for distribution in declared():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    return python, site


def run_first_steps(environment, source, tmp_path):
    python, _ = environment
    nothing = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ['numpy', 'torchvision', 'pytest'])))"
    run(python, "-c", nothing, cwd=tmp_path)
    picture = tmp_path / ("graph.svg" if shutil.which("dot") else "graph.dot")
    printed = run(python, FIRST_STEPS, picture, cwd=tmp_path, PYTHONPATH=str(source))
    assert f"swalp_fx of {source / 'swalp_fx'}" in printed and "bfp8[0]" in printed and "bfp8[0]" in picture.read_text()


def test_first_steps_need_what_is_declared(environment, tmp_path):
    run_first_steps(environment, Path(swalp_fx.__file__).parents[1], tmp_path)
