"""What the build makes: the CUDA module too, wherever there is a compiler for it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"
OPS = ["fixed", "block", "float", "microscaling", "integer", "nvfp4"]


def setup_says(*arguments, **environment):
    command = [sys.executable, str(SETUP), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=SETUP.parent, env={**os.environ, **environment})


NVCC = torch.version.cuda is not None and shutil.which("nvcc") is not None and os.environ.get("SWALP_FX_CUDA") != "0"


@pytest.mark.skipif(not NVCC, reason="torch is built without CUDA, nvcc is not on the PATH, or SWALP_FX_CUDA is 0")
@pytest.mark.parametrize("op", OPS)
def test_every_op_serves_cuda(op):
    assert importlib.util.find_spec("swalp_fx._C_cuda") is not None, "nvcc is here, but not its module; run make build"
    for form in ("", "_", "_foreach_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"swalp_fx::quantize_{op}{form}", "CUDA")


def test_an_unknown_wish_for_cuda_is_refused():
    result = setup_says("--version", SWALP_FX_CUDA="maybe")
    assert result.returncode != 0 and "SWALP_FX_CUDA='maybe' is neither 0 nor 1" in result.stderr
