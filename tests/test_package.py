"""The packages: an sdist with the files in git, a small typed wheel, and every dependency declared."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import swalp_fx

ROOT = Path(__file__).parents[1]
FIRST_STEPS = ROOT / "tests" / "first_steps.py"
FOR_GIT_ALONE = {".gitignore", ".ci/run"}
MODULE_BYTES = 12_000_000
COMPILED = [name for name in sys.modules if name.startswith("swalp_fx._C")]

NVCC = torch.version.cuda is not None and shutil.which("nvcc") is not None
needs_nvcc = pytest.mark.skipif(not NVCC, reason="torch is built without CUDA, or nvcc is not on the PATH")
with_and_without_cuda = pytest.mark.parametrize("cuda", ["0", pytest.param("1", marks=needs_nvcc)])


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


@pytest.fixture(scope="module")
def in_git():
    """Every file that is in git, or is new and not ignored."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("git, or the repository's .git, is not here")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).exists()}


@pytest.fixture
def clone(in_git, tmp_path):
    """A copy of git's files alone: no earlier build has left anything there."""
    for name in in_git:
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def of_package(in_git):
    return {name for name in in_git if name.startswith("swalp_fx/")}


def sdist_of(clone, *others, cuda):
    """The sdist; ``others`` are commands for the same run of setup.py."""
    run(sys.executable, "setup.py", "-q", "sdist", *others, cwd=clone, SWALP_FX_CUDA=cuda)
    (archive,) = (clone / "dist").glob("*.tar.gz")
    return archive


@with_and_without_cuda
def test_sdist_and_installation_hold_what_git_holds(clone, in_git, tmp_path, cuda):
    library = tmp_path / "library"
    with tarfile.open(sdist_of(clone, "build_py", "--build-lib", library, cuda=cuda)) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in held if name.startswith("swalp_fx.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert held - made == in_git - FOR_GIT_ALONE
    installed = {str(path.relative_to(library)) for path in library.rglob("*") if path.is_file()}
    assert installed == of_package(in_git) and "swalp_fx/py.typed" in installed


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the sanitizers' module holds debug information")
@pytest.mark.parametrize("module", COMPILED)
def test_a_compiled_module_is_small(module):
    assert Path(sys.modules[module].__file__).stat().st_size < MODULE_BYTES, "made by an older setup.py: make build"


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
    """(python, site-packages) of an environment with links to swalp_fx's declared dependencies, and nothing else."""
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


@pytest.mark.slow
@with_and_without_cuda
def test_an_sdist_builds_a_small_wheel_that_runs(environment, clone, in_git, tmp_path, cuda):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path]
    run(*pip, sdist_of(clone, cuda=cuda), cwd=tmp_path, SWALP_FX_CUDA=cuda)
    (wheel,) = tmp_path.glob("swalp_fx-*-cp310-abi3-*.whl")
    modules = {"swalp_fx/_C.abi3.so"} | ({"swalp_fx/_C_cuda.abi3.so"} if cuda == "1" else set())
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == of_package(in_git) | modules
        assert all(archive.getinfo(name).file_size < MODULE_BYTES for name in modules)
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: MIT\n" in archive.read(metadata).decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    run_first_steps(environment, tmp_path / "site", tmp_path)


@pytest.mark.slow
def test_a_users_script_passes_strict_type_checks(environment, clone, tmp_path):
    """Against the package as installed: there, only py.typed makes mypy read its types."""
    pytest.importorskip("mypy")
    python, site = environment
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", site, cwd=clone)
    shutil.copy(FIRST_STEPS, tmp_path)
    run(sys.executable, "-m", "mypy", "--strict", "--python-executable", python, FIRST_STEPS.name, cwd=tmp_path)
