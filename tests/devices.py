"""Which devices there are for tests."""

import importlib.util

import pytest
import torch

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is present, or torch is built without CUDA"),
    pytest.mark.skipif(
        importlib.util.find_spec("swalp_fx._C_cuda") is None,
        reason="swalp_fx._C_cuda is not built; run make build where nvcc is on the PATH",
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
