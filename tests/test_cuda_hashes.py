"""The kept hashes match the CPU's bits, and CUDA gives the same bits: every kernel and path, in every dtype."""

import cuda_cases
import pytest
from devices import DEVICES

DUE = cuda_cases.due()


def assert_as_kept(case, device):
    found = dict(case.hashes(device))
    assert found == {name: DUE.get(name) for name in found}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cuda_cases.CASES, ids=str)
def test_small(case, device):
    assert_as_kept(case, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cuda_cases.LARGE, ids=str)
def test_large(case, device):
    """More thread blocks than one wave has."""
    assert_as_kept(case, device)


def test_no_hash_is_kept_for_nothing():
    assert {name.split(",")[0] for name in DUE} == {
        str(case).split(",")[0] for case in cuda_cases.CASES + cuda_cases.LARGE
    }
