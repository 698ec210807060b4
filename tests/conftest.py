"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_whichever_tests_ran_before():
    torch.manual_seed(0)
