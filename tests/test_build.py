"""The results of the build, with the CUDA module if there is a compiler for it, and its errors."""

import ensurepip
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"


def setup_says(*arguments, **environment):
    command = [sys.executable, str(SETUP), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=SETUP.parent, env={**os.environ, **environment})


NVCC = torch.version.cuda is not None and shutil.which("nvcc") is not None and os.environ.get("SWALP_FX_CUDA") != "0"


@pytest.mark.skipif(not NVCC, reason="torch is built without CUDA, nvcc is not on the PATH, or SWALP_FX_CUDA is 0")
def test_the_op_serves_cuda():
    assert importlib.util.find_spec("swalp_fx._C_cuda") is not None, "nvcc is here, but not its module; run make build"
    for form in ("", "_", "_foreach_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"swalp_fx::quantize{form}", "CUDA")


def test_an_unknown_wish_for_cuda_is_refused():
    result = setup_says("--version", SWALP_FX_CUDA="maybe")
    assert result.returncode != 0 and "SWALP_FX_CUDA='maybe' is neither 0 nor 1" in result.stderr


# The packages of a new environment of Python 3.10 or 3.11.
OLD_SETUPTOOLS = list((Path(ensurepip.__file__).parent / "_bundled").glob("setuptools-6*.whl"))


@pytest.mark.skipif(not OLD_SETUPTOOLS, reason="this Python does not come with an old setuptools")
def test_an_old_setuptools_is_refused(tmp_path):
    zipfile.ZipFile(OLD_SETUPTOOLS[0]).extractall(tmp_path)
    result = setup_says("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0 and "is too old; pip install 'setuptools>=77.0.3'" in result.stderr.splitlines()[-1]
